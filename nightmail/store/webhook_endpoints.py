"""webhook_endpoints: where an org wants to be told, one set per env.

Whoever changes an endpoint locks its row before any delivery of it. Secrets are read by their owner and by the
deliverer; the audit log never holds one, and of a URL not the query, which may be one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast
from uuid import UUID

from nightmail.ids import new_id
from nightmail.rules.webhook_urls import mask_url
from nightmail.rules.webhooks import SECRET_OVERLAP_HOURS, Dialect, Status
from nightmail.store.audit_logs import insert_audit_log
from nightmail.store.database import Connection

# Every fact is compared with all endpoints of its org, so their number has a bound.
MAX_ENDPOINTS = 50


@dataclass(frozen=True, slots=True)
class EndpointView:
    """An endpoint as its org sees it; `previous_until` None means that only one secret holds now."""

    id: UUID
    url: str
    description: str
    dialect: Dialect
    types: list[str]
    status: Status
    disabled_reason: str | None
    schedule: str
    secret: str = field(repr=False)
    previous_until: datetime | None
    blocked_until: datetime | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class NewEndpoint:
    """An endpoint to be made; `topics` are what its `types` stand for."""

    url: str
    description: str
    dialect: Dialect
    types: Sequence[str]
    topics: Sequence[str]
    schedule: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class EndpointChange:
    """What to change; None leaves a part as it is. `types` and `topics` come together."""

    url: str | None = None
    description: str | None = None
    dialect: Dialect | None = None
    types: Sequence[str] | None = None
    topics: Sequence[str] | None = None
    status: Status | None = None
    schedule: str | None = None


# Two requests at once must not both see one place left. Not FOR UPDATE: inserts of messages hold the org's key.
LOCK_ORG = """
SELECT 1
FROM orgs
WHERE id = %(org_id)s
FOR NO KEY UPDATE
"""

INSERT = """
INSERT INTO webhook_endpoints (id, org_id, env, url, description, dialect, types, topics, schedule, secret)
SELECT %(id)s::uuid, %(org_id)s::uuid, %(env)s::text, %(url)s::text, %(description)s::text, %(dialect)s::text,
       %(types)s::text[], %(topics)s::text[], %(schedule)s::text, %(secret)s::text
WHERE (SELECT count(*) FROM webhook_endpoints WHERE org_id = %(org_id)s AND env = %(env)s) < %(max_endpoints)s
"""


async def insert_endpoint(
    conn: Connection, *, org_id: UUID, env: str, endpoint: NewEndpoint, actor: str
) -> UUID | None:
    """Make an endpoint and return its id; None when the org has as many as it may in this env."""
    endpoint_id = new_id()
    async with conn.transaction():
        await conn.execute(LOCK_ORG, {"org_id": org_id})
        cursor = await conn.execute(
            INSERT,
            {
                "id": endpoint_id,
                "org_id": org_id,
                "env": env,
                "url": endpoint.url,
                "description": endpoint.description,
                "dialect": endpoint.dialect,
                "types": list(endpoint.types),
                "topics": list(endpoint.topics),
                "schedule": endpoint.schedule,
                "secret": endpoint.secret,
                "max_endpoints": MAX_ENDPOINTS,
            },
        )
        if cursor.rowcount == 0:
            return None
        detail = {"env": env, "url": mask_url(endpoint.url), "events": list(endpoint.types)}
        await insert_audit_log(
            conn, actor=actor, action="webhook.created", org_id=org_id, target=str(endpoint_id), detail=detail
        )
    return endpoint_id


GET = """
SELECT id, url, description, dialect, types, status, disabled_reason, schedule, secret,
       CASE WHEN previous_until > nm_now() THEN previous_until END, blocked_until, created_at
FROM webhook_endpoints
WHERE id = %(id)s
  AND org_id = %(org_id)s
  AND env = %(env)s
"""


async def get_endpoint(conn: Connection, *, org_id: UUID, env: str, endpoint_id: UUID) -> EndpointView | None:
    """Return the endpoint, None when the org has none with this id in this env."""
    cursor = await conn.execute(GET, {"id": endpoint_id, "org_id": org_id, "env": env})
    row = await cursor.fetchone()
    return EndpointView(*row) if row else None


LOCK = """
SELECT id, url, description, dialect, types, status, disabled_reason, schedule, secret,
       CASE WHEN previous_until > nm_now() THEN previous_until END, blocked_until, created_at
FROM webhook_endpoints
WHERE id = %(id)s
  AND org_id = %(org_id)s
  AND env = %(env)s
FOR NO KEY UPDATE
"""


async def lock_endpoint(conn: Connection, *, org_id: UUID, env: str, endpoint_id: UUID) -> EndpointView | None:
    """Return the endpoint as it stays until the caller's transaction ends, None when there is none."""
    cursor = await conn.execute(LOCK, {"id": endpoint_id, "org_id": org_id, "env": env})
    row = await cursor.fetchone()
    return EndpointView(*row) if row else None


LIST = """
SELECT id, url, description, dialect, types, status, disabled_reason, schedule, secret,
       CASE WHEN previous_until > nm_now() THEN previous_until END, blocked_until, created_at
FROM webhook_endpoints
WHERE org_id = %(org_id)s
  AND env = %(env)s
  AND (%(after)s::uuid IS NULL OR id < %(after)s)
ORDER BY id DESC
LIMIT %(limit)s + 1
"""

