"""The embedded scheduler and the dispatcher."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import pytest

from nightmail.engine import scheduler as scheduler_module
from nightmail.engine.job import JobContext, JobResult
from nightmail.engine.runner import Engine
from nightmail.engine.scheduler import Dispatcher, Scheduler
from nightmail.errors import DatabaseAway
from nightmail.store.database import Connection
from tests.engine.place import Place, counting, job, place

pytestmark = pytest.mark.anyio

SENDING = job("sending", counting([], "sending"), keys=("claimed", "sent"))


class Lanes:
    """Lanes with something due, and a work that empties them one event at a time."""

    def __init__(self, *due: str) -> None:
        self.due = set(due)
        self.probes = 0
        self.works: list[str] = []
        self.job_ids: set[str] = set()
        self.under_way: set[str] = set()
        self.overlaps = 0
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.more = False
        self.fail: Exception | None = None

    async def probe(self, conn: Connection) -> list[str]:
        self.probes += 1
        return sorted(self.due)

    async def work(self, ctx: JobContext, lanes: Sequence[str]) -> tuple[Mapping[str, int], bool]:
        (lane,) = lanes
        self.works.append(lane)
        self.job_ids.add(str(ctx.job_id))
        self.overlaps += lane in self.under_way
        self.under_way.add(lane)
        try:
            await self.go_on.wait()
            if self.fail is not None:
                raise self.fail
            if not self.more:
                self.due.discard(lane)
            return {"claimed": 1, "sent": 1}, self.more
        finally:
            self.under_way.discard(lane)


def dispatcher_of(here: Place, lanes: Lanes) -> Dispatcher:
    return Dispatcher(here.engine, "sending", lanes.work, here.stopping, probe=lanes.probe)


async def until(condition: object, limit_s: float = 20) -> None:
    end = time.monotonic() + limit_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.01)


async def test_the_scheduler_fires_due_slots_without_a_call_and_stops_when_told(database_url: str) -> None:
    calls: list[str] = []
    jobs = [job("grant", counting(calls, "grant")), job("expire", counting(calls, "expire"), after=("grant",))]
    async with place(database_url, jobs) as here:
        running = asyncio.create_task(Scheduler(here.engine, here.stopping).run())
        await until(lambda: len(calls) == 2)
        here.stopping.set()
        await asyncio.wait_for(running, 5)
        assert here.rows("SELECT DISTINCT trigger, state FROM job_runs") == [("scheduler", "succeeded")]
    assert calls == ["grant", "expire"]


async def test_the_scheduler_survives_the_database_and_defects(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    failures: list[Exception] = [DatabaseAway("gone"), ValueError("a defect"), TimeoutError()]
    read_clock = Engine.read_clock

    async def flaky(engine: Engine) -> object:
        if failures:
            raise failures.pop(0)
        return await read_clock(engine)

    monkeypatch.setattr(Engine, "read_clock", flaky)
    monkeypatch.setattr(scheduler_module, "BACKOFF_MIN_S", 0.01)
    async with place(database_url, [job("one", counting(calls, "one"))]) as here:
        running = asyncio.create_task(Scheduler(here.engine, here.stopping).run())
        await until(lambda: calls)
        here.stopping.set()
        await asyncio.wait_for(running, 5)


async def test_the_dispatcher_works_due_lanes_without_a_call(database_url: str) -> None:
    lanes = Lanes("live:email", "test")
    async with place(database_url, [SENDING]) as here:
        running = asyncio.create_task(dispatcher_of(here, lanes).run())
        await until(lambda: not lanes.due)
        assert sorted(lanes.works) == ["live:email", "test"]
        lanes.due.add("live:sms")
        await until(lambda: not lanes.due)
        here.stopping.set()
        await asyncio.wait_for(running, 5)
        rows = here.rows("SELECT job_id::text, job, trigger, state, results FROM job_runs")
    assert rows == [(lanes.job_ids.pop(), "sending", "dispatcher", "succeeded", {"claimed": 3, "sent": 3})]
    assert not lanes.job_ids


async def test_a_lane_is_never_worked_twice_at_once_and_a_busy_one_does_not_hold_up_others(database_url: str) -> None:
    lanes = Lanes("live:email")
    lanes.go_on.clear()
    async with place(database_url, [SENDING]) as here:
        running = asyncio.create_task(dispatcher_of(here, lanes).run())
        await until(lambda: lanes.works)
        lanes.due.add("live:sms")
        probes = lanes.probes
        await until(lambda: lanes.probes > probes + 5)
        assert lanes.works == ["live:email", "live:sms"]
        lanes.go_on.set()
        await until(lambda: not lanes.due)
        here.stopping.set()
        await asyncio.wait_for(running, 5)
    assert lanes.overlaps == 0


async def test_an_idle_dispatcher_leaves_no_record(database_url: str) -> None:
    lanes = Lanes()
    async with place(database_url, [SENDING]) as here:
        running = asyncio.create_task(dispatcher_of(here, lanes).run())
        await until(lambda: lanes.probes > 3)
        here.stopping.set()
        await asyncio.wait_for(running, 5)
        assert here.rows("SELECT count(*) FROM job_runs") == [(0,)]


async def test_a_minute_is_one_record(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "WINDOW_S", 0.3)
    lanes = Lanes("test")
    async with place(database_url, [SENDING]) as here:
        running = asyncio.create_task(dispatcher_of(here, lanes).run())
        for count in (1, 2):
            lanes.due.add("test")
            await until(lambda count=count: here.rows("SELECT count(*) FROM job_runs") == [(count,)])
        here.stopping.set()
        await asyncio.wait_for(running, 5)
        rows = here.rows("SELECT results ->> 'sent' FROM job_runs WHERE trigger = 'dispatcher'")
    assert rows == [("1",), ("1",)]


@pytest.mark.parametrize("trouble", ["stopped by the provider", "defect", "database lost"])
async def test_a_lane_without_headway_is_left_alone_for_a_while(database_url: str, trouble: str) -> None:
    lanes = Lanes("live:email")
    lanes.more = trouble == "stopped by the provider"
    lanes.fail = {"defect": ValueError("no"), "database lost": DatabaseAway("gone")}.get(trouble)
    async with place(database_url, [SENDING]) as here:
        running = asyncio.create_task(dispatcher_of(here, lanes).run())
        await until(lambda: lanes.probes > 6)
        assert len(lanes.works) == 1
        await until(lambda: len(lanes.works) > 1)
        here.stopping.set()
        await asyncio.wait_for(running, 5)


async def test_the_dispatcher_backs_off_while_the_database_is_away(database_url: str) -> None:
    lanes = Lanes("test")
    failures = 4

    async def probe(conn: Connection) -> list[str]:
        nonlocal failures
        if failures:
            failures -= 1
            raise DatabaseAway("gone")
        return await lanes.probe(conn)

    async with place(database_url, [SENDING]) as here:
        dispatcher = Dispatcher(here.engine, "sending", lanes.work, here.stopping, probe=probe)
        waits = [await dispatcher.look() for _ in range(4)]
        assert waits == [0.25, 0.5, 1.0, 2.0]
        assert await dispatcher.look() == scheduler_module.PROBE_EVERY_S
        await until(lambda: not lanes.due)


async def test_a_stop_lets_a_work_finish_and_cancels_one_that_does_not(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "END_S", 0.2)
    lanes = Lanes("test")
    lanes.go_on.clear()
    async with place(database_url, [SENDING]) as here:
        running = asyncio.create_task(dispatcher_of(here, lanes).run())
        await until(lambda: lanes.under_way)
        here.stopping.set()
        await asyncio.wait_for(running, 5)
    assert not lanes.under_way


async def test_sigterm_ends_scheduler_and_dispatcher_within_seconds(database_url: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.engine.serving", database_url], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        assert any(line == "working\n" for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert process.wait(timeout=15) == 0
        assert time.monotonic() - began < 9
    async with place(database_url, [job("one", None)]) as here:
        assert here.rows("SELECT state, more FROM job_runs WHERE trigger = 'scheduler'") == [("succeeded", True)]


async def test_a_job_sees_that_the_process_is_ending(database_url: str) -> None:
    begun = asyncio.Event()

    async def run(ctx: JobContext) -> JobResult:
        begun.set()
        await ctx.stopping.wait()
        return JobResult({"claimed": 1}, more=True)

    async with place(database_url, [job("one", run)]) as here:
        running = asyncio.create_task(Scheduler(here.engine, here.stopping).run())
        await begun.wait()
        here.stopping.set()
        await asyncio.wait_for(running, 5)
        assert here.rows("SELECT state FROM job_slots") == [("unfinished",)]
