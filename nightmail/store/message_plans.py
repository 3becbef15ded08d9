"""message_plans: what a month includes, and what a unit beyond costs in credits. Another plan is another row."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from nightmail.store.database import Connection


@dataclass(frozen=True, slots=True)
class MessagePlan:
    """Units a month includes, by channel, and the price of a unit beyond, in credits."""

    id: str
    included_emails: int
    included_sms: int
    email_credits: int
    sms_credits: int


LIST = """
SELECT id, included_emails, included_sms, email_credits, sms_credits
FROM message_plans
ORDER BY id
LIMIT 1000
"""


async def list_message_plans(conn: Connection) -> list[MessagePlan]:
    """Return all plans."""
    return [MessagePlan(*row) for row in await (await conn.execute(LIST)).fetchall()]


@dataclass(frozen=True, slots=True)
class Terms:
    """What an org's live messages are paid with: the month's quota, and the wallet where billing has credits.

    `available` and `reserved` are credits, None without a wallet.
    """

    included_emails: int
    included_sms: int
    available: int | None
    reserved: int | None


TERMS = """
SELECT p.included_emails, p.included_sms, wallet.available, wallet.reserved
FROM orgs AS o
JOIN message_plans AS p ON p.id = o.plan
LEFT JOIN LATERAL (
    SELECT coalesce(sum(b.remaining) FILTER (WHERE b.expires_at IS NULL OR b.expires_at > nm_now()), 0)::bigint
               AS available,
           coalesce(sum(b.reserved), 0)::bigint AS reserved
    FROM credit_accounts AS a
    LEFT JOIN credit_batches AS b ON b.account_id = a.id AND (b.is_open OR b.reserved > 0)
    WHERE a.org_id = o.id
      AND a.env = 'live'
      AND a.user_id = o.billing_user
      AND o.billing <> 'quota'
    GROUP BY a.id
) AS wallet ON true
WHERE o.id = %(org_id)s
"""


async def get_terms(conn: Connection, org_id: UUID) -> Terms:
    """Return what pays for the org's live messages now."""
    row = await (await conn.execute(TERMS, {"org_id": org_id})).fetchone()
    assert row is not None, "a key belongs to an org, and an org has a plan"
    return Terms(*row)
