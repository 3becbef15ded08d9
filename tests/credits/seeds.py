"""Wallets, batches and subscriptions in bulk, as the ledger would have left them."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import psycopg

from nightmail.ids import new_id

Connection = psycopg.Connection[Any]

WALLETS = """
INSERT INTO credit_accounts (org_id, env, user_id)
SELECT %(org_id)s, 'live', 'user-' || lpad(i::text, 7, '0')
FROM generate_series(1, %(count)s) AS i
"""

# Every purchase begins so long ago (the interval may be negative), a second after the one before.
PURCHASES = """
INSERT INTO purchases (
    id, org_id, env, account_id, plan_id, status, anchor, grants_from, next_period, next_grant_at
)
SELECT nm_uuid7(), org_id, env, id, %(plan)s, 'active', at, at, 0, at
FROM (
    SELECT a.*, nm_now() - %(ago)s::interval + make_interval(secs => row_number() OVER (ORDER BY a.id)) AS at
    FROM credit_accounts AS a
    WHERE a.org_id = %(org_id)s
) AS a
"""

GRANTS = """
SELECT nm_credit_grant(
    'grant', org_id, env, user_id, %(reference)s, NULL, %(amount)s, 'bonus', 100::smallint, NULL,
    nm_now() + %(lasts)s::interval, 'system:grant', NULL, NULL, NULL, NULL
)
FROM credit_accounts
WHERE org_id = %(org_id)s
"""


def seed_org(conn: Connection) -> UUID:
    """Make an org."""
    org_id = new_id()
    conn.execute("INSERT INTO orgs (id, name) VALUES (%s, 'seeded')", [org_id])
    return org_id


def seed_wallets(conn: Connection, count: int) -> UUID:
    """Make an org with wallets user-0000001, user-0000002 and so on."""
    org_id = seed_org(conn)
    conn.execute(WALLETS, {"org_id": org_id, "count": count})
    return org_id


def seed_purchases(conn: Connection, org_id: UUID, *, plan: str = "monthly", ago: str = "1 hour") -> None:
    """Make a subscription for each wallet."""
    conn.execute(PURCHASES, {"org_id": org_id, "plan": plan, "ago": ago})


def seed_batches(conn: Connection, org_id: UUID, *, reference: str, amount: int, lasts: str) -> None:
    """Grant each wallet credits that last for this long."""
    conn.execute(GRANTS, {"org_id": org_id, "reference": reference, "amount": amount, "lasts": lasts})