LIST_BEFORE = """
SELECT id, url, description, dialect, types, status, disabled_reason, schedule, secret,
       CASE WHEN previous_until > nm_now() THEN previous_until END, blocked_until, created_at
FROM webhook_endpoints
WHERE org_id = %(org_id)s
  AND env = %(env)s
  AND id > %(before)s
ORDER BY id
LIMIT %(limit)s + 1
"""


async def list_endpoints(
    conn: Connection, *, org_id: UUID, env: str, limit: int, after: UUID | None, before: UUID | None
) -> tuple[list[EndpointView], bool]:
    """Return up to `limit` endpoints, newest first, and whether there are more in the direction asked."""
    arguments: dict[str, Any] = {"org_id": org_id, "env": env, "limit": limit, "after": after, "before": before}
    cursor = await conn.execute(LIST if before is None else LIST_BEFORE, arguments)
    views = [EndpointView(*row) for row in await cursor.fetchall()]
    page = views[:limit]
    return (page if before is None else page[::-1]), len(views) > limit


# What failed before says nothing about another address, nor about an endpoint that was enabled by hand: both start with
# a clean record.
UPDATE = """
UPDATE webhook_endpoints
SET url = coalesce(%(url)s, url),
    description = coalesce(%(description)s, description),
    dialect = coalesce(%(dialect)s, dialect),
    types = coalesce(%(types)s::text[], types),
    topics = coalesce(%(topics)s::text[], topics),
    schedule = coalesce(%(schedule)s, schedule),
    status = coalesce(%(status)s, status),
    disabled_reason = CASE
        WHEN coalesce(%(status)s, status) = 'disabled' THEN coalesce(disabled_reason, 'disabled by request')
    END,
    failures = CASE WHEN %(starts_anew)s THEN 0 ELSE failures END,
    first_failing_at = CASE WHEN %(starts_anew)s THEN NULL ELSE first_failing_at END,
    blocked_until = CASE WHEN %(starts_anew)s THEN NULL ELSE blocked_until END
WHERE id = %(id)s
"""


async def change_endpoint(
    conn: Connection, *, org_id: UUID, endpoint: EndpointView, change: EndpointChange, actor: str
) -> None:
    """Change an endpoint that the caller's transaction has locked.

    Enabling does not bring back what failed meanwhile: a replay does.
    """
    changed: dict[str, Any] = {
        "url": change.url,
        "description": change.description,
        "dialect": change.dialect,
        "types": list(change.types) if change.types is not None else None,
        "status": change.status,
        "schedule": change.schedule,
    }
    await conn.execute(
        UPDATE,
        {
            **changed,
            "id": endpoint.id,
            "topics": list(change.topics) if change.topics is not None else None,
            "starts_anew": change.status == "enabled" or change.url not in (None, endpoint.url),
        },
    )
    if change.url is not None:
        changed["url"] = mask_url(change.url)
    detail = {name: value for name, value in changed.items() if value is not None}
    await insert_audit_log(
        conn, actor=actor, action="webhook.changed", org_id=org_id, target=str(endpoint.id), detail=detail
    )


# Rotated twice within the overlap, the oldest secret stops to hold.
ROTATE = """
UPDATE webhook_endpoints
SET previous_secret = secret,
    previous_until = nm_now() + make_interval(hours => %(overlap_hours)s),
    secret = %(secret)s
WHERE id = %(id)s
  AND org_id = %(org_id)s
  AND env = %(env)s
RETURNING previous_until
"""


async def rotate_secret(
    conn: Connection, *, org_id: UUID, env: str, endpoint_id: UUID, secret: str, actor: str
) -> datetime | None:
    """Give an endpoint a new secret; return until when the old one holds too, None when there is no such endpoint."""
    async with conn.transaction():
        cursor = await conn.execute(
            ROTATE,
            {
                "id": endpoint_id,
                "org_id": org_id,
                "env": env,
                "secret": secret,
                "overlap_hours": SECRET_OVERLAP_HOURS,
            },
        )
        row = await cursor.fetchone()
        if row is None:
            return None
        await insert_audit_log(
            conn, actor=actor, action="webhook.secret_rotated", org_id=org_id, target=str(endpoint_id)
        )
    return cast(datetime, row[0])


DELETE = """
DELETE FROM webhook_endpoints
WHERE id = %(id)s
  AND org_id = %(org_id)s
  AND env = %(env)s
RETURNING url
"""


async def delete_endpoint(conn: Connection, *, org_id: UUID, env: str, endpoint_id: UUID, actor: str) -> bool:
    """Remove an endpoint; return whether the org had it. The job fails what was still to be delivered."""
    async with conn.transaction():
        cursor = await conn.execute(DELETE, {"id": endpoint_id, "org_id": org_id, "env": env})
        row = await cursor.fetchone()
        if row is None:
            return False
        await insert_audit_log(
            conn,
            actor=actor,
            action="webhook.deleted",
            org_id=org_id,
            target=str(endpoint_id),
            detail={"env": env, "url": mask_url(row[0])},
        )
    return True
