"""The two shapes of the queue, measured side by side: docs/decisions/0002-queue-shape.md.

    a  due_at, claim_id, attempts, intent_at are columns of messages, with partial indexes
    b  a narrow message_queue row per unfinished message, deleted when done (the shipped one)

Same rows, same steps, same indexes for the claim in both; live-like (claim, gate and record as separate statements, as
a provider call between them demands) and test-like (one statement). WAL bytes do not depend on what else the machine
does, times do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import psycopg

from bench import seed
from bench.plan import Plan, Tell
from bench.report import Section
from bench.server import Bench, Connection

BATCH = 500
SET = 100
CLAIM_ID = "11111111-1111-4111-8111-111111111111"

# Shape a: the queue's columns go to messages, its indexes follow them, and the queue table goes.
MAKE_A = """
DROP TABLE message_queue;
ALTER TABLE messages
    ADD COLUMN due_at timestamptz,
    ADD COLUMN claim_id uuid,
    ADD COLUMN attempts smallint NOT NULL DEFAULT 0,
    ADD COLUMN takeovers smallint NOT NULL DEFAULT 0,
    ADD COLUMN intent_at timestamptz,
    ADD COLUMN lane text COLLATE "C";
CREATE INDEX messages_due ON messages (lane, due_at) WHERE claim_id IS NULL AND due_at IS NOT NULL;
CREATE INDEX messages_due_of_org ON messages (lane, org_id, due_at) WHERE claim_id IS NULL AND due_at IS NOT NULL;
CREATE INDEX messages_claimed ON messages (claim_id) WHERE claim_id IS NOT NULL;
"""

ACCEPT_A = """
INSERT INTO messages (id, org_id, env, channel, sender, subject, addresses, units, period, created_at, due_at, lane)
SELECT uuidv7(), ('00000000-0000-7000-8000-' || lpad(to_hex(1 + i %% %(orgs)s), 12, '0'))::uuid, 'live', 'email',
       'Sender <sender@sender.test>', 'Message number ' || i, ARRAY['person' || i || '@recipient.test'], 1, '2020-01',
       now(), now() - interval '10 minutes' + make_interval(secs => i / 1000.0), 'live:email'
