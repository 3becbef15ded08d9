"""How long one claim of 500 takes, and how many blocks it reads, whatever else the tables hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import psycopg

from bench import seed
from bench.plan import Plan, Tell
from bench.report import Check, Section
from bench.server import Bench, Connection
from nightmail.ids import new_claim_id
from nightmail.store.queue import CLAIM, TURNS_READ
from nightmail.store.test_sends import FINISH_TEST

BATCH = 500
WARM_UP = 6  # the first ones read from disk and are planned


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement that takes a batch."""

    name: str
    text: str
    arguments: Callable[[], Mapping[str, Any]]


STATEMENTS = (
    Statement(
        "claim_due",
        CLAIM,
        lambda: {
            "lane": "live:email",
            "claim_id": new_claim_id(),
            "runner": "bench",
            "limit": BATCH,
            "lease_s": 60.0,
            "turns": TURNS_READ,
        },
    ),
    Statement("test set", FINISH_TEST, lambda: {"limit": BATCH, "turns": TURNS_READ, "shard": 0}),
)


@dataclass(frozen=True, slots=True)
class Latency:
    """Median milliseconds and the median of blocks touched (buffer hits and reads)."""

    ms: float
    blocks: float


def run(bench: Bench, plan: Plan, tell: Tell) -> Section:
    """Measure the cases, each on a database of its own, in turn."""
    base = f"{plan.claim_base:,} due"
    many_orgs = f"{base} of {plan.claim_orgs:,} orgs"
    cases: dict[str, Callable[[Connection], None]] = {
        base: lambda conn: _due(conn, plan.claim_base, plan.orgs),
        "…, again": lambda conn: _due(conn, plan.claim_base, plan.orgs),
        f"… + {plan.claim_many:,} in the future": lambda conn: _due_and_future(conn, plan),
        f"… after {plan.claim_many:,} churned through": lambda conn: _churn(conn, plan),
    }
    for stored in plan.claim_stored:
        cases[f"… + {stored:,} stored"] = lambda conn, stored=stored: _due_and_stored(conn, plan, stored)  # type: ignore[misc]
    cases |= {
        f"{plan.claim_many:,} due": lambda conn: _due(conn, plan.claim_many, plan.orgs),
        many_orgs: lambda conn: _due(conn, plan.claim_base, plan.claim_orgs),
        f"{plan.claim_many:,} due of {plan.claim_orgs:,} orgs": lambda conn: _due(
            conn, plan.claim_many, plan.claim_orgs
        ),
    }
    # a batch shared by many orgs reads the index once for each: growth is judged among equals
    bases = {case: many_orgs if case.endswith("orgs") else base for case in cases}
    with ExitStack() as stack:
        connections = {}
        for number, (name, fill) in enumerate(cases.items()):
            tell(f"seeding: {name}")
            database = f"claims_{number}"
            stack.callback(bench.drop, database)
            url = bench.make(database, fill)
            connections[name] = stack.enter_context(psycopg.connect(url, autocommit=True, prepare_threshold=2))
        connections[base].execute("CHECKPOINT")
        found = _measure(connections, plan.claim_repeats, tell)
    section = Section(
        title=f"Claim latency, batches of {BATCH}",
        columns=("in the queue", *(f"{s.name} {unit}" for s in STATEMENTS for unit in ("ms", "×", "blocks"))),
        lines=[
            f"Median of {plan.claim_repeats} claims, each rolled back; × against {base} of as many orgs.",
            "`claim_due` takes live messages under a lease; `test set` takes, decides and records test ones.",
            "Half of the messages are live, half test. Blocks are those the query's reading part touches: they do not",
            "depend on what else the machine does.",
        ],
    )
    growth = {
        (case, s.name): found[case][s.name].ms / found[bases[case]][s.name].ms for case in cases for s in STATEMENTS
    }
    for case, latencies in found.items():
        row = [case]
        for name, latency in latencies.items():
            row += [f"{latency.ms:.2f}", f"{growth[case, name]:.2f}", f"{latency.blocks:,.0f}"]
        section.rows.append(row)
    for statement in STATEMENTS:
        worst = max(cases, key=lambda case: growth[case, statement.name])
        section.checks.append(
            Check(f"{statement.name}, growth in the worst case ({worst})", growth[worst, statement.name], most=1.3)
        )
    return section


