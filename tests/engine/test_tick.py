"""Ticks: a slot fires once, in order, each job with its share of the time."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest

from nightmail.engine.job import JobContext, JobResult
from nightmail.engine.schedule import previous_slot
from nightmail.engine.scheduler import Scheduler
from nightmail.engine.tick import Ticker
from nightmail.errors import DatabaseAway
from nightmail.ids import new_claim_id
from nightmail.jobs.table import JOBS
from nightmail.store import job_slots
from nightmail.store.job_slots import DueSlot
from tests.engine.place import Place, content_of, counting, job, place

pytestmark = pytest.mark.anyio


async def tick(here: Place, deadline_s: float = 25, *, dry: bool = False) -> list[tuple[str, str]]:
    outcome = await Ticker(here.engine).tick(trigger="test", deadline_s=deadline_s, dry=dry)
    return [(ran.job, ran.status) for ran in outcome.ran]


async def test_a_tick_runs_what_has_not_succeeded_and_nothing_else(database_url: str) -> None:
    calls: list[str] = []
    jobs = [job(name, counting(calls, name)) for name in ("one", "two")] + [job("later", None)]
    async with place(database_url, jobs) as here:
        await here.engine.run("one", trigger="direct")
        assert await tick(here) == [("two", "succeeded"), ("later", "not_configured")]
        assert await tick(here) == []
        outcome = await Ticker(here.engine).tick(trigger="test")
    assert calls == ["one", "two"]
    assert outcome.waiting == 0


async def test_a_job_runs_after_those_it_comes_after(database_url: str) -> None:
    calls: list[str] = []
    jobs = [
        job("expire", counting(calls, "expire"), after=("grant",)),
        job("report", counting(calls, "report"), after=("expire",)),
        job("grant", counting(calls, "grant")),
    ]
    async with place(database_url, jobs) as here:
        await tick(here)
    assert calls == ["grant", "expire", "report"]


async def test_a_job_waits_while_the_one_before_it_is_held_by_another_ticker(database_url: str) -> None:
    calls: list[str] = []
    jobs = [job("grant", counting(calls, "grant")), job("expire", counting(calls, "expire"), after=("grant",))]
    async with place(database_url, jobs) as here:
        ticker = Ticker(here.engine)
        newest = ticker.newest_slots(await here.engine.read_clock())
        claim_id = new_claim_id()
        held = await ticker.claim(newest, claim_id=claim_id, lease_s=30)
        assert [slot.job for slot in held] == ["grant"]
        assert await tick(here) == []
        await ticker.release(held, claim_id)
        assert await tick(here) == [("grant", "succeeded"), ("expire", "succeeded")]


async def test_a_slot_fires_once_among_eight_tickers_and_eight_schedulers(database_url: str) -> None:
    calls: list[str] = []
    names = [f"job-{number}" for number in range(6)]
    jobs = [job(name, counting(calls, name), after=("job-0",) if name == "job-5" else ()) for name in names]
    async with AsyncExitStack() as stack:
        places = [await stack.enter_async_context(place(database_url, jobs)) for _ in range(4)]
        tickers = [Ticker(here.engine) for here in places for _ in range(2)]
        schedulers = [Scheduler(here.engine, here.stopping) for here in places for _ in range(2)]
        outcomes = await asyncio.gather(
            *(ticker.tick(trigger="tick") for ticker in tickers), *(scheduler.fire() for scheduler in schedulers)
        )
        for here in places:
            await here.settled()
        await tick(places[0])
        runs = places[0].rows("SELECT job, count(*) FROM job_runs GROUP BY 1 ORDER BY 1")
    assert sorted(calls) == sorted(names)
    assert runs == [(name, 1) for name in sorted(names)]
    assert len(outcomes) == 16


async def test_a_crashed_tickers_slots_are_taken_over_when_its_lease_ends(database_url: str) -> None:
    calls: list[str] = []
    jobs = [job("one", counting(calls, "one"), schedule="0 0 1 1 *")]
    async with place(database_url, jobs) as here:
        ticker = Ticker(here.engine)
        newest = ticker.newest_slots(await here.engine.read_clock())
        crashed = await ticker.claim(newest, claim_id=new_claim_id(), lease_s=30)
        assert [slot.attempts for slot in crashed] == [1]
        assert await tick(here) == []
    async with place(database_url, jobs, clock_offset="31 seconds") as here:
        assert await tick(here) == [("one", "succeeded")]
        late = await here.database.run(
            partial(
                job_slots.finish_slot,
                job="one",
                slot=newest[0].slot,
                claim_id=new_claim_id(),
                state="failed",
                again_s=0,
            )
        )
        assert not late
        assert here.rows("SELECT state FROM job_slots") == [("succeeded",)]


async def test_a_failed_slot_is_tried_again_with_backoff_from_a_minute_to_an_hour(database_url: str) -> None:
    async def run(ctx: JobContext) -> JobResult:
        raise ValueError("no")

    jobs = [job("broken", run, schedule="0 0 1 1 *")]
    waits: list[float] = []
    offset = timedelta()
    for _ in range(9):
        async with place(database_url, jobs, clock_offset=f"{offset.total_seconds():.0f} seconds") as here:
            assert await tick(here) == [("broken", "failed")]
            assert await tick(here) == []
            query = "SELECT extract(epoch FROM retry_at - now())::float FROM job_slots"
            ((from_now,),) = here.rows(query)
            waits.append(round((from_now - offset.total_seconds()) / 60))
            offset = timedelta(seconds=from_now + 2)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]


async def test_a_failed_slot_recovers(database_url: str) -> None:
    calls: list[str] = []
    is_broken = True

    async def run(ctx: JobContext) -> JobResult:
        if is_broken:
            raise DatabaseAway("gone")
        return await counting(calls, "any")(ctx)

    jobs = [job("any", run, schedule="0 0 1 1 *")]
    async with place(database_url, jobs) as here:
        outcome = await Ticker(here.engine).tick(trigger="test")
        assert [ran.status for ran in outcome.ran] == ["away"]
        assert outcome.waiting == 1
    is_broken = False
    async with place(database_url, jobs, clock_offset="2 minutes") as here:
        assert await tick(here) == [("any", "succeeded")]
        assert here.rows("SELECT state, attempts FROM job_slots") == [("succeeded", 0)]


async def test_each_job_gets_a_fair_share_and_the_tick_answers_in_time(database_url: str) -> None:
    shares: dict[str, float] = {}

    async def greedy(ctx: JobContext) -> JobResult:
        shares[ctx.job] = ctx.deadline.total_s
        while not ctx.deadline.is_over:
            await asyncio.sleep(0.02)
        return JobResult({"claimed": 1}, more=True)

    names = [f"job-{number}" for number in range(3)]
    async with place(database_url, [job(name, greedy) for name in names]) as here:
        outcome = await Ticker(here.engine).tick(trigger="test", deadline_s=6)
    assert [ran.job for ran in outcome.ran] == names
    assert outcome.duration_ms <= 5500
    assert all(1.4 < share < 3.5 for share in shares.values()), shares
    assert outcome.waiting == 3


async def test_what_the_time_does_not_allow_is_given_back(database_url: str) -> None:
    async def greedy(ctx: JobContext) -> JobResult:
        await asyncio.sleep(0.6)
        return JobResult({"claimed": 1})

    names = [f"job-{number}" for number in range(4)]
    async with place(database_url, [job(name, greedy) for name in names]) as here:
        first = await Ticker(here.engine).tick(trigger="test", deadline_s=2)
        states = here.rows("SELECT state, count(*) FROM job_slots GROUP BY 1 ORDER BY 1")
        second = await Ticker(here.engine).tick(trigger="test", deadline_s=20)
    assert 0 < len(first.ran) < 4
    assert first.waiting == 4 - len([ran for ran in first.ran if ran.status == "succeeded"])
    assert ("running", 1) not in states
    assert {ran.job for ran in first.ran} | {ran.job for ran in second.ran} == set(names)


async def test_a_dry_tick_changes_nothing(database_url: str) -> None:
    calls: list[str] = []
    jobs = [job("one", counting(calls, "one"))]
    async with place(database_url, jobs) as here:
        before = content_of(database_url)
        assert await tick(here, dry=True) == [("one", "succeeded")]
        await here.settled()
        assert content_of(database_url) == before


async def test_after_three_days_of_silence_one_tick_runs_each_job_once(database_url: str) -> None:
    async with place(database_url, JOBS) as here:
        await tick(here)
        here.execute(
            "INSERT INTO idempotency_keys"
            " SELECT gen_random_uuid(), 'live', n::text, '\\x00', 200, '{}', now(), now() + interval '24 hours'"
            " FROM generate_series(1, 12000) AS n"
        )
    async with place(database_url, JOBS, clock_offset="3 days") as here:
        now = await here.engine.read_clock()
        ran = await tick(here)
        again = await tick(here)
        left = here.rows("SELECT count(*) FROM idempotency_keys")
        slots = dict(here.rows("SELECT job, max(slot) FROM job_slots GROUP BY 1"))
    moved_on = {spec.name for spec in JOBS if previous_slot(spec.schedule, now) > now - timedelta(days=3)}
    assert moved_on <= {name for name, _ in ran}
    often = {spec.name for spec in JOBS if spec.schedule.startswith("*")}
    assert {name for name, _ in again} <= often  # the minute may have turned
    assert left == [(0,)]
    for spec in JOBS:
        assert now - slots[spec.name] <= now - previous_slot(spec.schedule, now)


async def test_old_slots_are_deleted_and_the_newest_of_each_job_is_kept(database_url: str) -> None:
    async with place(database_url, [job("one", None)]) as here:
        here.execute(
            "INSERT INTO job_slots (job, slot, state)"
            " SELECT 'one', timestamptz '2026-01-01' + n * interval '1 day', 'succeeded'"
            " FROM generate_series(0, 9) AS n"
        )
        newest = DueSlot("one", datetime(2026, 1, 9, tzinfo=UTC))
        assert await here.database.run(partial(job_slots.delete_past, newest=[newest])) == 8
        assert len(here.rows("SELECT FROM job_slots")) == 2