FROM generate_series(%(first)s::int, %(last)s::int) AS i
"""
ACCEPT_B = """
WITH message AS (
    INSERT INTO messages (id, org_id, env, channel, sender, subject, addresses, units, period, created_at)
    SELECT uuidv7(), ('00000000-0000-7000-8000-' || lpad(to_hex(1 + i %% %(orgs)s), 12, '0'))::uuid, 'live', 'email',
           'Sender <sender@sender.test>', 'Message number ' || i, ARRAY['person' || i || '@recipient.test'], 1,
           '2020-01', now() - interval '10 minutes' + make_interval(secs => i / 1000.0)
    FROM generate_series(%(first)s::int, %(last)s::int) AS i
    RETURNING id, org_id, created_at
)
INSERT INTO message_queue (message_id, org_id, lane, due_at)
SELECT id, org_id, 'live:email', created_at
FROM message
"""

CLAIM_A = """
WITH due AS MATERIALIZED (
    SELECT id
    FROM messages
    WHERE lane = 'live:email' AND claim_id IS NULL AND due_at IS NOT NULL AND due_at <= now()
    ORDER BY due_at
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
)
UPDATE messages SET claim_id = %(claim_id)s WHERE id = ANY (ARRAY(SELECT id FROM due)) RETURNING id
"""
CLAIM_B = """
WITH due AS MATERIALIZED (
    SELECT message_id
    FROM message_queue
    WHERE lane = 'live:email' AND claim_id IS NULL AND due_at <= now()
    ORDER BY due_at
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
)
UPDATE message_queue SET claim_id = %(claim_id)s WHERE message_id = ANY (ARRAY(SELECT message_id FROM due))
RETURNING message_id
"""

GATE_A = """
UPDATE messages
SET intent_at = now(), attempts = attempts + 1
WHERE id = ANY (%(ids)s) AND claim_id = %(claim_id)s
RETURNING id, org_id, sender, subject, addresses, attempts
"""
GATE_B = """
WITH started AS (
    UPDATE message_queue
    SET intent_at = now(), attempts = attempts + 1
    WHERE message_id = ANY (%(ids)s) AND claim_id = %(claim_id)s
    RETURNING message_id, attempts
)
SELECT m.id, m.org_id, m.sender, m.subject, m.addresses, started.attempts
FROM started
JOIN messages AS m ON m.id = started.message_id
"""

RECORD_A = """
UPDATE messages
SET state = 'sent', sent_at = now(), provider_message_id = 'p' || id, claim_id = NULL, intent_at = NULL, due_at = NULL
WHERE id = ANY (%(ids)s) AND claim_id = %(claim_id)s
"""
RECORD_B = """
WITH finished AS (
    DELETE FROM message_queue
    WHERE message_id = ANY (%(ids)s) AND claim_id = %(claim_id)s
    RETURNING message_id
)
UPDATE messages AS m
SET state = 'sent', sent_at = now(), provider_message_id = 'p' || m.id
FROM finished
WHERE m.id = finished.message_id
"""

TEST_A = """
WITH due AS MATERIALIZED (
    SELECT id
    FROM messages
    WHERE lane = 'live:email' AND claim_id IS NULL AND due_at IS NOT NULL AND due_at <= now()
    ORDER BY due_at
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
)
UPDATE messages
SET state = 'sent', sent_at = now(), provider_message_id = 'p' || id, due_at = NULL
WHERE id = ANY (ARRAY(SELECT id FROM due))
"""
TEST_B = """
WITH due AS MATERIALIZED (
    SELECT message_id
    FROM message_queue
    WHERE lane = 'live:email' AND claim_id IS NULL AND due_at <= now()
    ORDER BY due_at
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
), finished AS (
    DELETE FROM message_queue
    WHERE message_id = ANY (ARRAY(SELECT message_id FROM due))
    RETURNING message_id
)
UPDATE messages AS m
SET state = 'sent', sent_at = now(), provider_message_id = 'p' || m.id
FROM finished
WHERE m.id = finished.message_id
"""

SIZE = """
SELECT sum(pg_total_relation_size(c.oid))::bigint
FROM pg_class AS c
WHERE c.relname IN ('messages', 'message_queue')
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """The statements of one shape."""

    accept: str
    claim: str
    gate: str
    record: str
    test: str


SHAPES = {
    "a": Shape(ACCEPT_A, CLAIM_A, GATE_A, RECORD_A, TEST_A),
    "b": Shape(ACCEPT_B, CLAIM_B, GATE_B, RECORD_B, TEST_B),
}
STEPS = ("accept", "claim", "gate", "record", "all of live", "test, one statement")


class Costs:
    """Microseconds and WAL bytes per message, by step."""

    def __init__(self, conn: Connection, messages: int) -> None:
        self._conn = conn
        self.messages = messages
        self.us: dict[str, float] = dict.fromkeys(STEPS, 0.0)
        self.wal: dict[str, float] = dict.fromkeys(STEPS, 0.0)
        self.size_mib = 0.0

    def measure(self, step: str, act: Callable[[], None]) -> None:
        """Add what `act` costs to a step."""
        position, began = self._position(), time.perf_counter()
        act()
        took, written = time.perf_counter() - began, self._position() - position
        for name in (step,) if step.startswith("test") or step == "accept" else (step, "all of live"):
            self.us[name] += took / self.messages * 1e6
            self.wal[name] += written / self.messages

    def _position(self) -> int:
        row = self._conn.execute("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn").fetchone()
        assert row is not None, "a SELECT without FROM returns one row"
        return int(row[0])


