"""One call of one job."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest
import structlog

from nightmail.engine.job import JobContext, JobResult
from nightmail.errors import DatabaseAway, NotConfigured
from nightmail.jobs.table import JOBS
from nightmail.store.database import Database
from tests.engine.place import SECRET, content_of, counting, job, place

pytestmark = pytest.mark.anyio


async def test_every_call_is_a_row_with_slot_trigger_and_counts(database_url: str) -> None:
    calls: list[str] = []
    async with place(database_url, [job("sum", counting(calls, "sum", counts={"claimed": 3}))]) as here:
        first = await here.engine.run("sum", trigger="vercel")
        await here.engine.run("sum", trigger="cron-job.org")
        rows = here.rows(
            "SELECT job_id, job, slot, trigger, host, state, results, more, error FROM job_runs ORDER BY 1"
        )
        slots = here.rows("SELECT job, slot, state, claim_id FROM job_slots")
    assert first.state == "succeeded"
    assert first.counts == {"claimed": 3, "failed": 0}
    assert [row[3:] for row in rows] == [
        ("vercel", "here", "succeeded", {"claimed": 3, "failed": 0}, False, None),
        ("cron-job.org", "here", "succeeded", {"claimed": 3, "failed": 0}, False, None),
    ]
    assert rows[0][0] == first.job_id
    assert slots == [("sum", first.slot, "succeeded", None)]


async def test_the_log_lines_have_the_form_of_the_source_and_the_job_id_is_in_every_line(database_url: str) -> None:
    async def run(ctx: JobContext) -> JobResult:
        ctx.log.info("job.item")
        structlog.get_logger().info("elsewhere", **structlog.contextvars.get_contextvars())
        return JobResult({"processed": 150, "successful": 148, "skipped": 2, "failed": 0})

    keys = ("processed", "successful", "skipped", "failed")
    with structlog.testing.capture_logs() as lines:
        async with place(database_url, [job("credits-grant", run, keys=keys, holds="table")]) as here:
            outcome = await here.engine.run("credits-grant", trigger="test")
    lines = [line for line in lines if line.get("job") == "credits-grant"]
    head = f"[Credits Grant Job {outcome.job_id}]"
    assert lines[0]["event"] == f"{head} Starting credits-grant work"
    assert lines[-1]["event"] == f"{head} Completed in {outcome.duration_ms}ms. Processed: 150, Successful: 148"
    assert lines[-1]["results"] == dict(outcome.counts)
    assert len(lines) == 4
    assert {line["job_id"] for line in lines} == {str(outcome.job_id)}


async def test_a_broken_run_is_failed_without_stack_or_secret(database_url: str) -> None:
    async def run(ctx: JobContext) -> JobResult:
        raise ValueError(f"cannot use {SECRET} of postgresql://me:hunter22@host/db\nsecond line \x1b[31m")

    with structlog.testing.capture_logs() as lines:
        async with place(database_url, [job("broken", run)]) as here:
            outcome = await here.engine.run("broken", trigger="test")
            rows = here.rows("SELECT state, error FROM job_runs")
            slots = here.rows("SELECT count(*) FROM job_slots")
    assert outcome.state == "failed"
    assert outcome.error == "ValueError: cannot use [hidden] of postgresql://me:[hidden]@host/db"
    assert rows == [("failed", outcome.error)]
    assert slots == [(0,)]
    assert any(line["event"] == "run.broke" and line["exc_info"] for line in lines)


async def test_what_is_not_built_or_not_configured_is_said_and_left_until_the_next_slot(database_url: str) -> None:
    async def unset(ctx: JobContext) -> JobResult:
        raise NotConfigured(["STRIPE_API_KEY"])

    async with place(database_url, [job("later", None), job("unset", unset)]) as here:
        later = await here.engine.run("later", trigger="test")
        unset_ = await here.engine.run("unset", trigger="test")
        slots = here.rows("SELECT job, state FROM job_slots ORDER BY 1")
        rows = here.rows("SELECT job, state FROM job_runs ORDER BY 1")
    assert (later.state, list(later.missing)) == ("not_configured", ["later is not built in this version"])
    assert (unset_.state, list(unset_.missing)) == ("not_configured", ["STRIPE_API_KEY"])
    assert slots == rows == [("later", "not_configured"), ("unset", "not_configured")]


async def test_a_second_caller_of_a_whole_table_job_is_told_who_holds_it(database_url: str) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def run(ctx: JobContext) -> JobResult:
        begun.set()
        await go_on.wait()
        return JobResult({"claimed": 1})

    async with place(database_url, [job("whole", run, holds="table")]) as here:
        first = asyncio.create_task(here.engine.run("whole", trigger="first"))
        await begun.wait()
        others = await asyncio.gather(*(here.engine.run("whole", trigger="other") for _ in range(4)))
        go_on.set()
        outcome = await first
        again = await here.engine.run("whole", trigger="later")
        locks = here.rows("SELECT count(*) FROM job_locks")
        states = here.rows("SELECT state, count(*) FROM job_runs GROUP BY 1 ORDER BY 1")
    assert outcome.state == again.state == "succeeded"
    assert {other.state for other in others} == {"deduplicated"}
    assert {other.running_job_id for other in others} == {outcome.job_id}
    assert locks == [(0,)]
    assert states == [("deduplicated", 4), ("succeeded", 2)]


async def test_row_claiming_jobs_run_side_by_side(database_url: str) -> None:
    together = asyncio.Barrier(3)

    async def run(ctx: JobContext) -> JobResult:
        await together.wait()
        return JobResult({"claimed": 1})

    async with place(database_url, [job("rows", run)]) as here:
        outcomes = await asyncio.gather(*(here.engine.run("rows", trigger="test") for _ in range(3)))
    assert {outcome.state for outcome in outcomes} == {"succeeded"}


async def test_a_killed_holder_is_replaced_when_its_lease_ends_and_its_run_is_interrupted(database_url: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.engine.holder", database_url], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        with process.stdout:
            assert any(line == "holding\n" for line in process.stdout)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    calls: list[str] = []
    jobs = [job("whole", counting(calls, "whole"), holds="table")]
    async with place(database_url, jobs) as here:
        refused = await here.engine.run("whole", trigger="test")
        held_by = here.rows("SELECT job_id FROM job_locks")[0][0]
    assert (refused.state, refused.running_job_id, calls) == ("deduplicated", held_by, [])
    async with place(database_url, jobs, clock_offset="1 hour") as here:
        replaced = await here.engine.run("whole", trigger="test")
        assert await _interrupted(here.database) == 1
        states = here.rows("SELECT state, error FROM job_runs WHERE job_id = %s", held_by)
        locks = here.rows("SELECT count(*) FROM job_locks")
    assert (replaced.state, calls) == ("succeeded", ["whole"])
    assert states == [("interrupted", "the process ended or slept before the run did")]
    assert locks == [(0,)]


async def _interrupted(database: Database) -> int:
    from nightmail.store import job_runs

    return await database.run(job_runs.mark_interrupted)


async def test_a_late_finisher_does_not_release_the_lease_of_its_successor(database_url: str) -> None:
    """The first holder sleeps past its lease, a second one takes over, the first one then ends."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def sleepy(ctx: JobContext) -> JobResult:
        begun.set()
        await go_on.wait()
        return JobResult({"claimed": 1})

    jobs = [job("whole", sleepy, holds="table")]
    async with place(database_url, jobs) as early, place(database_url, jobs, clock_offset="10 minutes") as late:
        first = asyncio.create_task(early.engine.run("whole", trigger="first"))
        await begun.wait()
        begun.clear()
        second = asyncio.create_task(late.engine.run("whole", trigger="second"))
        await begun.wait()
        holder = early.rows("SELECT claim_id FROM job_locks")
        go_on.set()
        await asyncio.gather(first, second)
        assert len(holder) == 1
        assert early.rows("SELECT count(*) FROM job_locks") == [(0,)]


