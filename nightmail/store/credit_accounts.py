"""credit_accounts: listing wallets, and registering a user, who is given the org's bonus once."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from nightmail.store.audit_logs import insert_audit_log
from nightmail.store.credit_grants import NewGrant, grant
from nightmail.store.credits import Wallet
from nightmail.store.database import Connection

# By this a user is known to have had the bonus.
REGISTRATION = "registration"


@dataclass(frozen=True, slots=True)
class AccountView:
    """A wallet in a list; `balance` is what can be spent now."""

    user_id: str
    balance: int
    reserved: int
    low_below: int | None
    created_at: datetime


LIST = """
SELECT a.user_id,
       (
           SELECT coalesce(sum(b.remaining), 0)::bigint
           FROM credit_batches AS b
           WHERE b.account_id = a.id
             AND b.is_open
             AND (b.expires_at IS NULL OR b.expires_at > nm_now())
       ),
       (SELECT coalesce(sum(r.amount), 0)::bigint FROM credit_reservations AS r WHERE r.account_id = a.id),
       a.low_below, a.created_at
FROM credit_accounts AS a
WHERE a.org_id = %(org_id)s
  AND a.env = %(env)s
  AND (%(after)s::text IS NULL OR a.user_id > %(after)s)
ORDER BY a.user_id
LIMIT %(limit)s + 1
"""

LIST_BEFORE = LIST.replace("%(after)s::text IS NULL OR a.user_id > %(after)s", "a.user_id < %(before)s").replace(
    "ORDER BY a.user_id", "ORDER BY a.user_id DESC"
)


async def list_accounts(
    conn: Connection, *, org_id: UUID, env: str, limit: int, after: str | None = None, before: str | None = None
) -> tuple[list[AccountView], bool]:
    """Return up to `limit` wallets in the order of their users, and whether there are more in the direction asked."""
    arguments = {"org_id": org_id, "env": env, "limit": limit, "after": after, "before": before}
    cursor = await conn.execute(LIST if before is None else LIST_BEFORE, arguments)
    views = [AccountView(*row) for row in await cursor.fetchall()]
    page = views[:limit]
    return (page if before is None else page[::-1]), len(views) > limit


@dataclass(frozen=True, slots=True)
class Bonus:
    """What each new user of an org is given; `lifetime_days` None: it does not end."""

    credits: int
    lifetime_days: int | None


GET_BONUS = """
SELECT credits, lifetime_days
FROM credit_bonuses
WHERE org_id = %(org_id)s
  AND env = %(env)s
"""


async def get_bonus(conn: Connection, *, org_id: UUID, env: str) -> Bonus | None:
    """Return what a new user is given, None when that is nothing."""
    row = await (await conn.execute(GET_BONUS, {"org_id": org_id, "env": env})).fetchone()
    return Bonus(*row) if row else None


PUT_BONUS = """
INSERT INTO credit_bonuses (org_id, env, credits, lifetime_days)
VALUES (%(org_id)s, %(env)s, %(credits)s, %(lifetime_days)s)
ON CONFLICT (org_id, env) DO UPDATE
SET credits = excluded.credits,
    lifetime_days = excluded.lifetime_days
"""

DELETE_BONUS = """
DELETE FROM credit_bonuses
WHERE org_id = %(org_id)s
  AND env = %(env)s
"""


async def put_bonus(conn: Connection, *, org_id: UUID, env: str, bonus: Bonus, actor: str) -> None:
    """Set what new users are given from now on; 0 credits is nothing."""
    arguments = {"org_id": org_id, "env": env, "credits": bonus.credits, "lifetime_days": bonus.lifetime_days}
    async with conn.transaction():
        await conn.execute(PUT_BONUS if bonus.credits else DELETE_BONUS, arguments)
        await insert_audit_log(
            conn,
            actor=actor,
            action="credit_bonus.put",
            org_id=org_id,
            target=env,
            detail={"credits": bonus.credits, "lifetime_days": bonus.lifetime_days},
        )


MAKE = """
INSERT INTO credit_accounts (org_id, env, user_id)
VALUES (%(org_id)s, %(env)s, %(user_id)s)
ON CONFLICT DO NOTHING
"""

# 24 hours a day, whatever the session's zone.
DAYS_FROM_NOW = "SELECT nm_now() + make_interval(hours => 24 * %(days)s::integer)"


async def days_from_now(conn: Connection, days: int | None) -> datetime | None:
    """Return the moment so many days from now, None for None: never."""
    row = await (await conn.execute(DAYS_FROM_NOW, {"days": days})).fetchone()
    return row[0] if row else None


async def register(conn: Connection, wallet: Wallet) -> None:
    """Make the user's wallet if there is none, and give the bonus if the user has not had it."""
    async with conn.transaction():
        await conn.execute(MAKE, {"org_id": wallet.org_id, "env": wallet.env, "user_id": wallet.user_id})
        bonus = await get_bonus(conn, org_id=wallet.org_id, env=wallet.env)
        if bonus is None:
            return
        ends = await days_from_now(conn, bonus.lifetime_days)
        # A user who has had it is refused as a repeated reference, whatever the bonus was then.
        await grant(conn, wallet, NewGrant(bonus.credits, REGISTRATION, expires_at=ends, reason="registration bonus"))
