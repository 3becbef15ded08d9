"""A seeded search through interleavings of runners, over the shipped SQL on real PostgreSQL.

Three runners are state machines whose every atomic effect is a function of nightmail.store on a connection of their
own. One scheduler, driven by a list of numbers, picks who moves: a runner, a crash, a freeze, a thaw, the clock, a
failover that forgets the newest claim, a customer who cancels, suppresses or reschedules. The provider is a list, to
which nothing is ever taken away. The same numbers give the same trace, so a seed is a bug report.

    crash     the runner forgets everything; another starts in its place
    freeze    the runner does not move, whatever the clock does; thawed, it goes on where it was
    clock     moves by seconds. Runners that are neither dead nor frozen beat in time: their heartbeats and the
              timeouts of their calls happen before the clock passes them

nm_now() is replaced in the simulation's database by the simulated clock alone: real time must not leak in.

What must hold after every step is in `check`, and at the end, when everybody healthy has finished, in `check_end`.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch
from uuid import UUID

import psycopg

from nightmail.ports import OutgoingEmail
from nightmail.store import gate, queue, record
from nightmail.store.database import Connection
from nightmail.store.gate import Passed
from nightmail.store.messages import cancel_message, reschedule_message
from nightmail.store.queue import Claimed
from nightmail.store.record import Outcome, Recorded

__all__ = [
    "Mutant",
    "Outcome",
    "Result",
    "Runner",
    "Simulation",
    "Violation",
    "choices_of",
    "open_connections",
]

ORG = UUID(int=1)
RUNNERS = 3
MESSAGES = 6
LIMIT = 2
LEASE_S = 30.0
CALL_S = 5.0
STEPS = 70
LANE = "live:email"
# Effects that do not touch the database.
IN_MEMORY = frozenset({"call", "answer", "crash", "freeze"})
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
    " recipient_outcomes, suppressions, usage_records"
)
NO_AUTOVACUUM = "".join(f"ALTER TABLE {table} SET (autovacuum_enabled = off);" for table in TABLES.split(","))
TRUNCATE = f"TRUNCATE {TABLES}"
DELETE = "".join(f"DELETE FROM {table};" for table in TABLES.split(","))
IS_LARGE = f"SELECT max(pg_relation_size(name)) > 8 * 8192 FROM unnest(string_to_array('{TABLES}', ', ')) AS t (name)"
RESET = f"""
INSERT INTO orgs (id, name) VALUES ('{ORG}', 'simulated') ON CONFLICT DO NOTHING;
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

SUPPRESS = """
INSERT INTO suppressions (id, org_id, env, channel, address, origin)
VALUES (gen_random_uuid(), %s, 'live', 'email', %s, 'stop')
ON CONFLICT DO NOTHING
"""
FORGET_CLAIM = """
WITH freed AS (UPDATE message_queue SET claim_id = NULL WHERE claim_id = %(id)s)
DELETE FROM claims WHERE claim_id = %(id)s
"""


class Violation(AssertionError):
    """Something that must never be."""


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


Effect = Callable[[], Awaitable[str]]


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


@dataclass(frozen=True, slots=True)
class Result:
    """One schedule: its trace, and what it violated."""

    trace: tuple[str, ...]
    violation: str | None
    steps: int

    @property
    def hash(self) -> str:
        """Return the trace's digest."""
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()[:16]


def choices_of(seed: int) -> list[int]:
    """Return the numbers that drive a seed's schedule; the first seeds what is random inside the store."""
    source = random.Random(seed)
    return [source.getrandbits(32) for _ in range(STEPS * 3)]


async def open_connections(database_url: str) -> list[Connection]:
    """Return one connection for each runner and one for customers and observers, in a prepared database."""
    connections = [
        await psycopg.AsyncConnection.connect(database_url, autocommit=True, prepare_threshold=1)
        for _ in range(RUNNERS + 1)
    ]
    await connections[-1].execute(PREPARE + NO_AUTOVACUUM)
    return connections