async def test_an_overrunning_job_is_cut_off_and_answered_half_a_second_before_the_deadline(database_url: str) -> None:
    cleaned_up = asyncio.Event()

    async def run(ctx: JobContext) -> JobResult:
        try:
            await asyncio.sleep(60)
        finally:
            cleaned_up.set()
        raise AssertionError("not reached")

    async with place(database_url, [job("slow", run, holds="table")]) as here:
        began = time.monotonic()
        outcome = await here.engine.run("slow", trigger="test", deadline_s=2)
        took = time.monotonic() - began
        rows = here.rows("SELECT state, error FROM job_runs")
        locks = here.rows("SELECT count(*) FROM job_locks")
    assert took <= 1.5
    assert cleaned_up.is_set()
    assert outcome.state == "failed"
    assert outcome.error == "DeadlineExceeded: stopped just before its deadline of 2 s"
    assert rows == [("failed", outcome.error)]
    assert locks == [(0,)]


async def test_a_job_that_ignores_its_cancellation_is_answered_in_time_and_keeps_its_lease(database_url: str) -> None:
    async def run(ctx: JobContext) -> JobResult:
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            try:
                await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                continue
        return JobResult({"claimed": 1})

    async with place(database_url, [job("deaf", run, holds="table")]) as here:
        began = time.monotonic()
        outcome = await here.engine.run("deaf", trigger="test", deadline_s=2)
        took = time.monotonic() - began
        locks = here.rows("SELECT count(*) FROM job_locks")
    assert took <= 1.5
    assert outcome.state == "failed"
    assert locks == [(1,)]


