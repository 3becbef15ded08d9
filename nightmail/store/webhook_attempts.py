"""What became of attempts, with everything that follows from it in one transaction.

Order within it: endpoint rows (in id order, and only those whose health changes), then deliveries, then the attempts
themselves, then deliveries of `webhook.disabled` to the org's other endpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from uuid import UUID

import msgspec

from nightmail.ids import new_id
from nightmail.rules.webhooks import BREAKER_BASE_S, BREAKER_FAILURES, BREAKER_MAX_S, DISABLE_AFTER_DAYS
from nightmail.store.database import Connection
from nightmail.store.fan_out import Fact, fan_out

Kind = Literal["delivered", "retry", "failed", "cut", "unsent"]


class Outcome(msgspec.Struct, frozen=True):
    """How one attempt ended.

    `cut` is one that we broke off ourselves: not counted, due again at once; `unsent` the same without a POST.
    `is_post` says whether there was one, a row of webhook_attempts; `is_telling` whether its end says something of the
    endpoint. `wait_s` is the time until the next attempt; `block_s` how long the endpoint asked to be left alone.
    `is_gone` disables it. `is_healthy`: nothing is known that a success would have to put right. `url` is where it
    went: what an old address answers says nothing of the new one. `id` is the attempt's.
    """

    endpoint_id: UUID
    event_id: UUID
    claim_id: UUID
    kind: Kind
    sent_at: datetime
    duration_ms: int
    is_healthy: bool
    http_status: int | None = None
    error: str | None = None
    response: str | None = None
    wait_s: float = 0.0
    block_s: float = 0.0
    is_gone: bool = False
    is_post: bool = True
    is_telling: bool = True
    url: str = ""
    id: UUID = msgspec.field(default_factory=new_id)


@dataclass(frozen=True, slots=True)
class Disabled:
    """An endpoint that was disabled just now."""

    id: UUID
    org_id: UUID
    env: str
    url: str
    reason: str


@dataclass(frozen=True, slots=True)
class Recorded:
    """What one record step did not write, by place in what it was given: rows no longer ours. And whom it disabled."""

    lost: set[int]
    disabled: list[Disabled]


# The health of endpoints, only by results whose claim still stands and whose URL is still the endpoint's. A success
# ends the row of failures whatever else came with it; posts that we broke off count as one failure together, and not
# as days of failing. The breaker opens at the tenth failure in a row, for twice as long at each further ten. A failure
# never shortens a rest that holds already: posts that were under way when the endpoint asked for one may end after it.
# The endpoint is disabled when it said 410, or when nothing but failures came for five days. Locks in id order.
NOTE_HEALTH = """
WITH seen AS MATERIALIZED (
    SELECT s.endpoint_id, bool_or(s.kind = 'delivered') AS is_success, bool_or(s.is_gone) AS is_gone,
           bool_or(s.kind <> 'cut') AS is_failing,
           count(*) FILTER (WHERE s.kind IN ('retry', 'failed')) + bool_or(s.kind = 'cut')::int AS failures,
           max(s.block_s) AS block_s
    FROM unnest(
        %(endpoint_ids)b::uuid[], %(event_ids)b::uuid[], %(claim_ids)b::uuid[], %(kinds)b::text[], %(urls)b::text[],
        %(is_gone)b::bool[], %(blocks_s)b::float8[]
    ) AS s (endpoint_id, event_id, claim_id, kind, url, is_gone, block_s)
    JOIN webhook_deliveries AS d ON d.endpoint_id = s.endpoint_id AND d.event_id = s.event_id
    JOIN webhook_endpoints AS e ON e.id = s.endpoint_id
    WHERE d.claim_id = s.claim_id
      AND e.url = s.url
    GROUP BY s.endpoint_id
), locked AS MATERIALIZED (
    SELECT e.id, CASE WHEN s.is_success THEN 0 ELSE e.failures + s.failures END AS failures,
           CASE
               WHEN s.is_success THEN NULL
               WHEN s.is_failing THEN coalesce(e.first_failing_at, nm_now())
               ELSE e.first_failing_at
           END AS first_failing_at,
           CASE WHEN NOT s.is_success THEN e.blocked_until END AS rests_until,
           s.is_gone, s.block_s
    FROM webhook_endpoints AS e
    JOIN seen AS s ON s.endpoint_id = e.id
    ORDER BY e.id
    FOR NO KEY UPDATE OF e
), judged AS MATERIALIZED (
    SELECT l.*,
           CASE
               WHEN l.is_gone THEN 'the endpoint answered 410 Gone'
               WHEN l.first_failing_at <= nm_now() - make_interval(days => %(disable_after_days)s)
                   THEN 'nothing but failures for ' || %(disable_after_days)s || ' days'
           END AS reason,
           greatest(
               l.rests_until,
               CASE WHEN l.block_s > 0 THEN nm_now() + make_interval(secs => l.block_s) END,
               CASE
                   WHEN l.failures >= %(breaker)s THEN nm_now() + make_interval(
                       secs => least(
                           %(breaker_max_s)s, %(breaker_base_s)s * 2.0 ^ least(l.failures / %(breaker)s - 1, 20)
                       )
                   )
               END
           ) AS blocked_until
    FROM locked AS l
), changed AS (
    UPDATE webhook_endpoints AS e
    SET failures = j.failures,
        first_failing_at = j.first_failing_at,
        blocked_until = j.blocked_until
    FROM judged AS j
    WHERE e.id = j.id
      AND (j.reason IS NULL OR e.status = 'disabled')
), disabled AS (
    UPDATE webhook_endpoints AS e
    SET failures = j.failures,
        first_failing_at = j.first_failing_at,
        blocked_until = NULL,
        status = 'disabled',
        disabled_reason = j.reason
    FROM judged AS j
    WHERE e.id = j.id
      AND j.reason IS NOT NULL
      AND e.status <> 'disabled'
    RETURNING e.id, e.org_id, e.env, e.url, e.disabled_reason
)
SELECT id, org_id, env, url, disabled_reason
FROM disabled
ORDER BY id
"""

# Rows that are not ours any more drop out at `mine`; the attempt was made all the same and is kept. Arrays go in binary
# (%b): as text psycopg escapes every quote of an answer, which took longer than the statement.
RECORD = """
WITH result AS MATERIALIZED (
    SELECT *
    FROM unnest(
        %(endpoint_ids)b::uuid[], %(event_ids)b::uuid[], %(claim_ids)b::uuid[], %(kinds)b::text[],
        %(waits_s)b::float8[], %(sent_at)b::timestamptz[], %(durations_ms)b::int[], %(statuses)b::smallint[],
        %(errors)b::text[], %(responses)b::text[], %(is_post)b::bool[], %(ids)b::uuid[]
    ) WITH ORDINALITY AS r (
        endpoint_id, event_id, claim_id, kind, wait_s, sent_at, duration_ms, http_status, error, response, is_post,
        id, place
    )
), mine AS MATERIALIZED (
    SELECT d.ctid AS row, r.place, r.kind, r.wait_s, coalesce(r.error, 'status ' || r.http_status) AS reason
    FROM webhook_deliveries AS d
    JOIN result AS r ON r.endpoint_id = d.endpoint_id AND r.event_id = d.event_id
    WHERE d.claim_id = r.claim_id
    ORDER BY d.endpoint_id, d.event_id
    FOR UPDATE OF d
), written AS (
    UPDATE webhook_deliveries AS d
    SET state = CASE m.kind WHEN 'delivered' THEN 'delivered' WHEN 'failed' THEN 'failed' ELSE 'pending' END,
        finished_at = CASE WHEN m.kind IN ('delivered', 'failed') THEN nm_now() END,
        reason = CASE WHEN m.kind IN ('retry', 'failed') THEN m.reason END,
        attempts = d.attempts + (m.kind IN ('delivered', 'retry', 'failed'))::int,
        due_at = CASE
            WHEN m.kind IN ('retry', 'cut', 'unsent') THEN nm_now() + make_interval(secs => m.wait_s)
            ELSE d.due_at
        END,
        claim_id = NULL
    FROM mine AS m
    WHERE d.ctid = m.row
    RETURNING m.place
), attempts AS (
    INSERT INTO webhook_attempts (endpoint_id, event_id, id, sent_at, duration_ms, http_status, error, response)
    SELECT endpoint_id, event_id, id, sent_at, duration_ms, http_status, error, response
    FROM result
    WHERE is_post
    ON CONFLICT DO NOTHING  -- written before, by a commit whose answer was lost
)
SELECT place
FROM result
WHERE place NOT IN (SELECT place FROM written)
"""


async def record_attempts(conn: Connection, outcomes: Sequence[Outcome]) -> Recorded:
    """Write the outcomes in one transaction: health of the endpoints, deliveries, attempts, and who was disabled."""
    noted = [o for o in outcomes if o.is_telling and (o.kind != "delivered" or not o.is_healthy)]
    if not noted:
        return Recorded(await _record(conn, outcomes), [])
    async with conn.transaction():
        disabled = await _note_health(conn, noted)
        lost = await _record(conn, outcomes)
        facts = [
            Fact(
                one.org_id, one.env, "webhook.disabled", data={"id": str(one.id), "url": one.url, "reason": one.reason}
            )
            for one in disabled
        ]
        await fan_out(conn, facts)
    return Recorded(lost, disabled)


async def _record(conn: Connection, outcomes: Sequence[Outcome]) -> set[int]:
    """Write deliveries and attempts; return the places of rows that were not ours any more."""
    cursor = await conn.execute(
        RECORD,
        {
            "endpoint_ids": [o.endpoint_id for o in outcomes],
            "event_ids": [o.event_id for o in outcomes],
            "claim_ids": [o.claim_id for o in outcomes],
            "kinds": [o.kind for o in outcomes],
            "waits_s": [o.wait_s for o in outcomes],
            "sent_at": [o.sent_at for o in outcomes],
            "durations_ms": [o.duration_ms for o in outcomes],
            "statuses": [o.http_status for o in outcomes],
            "errors": [o.error for o in outcomes],
            "responses": [o.response for o in outcomes],
            "is_post": [o.is_post for o in outcomes],
            "ids": [o.id for o in outcomes],
        },
    )
    return {row[0] - 1 for row in await cursor.fetchall()}


async def _note_health(conn: Connection, outcomes: Sequence[Outcome]) -> list[Disabled]:
    cursor = await conn.execute(
        NOTE_HEALTH,
        {
            "endpoint_ids": [o.endpoint_id for o in outcomes],
            "event_ids": [o.event_id for o in outcomes],
            "claim_ids": [o.claim_id for o in outcomes],
            "kinds": [o.kind for o in outcomes],
            "urls": [o.url for o in outcomes],
            "is_gone": [o.is_gone for o in outcomes],
            "blocks_s": [o.block_s for o in outcomes],
            "breaker": BREAKER_FAILURES,
            "breaker_base_s": BREAKER_BASE_S,
            "breaker_max_s": BREAKER_MAX_S,
            "disable_after_days": DISABLE_AFTER_DAYS,
        },
    )
    return [Disabled(*row) for row in await cursor.fetchall()]
