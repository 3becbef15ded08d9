"""What is recorded of a wallet, and of what an org used and owes. Reading only."""

from __future__ import annotations

from datetime import UTC
from typing import Any
from uuid import UUID

from nightmail.rules.explain import BatchLine, LedgerLine, NextGrant, OrgStory, QuotaLine, UsageLine, WalletStory
from nightmail.store.credit_history import get_balance
from nightmail.store.credits import Wallet
from nightmail.store.database import Connection
from nightmail.store.explain_message import list_overage, utc

# Entries and batches that a story tells of; the replay sums all.
SHOWN = 200

ACCOUNT = """
SELECT id, balance, seq
FROM credit_accounts
WHERE org_id = %(org_id)s
  AND env = %(env)s
  AND user_id = %(user_id)s
"""

BATCHES = """
SELECT id, source, priority, remaining, reserved, granted, issued_at, expires_at
FROM credit_batches
WHERE account_id = %(account_id)s
  AND is_open
ORDER BY priority, expires_at, issued_at, id
LIMIT %(limit)s
"""

ENTRIES = """
SELECT e.seq, t.created_at, t.kind, t.reference, e.amount, e.balance_after, e.replayed, e.batch_id
FROM (
    SELECT seq, transaction_id, amount, balance_after, batch_id, (sum(amount) OVER (ORDER BY seq))::bigint AS replayed
    FROM credit_entries
    WHERE account_id = %(account_id)s
      AND seq IS NOT NULL
) AS e
JOIN credit_transactions AS t ON t.id = e.transaction_id
ORDER BY e.seq DESC
LIMIT %(limit)s
"""


async def explain_wallet(conn: Connection, wallet: Wallet) -> WalletStory | None:
    """Return a wallet's story, None when there is no such wallet."""
    named = {"org_id": wallet.org_id, "env": wallet.env, "user_id": wallet.user_id}
    account = await (await conn.execute(ACCOUNT, named)).fetchone()
    view = await get_balance(conn, wallet)
    if account is None or view is None:
        return None
    about: dict[str, Any] = {"account_id": account[0], "limit": SHOWN}
    batches = await (await conn.execute(BATCHES, about)).fetchall()
    entries = await (await conn.execute(ENTRIES, about)).fetchall()
    grant = view.next_grant
    return WalletStory(
        wallet.org_id,
        wallet.env,
        wallet.user_id,
        balance=account[1],
        spendable=view.balance,
        reserved=view.reserved,
        entries_in_all=account[2],
        next_expiry=(view.next_expiry[0].astimezone(UTC), view.next_expiry[1]) if view.next_expiry else None,
        next_grant=NextGrant(grant.at.astimezone(UTC), grant.amount, grant.plan) if grant else None,
        batches=[
            BatchLine(id, source, priority, remaining, reserved, granted, issued_at.astimezone(UTC), utc(expires_at))
            for id, source, priority, remaining, reserved, granted, issued_at, expires_at in batches
        ],
        entries=[LedgerLine(entry[0], entry[1].astimezone(UTC), *entry[2:]) for entry in entries],
    )


ORG = """
SELECT o.id, o.name, o.plan, o.billing, o.stripe_customer_id, o.billing_user, p.included_emails, p.included_sms
FROM orgs AS o
JOIN message_plans AS p ON p.id = o.plan
WHERE o.id = %(org_id)s
"""

# The newest twelve months.
USAGE = """
SELECT channel, env, period, rating, sum(reserved)::bigint, sum(used)::bigint
FROM usage_records
WHERE org_id = %(org_id)s
  AND period > to_char((nm_now() - interval '366 days') AT TIME ZONE 'UTC', 'YYYY-MM')
GROUP BY channel, env, period, rating
ORDER BY period DESC, channel, env, rating
"""

QUOTAS = """
SELECT channel, period, taken
FROM usage_quotas
WHERE org_id = %(org_id)s
"""


async def explain_org(conn: Connection, org_id: UUID) -> OrgStory | None:
    """Return an org's story, None when there is none of this id."""
    row = await (await conn.execute(ORG, {"org_id": org_id})).fetchone()
    if row is None:
        return None
    usage = [UsageLine(*line) for line in await (await conn.execute(USAGE, {"org_id": org_id})).fetchall()]
    rows = await (await conn.execute(QUOTAS, {"org_id": org_id})).fetchall()
    taken = {(channel, period): amount for channel, period, amount in rows}
    included = {"email": row[6], "sms": row[7]}
    months = sorted({(line.period, line.channel) for line in usage if line.env == "live"}, reverse=True)
    return OrgStory(
        id=row[0],
        name=row[1],
        plan=row[2],
        billing=row[3],
        stripe_customer_id=row[4],
        billing_user=row[5],
        quotas=[
            QuotaLine(channel, period, included[channel], taken.get((channel, period))) for period, channel in months
        ],
        usage=usage,
        overage=await list_overage(conn, org_id),
        wallet=await explain_wallet(conn, Wallet(org_id, "live", row[5])),
    )
