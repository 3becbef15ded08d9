"""Seeds in SQL: orgs, messages, bodies, queue rows and fair-share hints, as accepting them would have left them."""

from __future__ import annotations

from bench.server import Connection

ORGS = """
INSERT INTO orgs (id, name)
SELECT ('00000000-0000-7000-8000-' || lpad(to_hex(i), 12, '0'))::uuid, 'org ' || i
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
WHERE state = 'scheduled'
"""

TURNS = """
INSERT INTO queue_turns (lane, due_minute, org_id)
SELECT DISTINCT lane, date_trunc('minute', due_at), org_id
FROM message_queue
ORDER BY 1, 2, 3
ON CONFLICT DO NOTHING
"""

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
        conn.execute(BODIES)


def seed_due(conn: Connection, messages: int, *, orgs: int, env: str) -> None:
    """Insert orgs and due messages of one environment; live ones with a body."""
    seed_orgs(conn, orgs)
    seed_messages(conn, messages, orgs=orgs, env=env)
    queue_all(conn, bodies=env == "live")