def run(bench: Bench, plan: Plan, tell: Tell) -> Section:
    """Measure both shapes in turn."""
    found: dict[str, list[Costs]] = {"a": [], "b": []}
    for number in range(plan.rounds):
        for name in SHAPES:
            tell(f"shape {name}, {number + 1} of {plan.rounds}")
            with bench.seeded(f"shape_{name}", partial(_seed, shape=name, orgs=plan.orgs)) as url:
                found[name].append(_measure(url, SHAPES[name], plan))
    for name in SHAPES:
        bench.drop(f"shape_{name}")
    rows: list[Sequence[str]] = []
    for step in STEPS:
        us = {name: min(costs.us[step] for costs in found[name]) for name in SHAPES}
        wal = {name: median(costs.wal[step] for costs in found[name]) for name in SHAPES}
        rows.append(
            (
                step,
                f"{us['a']:.1f}",
                f"{us['b']:.1f}",
                f"{us['a'] / us['b']:.2f}",
                f"{wal['a']:,.0f}",
                f"{wal['b']:,.0f}",
                f"{wal['a'] / wal['b']:.2f}",
            )
        )
    sizes = {name: median(costs.size_mib for costs in found[name]) for name in SHAPES}
    return Section(
        title="Queue shape: (a) columns of messages, (b) a narrow queue table",
        columns=("step", "a µs", "b µs", "a/b", "a WAL B", "b WAL B", "a/b WAL"),
        rows=rows,
        lines=[
            f"Per message, {plan.shape_messages:,} messages each for the live-like and the test-like path, one "
            "connection; the lowest time of the rounds, since noise only adds. Tables and indexes at the end:",
            f"a {sizes['a']:,.0f} MiB, b {sizes['b']:,.0f} MiB. a/b above 1 speaks for b.",
        ],
    )


def _seed(conn: Connection, shape: str, orgs: int) -> None:
    seed.seed_orgs(conn, orgs)
    if shape == "a":
        conn.execute(MAKE_A)


def _measure(url: str, shape: Shape, plan: Plan) -> Costs:
    with psycopg.connect(url, autocommit=True, prepare_threshold=1) as conn:
        costs = Costs(conn, plan.shape_messages)
        for path in (_work_live, _work_test):
            for first in range(1, plan.shape_messages + 1, SET):
                last = min(first + SET - 1, plan.shape_messages)
                arguments = {"first": first, "last": last, "orgs": plan.orgs}
                # the second filling counts nowhere: it would be the same again
                if path is _work_live:
                    costs.measure("accept", lambda given=arguments: _execute(conn, shape.accept, given))  # type: ignore[misc]
                else:
                    _execute(conn, shape.accept, arguments)
            conn.execute("VACUUM (ANALYZE)")
            conn.execute("CHECKPOINT")
            path(conn, shape, costs)
        row = conn.execute(SIZE).fetchone()
        assert row is not None, "an aggregate returns one row"
        costs.size_mib = row[0] / 2**20
    return costs


def _work_live(conn: Connection, shape: Shape, costs: Costs) -> None:
    claimed: list[object] = []

    def claim() -> None:
        arguments = {"limit": BATCH, "claim_id": CLAIM_ID}
        claimed[:] = [row[0] for row in conn.execute(shape.claim, arguments).fetchall()]

    while True:
        costs.measure("claim", claim)
        if not claimed:
            return
        sets = [claimed[start : start + SET] for start in range(0, len(claimed), SET)]
        for step, statement in (("gate", shape.gate), ("record", shape.record)):
            for ids in sets:
                arguments = {"ids": ids, "claim_id": CLAIM_ID}
                costs.measure(step, partial(_execute, conn, statement, arguments))


def _work_test(conn: Connection, shape: Shape, costs: Costs) -> None:
    done = 0
    while done < costs.messages:
        costs.measure(STEPS[-1], partial(_execute, conn, shape.test, {"limit": BATCH}))
        done += BATCH


def _execute(conn: Connection, statement: str, arguments: Mapping[str, object]) -> None:
    cursor = conn.execute(statement, arguments)
    if cursor.description is not None:
        cursor.fetchall()
