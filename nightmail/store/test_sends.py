"""Test-env messages: claimed, decided and recorded inside PostgreSQL, in one transaction, set by set.

A test message has no effect outside the database, so it needs neither lease nor gate: the row locks of the
transaction are its claim, a crash rolls it back, and its id never leaves the server.
"""

from __future__ import annotations

from dataclasses import dataclass

from nightmail.store.database import Connection
from nightmail.store.queue import TURNS_READ
from nightmail.store.usage_records import SHARDS

# The claim is the one of store.queue (same order, same fairness) with a DELETE where that has an UPDATE: the row is
# finished in this very transaction. LATERAL with a LIMIT keeps the suppression look-up an index probe per address.
# Deliveries are those of store.fan_out, without leaving the server.
# Usage is settled here too, in key order: one round trip instead of four is an eighth more a second, and whoever holds
# a usage row waits for none of these messages, whose queue rows are ours.
FINISH_TEST = """
WITH turn AS MATERIALIZED (
    SELECT org_id
    FROM (
        SELECT org_id
        FROM queue_turns
        WHERE lane = 'test'
          AND due_minute <= nm_now()
        ORDER BY due_minute
        LIMIT %(turns)s
    ) AS hint
    GROUP BY org_id
    ORDER BY random()
    LIMIT %(limit)s
), fair AS MATERIALIZED (
    SELECT share.message_id
    FROM turn
    CROSS JOIN LATERAL (
        SELECT q.message_id
        FROM message_queue AS q
        WHERE q.lane = 'test'
          AND q.org_id = turn.org_id
          AND q.claim_id IS NULL
          AND q.due_at <= nm_now()
        ORDER BY q.due_at
        LIMIT greatest(1, %(limit)s / (SELECT count(*) FROM turn))
        FOR UPDATE SKIP LOCKED
    ) AS share
), rest AS MATERIALIZED (
    SELECT q.message_id
    FROM message_queue AS q
    WHERE q.lane = 'test'
      AND q.claim_id IS NULL
      AND q.due_at <= nm_now()
      AND q.message_id <> ALL (ARRAY(SELECT message_id FROM fair))
    ORDER BY q.due_at
    LIMIT greatest(0, %(limit)s - (SELECT count(*) FROM fair))
    FOR UPDATE SKIP LOCKED
), finished AS (
    DELETE FROM message_queue AS q
    WHERE q.message_id = ANY (ARRAY(SELECT message_id FROM fair UNION ALL SELECT message_id FROM rest))
    RETURNING q.message_id
), decided AS MATERIALIZED (
    SELECT m.id, m.org_id, m.channel, m.period, m.rating, m.units,
           CASE
               WHEN m.channel = 'email' THEN cardinality(m.addresses) - cardinality(hit.addresses)
               WHEN hit.addresses = '{}' THEN m.units
               ELSE 0
           END AS used,
           cardinality(hit.addresses) < cardinality(m.addresses) AS is_sent,
           hit.addresses AS suppressed
    FROM finished
    JOIN messages AS m ON m.id = finished.message_id
    CROSS JOIN LATERAL (
        SELECT coalesce(array_agg(s.address), '{}') AS addresses
        FROM (
            SELECT s.address
            FROM suppressions AS s
            WHERE s.org_id = m.org_id
              AND s.env = m.env
              AND s.channel = m.channel
              AND s.address = ANY (m.addresses)
            LIMIT 50
        ) AS s
    ) AS hit
), recorded AS (
    UPDATE messages AS m
    SET state = CASE WHEN d.is_sent THEN 'sent' ELSE 'canceled' END,
        reason = CASE WHEN d.is_sent THEN NULL ELSE 'suppressed' END,
        sent_at = CASE WHEN d.is_sent THEN nm_now() END,
        provider_message_id = CASE WHEN d.is_sent THEN 'test_' || m.id END
    FROM decided AS d
    WHERE m.id = d.id
      AND m.state = 'scheduled'
), outcomes AS (
    INSERT INTO recipient_outcomes (message_id, address, state)
    SELECT d.id, dropped.address, 'suppressed'
    FROM decided AS d
    CROSS JOIN LATERAL unnest(d.suppressed) AS dropped (address)
    ON CONFLICT DO NOTHING
), events AS (
    INSERT INTO message_events (message_id, org_id, kind, occurred_at, data)
    SELECT d.id, d.org_id,
           CASE WHEN d.is_sent THEN 'sent' ELSE 'suppressed' END,
           nm_now(),
           CASE
               WHEN d.suppressed = '{}' THEN '{}'::jsonb
               ELSE jsonb_build_object('suppressed', d.suppressed, 'units', d.used)
           END
    FROM decided AS d
), listener AS MATERIALIZED (
    SELECT e.id, e.org_id, e.topics
    FROM webhook_endpoints AS e
    WHERE e.org_id = ANY (ARRAY(SELECT DISTINCT org_id FROM decided))
      AND e.env = 'test'
      AND e.status IN ('enabled', 'paused')
), fact AS MATERIALIZED (
    SELECT d.id, d.org_id, d.channel || CASE WHEN d.is_sent THEN '.sent' ELSE '.suppressed' END AS topic, d.suppressed,
           nm_nth_id((SELECT nm_uuid7()::text), row_number() OVER ()) AS event_id
    FROM decided AS d
    WHERE EXISTS (SELECT FROM listener)
), deliveries AS (
    INSERT INTO webhook_deliveries (
        endpoint_id, event_id, org_id, topic, message_id, data, occurred_at, due_at
    )
    SELECT l.id, f.event_id, f.org_id, f.topic, f.id,
           CASE WHEN f.suppressed = '{}' THEN '{}'::jsonb ELSE jsonb_build_object('suppressed', f.suppressed) END,
           nm_now(), nm_now()
    FROM fact AS f
    JOIN listener AS l ON l.org_id = f.org_id
    WHERE f.topic = ANY (l.topics)
), usage AS (
    INSERT INTO usage_records AS u (org_id, channel, env, period, rating, shard, reserved, used)
    SELECT org_id, channel, 'test', period, rating, %(shard)s, -sum(units), sum(used)
    FROM decided
    GROUP BY org_id, channel, period, rating
    ORDER BY org_id, channel, period, rating
    ON CONFLICT (org_id, channel, env, period, rating, shard)
    DO UPDATE SET reserved = u.reserved + excluded.reserved, used = u.used + excluded.used
)
SELECT count(*), count(*) FILTER (WHERE is_sent)
FROM decided
"""


@dataclass(frozen=True, slots=True)
class TestCounts:
    """What one set came to: messages taken, sent, and canceled because every recipient is suppressed."""

    __test__ = False  # not a test class, whatever pytest makes of the name

    claimed: int = 0
    sent: int = 0
    canceled: int = 0


async def finish_due_test_messages(conn: Connection, *, limit: int, shard: int) -> TestCounts:
    """Finish up to `limit` due test messages: state, event, outcomes, deliveries and usage in one statement."""
    arguments = {"limit": limit, "turns": TURNS_READ, "shard": shard % SHARDS}
    cursor = await conn.execute(FINISH_TEST, arguments)
    claimed, sent = await cursor.fetchone() or (0, 0)
    return TestCounts(claimed=claimed, sent=sent, canceled=claimed - sent)
