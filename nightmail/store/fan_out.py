"""Fan-out: a fact becomes one delivery for each endpoint of its org that asked for it, in the fact's own transaction.

Whoever writes a fact calls `fan_out` before the transaction commits; what a rollback takes back was never told.
Locks come last here: inserts wait for nobody. The rows carry no body and no number yet, so that this costs the hot
path as little as possible; both are made when a delivery is first claimed or pulled (store.webhook_deliveries).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from nightmail.store.database import Connection


@dataclass(frozen=True, slots=True)
class Fact:
    """What happened, for whom. `topic` is one of rules.webhooks: `email.sent`, `domain.verified`.

    `message_id` makes the body tell of that message (sender, recipients, subject, tags); `data` is what only this
    fact knows, in Nightmail's words. `occurred_at` None means now.
    """

    org_id: UUID
    env: str
    topic: str
    message_id: UUID | None = None
    recipient: str = ""
    occurred_at: datetime | None = None
    data: dict[str, Any] = field(default_factory=dict)


# One event_id per fact, whatever the number of endpoints. Paused endpoints collect,
# disabled ones do not. The array keeps the look-up of endpoints at one index probe per org and env. Arguments go in
# binary (%b): as text psycopg escapes every quote of the data.
FAN_OUT = """
WITH fact AS MATERIALIZED (
    SELECT f.*, nm_nth_id((SELECT nm_uuid7()::text), row_number() OVER ()) AS event_id
    FROM unnest(
        %(org_ids)b::uuid[], %(envs)b::text[], %(topics)b::text[], %(message_ids)b::uuid[], %(recipients)b::text[],
        %(occurred_at)b::timestamptz[], %(data)b::text[]::jsonb[]
    ) AS f (org_id, env, topic, message_id, recipient, occurred_at, data)
), listener AS MATERIALIZED (
    SELECT e.id, e.org_id, e.env, e.topics
    FROM webhook_endpoints AS e
    WHERE e.org_id = ANY (ARRAY(SELECT DISTINCT org_id FROM fact))
      AND e.status IN ('enabled', 'paused')
)
INSERT INTO webhook_deliveries (
    endpoint_id, event_id, org_id, topic, message_id, recipient, data, occurred_at, due_at
)
SELECT l.id, f.event_id, f.org_id, f.topic, f.message_id, f.recipient, f.data, coalesce(f.occurred_at, nm_now()),
       nm_now()
FROM fact AS f
JOIN listener AS l ON l.org_id = f.org_id AND l.env = f.env
WHERE f.topic = ANY (l.topics)
"""


# nm_nth_id counts to 65,535.
FACTS_PER_STATEMENT = 10_000


async def fan_out(conn: Connection, facts: Sequence[Fact]) -> int:
    """Insert the deliveries of these facts; part of the caller's transaction. Returns how many there are."""
    deliveries = 0
    for start in range(0, len(facts), FACTS_PER_STATEMENT):
        deliveries += await _fan_out(conn, facts[start : start + FACTS_PER_STATEMENT])
    return deliveries


async def _fan_out(conn: Connection, facts: Sequence[Fact]) -> int:
    cursor = await conn.execute(
        FAN_OUT,
        {
            "org_ids": [fact.org_id for fact in facts],
            "envs": [fact.env for fact in facts],
            "topics": [fact.topic for fact in facts],
            "message_ids": [fact.message_id for fact in facts],
            "recipients": [fact.recipient for fact in facts],
            "occurred_at": [fact.occurred_at for fact in facts],
            "data": [msgspec.json.encode(fact.data).decode() if fact.data else "{}" for fact in facts],
        },
    )
    return cursor.rowcount
