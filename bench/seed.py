"""Seeds in SQL: orgs without a limit, messages, bodies, queue rows and fair-share hints, as accepting would leave them.

And webhook endpoints with deliveries, as sending would have left those: neither numbered nor with a body.
"""

from __future__ import annotations

from collections.abc import Iterable

from bench.server import Connection

ORGS = """
INSERT INTO orgs (id, name, plan, billing)
SELECT ('00000000-0000-7000-8000-' || lpad(to_hex(i), 12, '0'))::uuid, 'org ' || i, 'pro', 'metered'
FROM generate_series(1, %(orgs)s) AS i
"""

# Neighbouring messages belong to different orgs; what is due became due over nine minutes.
MESSAGES = """
INSERT INTO messages (
    id, org_id, env, channel, state, sender, subject, addresses, units, period, scheduled_at, created_at, sent_at,
    provider_message_id
)
SELECT uuidv7(),
       ('00000000-0000-7000-8000-' || lpad(to_hex(1 + i %% %(orgs)s), 12, '0'))::uuid,
       %(env)s, 'email', %(state)s, 'Sender <sender@sender.test>', 'Message number ' || i,
       ARRAY['person' || i || '@recipient.test'], 1, to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM'),
       now() + make_interval(secs => %(from_s)s + %(span_s)s * i / %(messages)s::float8),
       now() - interval '1 hour',
       CASE %(state)s WHEN 'sent' THEN now() END,
       CASE %(state)s WHEN 'sent' THEN 'stored_' || i END
FROM generate_series(1, %(messages)s) AS i
"""

QUEUE = """
INSERT INTO message_queue (message_id, org_id, lane, due_at)
SELECT id, org_id, CASE env WHEN 'test' THEN 'test' ELSE 'live:' || channel END, scheduled_at
FROM messages AS m
WHERE state = 'scheduled'
ON CONFLICT DO NOTHING
"""

BODIES = """
INSERT INTO message_bodies (message_id, to_addresses, html, text)
SELECT id, addresses, '<p>' || repeat('Hello from the bench. ', 20) || '</p>', repeat('Hello from the bench. ', 20)
FROM messages
WHERE state = %(state)s
"""

TURNS = """
INSERT INTO queue_turns (lane, due_minute, org_id)
SELECT DISTINCT lane, date_trunc('minute', due_at), org_id
FROM message_queue
ORDER BY 1, 2, 3
ON CONFLICT DO NOTHING
"""

# Endpoint 1 belongs to org 1; with more than one per org, org 2's follow those of org 1.
ENDPOINTS = """
INSERT INTO webhook_endpoints (id, org_id, env, url, dialect, types, topics, secret)
SELECT ('00000000-0000-7000-9000-' || lpad(to_hex((org - 1) * %(per_org)s + place), 12, '0'))::uuid,
       ('00000000-0000-7000-8000-' || lpad(to_hex(org), 12, '0'))::uuid,
       'test', 'https://nowhere.test', 'nightmail', '{message.sent}', '{email.sent,sms.sent}', %(secret)s
FROM generate_series(1, %(orgs)s) AS org
CROSS JOIN generate_series(1, %(per_org)s) AS place
"""

# The messages of the endpoint's org in turn; what is due became due over nine minutes.
DELIVERIES = """
WITH message AS MATERIALIZED (
    SELECT m.id, row_number() OVER (ORDER BY m.id) - 1 AS place, count(*) OVER () AS total
    FROM messages AS m
    WHERE m.org_id = (SELECT e.org_id FROM webhook_endpoints AS e WHERE e.id = %(endpoint_id)s)
)
INSERT INTO webhook_deliveries (endpoint_id, event_id, org_id, topic, message_id, occurred_at, due_at)
SELECT e.id, nm_uuid7(), e.org_id, 'email.sent', m.id, now(),
       now() - interval '10 minutes' + make_interval(secs => 540.0 * i / %(deliveries)s)
FROM generate_series(1, %(deliveries)s) AS i
JOIN message AS m ON m.place = i %% m.total
CROSS JOIN webhook_endpoints AS e
WHERE e.id = %(endpoint_id)s
"""

POINT = """
UPDATE webhook_endpoints
SET url = %(url)s || '/' || id
WHERE id = ANY (%(ids)s::uuid[])
"""

SECRET = "whsec_" + "YmVuY2gg" * 5
DUE_FROM_S, DUE_SPAN_S = -600.0, 540.0
FUTURE_FROM_S, FUTURE_SPAN_S = 86_400.0, 86_400.0 * 25


def seed_orgs(conn: Connection, orgs: int) -> None:
    """Insert orgs with known ids."""
    conn.execute(ORGS, {"orgs": orgs})


def seed_messages(
    conn: Connection,
    messages: int,
    *,
    orgs: int,
    env: str = "test",
    state: str = "scheduled",
    from_s: float = DUE_FROM_S,
    span_s: float = DUE_SPAN_S,
) -> None:
    """Insert messages only; those in state `scheduled` are to be queued by `queue_all`."""
    conn.execute(
        MESSAGES,
        {"messages": messages, "orgs": orgs, "env": env, "state": state, "from_s": from_s, "span_s": span_s},
    )


def queue_all(conn: Connection, *, bodies: bool = False) -> None:
    """Queue every scheduled message that is not queued yet."""
    conn.execute(QUEUE)
    conn.execute(TURNS)
    if bodies:
        conn.execute(BODIES, {"state": "scheduled"})


def seed_due(conn: Connection, messages: int, *, orgs: int, env: str) -> None:
    """Insert orgs and due messages of one environment; live ones with a body."""
    seed_orgs(conn, orgs)
    seed_messages(conn, messages, orgs=orgs, env=env)
    queue_all(conn, bodies=env == "live")


def endpoint_id(number: int) -> str:
    """Return the id of a seeded endpoint, counted from 1."""
    return f"00000000-0000-7000-9000-{number:012x}"


def seed_endpoints(conn: Connection, *, orgs: int, per_org: int = 1) -> None:
    """Insert endpoints of the test environment that want `message.sent`; they lead nowhere until pointed somewhere."""
    if per_org:
        conn.execute(ENDPOINTS, {"orgs": orgs, "per_org": per_org, "secret": SECRET})


def seed_sent(conn: Connection, messages: int, *, orgs: int) -> None:
    """Insert orgs and messages of the test environment that are sent, with what a delivery's body tells of them."""
    seed_orgs(conn, orgs)
    seed_messages(conn, messages, orgs=orgs, state="sent")
    conn.execute(BODIES, {"state": "sent"})


def seed_deliveries(conn: Connection, deliveries: int, *, endpoint: int) -> None:
    """Insert due deliveries for one endpoint, about the messages of its org."""
    conn.execute(DELIVERIES, {"deliveries": deliveries, "endpoint_id": endpoint_id(endpoint)})


def point_endpoints(conn: Connection, numbers: Iterable[int], url: str) -> None:
    """Let endpoints lead to paths below `url`."""
    conn.execute(POINT, {"ids": [endpoint_id(number) for number in numbers], "url": url})
