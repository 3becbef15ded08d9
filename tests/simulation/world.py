"""What there is: messages in a database, runners that send them, a provider, and a clock that all of them share.

nm_now() is replaced in the simulation's database by the simulated clock alone: real time must not leak in.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import psycopg

from nightmail.rules.webhooks import MESSAGE_KINDS, topics_of
from nightmail.store import gate, queue, record
from nightmail.store.database import Connection
from nightmail.store.gate import Passed
from nightmail.store.queue import Claimed
from nightmail.store.record import Outcome

ORG = UUID(int=1)
RUNNERS = 3
MESSAGES = 6
LIMIT = 2
LEASE_S = 30.0
CALL_S = 5.0
LANE = "live:email"
# All that can be told of messages: what is told and did not happen shows as well.
ENDPOINT_TYPES = tuple(f"message.{kind}" for kind in MESSAGE_KINDS)
START = "2030-01-31 23:30:00+00"

PREPARE = f"""
CREATE OR REPLACE FUNCTION nm_now() RETURNS timestamptz LANGUAGE sql STABLE PARALLEL SAFE
RETURN '{START}'::timestamptz
    + coalesce(nullif(current_setting('nightmail.clock_offset', true), ''), '0')::interval;

-- Rows due at the same time are claimed in the order of their places on disk, and those depend on when PostgreSQL
-- pruned dead ones, thus on transactions of other databases. Microseconds by number leave no two due times equal.
CREATE OR REPLACE FUNCTION break_tie() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.due_at := date_trunc('milliseconds', NEW.due_at + interval '500 us')
        - (SELECT count(*) FROM messages WHERE id <= NEW.message_id) * interval '1 us';
    RETURN NEW;
END $$;
CREATE OR REPLACE TRIGGER break_tie BEFORE UPDATE OF due_at ON message_queue
    FOR EACH ROW EXECUTE FUNCTION break_tie();
"""

# Plans must not change either: no ANALYZE by autovacuum, and PostgreSQL plans for ten pages while a table has fewer.
TABLES = (
    "messages, message_bodies, message_attachments, message_queue, queue_turns, claims, message_events,"
    " recipient_outcomes, suppressions, usage_records, usage_quotas, usage_notices, webhook_deliveries"
)
NO_AUTOVACUUM = "".join(f"ALTER TABLE {table} SET (autovacuum_enabled = off);" for table in TABLES.split(","))
TRUNCATE = f"TRUNCATE {TABLES}"
DELETE = "".join(f"DELETE FROM {table};" for table in TABLES.split(","))
IS_LARGE = f"SELECT max(pg_relation_size(name)) > 8 * 8192 FROM unnest(string_to_array('{TABLES}', ', ')) AS t (name)"
RESET = """
WITH org AS (
    INSERT INTO orgs (id, name) VALUES (%(org)s, 'simulated') ON CONFLICT DO NOTHING
)
INSERT INTO webhook_endpoints (id, org_id, env, url, dialect, types, topics, secret)
VALUES (%(org)s, %(org)s, 'live', 'https://customer.test', 'nightmail', %(types)s, %(topics)s, 'whsec_simulated')
ON CONFLICT DO NOTHING
"""

ADD = """
WITH input AS (
    SELECT id, n FROM unnest(%(ids)s::uuid[]) WITH ORDINALITY AS i (id, n)
), message AS (
    INSERT INTO messages (id, org_id, env, channel, sender, addresses, units, period, send_policy, created_at)
    SELECT id, %(org)s, 'live', 'email', 'post@sender.test', ARRAY['a' || n || '@x.test', 'b' || n || '@x.test'], 2,
           '2030-01', CASE WHEN n = 1 THEN 'at_most_once' END, nm_now()
    FROM input
), body AS (
    INSERT INTO message_bodies (message_id, to_addresses)
    SELECT id, ARRAY['a' || n || '@x.test', 'b' || n || '@x.test'] FROM input
), queued AS (
    INSERT INTO message_queue (message_id, org_id, lane, due_at)
    SELECT id, %(org)s, 'live:email', nm_now() - make_interval(secs => 100 - n) FROM input
), turn AS (
    INSERT INTO queue_turns (lane, due_minute, org_id)
    VALUES ('live:email', date_trunc('minute', nm_now()), %(org)s)
)
INSERT INTO usage_records (org_id, channel, env, period, rating, shard, reserved)
VALUES (%(org)s, 'email', 'live', '2030-01', 'included', 0, 2 * cardinality(%(ids)s::uuid[]))
"""

LOOK = """
SELECT m.id, m.state, m.provider_message_id, q.claim_id, q.attempts, q.takeovers, q.intent_at IS NOT NULL,
       q.message_id IS NOT NULL, extract(epoch FROM q.due_at - nm_now())::float8,
       (SELECT count(*) FROM message_events AS e WHERE e.message_id = m.id AND e.kind = 'sent'),
       m.units - (SELECT count(*) FROM recipient_outcomes AS r
                  WHERE r.message_id = m.id AND r.state = 'suppressed'),
       m.units,
       (SELECT sum(used)::bigint FROM usage_records), (SELECT sum(reserved)::bigint FROM usage_records)
