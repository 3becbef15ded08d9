"""webhook_deliveries and webhook_attempts as the owner of an endpoint sees them: events, what became of them, replays.

The run that delivers them has its own statements in store.webhook_deliveries. Every function here is given an endpoint
that the caller has looked up, so that none can reach another org's; those that write want its row locked first, then
lock deliveries in key order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from psycopg.types.json import Jsonb

from nightmail.ids import new_id
from nightmail.rules.webhooks import TEST_TOPIC
from nightmail.store.audit_logs import insert_audit_log
from nightmail.store.database import Connection
from nightmail.store.webhook_deliveries import Stamped

State = Literal["pending", "delivered", "failed"]

# Deliveries that one request sets going again, and rows it looks at to find them.
REPLAY_LIMIT = 10_000
REPLAY_SCAN = 100_000


@dataclass(frozen=True, slots=True)
class EventView:
    """An event for one endpoint.

    `seq` and `body` None mean that it was not claimed or pulled yet. `is_claimed`: an attempt is being made now.
    """

    event_id: UUID
    topic: str
    occurred_at: datetime
    seq: int | None
    state: State
    reason: str | None
    due_at: datetime
    is_claimed: bool
    attempts: int
    body: str | None


# A claim whose lease ran out is nobody's: the delivery waits for its next attempt. A bound that is always there keeps a
# generic plan at one probe of the index: an OR would read all newer events again for each page.
LIST = """
SELECT event_id, topic, occurred_at, seq, state, reason, due_at, claim_id IS NOT NULL AND due_at > nm_now(), attempts,
       NULL
FROM webhook_deliveries
WHERE endpoint_id = %(endpoint_id)s
  AND event_id < coalesce(%(after)s::uuid, 'ffffffff-ffff-ffff-ffff-ffffffffffff')
ORDER BY event_id DESC
LIMIT %(limit)s + 1
"""

LIST_BEFORE = """
SELECT event_id, topic, occurred_at, seq, state, reason, due_at, claim_id IS NOT NULL AND due_at > nm_now(), attempts,
       NULL
FROM webhook_deliveries
WHERE endpoint_id = %(endpoint_id)s
  AND event_id > %(before)s
ORDER BY event_id
LIMIT %(limit)s + 1
"""


async def list_events(
    conn: Connection, endpoint_id: UUID, *, limit: int, after: UUID | None, before: UUID | None
) -> tuple[list[EventView], bool]:
    """Return up to `limit` events without bodies, newest first, and whether there are more in the direction asked."""
    arguments: dict[str, Any] = {"endpoint_id": endpoint_id, "limit": limit, "after": after, "before": before}
    cursor = await conn.execute(LIST if before is None else LIST_BEFORE, arguments)
    views = [EventView(*row) for row in await cursor.fetchall()]
    page = views[:limit]
    return (page if before is None else page[::-1]), len(views) > limit


# Numbers are given under the endpoint's lock and seen from commit on, so no number appears below one that was seen.
PULL = """
SELECT event_id, topic, occurred_at, seq, state, reason, due_at, claim_id IS NOT NULL AND due_at > nm_now(), attempts,
       body
FROM webhook_deliveries
WHERE endpoint_id = %(endpoint_id)s
  AND seq > %(after_seq)s
ORDER BY seq
LIMIT %(limit)s
"""


async def pull_events(conn: Connection, endpoint_id: UUID, *, after_seq: int, limit: int) -> list[EventView]:
    """Return up to `limit` numbered events after a number, in the order of their numbers."""
    cursor = await conn.execute(PULL, {"endpoint_id": endpoint_id, "after_seq": after_seq, "limit": limit})
    return [EventView(*row) for row in await cursor.fetchall()]


OLDEST_SEQ = """
SELECT seq
FROM webhook_deliveries
WHERE endpoint_id = %(endpoint_id)s
  AND seq IS NOT NULL
ORDER BY seq
LIMIT 1
"""


async def get_oldest_seq(conn: Connection, endpoint_id: UUID) -> int | None:
    """Return the lowest number that is still kept, None when there is none."""
    cursor = await conn.execute(OLDEST_SEQ, {"endpoint_id": endpoint_id})
    row = await cursor.fetchone()
    return row[0] if row else None


GET = """
SELECT event_id, topic, occurred_at, seq, state, reason, due_at, claim_id IS NOT NULL AND due_at > nm_now(), attempts,
       body
FROM webhook_deliveries
WHERE endpoint_id = %(endpoint_id)s
  AND event_id = %(event_id)s
