"""Suppressions that recipients and their servers ask for: bounce, complaint, STOP, unsubscribe, and START.

Part of the transaction that learned of it; rows are locked in key order. An operator's own suppression is never changed
from outside, and a stronger wish replaces a weaker one, so that the order of reports does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from nightmail.ids import new_id
from nightmail.store.database import Connection
from nightmail.store.suppressions import Origin

# From a guess of machines to what a person said to the mailbox provider. `manual` and `stop` are not among them: no
# wish replaces those, and they replace none.
STRENGTH: tuple[Origin, ...] = ("bounce", "unsubscribe", "complaint")


@dataclass(frozen=True, slots=True)
class Wish:
    """A recipient that gets nothing more from an org."""

    org_id: UUID
    env: str
    channel: str
    address: str
    origin: Origin
    reason: str | None = None


# A change is written down in the audit log, a repetition is not.
SUPPRESS = """
WITH wish AS MATERIALIZED (
    SELECT *
    FROM unnest(
        %(ids)s::uuid[], %(org_ids)s::uuid[], %(envs)s::text[], %(channels)s::text[], %(addresses)s::text[],
        %(origins)s::text[], %(reasons)s::text[]
    ) AS w (id, org_id, env, channel, address, origin, reason)
), added AS (
    INSERT INTO suppressions AS s (id, org_id, env, channel, address, origin, reason)
    SELECT id, org_id, env, channel, address, origin, reason
    FROM wish
    ORDER BY org_id, env, channel, address
    ON CONFLICT (org_id, env, channel, address) DO UPDATE
    SET origin = excluded.origin,
        reason = excluded.reason
    WHERE array_position(%(strength)s::text[], excluded.origin) > array_position(%(strength)s::text[], s.origin)
    RETURNING s.id, s.org_id, s.channel, s.address, s.origin
)
INSERT INTO audit_logs (id, actor, action, org_id, target, detail)
SELECT nm_uuid7(), %(actor)s, 'suppression.added', org_id, id::text,
       jsonb_build_object('channel', channel, 'addresses', jsonb_build_array(address), 'origin', origin)
FROM added
"""


async def suppress_recipients(conn: Connection, wishes: Sequence[Wish], *, actor: str) -> int:
    """Suppress the recipients, each once; return how many were not suppressed as strongly before."""
    strongest: dict[tuple[UUID, str, str, str], Wish] = {}
    for wish in wishes:
        key = (wish.org_id, wish.env, wish.channel, wish.address)
        held = strongest.get(key)
        if held is None or _strength(wish.origin) > _strength(held.origin):
            strongest[key] = wish
    if not strongest:
        return 0
    distinct = list(strongest.values())
    cursor = await conn.execute(
        SUPPRESS,
        {
            "actor": actor,
            "strength": list(STRENGTH),
            "ids": [new_id() for _ in distinct],
            "org_ids": [wish.org_id for wish in distinct],
            "envs": [wish.env for wish in distinct],
            "channels": [wish.channel for wish in distinct],
            "addresses": [wish.address for wish in distinct],
            "origins": [wish.origin for wish in distinct],
            "reasons": [wish.reason for wish in distinct],
        },
    )
    return cursor.rowcount


def _strength(origin: Origin) -> int:
    return STRENGTH.index(origin) if origin in STRENGTH else -1


LIFT_STOP = """
WITH stopped AS MATERIALIZED (
    SELECT id
    FROM suppressions
    WHERE org_id = ANY (%(org_ids)s)
      AND env = 'live'
      AND channel = 'sms'
      AND address = %(number)s
      AND origin = 'stop'
    ORDER BY org_id
    FOR UPDATE
), lifted AS (
    DELETE FROM suppressions AS s
    USING stopped
    WHERE s.id = stopped.id
    RETURNING s.id, s.org_id, s.address
)
INSERT INTO audit_logs (id, actor, action, org_id, target, detail)
SELECT nm_uuid7(), %(actor)s, 'suppression.removed', org_id, id::text,
       jsonb_build_object('channel', 'sms', 'addresses', jsonb_build_array(address), 'origin', 'stop')
FROM lifted
"""


async def lift_stop(conn: Connection, *, org_ids: Sequence[UUID], number: str, actor: str) -> int:
    """Lift what a STOP of this number suppressed, and nothing else; return how many orgs may write again."""
    cursor = await conn.execute(LIFT_STOP, {"org_ids": list(org_ids), "number": number, "actor": actor})
    return cursor.rowcount
