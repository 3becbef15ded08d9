"""The embedded scheduler: fires slots once a second and, between slots, works what has just become due.

Any number of processes may run both side by side: a slot is claimed in PostgreSQL before it fires, and the dispatcher
works rows that are claimed one set at a time like everybody else's. With the dispatcher a message leaves within 100 ms
of its time; the slot is the safety net.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import structlog
from structlog.typing import FilteringBoundLogger

from nightmail.clock import monotonic
from nightmail.engine.background import pause
from nightmail.engine.deadline import Deadline
from nightmail.engine.job import JobContext
from nightmail.engine.runner import Engine
from nightmail.engine.schedule import previous_slot
from nightmail.engine.tick import LEASE_MARGIN_S, Ticker
from nightmail.errors import DatabaseAway
from nightmail.ids import UUID, new_claim_id, new_id
from nightmail.log import short_error
from nightmail.store import job_runs, queue
from nightmail.store.database import Connection
from nightmail.store.job_slots import ClaimedSlot

FIRE_EVERY_S = 1.0
PROBE_EVERY_S = 0.05
PROBE_LIMIT_S = 5.0
# One run record of the dispatcher covers this.
WINDOW_S = 60.0
# While PostgreSQL is away, or a lane makes no headway, the wait doubles between these.
BACKOFF_MIN_S = 0.25
BACKOFF_MAX_S = 5.0
LANE_BACKOFF_MIN_S = 1.0
LANE_BACKOFF_MAX_S = 30.0
# A work that returned with rows left and more time than this left was stopped by the provider, not by its deadline.
STOPPED_EARLY_S = 3.0
# When the process ends: calls in flight may finish within this, then they are cancelled and left to their leases.
END_S = 8.0

Probe = Callable[[Connection], Awaitable[list[str]]]
Work = Callable[[JobContext, Sequence[str]], Awaitable[tuple[Mapping[str, int], bool]]]


class Backoff:
    """A wait that doubles with each failure and is forgotten with the first success."""

    def __init__(self, least_s: float, most_s: float) -> None:
        self._least_s = least_s
        self._most_s = most_s
        self.failures = 0

    def fail(self) -> float:
        """Return the seconds to wait after one more failure."""
        self.failures += 1
        return float(min(self._least_s * 2 ** min(self.failures - 1, 16), self._most_s))

    def succeed(self) -> bool:
        """Forget the failures; return whether there were any."""
        failed, self.failures = self.failures > 0, 0
        return failed


class Scheduler:
    """Fires due slots once a second; a slot runs as a task of its own with the whole deadline."""

    def __init__(self, engine: Engine, stopping: asyncio.Event) -> None:
        self._engine = engine
        self._stopping = stopping
        self._ticker = Ticker(engine)
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._away = Backoff(BACKOFF_MIN_S, BACKOFF_MAX_S)
        self._next_evaluation = 0.0
        self._next_audit = 0.0

    async def run(self) -> None:
        """Fire until the process is asked to stop, then wait for what runs."""
        while not self._stopping.is_set():
            wait_s = FIRE_EVERY_S
            try:
                await self.fire()
            except (DatabaseAway, TimeoutError) as error:
                if not self._away.failures:
                    self._engine.log.warning("scheduler.database_away", error=short_error(error, self._engine.redact))
                wait_s = self._away.fail()
            except Exception as error:
                self._engine.log.error("scheduler.broke", exc_info=error)
                wait_s = self._away.fail()
            else:
                if self._away.succeed():
                    self._engine.log.info("scheduler.database_back")
            await pause(self._stopping, wait_s)
        if self._runs:
            await asyncio.wait(self._runs.values(), timeout=END_S)

    async def fire(self) -> list[ClaimedSlot]:
        """Claim due slots of jobs that do not run here already and start them; return what was claimed."""
        self._ticker.upkeep_soon()
        newest = self._ticker.newest_slots(await self._engine.read_clock(), busy=self._runs.keys())
        claim_id = new_claim_id()
        lease_s = self._engine.settings.job_deadline_s + LEASE_MARGIN_S
        claimed = await self._ticker.claim(newest, claim_id=claim_id, lease_s=lease_s)
        for slot in claimed:
            task = self._engine.background.start(self._run(slot, claim_id))
            self._runs[slot.job] = task
            task.add_done_callback(partial(self._ended, slot.job))
        if self._engine.alerts is not None and monotonic() >= self._next_evaluation:
            # Between runs too: a run that never comes must be noticed.
            self._next_evaluation = monotonic() + WINDOW_S
            self._engine.alerts.evaluate_soon()
        if monotonic() >= self._next_audit:
            self._next_audit = monotonic() + WINDOW_S
            self._ticker.audit_soon()
        return claimed

    async def _run(self, slot: ClaimedSlot, claim_id: UUID) -> None:
        outcome = await self._engine.run(slot.job, slot=slot.slot, trigger="scheduler")
        await self._ticker.settle(slot, claim_id, outcome)

    def _ended(self, job: str, task: asyncio.Task[None]) -> None:
        self._runs.pop(job, None)
        if not task.cancelled() and task.exception() is not None:
            self._engine.log.error("scheduler.run_broke", job=job, exc_info=task.exception())


@dataclass(slots=True)
class Window:
    """A minute of the dispatcher's work: one run record, written when the minute is over and nothing is under way."""

    job_id: UUID = field(default_factory=new_id)
    started: float = field(default_factory=monotonic)
    counts: Counter[str] = field(default_factory=Counter)
    under_way: int = 0

    @property
    def is_over(self) -> bool:
        """Return whether no further work belongs to it."""
        return monotonic() - self.started >= WINDOW_S