class Simulation:
    """One schedule."""

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
        self.names: dict[UUID, str] = {}
        # The truth, outside every runner and the database.
        self.taken: list[tuple[UUID, str]] = []
        self.takeovers: Counter[UUID] = Counter()
        self.owners: dict[UUID, tuple[int, int]] = {}  # claim → runner and its life
        self.begun_under: dict[UUID, UUID] = {}  # message → claim under which its newest call was let through
        self.suppressed: dict[str, int] = {}
        self.canceled: set[UUID] = set()

    # ── running ──

    async def run(self) -> Result:
        """Set up, take the steps, end; return what happened."""
        try:
            await self.set_up()
            while self.steps < STEPS:
                if not await self.step():
                    break
            await self.end()
        except Violation as violation:
            return Result(tuple(self.trace), str(violation), self.steps)
        return Result(tuple(self.trace), None, self.steps)

    async def set_up(self) -> None:
        """Make the messages; everything random comes from the choices."""
        cursor = await self.admin.execute(IS_LARGE)
        await self.admin.execute(TRUNCATE if await cursor.fetchone() == (True,) else DELETE)  # deleting is faster
        await self.admin.execute(RESET)
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

    async def step(self) -> bool:
        """Let the scheduler pick one effect, carry it out and check; return False when the numbers have run out."""
        actions = [action for runner in self.runners for action in self.actions_of(runner)] + self.other_actions()
        chosen = self.choose(len(actions))
        if chosen is None:
            return False
        name, effect = actions[chosen]
        await self.carry_out(name, effect)
        return True

    async def carry_out(self, name: str, effect: Effect) -> None:
        """Do one effect, note it, look, check."""
        self.steps += 1
        said = await effect()
        self.trace.append(f"{self.now:6.0f} {name} {said}".rstrip())
        before = self.rows
        if name.rpartition(" ")[2] not in IN_MEMORY:
            self.rows = await self.look()
        self.check(name, before)

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

    # ── what can happen next ──

    def actions_of(self, runner: Runner) -> list[tuple[str, Effect]]:
        """Return what a runner could do now, likelier things more than once."""
        if runner.frozen:
            return [(f"r{runner.number} thaw", lambda: self.thaw(runner))]
        name = f"r{runner.number}"
        actions: list[tuple[str, Effect]] = []
        if runner.is_idle:
            if runner.claims:
                actions += [(f"{name} end", lambda: self.end_run(runner))] * 3
            if not self.is_ending or not runner.claims:
                actions += [(f"{name} claim", lambda: self.claim(runner))] * 3
                actions += [(f"{name} rescue", lambda: self.rescue(runner))]
        else:
            if not self.is_ending:
                actions += [(f"{name} crash", lambda: self.crash(runner))]
                actions += [(f"{name} freeze", lambda: self.freeze(runner))]
            if runner.held:
                actions += [(f"{name} gate", lambda: self.gate(runner))] * 3
                actions += [(f"{name} release", lambda: self.release(runner))] if not self.is_ending else []
            if runner.gated:
                actions += [(f"{name} call", lambda: self.call(runner))] * 3
            if runner.calls:
                actions += [(f"{name} answer", lambda: self.answer(runner))] * 3
            if runner.results:
                actions += [(f"{name} record", lambda: self.record(runner))] * 3
        return actions

    def other_actions(self) -> list[tuple[str, Effect]]:
        """Return what else could happen: the clock, customers, a failover."""
        actions: list[tuple[str, Effect]] = [("clock", self.move_clock)] * 3
        actions += [("customer cancel", self.cancel), ("customer suppress", self.suppress)]
        actions += [("customer reschedule", self.reschedule)]
        if self.newest_claim is not None:
            actions += [("failover", self.failover)] * 2
        return actions

    # ── runners ──

    async def claim(self, runner: Runner) -> str:
        """Claim, as the job does."""
        await self.at_now(runner.conn)
        claim_id = UUID(int=self.source.getrandbits(128), version=4)
        if self.mutant.has_counter:
            self.claim_numbers += 1
            claim_id = UUID(int=self.claim_numbers)
        with patch.object(queue, "new_claim_id", lambda: claim_id):
            rows = await self.mutant.claim_due(
                runner.conn, LANE, runner=f"r{runner.number}", limit=LIMIT, lease_s=LEASE_S
            )
        rows = sorted(rows, key=lambda row: row.message_id)
        if len(rows) > LIMIT:
            raise Violation(f"claimed {len(rows)} rows, the limit is {LIMIT}")
        for row in rows:
            if self.rows[row.message_id].claim_id is not None:
                raise Violation(f"{self.names[row.message_id]} was claimed and is another's")
        if rows:
            runner.held = rows
            runner.claims[claim_id] = self.now + LEASE_S
            runner.beat_at = self.now + LEASE_S / 3
            self.owners[claim_id] = (runner.number, runner.life)
            self.newest_claim = claim_id
        return self.names_of(row.message_id for row in rows)

    async def gate(self, runner: Runner) -> str:
        """Pass the gate with one or all held rows of a claim."""
        self.newest_claim = None
        await self.at_now(runner.conn)
        claim_id = runner.held[0].claim_id
        mine = [row for row in runner.held if row.claim_id == claim_id]
        chosen = mine[: 1 + (self.choose(2) or 0)]
        runner.held = [row for row in runner.held if row not in chosen]
        if claim_id not in runner.claims:
            return "lost " + self.names_of(row.message_id for row in chosen)
        ids = [row.message_id for row in chosen]
        result = await self.mutant.pass_gate(runner.conn, claim_id, ids, call_s=CALL_S, shard=runner.number)
        begin_before = runner.claims[claim_id] - CALL_S
        runner.gated += [(passed, begin_before) for passed in result.passed]
        for passed in result.passed:
            self.begun_under[passed.message_id] = claim_id
            assert isinstance(passed.outgoing, OutgoingEmail)
            if wrong := set(passed.outgoing.to) & set(self.suppressed):
                raise Violation(f"{sorted(wrong)} passed the gate after their suppression")
        return f"{self.names_of(ids)} → {self.names_of(passed.message_id for passed in result.passed)}"

    async def call(self, runner: Runner) -> str:
        """Begin a call; what the provider does is decided now, and whether the runner learns it later."""
        passed, begin_before = runner.gated.pop(0)
        name = self.names[passed.message_id]
        if self.now > begin_before:
            return f"{name} not begun: the lease may have ended"
        kinds = ("ok", "ok", "ok", "ok", "throttled", "retry", "failed", "doubt accepted", "doubt")
        kind = kinds[(self.choose(len(kinds)) or 0)] if not self.is_ending else "ok"
        provider_id = f"{name}-{len(self.taken)}"
        if kind in ("ok", "doubt accepted"):
            self.taken.append((passed.message_id, provider_id))
            if passed.message_id in self.canceled and not self.takeovers[passed.message_id]:
                raise Violation(f"{name} was called after it was canceled")
        outcome = Outcome(passed.message_id, passed.claim_id, "sent", passed.units, "simulated", provider_id)
        if kind != "ok":
            refused: Any = "in_doubt" if kind.startswith("doubt") else kind
            outcome = Outcome(passed.message_id, passed.claim_id, refused, provider="simulated", code=kind, wait_s=7.0)
        runner.calls.append(Call(passed, outcome, self.now + CALL_S))
        return f"{name} {kind}"

    async def answer(self, runner: Runner) -> str:
        """Learn the outcome of the oldest call."""
        call = runner.calls.pop(0)
        runner.results.append(call.outcome)
        return f"{self.names[call.passed.message_id]} {call.outcome.kind}"

    async def record(self, runner: Runner) -> str:
        """Write what ended."""
        await self.at_now(runner.conn)
        outcomes, runner.results = runner.results, []
        recorded = await self.mutant.record_outcomes(runner.conn, outcomes, shard=runner.number)
        for outcome in outcomes:
            row = self.rows[outcome.message_id]
            if outcome.message_id in recorded.written:
                if outcome.kind == "in_doubt":
                    self.takeovers[outcome.message_id] += 1
                if row.claim_id != outcome.claim_id:
                    raise Violation(f"{self.names[row.id]} was recorded by a runner that did not hold it")
        if self.mutant.record_rest is not None and recorded.written:
            actions = {
                "rest": lambda: self.record_rest(runner, outcomes, recorded),
                "crash": lambda: self.crash(runner),
            }
            name = "rest" if self.is_ending or (self.choose(6) or 0) else "crash"
            return f"{self.names_of(recorded.written)}, then {name} {await actions[name]()}"
        said = [
            f"{self.names[o.message_id]}:{o.kind if o.message_id in recorded.written else 'lost'}" for o in outcomes
        ]
        return " ".join(said)

    async def record_rest(self, runner: Runner, outcomes: Sequence[Outcome], recorded: Recorded) -> str:
        """Do what a mutant does after its record transaction."""
        await self.mutant.record_rest(runner.conn, outcomes, recorded, shard=runner.number)
        return ""

    async def rescue(self, runner: Runner) -> str:
        """Free what expired claims hold."""
        self.newest_claim = None
        await self.at_now(runner.conn)
        freed = await queue.rescue_expired(runner.conn, evidence_wait_s=0)
        return f"{freed} rows"

    async def release(self, runner: Runner) -> str:
        """End the run: give back what was not begun."""
        await self.at_now(runner.conn)
        not_begun = [row.message_id for row in runner.held]
        freed = await queue.release_claims(runner.conn, list(runner.claims), not_begun=not_begun)
        runner.held = []
        return f"{freed} rows"

    async def end_run(self, runner: Runner) -> str:
        """End a run that has nothing left in hand; what its claims still hold in the database is for a rescue."""
        await self.at_now(runner.conn)
        freed = await queue.release_claims(runner.conn, list(runner.claims))
        runner.was_frozen |= set(runner.claims)
        runner.claims = {}
        return f"{freed} rows"

    async def beat(self, runner: Runner) -> None:
        """Renew the leases, drop what is gone: the job's keep_leases."""
        runner.beat_at = self.now + LEASE_S / 3
        if not self.mutant.has_heartbeat or not runner.claims:
            return
        await self.at_now(runner.conn)
        for claim_id in await queue.end_claims(runner.conn, list(runner.claims)):
            del runner.claims[claim_id]
        alive = await queue.renew_claims(runner.conn, list(runner.claims), lease_s=LEASE_S)
        for claim_id in list(runner.claims):
            if claim_id in alive:
                runner.claims[claim_id] = self.now + LEASE_S
            else:
                del runner.claims[claim_id]
                runner.held = [row for row in runner.held if row.claim_id != claim_id]

    async def crash(self, runner: Runner) -> str:
        """Forget everything; a new runner takes the place."""
        self.newest_claim = None
        fresh = Runner(runner.number, runner.conn, life=runner.life + 1, beat_at=self.now)
        self.runners[runner.number] = fresh
        return ""

    async def freeze(self, runner: Runner) -> str:
        """Stop moving."""
        runner.frozen = True
        runner.was_frozen |= set(runner.claims)
        return ""

    async def thaw(self, runner: Runner) -> str:
        """Go on; timers that ran out meanwhile fire in the order of the event loop: the heartbeat may be late."""
        runner.frozen = False
        if (self.choose(2) or 0) == 0:
            await self.beat(runner)
        return ""

    # ── everybody else ──

    async def move_clock(self) -> str:
        """Let seconds pass; live runners beat and time out on the way."""
        seconds = (1.0, 4.0, 11.0, 31.0)[self.choose(4) or 0]
        await self.pass_time(seconds)
        return f"+{seconds:.0f}"

    async def pass_time(self, seconds: float) -> None:
        """Move the clock, stopping at every timer of a live runner."""
        target = self.now + seconds
        while True:
            live = [runner for runner in self.runners if not runner.frozen]
            timers = [(runner.beat_at, runner.number) for runner in live if runner.claims]
            timers += [(call.timeout_at, runner.number) for runner in live for call in runner.calls]
            due = [(at, number) for at, number in timers if at <= target]
            if not due:
                break
            at, number = min(due)
            self.now = max(self.now, at)
            runner = self.runners[number]
            for call in [call for call in runner.calls if call.timeout_at <= self.now]:
                runner.calls.remove(call)
                runner.results.append(
                    Outcome(call.passed.message_id, call.passed.claim_id, "in_doubt", code="timeout", wait_s=7.0)
                )
            if runner.claims and runner.beat_at <= self.now:
                await self.beat(runner)
            self.rows = await self.look()
        self.now = target

    def some_message(self) -> UUID:
        """Return a message the scheduler picks."""
        return list(self.names)[self.choose(MESSAGES) or 0]

    async def cancel(self) -> str:
        """Cancel a message through the API."""
        message_id = self.some_message()
        await self.at_now(self.admin)
        answer = await cancel_message(self.admin, org_id=ORG, env="live", channel="email", message_id=message_id)
        if answer == "done":
            self.canceled.add(message_id)
        return f"{self.names[message_id]} {answer}"

    async def reschedule(self) -> str:
        """Reschedule a message by a minute, or into the next month."""
        message_id = self.some_message()
        await self.at_now(self.admin)
        cursor = await self.admin.execute(
            "SELECT nm_now() + make_interval(secs => %s)", [60 if (self.choose(2) or 0) else 3600]
        )
        row = await cursor.fetchone()
        assert row is not None
        answer = await reschedule_message(
            self.admin, org_id=ORG, env="live", channel="email", message_id=message_id, scheduled_at=row[0]
        )
        return f"{self.names[message_id]} {answer}"

    async def suppress(self) -> str:
        """Suppress one of a message's two recipients."""
        number = list(self.names).index(self.some_message()) + 1
        address = f"{'ab'[self.choose(2) or 0]}{number}@x.test"
        await self.admin.execute(SUPPRESS, [ORG, address])
        self.suppressed.setdefault(address, self.steps)
        return address

    async def failover(self) -> str:
        """Lose the newest claim's transaction, as an asynchronous standby may; its runner does not know."""
        claim_id = self.newest_claim
        assert claim_id is not None
        await self.admin.execute(FORGET_CLAIM, {"id": claim_id})
        self.newest_claim = None
        self.claim_numbers -= 1
        self.owners.pop(claim_id, None)
        return ""

    # ── what must hold ──

    def names_of(self, ids: Any) -> str:
        """Return the messages' names in the trace."""
        return " ".join(self.names[message_id] for message_id in ids)

    def check(self, name: str, before: dict[UUID, Row]) -> None:
        """Check what must hold after every step."""
        calls = Counter(message_id for message_id, _ in self.taken)
        for row in self.rows.values():
            old = before[row.id]
            if name.endswith("rescue") and old.claim_id is not None and row.claim_id is None:
                self.takeovers[row.id] += self.begun_under.get(row.id) == old.claim_id
                owner = self.owners.get(old.claim_id)
                if owner is not None:
                    runner = self.runners[owner[0]]
                    if runner.life == owner[1] and old.claim_id not in runner.was_frozen:
                        raise Violation(f"{self.names[row.id]} was taken from a runner that lived and beat")
            if calls[row.id] > 1 + self.takeovers[row.id]:
                raise Violation(
                    f"{self.names[row.id]} was taken {calls[row.id]} times with {self.takeovers[row.id]} takeovers"
                )
            if row.state == "sent" and (row.id, row.provider_id) not in self.taken:
                raise Violation(f"{self.names[row.id]} is sent as {row.provider_id}, which no call was answered with")
            if row.state == "canceled" and calls[row.id] > self.takeovers[row.id]:
                raise Violation(f"{self.names[row.id]} is canceled and was sent")
        if self.mutant.checks_each_step:
            self.check_books()

    def check_books(self) -> None:
        """Check that events and usage say what the states say."""
        for row in self.rows.values():
            if row.sent_events != (row.state == "sent"):
                raise Violation(f"{self.names[row.id]} is {row.state} with {row.sent_events} sent events")
            if row.queued != (row.state == "scheduled"):
                raise Violation(f"{self.names[row.id]} is {row.state} and {'' if row.queued else 'not '}queued")
        used = sum(row.units_called for row in self.rows.values() if row.state == "sent")
        reserved = sum(row.units for row in self.rows.values() if row.state in ("scheduled", "ambiguous"))
        if self.usage != (used, reserved):
            raise Violation(f"usage and reservation are {self.usage}, should be {(used, reserved)}")

    async def end(self) -> None:
        """Let everybody healthy finish, then check that nothing is left and nothing lost."""
        self.is_ending = True
        for runner in self.runners:
            if runner.frozen:
                await self.carry_out(f"r{runner.number} thaw", lambda runner=runner: self.thaw(runner))  # type: ignore[misc]
        for _ in range(400):
            runner = self.runners[self.steps % RUNNERS]
            if not runner.is_idle or any(row.queued for row in self.rows.values()):
                actions = self.actions_of(runner)
                wanted = "rescue" if runner.is_idle and self.steps % 7 == 0 else ""
                name, effect = next((a for a in actions if a[0].endswith(wanted) and wanted), actions[0])
                await self.carry_out(name, effect)
            elif all(other.is_idle for other in self.runners):
                break
            else:
                self.steps += 1
            if self.steps % 5 == 0:
                await self.pass_time(3700 if all(other.is_idle for other in self.runners) else 1)
        self.check_end()

    def check_end(self) -> None:
        """Check what must hold when all is done."""
        self.check_books()
        calls = Counter(message_id for message_id, _ in self.taken)
        for row in self.rows.values():
            if row.queued or row.state == "scheduled":
                raise Violation(f"{self.names[row.id]} was lost: still {row.state}")
            if row.state == "sent" and not calls[row.id]:
                raise Violation(f"{self.names[row.id]} is sent without a call")
