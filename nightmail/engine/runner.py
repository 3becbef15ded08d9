"""One call of one job: slot → record → lease → job → record → outcome, answered in time whatever happens.

Every call is one row of job_runs. Whole-table jobs hold a lease of their deadline and a margin; row-claiming jobs run
side by side. Nothing here waits without a bound: PostgreSQL may be frozen, a job may ignore its deadline, and the
answer must still leave half a second before the caller's time is up. A run goes on when its caller hangs up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Literal, TypeVar
from uuid import UUID

import structlog
from structlog.typing import FilteringBoundLogger

from nightmail.clock import monotonic, now
from nightmail.engine.alerts import Alerts
from nightmail.engine.background import Background
from nightmail.engine.crash import CrashPoints
from nightmail.engine.deadline import Deadline
from nightmail.engine.job import JobContext, JobSpec, Run
from nightmail.engine.schedule import slot_of_call
from nightmail.errors import DatabaseAway, NotConfigured
from nightmail.ids import new_claim_id, new_id
from nightmail.log import Redactor, secret_values, short_error
from nightmail.ports import Ports
from nightmail.settings import Settings
from nightmail.store import job_locks, job_runs, job_slots, queue
from nightmail.store.database import Connection, Database

T = TypeVar("T")
State = Literal["succeeded", "failed", "deduplicated", "not_configured", "away"]

# The contract: the answer leaves this long before the deadline.
ANSWER_BEFORE_S = 0.5
# An overrunning job is cancelled this long before the deadline: after it should have stopped by itself
# (Deadline.left_s), and early enough to write the record and answer.
CUT_BEFORE_S = 0.7
# For deadlines under 2 s, where half a second is much.
CUT_BEFORE_SHORT_S = 0.6
# How long a cancelled job may take to clean up before the answer leaves without it.
CLEAN_UP_S = 0.05
# The first statements of a run: a server that takes longer counts as away.
BEGIN_LIMIT_S = 10.0
# A whole-table lease outlives its run's deadline by this, so that a slow record is still written under it.
LEASE_MARGIN_S = 5.0
# A run that left work is continued after this by whoever ticks.
AGAIN_S = 10.0


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """What one call came to. `counts` in snake_case, every key of the job present."""

    job_id: UUID
    job: str
    slot: datetime
    state: State
    counts: Mapping[str, int]
    more: bool = False
    duration_ms: int = 0
    error: str | None = None
    missing: Sequence[str] = ()
    running_job_id: UUID | None = None


@dataclass(slots=True)
class Call:
    """One call under way."""

    spec: JobSpec
    job_id: UUID
    trigger: str
    deadline_s: float
    deadline: Deadline
    slot: datetime | None
    missing: list[str]
    log: FilteringBoundLogger
    claim_id: UUID
    clock_fault: str | None = None
    started: float = field(default_factory=monotonic)
    is_cleaned_up: bool = True

    @property
    def elapsed_ms(self) -> int:
        """Return the milliseconds since the call came."""
        return round((monotonic() - self.started) * 1000)

    @property
    def cut_s(self) -> float:
        """Return the seconds after which the job is cancelled."""
        margin = CUT_BEFORE_S if self.deadline_s >= 2 else CUT_BEFORE_SHORT_S
        return max(self.deadline.at - monotonic() - margin, 0.0)

    @property
    def answer_s(self) -> float:
        """Return the seconds in which the answer must leave."""
        return self.deadline.at - monotonic() - ANSWER_BEFORE_S

    def say(self, text: str) -> str:
        """Return a log line in the form of the source documents."""
        return f"[{self.spec.title} {self.job_id}] {text}"


class Engine:
    """Runs any job of the table it is given and names none; `alerts` None means that nobody is told of anything."""

    def __init__(
        self,
        jobs: Sequence[JobSpec],
        database: Database,
        ports: Ports,
        settings: Settings,
        host: str,
        stopping: asyncio.Event,
        crash: CrashPoints,
        alerts: Alerts | None = None,
    ) -> None:
        self.jobs = {spec.name: spec for spec in jobs}
        self.database = database
        self.ports = ports
        self.settings = settings
        self.host = host
        self.stopping = stopping
        self.crash = crash
        self.background = Background()
        self.redact = Redactor(secret_values(settings))
        self.alerts = alerts
        # What follows a run within its deadline, before it is recorded: what the run has told is delivered.
        self.after_run: Callable[[JobContext], Awaitable[None]] | None = None
        self.log: FilteringBoundLogger = structlog.get_logger()

    async def read_clock(self, limit_s: float = BEGIN_LIMIT_S) -> datetime:
        """Return the database's time. Raises DatabaseAway, after `limit_s` at the latest."""
        try:
            return await self.background.within(min(limit_s, BEGIN_LIMIT_S), self.database.run(queue.read_clock))
        except TimeoutError as error:
            raise DatabaseAway(str(error)) from error

    async def run(
        self,
        name: str,
        *,
        slot: datetime | None = None,
        trigger: str,
        deadline_s: float | None = None,
        dry: bool = False,
    ) -> RunOutcome:
        """Run the job once. `slot` None is the call's own; `deadline_s` None is the setting; raises KeyError only.

        When the caller is cancelled the run goes on.
        """
        spec = self.jobs[name]
        total_s = deadline_s if deadline_s is not None else self.settings.job_deadline_s
        job_id = new_id()
        call = Call(
            spec=spec,
            job_id=job_id,
            trigger=trigger,
            deadline_s=total_s,
            deadline=job_deadline(total_s),
            slot=slot,
            missing=self.missing(spec),
            log=self.log.bind(job=name, job_id=str(job_id), trigger=trigger, **({"dry": True} if dry else {})),
            claim_id=new_claim_id(),
        )
        return await asyncio.shield(self.background.start(self._run(call, dry)))

    def missing(self, spec: JobSpec) -> list[str]:
        """Return what keeps the job from running: names of settings, or that it is not built."""
        if spec.run is None:
            return [f"{spec.name} is not built in this version"]
        return spec.missing(self.settings)

    def context(self, call: Call, dry: bool = False) -> JobContext:
        """Return the context of a run."""
        return JobContext(
            job_id=call.job_id,
            job=call.spec.name,
            database=self.database,
            ports=self.ports,
            settings=self.settings,
            deadline=call.deadline,
            runner=self.host,
            log=call.log,
            dry=dry,
            stopping=self.stopping,
            crash=self.crash,
        )

    async def close(self, seconds: float = 8.0) -> None:
        """Wait for runs under way, at most `seconds`; then cancel them."""
        await self.background.drain(seconds)

    async def _run(self, call: Call, dry: bool) -> RunOutcome:
        with structlog.contextvars.bound_contextvars(job=call.spec.name, job_id=str(call.job_id)):
            if dry:
                return await self._run_dry(call)
            outcome = await self._run_recorded(call)
            self._log_outcome(call, outcome)
            if self.alerts is not None:
                self.alerts.run_ended(outcome)
            return outcome

    async def _run_dry(self, call: Call) -> RunOutcome:
        try:
            call.slot = call.slot or slot_of_call(call.spec.schedule, await self.read_clock(call.cut_s))
        except DatabaseAway as error:
            return self._outcome(call, "away", error=short_error(error, self.redact))
        if call.missing or call.spec.run is None:
            return self._outcome(call, "not_configured", missing=call.missing)
        return await self._work(call, call.spec.run, dry=True)

    async def _run_recorded(self, call: Call) -> RunOutcome:
        limit_s = min(BEGIN_LIMIT_S, call.cut_s)
        try:
            holder = await self.background.within(limit_s, self.database.run(partial(self._begin, call=call)))
        except (DatabaseAway, TimeoutError) as error:
            return self._outcome(call, "away", error=short_error(error, self.redact))
        except Exception as error:
            self.log.error("run.begin_broke", exc_info=error)
            return self._outcome(call, "failed", error=short_error(error, self.redact))
        if call.missing or call.spec.run is None:
            return self._outcome(call, "not_configured", missing=call.missing)
        if holder is not None:
            return self._outcome(call, "deduplicated", running_job_id=holder)
        if call.clock_fault is not None:
            return await self._record(call, self._outcome(call, "failed", error=f"Clock: {call.clock_fault}"))
        self._log_start(call)
        if self.alerts is not None:
            self.alerts.run_started(call.spec.name, call.job_id)
        self.crash.reach(f"{call.spec.name}:begun")
        outcome = await self._work(call, call.spec.run, dry=False)
        self.crash.reach(f"{call.spec.name}:ended")
        if outcome.state == "succeeded" and self.after_run is not None:
            await self._follow(call, self.after_run)
        return await self._record(call, outcome)

    async def _follow(self, call: Call, follow: Callable[[JobContext], Awaitable[None]]) -> None:
        """Do what follows the run, in what its deadline leaves; the run itself has succeeded whatever becomes of it."""
        task = self.background.start(_as_coroutine(follow, self.context(call)))
        done, _ = await asyncio.wait({task}, timeout=call.cut_s)
        if not done:
            task.cancel()
            await asyncio.wait({task}, timeout=CLEAN_UP_S)
            call.log.warning("run.follow_up_overran")
        elif not task.cancelled() and (error := task.exception()) is not None:
            call.log.error("run.follow_up_broke", error=short_error(error, self.redact))

    async def _begin(self, conn: Connection, call: Call) -> UUID | None:
        """Write the run's row and take the lease; return the job_id of who holds it, None when the way is free."""
        spec = call.spec
        call.slot = call.slot or slot_of_call(spec.schedule, await queue.read_clock(conn))
        holder = None
        async with conn.transaction():
            await job_runs.insert_run(
                conn,
                job_id=call.job_id,
                job=spec.name,
                slot=call.slot,
                trigger=call.trigger,
                host=self.host,
                deadline_s=call.deadline_s,
            )
            if call.missing:
                await self._finish_at_once(conn, call, "not_configured", ", ".join(call.missing))
                await job_slots.mark_not_configured(conn, job=spec.name, slot=call.slot)
            elif spec.holds == "table":
                holder = await job_locks.take_lock(
                    conn,
                    job=spec.name,
                    claim_id=call.claim_id,
                    job_id=call.job_id,
                    lease_s=call.deadline_s + LEASE_MARGIN_S,
                )
                if holder is not None:
                    await self._finish_at_once(conn, call, "deduplicated", f"running as {holder}")
            if spec.destroys:
                call.clock_fault = await job_runs.find_clock_fault(conn, job=spec.name, host_now=now())
        return holder

    async def _finish_at_once(self, conn: Connection, call: Call, state: str, error: str) -> None:
        finish = job_runs.Finish(call.job_id, state, {}, more=False, duration_ms=call.elapsed_ms, error=error)
        await job_runs.finish_run(conn, finish)

    async def _work(self, call: Call, run: Run, dry: bool) -> RunOutcome:
        """Run the job itself; cancel it when it overruns."""
        task = self.background.start(_as_coroutine(run, self.context(call, dry)))
        done, _ = await asyncio.wait({task}, timeout=call.cut_s)
        if not done:
            task.cancel()
            await asyncio.wait({task}, timeout=CLEAN_UP_S)
            call.is_cleaned_up = task.done()
            call.log.error("run.overran", deadline_s=call.deadline_s, is_cleaned_up=task.done())
            return self._outcome(
                call,
                "failed",
                error=f"DeadlineExceeded: stopped just before its deadline of {call.deadline_s:g} s",
            )
        try:
            result = task.result()
        except DatabaseAway as error:
            return self._outcome(call, "away", error=short_error(error, self.redact))
        except NotConfigured as error:
            return self._outcome(call, "not_configured", missing=error.missing)
        except asyncio.CancelledError:
            return self._outcome(call, "failed", error="Cancelled: the process is ending")
        except Exception as error:
            call.log.error("run.broke", exc_info=error)
            return self._outcome(call, "failed", error=short_error(error, self.redact))
        return self._outcome(call, "succeeded", counts=result.counts, more=result.more)

    async def _record(self, call: Call, outcome: RunOutcome) -> RunOutcome:
        """Write how the run ended, while the caller's time allows; after that it goes on in the background."""
        task = self.background.start(self.database.run(partial(self._end, call=call, outcome=outcome)))
        done, _ = await asyncio.wait({task}, timeout=max(call.answer_s, 0.0))
        if not done:
            call.log.warning("run.recorded_late")
            return outcome
        try:
            task.result()
        except DatabaseAway as error:
            return self._outcome(call, "away", error=short_error(error, self.redact))
        except Exception as error:
            call.log.error("run.not_recorded", exc_info=error)
            return self._outcome(call, "failed", error=short_error(error, self.redact))
        return outcome

    async def _end(self, conn: Connection, call: Call, outcome: RunOutcome) -> None:
        """Write the run's end, its slot's, and give back the lease: one transaction, runs → slots → locks."""
        if call.slot is None:
            raise AssertionError("a run that has begun has a slot")
        error = outcome.error or ", ".join(outcome.missing) or None
        state = "interrupted" if outcome.state == "away" else outcome.state
        finish = job_runs.Finish(
            call.job_id, state, outcome.counts, outcome.more, duration_ms=outcome.duration_ms, error=error
        )
        async with conn.transaction():
            await job_runs.finish_run(conn, finish)
            if outcome.state == "succeeded":
                await job_slots.mark_succeeded(conn, job_id=call.job_id, more=outcome.more, again_s=AGAIN_S)
            elif outcome.state == "not_configured":
                await job_slots.mark_not_configured(conn, job=call.spec.name, slot=call.slot)
            # A cancelled job that is still cleaning up keeps the lease until it ends by itself.
            if call.spec.holds == "table" and call.is_cleaned_up:
                await job_locks.release_lock(conn, job=call.spec.name, claim_id=call.claim_id)

    def _outcome(
        self,
        call: Call,
        state: State,
        *,
        counts: Mapping[str, int] | None = None,
        more: bool = False,
        error: str | None = None,
        missing: Sequence[str] = (),
        running_job_id: UUID | None = None,
    ) -> RunOutcome:
        return RunOutcome(
            job_id=call.job_id,
            job=call.spec.name,
            slot=call.slot or slot_of_call(call.spec.schedule, now()),
            state=state,
            counts={**dict.fromkeys(call.spec.keys, 0), **(counts or {})},
            more=more,
            duration_ms=call.elapsed_ms,
            error=error,
            missing=tuple(missing),
            running_job_id=running_job_id,
        )

    def _log_start(self, call: Call) -> None:
        slot = call.slot.isoformat() if call.slot else None
        call.log.info(call.say(f"Starting {call.spec.starting}"), kind="run.started", slot=slot)

    def _log_outcome(self, call: Call, outcome: RunOutcome) -> None:
        ms = outcome.duration_ms
        fields = {
            "kind": f"run.{outcome.state}",
            "slot": outcome.slot.isoformat(),
            "duration_ms": ms,
            "more": outcome.more,
            "results": dict(outcome.counts),
        }
        if outcome.state == "succeeded":
            first = [f"{key.replace('_', ' ').title()}: {outcome.counts[key]}" for key in call.spec.keys[:2]]
            call.log.info(call.say(f"Completed in {ms}ms. {', '.join(first)}"), **fields)
        elif outcome.state == "deduplicated":
            call.log.info(call.say(f"Skipped: {outcome.running_job_id} is running"), **fields)
        elif outcome.state == "not_configured":
            call.log.warning(call.say("Not configured"), missing=list(outcome.missing), **fields)
        else:
            call.log.error(call.say(f"Failed after {ms}ms. {outcome.error}"), error=outcome.error, **fields)


def job_deadline(total_s: float) -> Deadline:
    """Return a job's deadline; one under 1.5 s gets a wider margin, so that the job stops before it is cut off."""
    return Deadline(monotonic() + total_s, max(total_s, 1.5))


async def _as_coroutine(run: Callable[[JobContext], Awaitable[T]], ctx: JobContext) -> T:
    return await run(ctx)