"""


async def get_event(conn: Connection, endpoint_id: UUID, event_id: UUID) -> EventView | None:
    """Return one event, None when the endpoint has none with this id."""
    cursor = await conn.execute(GET, {"endpoint_id": endpoint_id, "event_id": event_id})
    row = await cursor.fetchone()
    return EventView(*row) if row else None


GET_UNSTAMPED = """
SELECT d.topic, d.recipient, d.data, d.occurred_at,
       m.id, m.env, m.channel, m.sender, m.subject, b.to_addresses, b.cc_addresses, b.tags, m.units, m.created_at,
       m.scheduled_at, m.provider_message_id
FROM webhook_deliveries AS d
LEFT JOIN messages AS m ON m.id = d.message_id
LEFT JOIN message_bodies AS b ON b.message_id = m.id
WHERE d.endpoint_id = %(endpoint_id)s
  AND d.event_id = %(event_id)s
"""


async def get_unstamped(conn: Connection, endpoint_id: UUID, event_id: UUID) -> Stamped | None:
    """Return what the body of an event will be made from, to show it before its number is given."""
    cursor = await conn.execute(GET_UNSTAMPED, {"endpoint_id": endpoint_id, "event_id": event_id})
    row = await cursor.fetchone()
    if row is None:
        return None
    topic, recipient, data, occurred_at, *about = row
    return Stamped(endpoint_id, event_id, topic, recipient, data, occurred_at, tuple(about) if about[0] else None)


@dataclass(frozen=True, slots=True)
class AttemptView:
    """One POST; `http_status` None means that no answer came, and `error` says why."""

    id: UUID
    sent_at: datetime
    duration_ms: int
    http_status: int | None
    error: str | None
    response: str | None


LIST_ATTEMPTS = """
SELECT id, sent_at, duration_ms, http_status, error, response
FROM webhook_attempts
WHERE endpoint_id = %(endpoint_id)s
  AND event_id = %(event_id)s
  AND (%(after)s::uuid IS NULL OR id < %(after)s)
ORDER BY id DESC
LIMIT %(limit)s + 1
"""

LIST_ATTEMPTS_BEFORE = """
SELECT id, sent_at, duration_ms, http_status, error, response
FROM webhook_attempts
WHERE endpoint_id = %(endpoint_id)s
  AND event_id = %(event_id)s
  AND id > %(before)s
ORDER BY id
LIMIT %(limit)s + 1
"""


async def list_attempts(
    conn: Connection, endpoint_id: UUID, event_id: UUID, *, limit: int, after: UUID | None, before: UUID | None
) -> tuple[list[AttemptView], bool]:
    """Return up to `limit` attempts, newest first, and whether there are more in the direction asked."""
    arguments: dict[str, Any] = {
        "endpoint_id": endpoint_id,
        "event_id": event_id,
        "limit": limit,
        "after": after,
        "before": before,
    }
    cursor = await conn.execute(LIST_ATTEMPTS if before is None else LIST_ATTEMPTS_BEFORE, arguments)
    views = [AttemptView(*row) for row in await cursor.fetchall()]
    page = views[:limit]
    return (page if before is None else page[::-1]), len(views) > limit


INSERT_TEST = """
INSERT INTO webhook_deliveries (endpoint_id, event_id, org_id, topic, data, occurred_at, due_at)
VALUES (%(endpoint_id)s, %(event_id)s, %(org_id)s, %(topic)s, %(data)s, nm_now(), nm_now())
"""


async def insert_test_event(conn: Connection, endpoint_id: UUID, *, org_id: UUID, actor: str) -> UUID:
    """Insert a test event for a locked endpoint, subscribed or not; return its id."""
    event_id = new_id()
    data = {"webhook_id": str(endpoint_id), "message": "A test event: the endpoint is reached and the signature holds."}
    await conn.execute(
        INSERT_TEST,
        {
            "endpoint_id": endpoint_id,
            "event_id": event_id,
            "org_id": org_id,
            "topic": TEST_TOPIC,
            "data": Jsonb(data),
        },
    )
    await insert_audit_log(
        conn,
        actor=actor,
        action="webhook.tested",
        org_id=org_id,
        target=str(endpoint_id),
        detail={"event": str(event_id)},
    )
    return event_id


# Number, body and event id stay: the receiver sees the same webhook-id again. A claim alive is left alone; one whose
# lease ran out is taken off, and its late finisher finds that the delivery is no longer its own. What has no number yet
# is not written at all: it is on its way, and a claim that began before could number it without reaching the new row.
REPLAY_ONE = """
UPDATE webhook_deliveries
SET state = 'pending',
    due_at = nm_now(),
    attempts = 0,
    takeovers = 0,
    claim_id = NULL,
    reason = NULL,
    finished_at = NULL
