"""orgs: the tenants. Made by the admin API and the command line; nothing deletes one."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from nightmail.ids import new_id
from nightmail.store.api_keys import NewApiKey, insert_api_key
from nightmail.store.audit_logs import insert_audit_log
from nightmail.store.database import Connection


@dataclass(frozen=True, slots=True)
class NewOrg:
    """A tenant to be made."""

    name: str
    plan: str = "free"
    billing: str = "quota"
    stripe_customer_id: str | None = None
    send_policy: str = "at_least_once"


@dataclass(frozen=True, slots=True)
class OrgView:
    """A tenant."""

    id: UUID
    name: str
    plan: str
    billing: str
    stripe_customer_id: str | None
    send_policy: str
    created_at: datetime


INSERT = """
INSERT INTO orgs (id, name, plan, billing, stripe_customer_id, send_policy)
VALUES (%(id)s, %(name)s, %(plan)s, %(billing)s, %(stripe_customer_id)s, %(send_policy)s)
RETURNING id, name, plan, billing, stripe_customer_id, send_policy, created_at
"""


async def create_org(conn: Connection, org: NewOrg, *, actor: str) -> tuple[OrgView, str, str]:
    """Make a tenant and its first two keys; return it with the live and the test token, which are not kept."""
    async with conn.transaction():
        cursor = await conn.execute(
            INSERT,
            {
                "id": new_id(),
                "name": org.name,
                "plan": org.plan,
                "billing": org.billing,
                "stripe_customer_id": org.stripe_customer_id,
                "send_policy": org.send_policy,
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


GET = """
SELECT id, name, plan, billing, stripe_customer_id, send_policy, created_at
FROM orgs
WHERE id = %(id)s
"""


async def get_org(conn: Connection, org_id: UUID) -> OrgView | None:
    """Return the tenant, None when there is none with this id."""
    cursor = await conn.execute(GET, {"id": org_id})
    row = await cursor.fetchone()
    return OrgView(*row) if row else None


LIST = """
SELECT id, name, plan, billing, stripe_customer_id, send_policy, created_at
FROM orgs
WHERE %(after)s::uuid IS NULL OR id < %(after)s
ORDER BY id DESC
LIMIT %(limit)s + 1
"""

LIST_BEFORE = """
SELECT id, name, plan, billing, stripe_customer_id, send_policy, created_at
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
