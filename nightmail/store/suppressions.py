"""suppressions: recipients an org must not send to; the gate looks here just before each call.

Each env has its own, so that a test key can neither read nor lift what protects live recipients. Every write locks
rows in address order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from nightmail.ids import new_id
from nightmail.store.audit_logs import insert_audit_log
from nightmail.store.database import Connection

Origin = Literal["manual", "bounce", "complaint", "stop", "unsubscribe"]


@dataclass(frozen=True, slots=True)
class SuppressionView:
    """A recipient that gets nothing from the org on this channel."""

    id: UUID
    channel: str
    address: str
    origin: str
    reason: str | None
    created_at: datetime


# The update changes nothing; it makes the row that is there come back, and waits for one being written.
ADD = """
INSERT INTO suppressions AS s (id, org_id, env, channel, address, origin, reason)
SELECT new.id, %(org_id)s, %(env)s, %(channel)s, new.address, %(origin)s, %(reason)s
FROM unnest(%(ids)s::uuid[], %(addresses)s::text[]) AS new (id, address)
ORDER BY new.address
ON CONFLICT (org_id, env, channel, address) DO UPDATE SET address = excluded.address
RETURNING s.id, s.channel, s.address, s.origin, s.reason, s.created_at
"""


async def add_suppressions(
    conn: Connection,
    *,
    org_id: UUID,
    env: str,
    channel: str,
    addresses: Sequence[str],
    origin: Origin,
    actor: str,
    reason: str | None = None,
) -> list[SuppressionView]:
    """Suppress normalised addresses; those that are suppressed already come back as they are."""
    wanted = sorted(set(addresses))
    async with conn.transaction():
        cursor = await conn.execute(
            ADD,
            {
                "org_id": org_id,
                "env": env,
                "channel": channel,
                "origin": origin,
                "reason": reason,
                "ids": [new_id() for _ in wanted],
                "addresses": wanted,
            },
        )
        views = [SuppressionView(*row) for row in await cursor.fetchall()]
        await _audit(conn, "suppression.added", org_id, views, actor)
    return views


GET = """
SELECT id, channel, address, origin, reason, created_at
FROM suppressions
WHERE org_id = %(org_id)s
  AND env = %(env)s
  AND (id = %(id)s OR (channel = %(channel)s AND address = %(address)s))
"""


async def get_suppression(
    conn: Connection, *, org_id: UUID, env: str, suppression_id: UUID | None, channel: str | None, address: str | None
) -> SuppressionView | None:
    """Return one by its id, or by channel and normalised address; None when it is not there."""
    cursor = await conn.execute(
        GET, {"org_id": org_id, "env": env, "id": suppression_id, "channel": channel, "address": address}
    )
    row = await cursor.fetchone()
    return SuppressionView(*row) if row else None


LIST = """
SELECT id, channel, address, origin, reason, created_at
FROM suppressions
WHERE org_id = %(org_id)s
  AND env = %(env)s
  AND channel = %(channel)s
  AND (%(origin)s::text IS NULL OR origin = %(origin)s)
  AND (%(after)s::uuid IS NULL OR id < %(after)s)
ORDER BY id DESC
LIMIT %(limit)s + 1
"""

LIST_BEFORE = """
SELECT id, channel, address, origin, reason, created_at
FROM suppressions
WHERE org_id = %(org_id)s
  AND env = %(env)s
  AND channel = %(channel)s
  AND (%(origin)s::text IS NULL OR origin = %(origin)s)
  AND id > %(before)s
ORDER BY id
LIMIT %(limit)s + 1
"""


async def list_suppressions(
    conn: Connection,
    *,
    org_id: UUID,
    env: str,
    channel: str,
    origin: str | None,
    limit: int,
    after: UUID | None,
    before: UUID | None,
) -> tuple[list[SuppressionView], bool]:
    """Return up to `limit` suppressions, newest first, and whether there are more in the direction asked."""
    arguments: dict[str, Any] = {
        "org_id": org_id,
        "env": env,
        "channel": channel,
        "origin": origin,
        "limit": limit,
        "after": after,
        "before": before,
    }
    cursor = await conn.execute(LIST if before is None else LIST_BEFORE, arguments)
    views = [SuppressionView(*row) for row in await cursor.fetchall()]
    page = views[:limit]
    return (page if before is None else page[::-1]), len(views) > limit


REMOVE = """
WITH unwanted AS MATERIALIZED (
    SELECT id
    FROM suppressions
    WHERE org_id = %(org_id)s
  AND env = %(env)s
      AND (id = ANY (%(ids)s) OR (channel = %(channel)s AND address = ANY (%(addresses)s)))
    ORDER BY channel, address
    FOR UPDATE
)
DELETE FROM suppressions AS s
USING unwanted
WHERE s.id = unwanted.id
RETURNING s.id, s.channel, s.address, s.origin, s.reason, s.created_at
"""


async def remove_suppressions(
    conn: Connection,
    *,
    org_id: UUID,
    env: str,
    actor: str,
    ids: Sequence[UUID] = (),
    channel: str | None = None,
    addresses: Sequence[str] = (),
) -> list[SuppressionView]:
    """Lift suppressions by id, or by channel and normalised addresses; return those that were there."""
    async with conn.transaction():
        cursor = await conn.execute(
            REMOVE,
            {"org_id": org_id, "env": env, "ids": list(ids), "channel": channel, "addresses": list(addresses)},
        )
        views = [SuppressionView(*row) for row in await cursor.fetchall()]
        await _audit(conn, "suppression.removed", org_id, views, actor)
    return views


async def _audit(conn: Connection, action: str, org_id: UUID, views: Sequence[SuppressionView], actor: str) -> None:
    if views:
        await insert_audit_log(
            conn,
            actor=actor,
            action=action,
            org_id=org_id,
            target=str(views[0].id),
            detail={"channel": views[0].channel, "addresses": [view.address for view in views]},
        )