FROM messages AS m
LEFT JOIN message_queue AS q ON q.message_id = m.id
ORDER BY m.id
"""


@dataclass(frozen=True, slots=True)
class Row:
    """A message and its queue row as one look shows them."""

    id: UUID
    state: str
    provider_id: str | None
    claim_id: UUID | None
    attempts: int | None
    takeovers: int | None
    intent: bool
    queued: bool
    due_in_s: float | None
    sent_events: int
    units_called: int
    units: int


@dataclass(slots=True)
class Call:
    """A call on its way: what the provider did with it, and until when the runner waits."""

    passed: Passed
    outcome: Outcome
    timeout_at: float


@dataclass(slots=True)
class Runner:
    """What one runner knows; it loses all of it when it crashes."""

    number: int
    conn: Connection
    life: int = 0
    frozen: bool = False
    was_frozen: set[UUID] = field(default_factory=set)  # claims held while it was frozen
    held: list[Claimed] = field(default_factory=list)
    gated: list[tuple[Passed, float]] = field(default_factory=list)  # with the latest time to begin
    calls: list[Call] = field(default_factory=list)
    results: list[Outcome] = field(default_factory=list)
    claims: dict[UUID, float] = field(default_factory=dict)
    beat_at: float = 0.0

    @property
    def is_idle(self) -> bool:
        """Return whether it holds nothing."""
        return not (self.held or self.gated or self.calls or self.results)


@dataclass
class Mutant:
    """The store as shipped, and the seams at which a mutant replaces it."""

    name: str = "shipped"
    session: str = ""
    has_heartbeat: bool = True
    checks_each_step: bool = True
    has_counter: bool = False
    claim_due: Callable[..., Any] = field(default=queue.claim_due)
    pass_gate: Callable[..., Any] = field(default=gate.pass_gate)
    record_outcomes: Callable[..., Any] = field(default=record.record_outcomes)
    # Runs as an effect of its own after record_outcomes: what is not in its transaction.
    record_rest: Any = None


async def open_connections(database_url: str) -> list[Connection]:
    """Return one connection for each runner and one for customers and observers, in a prepared database."""
    connections = [
        await psycopg.AsyncConnection.connect(database_url, autocommit=True, prepare_threshold=1)
        for _ in range(RUNNERS + 1)
    ]
    await connections[-1].execute(PREPARE + NO_AUTOVACUUM)
    return connections


class World:
    """Everything that one schedule changes, and the choices that drive it."""

    def __init__(self, connections: Sequence[Connection], choices: Sequence[int], mutant: Mutant) -> None:
        self.admin = connections[-1]
        self.connections = connections
        self.choices = iter(choices[1:])
        self.source = random.Random(choices[0] if choices else 0)
        self.mutant = mutant
        self.runners = [Runner(number, conn) for number, conn in enumerate(connections[:-1])]
        self.now = 0.0
        self.clock_of: dict[int, float] = {}
        self.trace: list[str] = []
        self.steps = 0
        self.is_ending = False
        self.claim_numbers = 0
        self.newest_claim: UUID | None = None
        self.rows: dict[UUID, Row] = {}
        self.usage = (0, 0)
        self.names: dict[UUID, str] = {}
        # The truth, outside every runner and the database.
        self.taken: list[tuple[UUID, str]] = []
        self.takeovers: Counter[UUID] = Counter()
        self.owners: dict[UUID, tuple[int, int]] = {}  # claim → runner and its life
        self.begun_under: dict[UUID, UUID] = {}  # message → claim under which its newest call was let through
        self.suppressed: dict[str, int] = {}
        self.canceled: set[UUID] = set()

    async def set_up(self) -> None:
        """Make the messages; everything random comes from the choices."""
        cursor = await self.admin.execute(IS_LARGE)
        await self.admin.execute(TRUNCATE if await cursor.fetchone() == (True,) else DELETE)  # deleting is faster
        topics = topics_of("nightmail", ENDPOINT_TYPES)
        await self.admin.execute(RESET, {"org": ORG, "types": list(ENDPOINT_TYPES), "topics": topics})
        for conn in self.connections:
            await conn.execute("RESET ALL; SET plan_cache_mode = force_generic_plan")
            if self.mutant.session:
                await conn.execute(self.mutant.session)
            await conn.execute("SELECT setseed(%s)", [self.source.random()])
            await self.at_now(conn, force=True)
        ids = sorted(UUID(int=self.source.getrandbits(128), version=4) for _ in range(MESSAGES))
        self.names = {message_id: f"m{number}" for number, message_id in enumerate(ids)}
        await self.admin.execute(ADD, {"ids": ids, "org": ORG})
        self.rows = await self.look()

    def choose(self, count: int) -> int | None:
        """Return the next choice among `count`, None when the numbers have run out."""
        number = next(self.choices, None)
        return None if number is None else number % count

    async def look(self) -> dict[UUID, Row]:
        """Read every message as it is now."""
        await self.at_now(self.admin)
        cursor = await self.admin.execute(LOOK)
        rows = await cursor.fetchall()
        self.usage = (rows[0][12], rows[0][13]) if rows else (0, 0)
        return {row[0]: Row(*row[:12]) for row in rows}

    async def at_now(self, conn: Connection, *, force: bool = False) -> None:
        """Set a connection's clock to the simulation's."""
        if force or self.clock_of.get(id(conn)) != self.now:
            self.clock_of[id(conn)] = self.now
            await conn.execute(f"SET nightmail.clock_offset = '{self.now} seconds'")

    def names_of(self, ids: Any) -> str:
        """Return the messages' names in the trace."""
        return " ".join(self.names[message_id] for message_id in ids)