WHERE endpoint_id = %(endpoint_id)s
  AND event_id = %(event_id)s
  AND (claim_id IS NULL OR due_at <= nm_now())
  AND (seq IS NOT NULL OR state <> 'pending')
"""

IS_FRESH = """
SELECT EXISTS (
    SELECT
    FROM webhook_deliveries
    WHERE endpoint_id = %(endpoint_id)s
      AND event_id = %(event_id)s
      AND seq IS NULL
      AND state = 'pending'
)
"""


async def replay_event(conn: Connection, endpoint_id: UUID, event_id: UUID, *, org_id: UUID, actor: str) -> bool:
    """Set one event of a locked endpoint going again; return False when an attempt is being made or it is not there."""
    arguments = {"endpoint_id": endpoint_id, "event_id": event_id}
    if (await conn.execute(REPLAY_ONE, arguments)).rowcount == 0:
        row = await (await conn.execute(IS_FRESH, arguments)).fetchone()
        if row is None or not row[0]:
            return False
    await insert_audit_log(
        conn,
        actor=actor,
        action="webhook.replayed",
        org_id=org_id,
        target=str(endpoint_id),
        detail={"event": str(event_id)},
    )
    return True


@dataclass(frozen=True, slots=True)
class ReplayFilter:
    """Which finished events to set going again; the times are a half-open range of when they happened."""

    state: Literal["delivered", "failed"]
    start: datetime | None = None
    end: datetime | None = None
    topics: Sequence[str] | None = None
    after: UUID | None = None


# Looks at a bounded part of the endpoint's events, in key order, and says where it stopped: there is no index on state
# or time, which the hot path would pay for. The state is asked again under the row's lock.
REPLAY = """
WITH scanned AS MATERIALIZED (
    SELECT event_id, state, topic, occurred_at
    FROM webhook_deliveries
    WHERE endpoint_id = %(endpoint_id)s
      AND event_id > coalesce(%(after)s::uuid, '00000000-0000-0000-0000-000000000000')
    ORDER BY event_id
    LIMIT %(scan)s
), chosen AS MATERIALIZED (
    SELECT event_id
    FROM scanned
    WHERE state = %(state)s
      AND (%(start)s::timestamptz IS NULL OR occurred_at >= %(start)s)
      AND (%(end)s::timestamptz IS NULL OR occurred_at < %(end)s)
      AND (%(topics)s::text[] IS NULL OR topic = ANY (%(topics)s))
    ORDER BY event_id
    LIMIT %(limit)s
), locked AS MATERIALIZED (
    SELECT d.event_id
    FROM chosen
    JOIN webhook_deliveries AS d ON d.endpoint_id = %(endpoint_id)s AND d.event_id = chosen.event_id
    WHERE d.state = %(state)s
    ORDER BY d.event_id
    FOR UPDATE OF d
), replayed AS (
    UPDATE webhook_deliveries AS d
    SET state = 'pending',
        due_at = nm_now(),
        attempts = 0,
        takeovers = 0,
        reason = NULL,
        finished_at = NULL
    FROM locked
    WHERE d.endpoint_id = %(endpoint_id)s
      AND d.event_id = locked.event_id
    RETURNING d.event_id
)
SELECT (SELECT count(*) FROM replayed),
       (SELECT count(*) FROM chosen),
       (SELECT count(*) FROM scanned),
       (SELECT event_id FROM chosen ORDER BY event_id DESC LIMIT 1),
       (SELECT event_id FROM scanned ORDER BY event_id DESC LIMIT 1)
"""


async def replay_events(
    conn: Connection,
    endpoint_id: UUID,
    wanted: ReplayFilter,
    *,
    org_id: UUID,
    actor: str,
    limit: int = REPLAY_LIMIT,
    scan: int = REPLAY_SCAN,
) -> tuple[int, UUID | None]:
    """Set finished events of a locked endpoint going again, oldest first.

    Returns how many, and the event to go on after, None when all were looked at.
    """
    cursor = await conn.execute(
        REPLAY,
        {
            "endpoint_id": endpoint_id,
            "after": wanted.after,
            "scan": scan,
            "state": wanted.state,
            "start": wanted.start,
            "end": wanted.end,
            "topics": list(wanted.topics) if wanted.topics is not None else None,
            "limit": limit,
        },
    )
    row = await cursor.fetchone()
    assert row is not None, "a SELECT of scalars has one row"
    replayed, chosen, scanned, last_chosen, last_scanned = row
    if replayed:
        await insert_audit_log(
            conn,
            actor=actor,
            action="webhook.replayed",
            org_id=org_id,
            target=str(endpoint_id),
            detail={"events": replayed, "status": wanted.state},
        )
    if chosen == limit:
        return replayed, last_chosen
    return replayed, last_scanned if scanned == scan else None
