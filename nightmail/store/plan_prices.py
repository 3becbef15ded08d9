"""plan_prices: which plan a price of Stripe buys; changed by the operator, read when a subscription is told of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nightmail.store.audit_logs import insert_audit_log
from nightmail.store.database import Connection

MAX_PRICES = 1000


@dataclass(frozen=True, slots=True)
class PlanPrice:
    """A price, by its id or lookup key, and the plan it buys."""

    price: str
    plan_id: str


LIST = """
SELECT price, plan_id
FROM plan_prices
ORDER BY price
LIMIT %(limit)s
"""


async def list_plan_prices(conn: Connection) -> list[PlanPrice]:
    """Return all prices that have a plan."""
    cursor = await conn.execute(LIST, {"limit": MAX_PRICES})
    return [PlanPrice(*row) for row in await cursor.fetchall()]


PUT = """
INSERT INTO plan_prices (price, plan_id)
SELECT %(price)s, id
FROM plans
WHERE id = %(plan_id)s
  AND kind = 'subscription'
  AND (%(limit)s > (SELECT count(*) FROM plan_prices) OR EXISTS (SELECT FROM plan_prices WHERE price = %(price)s))
ON CONFLICT (price) DO UPDATE SET plan_id = excluded.plan_id
"""

PLAN = "SELECT kind FROM plans WHERE id = %(plan_id)s"


async def put_plan_price(
    conn: Connection, new: PlanPrice, *, actor: str
) -> Literal["done", "unknown_plan", "not_a_subscription", "too_many"]:
    """Say which plan a price buys, for events to come."""
    async with conn.transaction():
        arguments = {"price": new.price, "plan_id": new.plan_id, "limit": MAX_PRICES}
        if (await conn.execute(PUT, arguments)).rowcount == 0:
            row = await (await conn.execute(PLAN, {"plan_id": new.plan_id})).fetchone()
            if row is None:
                return "unknown_plan"
            return "too_many" if row[0] == "subscription" else "not_a_subscription"
        await insert_audit_log(
            conn, actor=actor, action="plan_price.put", org_id=None, target=new.price, detail={"plan": new.plan_id}
        )
    return "done"


DELETE = """
DELETE FROM plan_prices
WHERE price = %(price)s
"""


async def delete_plan_price(conn: Connection, price: str, *, actor: str) -> bool:
    """Forget a price; return whether it was known."""
    async with conn.transaction():
        if (await conn.execute(DELETE, {"price": price})).rowcount == 0:
            return False
        await insert_audit_log(conn, actor=actor, action="plan_price.deleted", org_id=None, target=price)
    return True
