"""credit_prices: what a service costs in credits, by org and env."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from nightmail.store.audit_logs import insert_audit_log
from nightmail.store.database import Connection

MAX_PRICES = 1000


@dataclass(frozen=True, slots=True)
class Price:
    """What one unit of a service costs."""

    service: str
    credits: int


GET = """
SELECT credits
FROM credit_prices
WHERE org_id = %(org_id)s
  AND env = %(env)s
  AND service = %(service)s
"""


async def get_price(conn: Connection, *, org_id: UUID, env: str, service: str) -> int | None:
    """Return the credits for one unit, None when the org has set no price for the service."""
    row = await (await conn.execute(GET, {"org_id": org_id, "env": env, "service": service})).fetchone()
    return int(row[0]) if row else None


LIST = """
SELECT service, credits
FROM credit_prices
WHERE org_id = %(org_id)s
  AND env = %(env)s
ORDER BY service
LIMIT %(limit)s
"""


async def list_prices(conn: Connection, *, org_id: UUID, env: str) -> list[Price]:
    """Return the org's prices, by service."""
    cursor = await conn.execute(LIST, {"org_id": org_id, "env": env, "limit": MAX_PRICES})
    return [Price(*row) for row in await cursor.fetchall()]


# The count is read without a lock: two at once may end one or two above the limit, which is there for the list's sake.
PUT = """
INSERT INTO credit_prices (org_id, env, service, credits)
SELECT %(org_id)s, %(env)s, %(service)s, %(credits)s
WHERE EXISTS (
        SELECT FROM credit_prices WHERE org_id = %(org_id)s AND env = %(env)s AND service = %(service)s
    )
   OR %(limit)s > (SELECT count(*) FROM credit_prices WHERE org_id = %(org_id)s AND env = %(env)s)
ON CONFLICT (org_id, env, service) DO UPDATE SET credits = excluded.credits
"""


async def put_price(conn: Connection, *, org_id: UUID, env: str, price: Price, actor: str) -> bool:
    """Set a price, for spends to come; False when the org has too many."""
    arguments = {
        "org_id": org_id,
        "env": env,
        "service": price.service,
        "credits": price.credits,
        "limit": MAX_PRICES,
    }
    async with conn.transaction():
        if (await conn.execute(PUT, arguments)).rowcount == 0:
            return False
        await insert_audit_log(
            conn,
            actor=actor,
            action="credit_price.put",
            org_id=org_id,
            target=price.service,
            detail={"credits": price.credits, "env": env},
        )
    return True


DELETE = """
DELETE FROM credit_prices
WHERE org_id = %(org_id)s
  AND env = %(env)s
  AND service = %(service)s
"""


async def delete_price(conn: Connection, *, org_id: UUID, env: str, service: str, actor: str) -> bool:
    """Remove a price; return whether there was one."""
    async with conn.transaction():
        cursor = await conn.execute(DELETE, {"org_id": org_id, "env": env, "service": service})
        if cursor.rowcount == 0:
            return False
        await insert_audit_log(
            conn, actor=actor, action="credit_price.deleted", org_id=org_id, target=service, detail={"env": env}
        )
    return True