async def test_the_job_is_told_a_deadline_that_lets_it_answer_in_time(database_url: str) -> None:
    seen: list[float] = []

    async def run(ctx: JobContext) -> JobResult:
        seen.append(ctx.deadline.left_s)
        return JobResult({"claimed": 0})

    async with place(database_url, [job("told", run)], job_deadline_s=10) as here:
        await here.engine.run("told", trigger="test")
        await here.engine.run("told", trigger="test", deadline_s=1)
    assert 5 < seen[0] <= 9
    assert seen[1] <= 0.25


async def test_a_run_goes_on_when_its_caller_is_cancelled(database_url: str) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def run(ctx: JobContext) -> JobResult:
        begun.set()
        await go_on.wait()
        return JobResult({"claimed": 7})

    async with place(database_url, [job("long", run)]) as here:
        caller = asyncio.create_task(here.engine.run("long", trigger="test"))
        await begun.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        go_on.set()
        await here.settled()
        rows = here.rows("SELECT state, results FROM job_runs")
    assert rows == [("succeeded", {"claimed": 7, "failed": 0})]


async def test_the_database_away_is_said_at_begin_and_in_the_run() -> None:
    async def run(ctx: JobContext) -> JobResult:
        raise DatabaseAway("gone")

    async with place("postgresql://nobody@127.0.0.1:9/none", [job("any", run)]) as here:
        outcome = await here.engine.run("any", trigger="test", deadline_s=3)
    assert outcome.state == "away"


async def test_the_database_lost_within_a_run_leaves_an_interrupted_row(database_url: str) -> None:
    async def run(ctx: JobContext) -> JobResult:
        raise DatabaseAway("gone")

    async with place(database_url, [job("any", run)]) as here:
        outcome = await here.engine.run("any", trigger="test")
        rows = here.rows("SELECT state, error FROM job_runs")
    assert outcome.state == "away"
    assert rows == [("interrupted", "DatabaseAway: gone")]


async def test_a_dry_run_changes_nothing_in_the_whole_database(database_url: str) -> None:
    async with place(database_url, JOBS) as here:
        here.execute(
            "INSERT INTO idempotency_keys VALUES (gen_random_uuid(), 'live', 'k', '\\x00', 200, '{}', now(), now())"
        )
        before = content_of(database_url)
        states = {}
        for spec in JOBS:
            outcome = await here.engine.run(spec.name, trigger="test", dry=True)
            states[spec.name] = outcome.state
        counted = await here.engine.run("cleanup-idempotency", trigger="test", dry=True)
        await here.settled()
        assert content_of(database_url) == before
    assert counted.counts == {"deleted": 1}
    assert states["send-scheduled"] == states["cleanup-idempotency"] == "succeeded"


async def test_an_early_run_leaves_its_slot_open_until_its_time(database_url: str) -> None:
    calls: list[str] = []
    slot = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=40)
    async with place(database_url, [job("early", counting(calls, "early"))]) as here:
        await here.engine.run("early", slot=slot, trigger="test")
        rows = here.rows("SELECT state, retry_at FROM job_slots")
    assert rows == [("unfinished", slot)]


async def test_a_run_that_left_work_leaves_its_slot_open(database_url: str) -> None:
    calls: list[str] = []
    async with place(database_url, [job("much", counting(calls, "much", more=True))]) as here:
        outcome = await here.engine.run("much", trigger="test")
        rows = here.rows("SELECT state, retry_at > now() FROM job_slots")
    assert outcome.more
    assert rows == [("unfinished", True)]