def _due(conn: Connection, messages: int, orgs: int) -> None:
    """Half of the messages are live, half are test."""
    seed.seed_orgs(conn, orgs)
    for env in ("live", "test"):
        seed.seed_messages(conn, messages // 2, orgs=orgs, env=env)
    seed.queue_all(conn)


def _due_and_future(conn: Connection, plan: Plan) -> None:
    seed.seed_orgs(conn, plan.orgs)
    for env in ("live", "test"):
        seed.seed_messages(conn, plan.claim_base // 2, orgs=plan.orgs, env=env)
        seed.seed_messages(
            conn,
            plan.claim_many // 2,
            orgs=plan.orgs,
            env=env,
            from_s=seed.FUTURE_FROM_S,
            span_s=seed.FUTURE_SPAN_S,
        )
    seed.queue_all(conn)


def _due_and_stored(conn: Connection, plan: Plan, stored: int) -> None:
    seed.seed_orgs(conn, plan.orgs)
    for env in ("live", "test"):
        seed.seed_messages(conn, stored // 2, orgs=plan.orgs, env=env, state="sent")
        seed.seed_messages(conn, plan.claim_base // 2, orgs=plan.orgs, env=env)
    seed.queue_all(conn)


# A claim that is recorded at once: what claim, gate and record leave in the queue's indexes, without the calls.
FORGET_CLAIM = "DELETE FROM message_queue WHERE claim_id = %(claim_id)s"
CHURN_STEP = 20_000


def _churn(conn: Connection, plan: Plan) -> None:
    """Pass `claim_many` messages through the queue, in portions, while autovacuum does what it does; then fill up."""
    seed.seed_orgs(conn, plan.orgs)
    claim, finish = STATEMENTS
    passed = 0
    while passed < plan.claim_many:
        step = min(CHURN_STEP, plan.claim_many - passed)
        for env in ("live", "test"):
            seed.seed_messages(conn, step // 2, orgs=plan.orgs, env=env)
        seed.queue_all(conn)
        while True:
            arguments = claim.arguments()
            if not conn.execute(claim.text, arguments).fetchall():
                break
            conn.execute(FORGET_CLAIM, arguments)
        while (conn.execute(finish.text, finish.arguments()).fetchone() or (0,))[0]:
            pass
        passed += step
    # claimed live messages are not recorded here: they must not be queued again
    conn.execute("UPDATE messages SET state = 'sent' WHERE env = 'live' AND state = 'scheduled'")
    for env in ("live", "test"):
        seed.seed_messages(conn, plan.claim_base // 2, orgs=plan.orgs, env=env)
    seed.queue_all(conn)


def _measure(connections: Mapping[str, Connection], repeats: int, tell: Tell) -> dict[str, dict[str, Latency]]:
    """Claim and roll back in all databases in turn, so that the machine's moods fall on all alike."""
    times: dict[tuple[str, str], list[float]] = {(case, s.name): [] for case in connections for s in STATEMENTS}
    for number in range(WARM_UP + repeats):
        tell(f"claiming, {number + 1} of {WARM_UP + repeats}")
        for case, conn in connections.items():
            for statement in STATEMENTS:
                with _undone(conn):
                    began = time.perf_counter()
                    conn.execute(statement.text, statement.arguments()).fetchall()
                    if number >= WARM_UP:
                        times[case, statement.name].append((time.perf_counter() - began) * 1000)
    return {
        case: {s.name: Latency(median(times[case, s.name]), _count_blocks(conn, s)) for s in STATEMENTS}
        for case, conn in connections.items()
    }


@contextmanager
def _undone(conn: Connection) -> Iterator[None]:
    """Roll back behind psycopg's back: at a ROLLBACK that it sees it forgets its prepared statements."""
    conn.pgconn.exec_(b"BEGIN")
    try:
        yield
    finally:
        conn.pgconn.exec_(b"ROLLBACK")


def _count_blocks(conn: Connection, statement: Statement) -> float:
    """Return the blocks that one execution touches."""
    explain = b"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) " + statement.text.encode()
    blocks: list[float] = []
    for _ in range(3):
        with _undone(conn):
            row = conn.execute(explain, statement.arguments()).fetchone()
            assert row is not None, "EXPLAIN returns one row"
            plan = row[0][0]["Plan"]
            blocks.append(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])
    return median(blocks)