@dataclass(slots=True)
class Lane:
    """What the dispatcher knows of one lane."""

    task: asyncio.Task[None] | None = None
    not_before: float = 0.0
    backoff: Backoff = field(default_factory=lambda: Backoff(LANE_BACKOFF_MIN_S, LANE_BACKOFF_MAX_S))


class Dispatcher:
    """Watches for due rows and works their lanes at once, each lane by one work at a time in this process.

    `job` is the one whose work it does ahead of the slot; `work` does it for some lanes; `probe` says which lanes have
    something due. `deadline_s` bounds one work (None: as a run of the job).
    """

    def __init__(
        self,
        engine: Engine,
        job: str,
        work: Work,
        stopping: asyncio.Event,
        *,
        probe: Probe = queue.list_due_lanes,
        deadline_s: float | None = None,
    ) -> None:
        self._engine = engine
        self._deadline_s = deadline_s if deadline_s is not None else engine.settings.job_deadline_s
        self._spec = engine.jobs[job]
        self._stopping = stopping
        self._work = work
        self._probe = probe
        self._lanes: dict[str, Lane] = {}
        self._window = Window()
        self._past: list[Window] = []
        self._away = Backoff(BACKOFF_MIN_S, BACKOFF_MAX_S)
        self._log: FilteringBoundLogger = structlog.get_logger().bind(job=job, trigger="dispatcher")

    async def run(self) -> None:
        """Probe until the process is asked to stop; then let what has begun finish and write the record."""
        while not self._stopping.is_set():
            began = monotonic()
            wait_s = await self.look()
            self._turn_windows()
            await pause(self._stopping, max(began + wait_s - monotonic(), 0.001))
        await self._end()

    async def look(self) -> float:
        """Probe once and begin work on free lanes with something due; return the seconds until the next look."""
        try:
            lanes = await self._engine.background.within(PROBE_LIMIT_S, self._engine.database.run(self._probe))
        except (DatabaseAway, TimeoutError) as error:
            if not self._away.failures:
                self._log.warning("dispatcher.database_away", error=short_error(error, self._engine.redact))
            return self._away.fail()
        except Exception as error:
            self._log.error("dispatcher.probe_broke", exc_info=error)
            return self._away.fail()
        if self._away.succeed():
            self._log.info("dispatcher.database_back")
        for name in lanes:
            lane = self._lanes.setdefault(name, Lane())
            if lane.task is None and monotonic() >= lane.not_before:
                lane.task = self._engine.background.start(self._work_lane(name, lane))
        return PROBE_EVERY_S

    async def _work_lane(self, name: str, lane: Lane) -> None:
        window = self._window
        window.under_way += 1
        ctx = self._context(window)
        try:
            with structlog.contextvars.bound_contextvars(job=self._spec.name, job_id=str(window.job_id)):
                counts, more = await self._work(ctx, [name])
        except DatabaseAway as error:
            self._log.warning("dispatcher.work_lost_database", lane=name, error=short_error(error, self._engine.redact))
            lane.not_before = monotonic() + lane.backoff.fail()
        except Exception as error:
            self._log.error("dispatcher.work_broke", lane=name, job_id=str(window.job_id), exc_info=error)
            lane.not_before = monotonic() + lane.backoff.fail()
        else:
            window.counts.update(counts)
            if more and ctx.deadline.left_s > STOPPED_EARLY_S:
                lane.not_before = monotonic() + lane.backoff.fail()
            else:
                lane.backoff.succeed()
        finally:
            window.under_way -= 1
            lane.task = None

    def _context(self, window: Window) -> JobContext:
        engine = self._engine
        return JobContext(
            job_id=window.job_id,
            job=self._spec.name,
            database=engine.database,
            ports=engine.ports,
            settings=engine.settings,
            deadline=Deadline.after(self._deadline_s),
            runner=engine.host,
            log=self._log.bind(job_id=str(window.job_id)),
            stopping=self._stopping,
            crash=engine.crash,
        )

    # ── the record ──

    def _turn_windows(self) -> None:
        """Begin a new minute when this one is over; write the records of those that are complete."""
        if self._window.is_over:
            self._past.append(self._window)
            self._window = Window()
        for window in [w for w in self._past if not w.under_way]:
            self._past.remove(window)
            self._engine.background.start(self._record(window))

    async def _record(self, window: Window) -> None:
        """Write one run record, if anything was done."""
        if not +window.counts:
            return
        counts = {**dict.fromkeys(self._spec.keys, 0), **window.counts}
        duration_ms = round((monotonic() - window.started) * 1000)
        finish = job_runs.Finish(window.job_id, "succeeded", counts, False, duration_ms, None)
        try:
            await self._engine.database.run(partial(self._insert, finish=finish))
        except DatabaseAway as error:
            self._log.warning("dispatcher.record_lost", error=short_error(error, self._engine.redact), results=counts)
            return
        self._log.info("dispatcher.minute", job_id=str(window.job_id), duration_ms=duration_ms, results=counts)

    async def _insert(self, conn: Connection, finish: job_runs.Finish) -> None:
        await job_runs.insert_finished_run(
            conn,
            finish,
            job=self._spec.name,
            slot=previous_slot(self._spec.schedule, await queue.read_clock(conn)),
            trigger="dispatcher",
            host=self._engine.host,
            deadline_s=WINDOW_S,
        )

    async def _end(self) -> None:
        """Wait for the works, cancel what takes too long, and write the records."""
        tasks = [lane.task for lane in self._lanes.values() if lane.task is not None]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=END_S)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=0.5)
        for window in [*self._past, self._window]:
            with suppress(TimeoutError):
                await self._engine.background.within(1.0, self._record(window))
