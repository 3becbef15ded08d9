"""plans: what can be bought, as data; changed by the operator, read by every grant."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from nightmail.store.audit_logs import insert_audit_log
from nightmail.store.database import Connection


@dataclass(frozen=True, slots=True)
class Plan:
    """A subscription (`credits` for each month) or a pack (`credits` once); schema/0004 explains each field."""

    id: str
    name: str
    kind: Literal["subscription", "pack"]
    credits: int
    interval_months: int = 1
    priority: int = 100
    expires: bool = True
    grace_days: int = 0
    lifetime_days: int | None = None
    rollover_cap: int = 0
    trial_credits: int = 0
    past_due_days: int = 0


LIST = """
SELECT id, name, kind, credits, interval_months, priority, expires, grace_days, lifetime_days, rollover_cap,
       trial_credits, past_due_days
FROM plans
ORDER BY id
LIMIT 1000
"""


async def list_plans(conn: Connection) -> list[Plan]:
    """Return all plans."""
    return [Plan(*row) for row in await (await conn.execute(LIST)).fetchall()]


GET = LIST.replace("ORDER BY id\nLIMIT 1000", "WHERE id = %(id)s")


async def get_plan(conn: Connection, plan_id: str) -> Plan | None:
    """Return a plan, None when there is none of this id."""
    row = await (await conn.execute(GET, {"id": plan_id})).fetchone()
    return Plan(*row) if row else None


PUT = """
INSERT INTO plans (
    id, name, kind, credits, interval_months, priority, expires, grace_days, lifetime_days, rollover_cap, trial_credits,
    past_due_days
)
VALUES (
    %(id)s, %(name)s, %(kind)s, %(credits)s, %(interval_months)s, %(priority)s, %(expires)s, %(grace_days)s,
    %(lifetime_days)s, %(rollover_cap)s, %(trial_credits)s, %(past_due_days)s
)
ON CONFLICT (id) DO UPDATE
SET name = excluded.name,
    credits = excluded.credits,
    interval_months = excluded.interval_months,
    priority = excluded.priority,
    expires = excluded.expires,
    grace_days = excluded.grace_days,
    lifetime_days = excluded.lifetime_days,
    rollover_cap = excluded.rollover_cap,
    trial_credits = excluded.trial_credits,
    past_due_days = excluded.past_due_days
WHERE plans.kind = excluded.kind
"""


async def put_plan(conn: Connection, plan: Plan, *, actor: str) -> bool:
    """Make or change a plan, for grants to come; False when it would turn a subscription into a pack or back."""
    async with conn.transaction():
        if (await conn.execute(PUT, asdict(plan))).rowcount == 0:
            return False
        await insert_audit_log(conn, actor=actor, action="plan.put", org_id=None, target=plan.id, detail=asdict(plan))
    return True
