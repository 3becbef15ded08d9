"""orgs: the tenants. Made and changed by the admin API and the command line; nothing deletes one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from uuid import UUID

from nightmail.errors import UnknownPlan
from nightmail.ids import new_id
from nightmail.store.api_keys import NewApiKey, insert_api_key
from nightmail.store.audit_logs import insert_audit_log
from nightmail.store.database import Connection
from nightmail.store.message_plans import list_message_plans


@dataclass(frozen=True, slots=True)
class NewOrg:
    """A tenant to be made."""

    name: str
    plan: str = "free"
    billing: str = "quota"
    stripe_customer_id: str | None = None
    send_policy: str = "at_least_once"
    billing_user: str = "billing"


@dataclass(frozen=True, slots=True)
class OrgView:
    """A tenant; the credits of its `billing_user` pay for its messages, where its billing has credits."""

    id: UUID
    name: str
    plan: str
    billing: str
    stripe_customer_id: str | None
    send_policy: str
    billing_user: str
    created_at: datetime


INSERT = """
INSERT INTO orgs (id, name, plan, billing, stripe_customer_id, send_policy, billing_user)
VALUES (%(id)s, %(name)s, %(plan)s, %(billing)s, %(stripe_customer_id)s, %(send_policy)s, %(billing_user)s)
RETURNING id, name, plan, billing, stripe_customer_id, send_policy, billing_user, created_at
"""


async def create_org(conn: Connection, org: NewOrg, *, actor: str) -> tuple[OrgView, str, str]:
    """Make a tenant and its first two keys; return it with the live and the test token, which are not kept.

    Raises UnknownPlan.
    """
    async with conn.transaction():
        await _check_plan(conn, org.plan)
        cursor = await conn.execute(
            INSERT,
            {
                "id": new_id(),
                "name": org.name,
                "plan": org.plan,
                "billing": org.billing,
                "stripe_customer_id": org.stripe_customer_id,
                "send_policy": org.send_policy,
                "billing_user": org.billing_user,
            },
        )
        row = await cursor.fetchone()
        assert row is not None, "INSERT ... RETURNING has one row"
        view = OrgView(*row)
        await insert_audit_log(
            conn, actor=actor, action="org.created", org_id=view.id, target=str(view.id), detail={"name": org.name}
        )
        _, live = await insert_api_key(conn, org_id=view.id, key=NewApiKey("first live key", "live"), actor=actor)
        _, test = await insert_api_key(conn, org_id=view.id, key=NewApiKey("first test key", "test"), actor=actor)
    return view, live, test


async def _check_plan(conn: Connection, plan: str) -> None:
    known = [row.id for row in await list_message_plans(conn)]
    if plan not in known:
        raise UnknownPlan(plan, known)


# What is waiting keeps the split and the price it was accepted with. A quota row holds what is taken, not what is left,
# so that another plan or billing needs no change of it.
# The plan before is kept: months that are over are reported by the plan they ended with.
CHANGE = """
WITH changed AS (
    UPDATE orgs
    SET plan = coalesce(%(plan)s, plan),
        billing = coalesce(%(billing)s, billing),
        billing_user = coalesce(%(billing_user)s, billing_user),
        stripe_customer_id = CASE WHEN %(sets_customer)s THEN %(stripe_customer_id)s ELSE stripe_customer_id END
    WHERE id = %(id)s
    RETURNING new.*, old.plan AS plan_before
), noted AS (
    INSERT INTO org_plan_changes (org_id, plan)
    SELECT id, plan_before
    FROM changed
    WHERE plan_before <> plan
    ON CONFLICT DO NOTHING
)
SELECT id, name, plan, billing, stripe_customer_id, send_policy, billing_user, created_at
FROM changed
"""


@dataclass(frozen=True, slots=True)
class OrgChange:
    """What to change of a tenant, None: nothing; `sets_customer` tells a Stripe customer taken away from one kept."""

    plan: str | None = None
    billing: str | None = None
    billing_user: str | None = None
    sets_customer: bool = False
    stripe_customer_id: str | None = None


async def change_org(conn: Connection, org_id: UUID, change: OrgChange, *, actor: str) -> OrgView | None:
    """Change how a tenant pays, for what is accepted from now on; None when there is none. Raises UnknownPlan."""
    async with conn.transaction():
        if change.plan is not None:
            await _check_plan(conn, change.plan)
        row = await (await conn.execute(CHANGE, {"id": org_id, **asdict(change)})).fetchone()
        if row is None:
            return None
        detail = {name: value for name, value in asdict(change).items() if value not in (None, False)}
        await insert_audit_log(
            conn, actor=actor, action="org.changed", org_id=org_id, target=str(org_id), detail=detail
        )
    return OrgView(*row)


GET = """
SELECT id, name, plan, billing, stripe_customer_id, send_policy, billing_user, created_at
FROM orgs
WHERE id = %(id)s
"""


async def get_org(conn: Connection, org_id: UUID) -> OrgView | None:
    """Return the tenant, None when there is none with this id."""
    cursor = await conn.execute(GET, {"id": org_id})
    row = await cursor.fetchone()
    return OrgView(*row) if row else None


LIST = """
SELECT id, name, plan, billing, stripe_customer_id, send_policy, billing_user, created_at
FROM orgs
WHERE %(after)s::uuid IS NULL OR id < %(after)s
ORDER BY id DESC
LIMIT %(limit)s + 1
"""

LIST_BEFORE = """
SELECT id, name, plan, billing, stripe_customer_id, send_policy, billing_user, created_at
FROM orgs
WHERE id > %(before)s
ORDER BY id
LIMIT %(limit)s + 1
"""


async def list_orgs(
    conn: Connection, *, limit: int, after: UUID | None = None, before: UUID | None = None
) -> tuple[list[OrgView], bool]:
    """Return up to `limit` tenants, newest first, and whether there are more in the direction asked."""
    arguments = {"limit": limit, "after": after, "before": before}
    cursor = await conn.execute(LIST if before is None else LIST_BEFORE, arguments)
    views = [OrgView(*row) for row in await cursor.fetchall()]
    page = views[:limit]
    return (page if before is None else page[::-1]), len(views) > limit
