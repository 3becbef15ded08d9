"""Events against deliveries: everybody subscribed is told, and nobody of what did not happen.

An event and its deliveries are written in one transaction, within moments of each other: an id of a delivery tells when
(UUIDv7), so a minute on either side of a span of events holds all their deliveries. They are kept for 30 days.
"""

from __future__ import annotations

from typing import LiteralString

from nightmail.store.audit.invariant import Invariant

# Who has changed a subscription since is not asked about what was before: it was another subscription then.
TELLING: LiteralString = """
WITH event AS MATERIALIZED (
    SELECT e.message_id, e.recipient, e.kind, e.recorded_at
    FROM message_events AS e
    WHERE e.recorded_at >= %(start)s
      AND e.recorded_at < %(end)s
      AND e.recorded_at > clock_timestamp() - interval '29 days'
      AND e.kind NOT IN ('accepted', 'late_result')
), changed AS MATERIALIZED (
    SELECT l.target, max(l.at) AS at
    FROM audit_logs AS l
    WHERE l.at >= %(start)s - interval '1 minute'
      AND l.action LIKE 'webhook.%%'
      AND l.action <> 'webhook.created'
    GROUP BY l.target
)
SELECT e.recorded_at AS key, concat_ws(' ', e.message_id, e.kind, nullif(e.recipient, ''), w.id) AS id, 1 AS things,
       NOT EXISTS (
           SELECT
           FROM webhook_deliveries AS d
           WHERE d.endpoint_id = w.id
             AND d.event_id >= nm_uuid_at(e.recorded_at - interval '1 minute')
             AND d.event_id < nm_uuid_at(e.recorded_at + interval '1 minute')
             AND d.message_id = e.message_id
             AND d.topic = m.channel || '.' || e.kind
             AND d.recipient = e.recipient
       ) AS is_wrong
FROM event AS e
JOIN messages AS m ON m.id = e.message_id
JOIN webhook_endpoints AS w ON w.org_id = m.org_id AND w.env = m.env
WHERE w.status IN ('enabled', 'paused')
  AND m.channel || '.' || e.kind = ANY (w.topics)
  AND w.created_at < e.recorded_at - interval '1 minute'
  AND NOT EXISTS (SELECT FROM changed AS c WHERE c.target = w.id::text AND c.at > e.recorded_at - interval '1 minute')
"""

# The key is the moment in the event's id.
TOLD: LiteralString = """
SELECT 'epoch'::timestamptz
       + ('x0000' || left(replace(d.event_id::text, '-', ''), 12))::bit(64)::bigint * interval '1 millisecond' AS key,
       d.event_id::text AS id, 1 AS things,
       m.id IS NULL
       OR m.org_id <> d.org_id
       OR NOT EXISTS (
           SELECT FROM message_events AS e
           WHERE e.message_id = d.message_id
             AND e.recipient = d.recipient
             AND m.channel || '.' || e.kind = d.topic
       )
       OR (d.seq IS NOT NULL AND d.body IS NULL) AS is_wrong
FROM webhook_endpoints AS w
JOIN webhook_deliveries AS d ON d.endpoint_id = w.id
                            AND d.event_id >= nm_uuid_at(%(start)s)
                            AND d.event_id < nm_uuid_at(%(end)s)
LEFT JOIN messages AS m ON m.id = d.message_id
WHERE d.message_id IS NOT NULL
"""

NUMBERED: LiteralString = """
SELECT e.id AS key, e.id::text AS id, 1 AS things,
       e.next_seq <= coalesce((
           SELECT d.seq
           FROM webhook_deliveries AS d
           WHERE d.endpoint_id = e.id AND d.seq IS NOT NULL
           ORDER BY d.seq DESC
           LIMIT 1
       ), 0) AS is_wrong
FROM webhook_endpoints AS e
WHERE e.id = ANY (%(keys)s::uuid[])
"""

WEBHOOKS: tuple[Invariant, ...] = (
    Invariant(
        "telling",
        "an event has a delivery for each endpoint that was there and subscribed when it happened",
        "written",
        TELLING,
    ),
    Invariant(
        "told",
        "a delivery about a message tells of an event that the message has, belongs to its org, and has a body when"
        " it has a number",
        "written",
        TOLD,
    ),
    Invariant("numbered", "an endpoint's next number follows its highest", "endpoints", NUMBERED),
)
