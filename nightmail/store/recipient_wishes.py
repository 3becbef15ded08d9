"""Suppressions that recipients and their servers ask for: bounce, complaint, STOP, unsubscribe, and START.

Part of the transaction that learned of it; rows are locked in key order. A stronger wish replaces a weaker one, so that
the order of reports does not matter. An operator's own suppression stays `manual` whatever comes; its reason then tells
of each kind of wish, as in `asked by phone [stop: wrote STOP]`, so that whoever lifts it knows what the person wants.
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
# Of a wish's reason, in the reason of a suppression that it does not replace.
MAX_TRACE = 200


@dataclass(frozen=True, slots=True)
class Wish:
    """A recipient that gets nothing more from an org."""

    org_id: UUID
    env: str
    channel: str
    address: str
    origin: Origin
    reason: str | None = None


# A change is written down in the audit log, a repetition is not. Brackets are taken out of the wish's own words: no
# text of a remote server can look like the trace of another kind.
SUPPRESS = """
WITH wish AS MATERIALIZED (
    SELECT *
    FROM unnest(
        %(ids)s::uuid[], %(org_ids)s::uuid[], %(envs)s::text[], %(channels)s::text[], %(addresses)s::text[],
        %(origins)s::text[], %(reasons)s::text[]
    ) AS w (id, org_id, env, channel, address, origin, reason)
), changed AS (
    INSERT INTO suppressions AS s (id, org_id, env, channel, address, origin, reason)
    SELECT id, org_id, env, channel, address, origin, reason
    FROM wish
    ORDER BY org_id, env, channel, address
    ON CONFLICT (org_id, env, channel, address) DO UPDATE
    SET origin = CASE WHEN s.origin = ANY (%(strength)s::text[]) THEN excluded.origin ELSE s.origin END,
        reason = CASE
            WHEN s.origin = ANY (%(strength)s::text[]) THEN excluded.reason
            ELSE concat_ws(
                ' ',
                s.reason,
                concat('[', excluded.origin, ': ', translate(left(excluded.reason, %(max_trace)s), '[]', '()'), ']')
            )
        END
    WHERE CASE
        WHEN s.origin = ANY (%(strength)s::text[])
            THEN array_position(%(strength)s::text[], excluded.origin) > array_position(%(strength)s::text[], s.origin)
        ELSE excluded.origin <> s.origin
             AND position(concat('[', excluded.origin, ': ') IN coalesce(s.reason, '')) = 0
    END
    RETURNING s.id, s.org_id, s.env, s.channel, s.address, s.origin
)
INSERT INTO audit_logs (id, actor, action, org_id, target, detail)
SELECT nm_uuid7(), %(actor)s,
       CASE c.origin WHEN w.origin THEN 'suppression.added' ELSE 'suppression.noted' END,
       c.org_id, c.id::text,
       jsonb_build_object('channel', c.channel, 'addresses', jsonb_build_array(c.address), 'origin', w.origin)
FROM changed AS c
JOIN wish AS w USING (org_id, env, channel, address)
"""


async def suppress_recipients(conn: Connection, wishes: Sequence[Wish], *, actor: str) -> int:
    """Suppress the recipients, each once; return how many suppressions were added, replaced, or told of the wish."""
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
            "max_trace": MAX_TRACE,
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


# Under an operator's suppression the trace of the STOP goes, and the suppression stays.
LIFT_STOP = """
WITH stopped AS MATERIALIZED (
    SELECT id, origin
    FROM suppressions
    WHERE org_id = ANY (%(org_ids)s)
      AND env = 'live'
      AND channel = 'sms'
      AND address = %(number)s
      AND (origin = 'stop' OR position('[stop: ' IN reason) > 0)
    ORDER BY org_id
    FOR UPDATE
), lifted AS (
    DELETE FROM suppressions AS s
    USING stopped
    WHERE s.id = stopped.id
      AND stopped.origin = 'stop'
    RETURNING s.id, s.org_id, 'suppression.removed' AS action, 'stop' AS origin
), cleared AS (
    UPDATE suppressions AS s
    SET reason = nullif(ltrim(regexp_replace(s.reason, ' ?\\[stop: [^]]*\\]', '')), '')
    FROM stopped
    WHERE s.id = stopped.id
      AND stopped.origin <> 'stop'
    RETURNING s.id, s.org_id, 'suppression.noted' AS action, 'start' AS origin
)
INSERT INTO audit_logs (id, actor, action, org_id, target, detail)
SELECT nm_uuid7(), %(actor)s, action, org_id, id::text,
       jsonb_build_object('channel', 'sms', 'addresses', jsonb_build_array(%(number)s::text), 'origin', origin)
FROM (SELECT * FROM lifted UNION ALL SELECT * FROM cleared) AS changed
"""


async def lift_stop(conn: Connection, *, org_ids: Sequence[UUID], number: str, actor: str) -> None:
    """Lift what a STOP of this number suppressed, or left behind in a reason, and nothing else."""
    await conn.execute(LIFT_STOP, {"org_ids": list(org_ids), "number": number, "actor": actor})
