"""The queue's statements: bounded claims under any plan, fair shares, leases, and who waits for whom."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import psycopg
import pytest

from nightmail.ids import new_claim_id, new_id
from nightmail.store import gate, queue, test_sends
from nightmail.store.database import Connection
from nightmail.store.messages import cancel_message, reschedule_message
from tests.crash.world import World

pytestmark = pytest.mark.anyio

# Rows in the queue alone, for what only the queue's statements see.
FILL = """
INSERT INTO message_queue (message_id, org_id, lane, due_at)
SELECT gen_random_uuid(), %s, %s, now() - make_interval(secs => n * %s)
FROM generate_series(1, %s) AS n
"""
HINTS = """
INSERT INTO queue_turns (lane, due_minute, org_id)
SELECT DISTINCT lane, date_trunc('minute', due_at), org_id
FROM message_queue
ON CONFLICT DO NOTHING
"""


@pytest.fixture
async def conn(database_url: str) -> AsyncIterator[Connection]:
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as conn:
        yield conn


async def fill(conn: Connection, count: int, *, org_id: UUID, lane: str = "live:email", step_s: float = 0.001) -> None:
    await conn.execute(FILL, (org_id, lane, step_s, count))


async def claim(conn: Connection, limit: int, *, lane: str = "live:email", lease_s: float = 60) -> list[queue.Claimed]:
    return await queue.claim_due(conn, lane, runner="test", limit=limit, lease_s=lease_s)


async def value(conn: Connection, query: str, *arguments: Any) -> Any:
    cursor = await conn.execute(query, arguments or None)
    row = await cursor.fetchone()
    return None if row is None else row[0]


# ── bounded claims ──

PLANS = {
    "planner's choice": "",
    "nested loop": "SET enable_hashjoin = off; SET enable_mergejoin = off",
    "hash join": "SET enable_nestloop = off; SET enable_mergejoin = off",
    "no index": "SET enable_indexscan = off; SET enable_bitmapscan = off; SET enable_indexonlyscan = off",
    "parallel": "SET debug_parallel_query = on; SET parallel_setup_cost = 0; SET min_parallel_table_scan_size = 0",
}
STATISTICS = ["none", "of an empty table", "of ten times as many rows", "fresh"]


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("plan", PLANS)
async def test_a_claim_never_takes_more_than_its_limit(conn: Connection, plan: str, statistics: str) -> None:
    await conn.execute("ALTER TABLE message_queue SET (autovacuum_enabled = off)")
    orgs = [new_id() for _ in range(3)]
    if statistics == "of an empty table":
        await conn.execute("ANALYZE message_queue, queue_turns")
    if statistics == "of ten times as many rows":
        await fill(conn, 20_000, org_id=orgs[0])
        await conn.execute("ANALYZE message_queue, queue_turns")
        await conn.execute("TRUNCATE message_queue")
    for org_id in orgs:
        for lane in ("live:email", "test"):
            await fill(conn, 700, org_id=org_id, lane=lane)
    await conn.execute(HINTS)
    if statistics == "fresh":
        await conn.execute("ANALYZE message_queue, queue_turns")
    if PLANS[plan]:
        await conn.execute(PLANS[plan])
    for limit in (1, 2, 10, 100, 500):
        rows = await claim(conn, limit)
        assert len(rows) == limit
        assert len({row.message_id for row in rows}) == limit
        assert await value(conn, "SELECT count(*) FROM message_queue WHERE claim_id = %s", rows[0].claim_id) == limit
        before = await value(conn, "SELECT count(*) FROM message_queue WHERE lane = 'test'")
        await test_sends.finish_due_test_messages(conn, limit=limit, shard=0)
        assert await value(conn, "SELECT count(*) FROM message_queue WHERE lane = 'test'") == before - limit


async def test_claims_made_at_once_are_disjoint_and_each_within_its_limit(database_url: str, conn: Connection) -> None:
    await fill(conn, 3000, org_id=new_id())
    await conn.execute(HINTS)

    async def claimer() -> list[UUID]:
        taken: list[UUID] = []
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as mine:
            while rows := await claim(mine, 37):
                assert len(rows) <= 37
                taken += [row.message_id for row in rows]
        return taken

    taken = await asyncio.gather(*(claimer() for _ in range(8)))
    assert sum(map(len, taken)) == len(set().union(*taken)) == 3000


# ── the plan ──


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(node for child in plan.get("Plans", []) for node in nodes(child))]


STATEMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "claim": (queue.CLAIM, {"lane": "live:email", "claim_id": new_claim_id(), "runner": "r", "lease_s": 60}),
    "test sends": (test_sends.FINISH_TEST.replace("'test'", "'live:email'"), {"shard": 0}),
    "due lanes": (queue.HAS_DUE, {}),
}


@pytest.mark.parametrize("statistics", ["stale", "fresh"])
async def test_due_rows_are_found_by_an_index_condition_on_due_at(conn: Connection, statistics: str) -> None:
    await conn.execute("ALTER TABLE message_queue SET (autovacuum_enabled = off)")
    if statistics == "stale":
        await conn.execute("ANALYZE")
    for _ in range(4):
        await fill(conn, 50_000, org_id=new_id(), step_s=0.05)
    await conn.execute("UPDATE message_queue SET due_at = due_at + interval '3 days' WHERE random() < 0.7")
    await conn.execute(HINTS)
    if statistics == "fresh":
        await conn.execute("ANALYZE")
    for name, (statement, arguments) in STATEMENTS.items():
        cursor = await conn.execute(
            "EXPLAIN (FORMAT JSON) " + statement,
            {**arguments, "limit": 100, "turns": queue.TURNS_READ},
        )
        row = await cursor.fetchone()
        assert row is not None
        scans = [node for node in nodes(row[0][0]["Plan"]) if node.get("Relation Name") == "message_queue"]
        reads = [node for node in scans if "Scan" in node["Node Type"]]
        assert reads, name
        for scan in reads:
            assert "Seq Scan" not in scan["Node Type"], (name, json.dumps(scan, indent=1))
        of_due = [scan for scan in reads if "due" in scan.get("Index Name", "")]
        assert len(of_due) == (1 if name == "due lanes" else 2), name
        for scan in of_due:
            assert "due_at <=" in scan["Index Cond"], (name, scan["Index Cond"])


async def test_a_claim_reads_only_what_it_takes_from_a_large_queue(conn: Connection) -> None:
    for _ in range(4):
        await fill(conn, 50_000, org_id=new_id(), step_s=0.05)
    await conn.execute(HINTS)
    await conn.execute("ANALYZE")
    await queue.prune_turns(conn)
    cursor = await conn.execute(
        "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + queue.CLAIM,
        {**STATEMENTS["claim"][1], "limit": 100, "turns": queue.TURNS_READ},
    )
    row = await cursor.fetchone()
    assert row is not None
    assert row[0][0]["Plan"]["Shared Hit Blocks"] + row[0][0]["Plan"]["Shared Read Blocks"] < 4000


# ── fair share ──


async def test_ten_rows_leave_within_two_batches_beside_twenty_thousand(conn: Connection) -> None:
    many, few = new_id(), new_id()
    await fill(conn, 20_000, org_id=many)
    await fill(conn, 10, org_id=few, step_s=0)  # the youngest of all
    await conn.execute(HINTS)
    batches = [await claim(conn, 50) for _ in range(2)]
    assert sum(row.org_id == few for rows in batches for row in rows) == 10
    assert [len(rows) for rows in batches] == [50, 50]


@pytest.mark.parametrize("few_step_s", [0.0, 3600.0])
async def test_shares_are_fair_when_both_orgs_have_many_minutes_of_hints(conn: Connection, few_step_s: float) -> None:
    many, few = new_id(), new_id()
    await fill(conn, 20_000, org_id=many, step_s=20)  # more than four days: 6,667 minutes
    await fill(conn, 10, org_id=few, step_s=few_step_s)
    await conn.execute(HINTS)
    assert await value(conn, "SELECT count(*) FROM queue_turns") > 6000
    await queue.prune_turns(conn)  # as every run does first
    assert await value(conn, "SELECT count(*) FROM queue_turns") <= 8
    batches = [await claim(conn, 50) for _ in range(2)]
    assert sum(row.org_id == few for rows in batches for row in rows) == 10


async def test_rows_without_a_hint_are_claimed_all_the_same(conn: Connection) -> None:
    await fill(conn, 25, org_id=new_id())
    assert [len(await claim(conn, 10)) for _ in range(4)] == [10, 10, 5, 0]


async def test_pruning_keeps_a_hint_for_every_org_with_something_due(conn: Connection) -> None:
    waiting, done = new_id(), new_id()
    await fill(conn, 500, org_id=waiting, step_s=60)
    await fill(conn, 500, org_id=done, step_s=60)
    await conn.execute(HINTS)
    await conn.execute("DELETE FROM message_queue WHERE org_id = %s", [done])
    await queue.prune_turns(conn)
    old = "SELECT count(*) FROM queue_turns WHERE due_minute < now() - interval '2 minutes' AND org_id = %s"
    assert [await value(conn, old, org) for org in (waiting, done)] == [1, 0]


# ── leases ──


async def test_an_expired_lease_is_not_renewed_and_its_rows_are_freed_once(conn: Connection) -> None:
    await fill(conn, 5, org_id=new_id())
    rows = await claim(conn, 5, lease_s=30)
    claim_id = rows[0].claim_id
    assert await queue.renew_claims(conn, [claim_id], lease_s=60) == {claim_id}
    await conn.execute("SET nightmail.clock_offset = '61 seconds'")
    assert await queue.renew_claims(conn, [claim_id], lease_s=60) == set()
    assert await queue.rescue_expired(conn, evidence_wait_s=120) == 5
    assert await queue.rescue_expired(conn, evidence_wait_s=120) == 0
    assert await value(conn, "SELECT count(*) FROM claims") == 0
    again = await claim(conn, 5)
    assert {row.message_id for row in again} == {row.message_id for row in rows}
    assert {row.takeovers for row in again} == {0}
    assert await queue.renew_claims(conn, [claim_id], lease_s=60) == set()


async def test_a_lease_from_before_the_clock_was_set_back_ends_too(conn: Connection) -> None:
    await fill(conn, 2, org_id=new_id())
    await conn.execute("SET nightmail.clock_offset = '3 hours'")
    await claim(conn, 2)
    await conn.execute("SET nightmail.clock_offset = '0'")
    assert await queue.rescue_expired(conn, evidence_wait_s=0) == 2


async def test_a_row_with_an_intent_waits_for_evidence_and_counts_the_takeover(conn: Connection) -> None:
    await fill(conn, 2, org_id=new_id())
    first, second = await claim(conn, 2, lease_s=30)
    await conn.execute("UPDATE message_queue SET intent_at = now() WHERE message_id = %s", [first.message_id])
    await conn.execute("SET nightmail.clock_offset = '40 seconds'")
    assert await queue.rescue_expired(conn, evidence_wait_s=120) == 2
    assert [row.message_id for row in await claim(conn, 2)] == [second.message_id]
    await conn.execute("SET nightmail.clock_offset = '121 seconds'")
    (row,) = await claim(conn, 2)
    assert (row.message_id, row.takeovers, row.in_doubt) == (first.message_id, 1, True)


async def test_a_runner_frozen_within_a_transaction_does_not_hold_up_the_rescue_of_others(
    database_url: str, conn: Connection
) -> None:
    await fill(conn, 6, org_id=new_id())
    frozen, dead = await claim(conn, 3), await claim(conn, 3)
    async with await psycopg.AsyncConnection.connect(database_url) as stuck:
        await stuck.execute("SELECT FROM message_queue WHERE message_id = %s FOR UPDATE", [frozen[0].message_id])
        await conn.execute("SET nightmail.clock_offset = '61 seconds'; SET lock_timeout = '500ms'")
        assert await queue.rescue_expired(conn, evidence_wait_s=0) == 5
        held = await value(conn, "SELECT array_agg(message_id) FROM message_queue WHERE claim_id IS NOT NULL")
        assert held == [frozen[0].message_id]
        # The claim outlives its last row, or that row would be nobody's for ever.
        assert await value(conn, "SELECT array_agg(claim_id) FROM claims") == [frozen[0].claim_id]
        await stuck.rollback()
    assert await queue.rescue_expired(conn, evidence_wait_s=0) == 1
    assert await value(conn, "SELECT count(*) FROM claims") == 0
    assert len(await claim(conn, 10)) == 6
    assert dead[0].claim_id != frozen[0].claim_id


async def test_more_dead_claims_than_one_rescue_takes_are_all_ended(conn: Connection) -> None:
    await fill(conn, 250, org_id=new_id())
    for _ in range(250):
        assert len(await claim(conn, 1)) == 1
    await conn.execute("SET nightmail.clock_offset = '61 seconds'")
    assert await queue.rescue_expired(conn, evidence_wait_s=0) == 250
    assert await value(conn, "SELECT count(*) FROM claims") == 0


async def test_release_gives_back_what_was_not_begun(conn: Connection) -> None:
    await fill(conn, 4, org_id=new_id())
    rows = await claim(conn, 4)
    begun, older, *_ = [row.message_id for row in rows]
    await conn.execute("UPDATE message_queue SET intent_at = now() WHERE message_id = ANY (%s)", [[begun, older]])
    assert await queue.release_claims(conn, [rows[0].claim_id], not_begun=[older]) == 3
    assert await value(conn, "SELECT array_agg(message_id) FROM message_queue WHERE claim_id IS NOT NULL") == [begun]
    assert await value(conn, "SELECT count(*) FROM claims") == 1
    assert await queue.release_claims(conn, [new_claim_id()]) == 0


# ── cancel and reschedule against the gate ──


async def test_cancel_and_gate_at_once_have_one_winner(world: World) -> None:
    messages = await world.accept(40)
    where: dict[str, Any] = {"org_id": world.org_id, "env": "live", "channel": "email"}
    canceled = begun = 0
    async with world.database() as database, database.connection() as one, database.connection() as two:
        rows = {row.message_id: row for row in await claim(one, 40)}
        for number, message in enumerate(messages):
            taking = cancel_message(one, **where, message_id=message)
            passing = gate.pass_gate(two, rows[message].claim_id, [message], call_s=5, shard=0)
            pair = asyncio.gather(*((taking, passing) if number % 2 else (passing, taking)))
            first, second = await pair
            answer, result = (first, second) if number % 2 else (second, first)
            assert isinstance(result, gate.GateResult)
            assert (answer == "done") == (result.lost == 1) == (not result.passed)
            assert answer in ("done", "already_sending")
            canceled += answer == "done"
            begun += len(result.passed)
    assert canceled + begun == 40
    assert world.ask("SELECT count(*) FROM message_queue WHERE intent_at IS NOT NULL") == [begun]
    assert world.account().reserved_left == 0


async def test_a_rescheduled_row_is_taken_from_its_claim(world: World) -> None:
    (message,) = await world.accept()
    async with world.database() as database, database.connection() as conn:
        (row,) = await claim(conn, 1)
        later = await value(conn, "SELECT nm_now() + interval '40 days'")
        answer = await reschedule_message(
            conn, org_id=world.org_id, env="live", channel="email", message_id=message, scheduled_at=later
        )
        assert answer == "done"
        result = await gate.pass_gate(conn, row.claim_id, [message], call_s=5, shard=0)
        assert (result.lost, result.passed) == (1, [])
        assert await claim(conn, 1) == []
        # Its units moved with it to the other month.
        this_month = "SELECT sum(reserved) FROM usage_records WHERE period = to_char(now(), 'YYYY-MM')"
        assert await value(conn, this_month) == 0
    assert world.account().reserved_left == 0
