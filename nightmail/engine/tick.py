"""One tick: every job whose newest slot has not succeeded, in dependency order, each with a fair slice of the time.

A slot is claimed by one statement for all jobs (store.job_slots), so it fires once among any number of tickers, and a
crashed ticker's slots are taken over when its lease ends. Nothing here names a job.

A tick looks at slots whose time has come and, unlike a direct call, never counts for a coming one: a platform whose
clock is ahead runs each slot one tick later, and none twice or never.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from uuid import UUID

from nightmail.clock import monotonic
from nightmail.engine.audit import PASS_S, Auditor
from nightmail.engine.runner import AGAIN_S, ANSWER_BEFORE_S, Engine, RunOutcome
from nightmail.engine.schedule import previous_slot
from nightmail.errors import DatabaseAway
from nightmail.ids import new_claim_id, new_id
from nightmail.log import short_error
from nightmail.store import job_runs, job_slots
from nightmail.store.job_slots import ClaimedSlot, DueSlot

# A slot claim outlives its run's deadline by this.
LEASE_MARGIN_S = 5.0
# Below this a slice is not worth a run; what is left waits for the next tick.
MIN_SLICE_S = 1.0
# Kept for the tick's own statements and its answer.
OWN_S = 0.5
STATEMENT_LIMIT_S = 5.0
# Old slots and dead runs are looked for this often in a process.
UPKEEP_EVERY_S = 60.0


@dataclass(frozen=True, slots=True)
class Ran:
    """One run of a tick; `status` is the run's state."""

    job: str
    job_id: UUID
    status: str


@dataclass(frozen=True, slots=True)
class TickOutcome:
    """What a tick at `at` did. `waiting` counts jobs whose newest slot has still not succeeded."""

    tick_id: UUID
    at: datetime
    ran: list[Ran]
    waiting: int
    duration_ms: int


class Ticker:
    """Claims due slots for one process and runs them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._auditor = Auditor(engine.database, engine.stopping)
        self._next_upkeep = 0.0
        self._audit: asyncio.Task[None] | None = None

    # ── slots ──

    def newest_slots(self, at: datetime, *, busy: Collection[str] = ()) -> list[DueSlot]:
        """Return each job's newest slot at this time; those of `busy` jobs only for the order, not to be claimed."""
        return [
            DueSlot(spec.name, previous_slot(spec.schedule, at), spec.after, is_wanted=spec.name not in busy)
            for spec in self._engine.jobs.values()
        ]

    async def claim(self, newest: list[DueSlot], *, claim_id: UUID, lease_s: float) -> list[ClaimedSlot]:
        """Take what is due, in the order of the job table. Raises DatabaseAway, TimeoutError."""
        step = partial(job_slots.claim_due, newest=newest, claim_id=claim_id, lease_s=lease_s)
        claimed = await self._engine.background.within(STATEMENT_LIMIT_S, self._engine.database.run(step))
        order = list(self._engine.jobs)
        return sorted(claimed, key=lambda slot: order.index(slot.job))

    async def settle(self, slot: ClaimedSlot, claim_id: UUID, outcome: RunOutcome) -> None:
        """End our claim; what succeeded or is not configured has ended it with the run's own record."""
        if outcome.state in ("failed", "away"):
            await self._finish(slot, claim_id, "failed")
        elif outcome.state == "deduplicated":
            await self._finish(slot, claim_id, "unfinished", again_s=AGAIN_S)

    async def release(self, slots: list[ClaimedSlot], claim_id: UUID) -> None:
        """Give back slots that were not come to."""
        for slot in slots:
            await self._finish(slot, claim_id, "unfinished")

    async def _finish(self, slot: ClaimedSlot, claim_id: UUID, state: str, again_s: float = 0.0) -> None:
        step = partial(
            job_slots.finish_slot,
            job=slot.job,
            slot=slot.slot,
            claim_id=claim_id,
            state=state,
            again_s=again_s,
        )
        try:
            await self._engine.background.within(STATEMENT_LIMIT_S, self._engine.database.run(step))
        except (DatabaseAway, TimeoutError) as error:  # the lease will end by itself
            self._engine.log.warning(
                "tick.slot_not_settled", job=slot.job, error=short_error(error, self._engine.redact)
            )

    def upkeep_soon(self) -> None:
        """Close the records of dead runs and delete old slots, in the background, at most once a minute."""
        if monotonic() >= self._next_upkeep:
            self._next_upkeep = monotonic() + UPKEEP_EVERY_S
            self._engine.background.start(self._upkeep())

    async def _upkeep(self) -> None:
        database = self._engine.database
        try:
            newest = self.newest_slots(await self._engine.read_clock())
            await database.run(job_runs.mark_interrupted)
            await database.run(partial(job_slots.delete_past, newest=newest))
        except DatabaseAway as error:
            self._engine.log.warning("tick.no_upkeep", error=short_error(error, self._engine.redact))

    async def audit(self, *, within_s: float = PASS_S) -> None:
        """Do the hourly audit if it is due, for at most so long; whatever becomes of it is no failure of the caller."""
        engine = self._engine
        try:
            done = await engine.background.within(within_s, self._auditor.audit_if_due(pass_s=within_s / 2))
        except (DatabaseAway, TimeoutError) as error:
            engine.log.warning("audit.not_finished", error=short_error(error, engine.redact))
        except Exception as error:
            engine.log.error("audit.broke", exc_info=error)
        else:
            if done is not None and engine.alerts is not None:
                engine.alerts.evaluate_soon()

    def audit_soon(self) -> None:
        """Audit in the background; at most one audit at a time in a process."""
        if self._audit is None or self._audit.done():
            self._audit = self._engine.background.start(self.audit())

    # ── the tick of a platform or a command ──

    async def tick(self, *, trigger: str, deadline_s: float | None = None, dry: bool = False) -> TickOutcome:
        """Run what is due, one after the other; goes on when the caller is cancelled. Raises DatabaseAway."""
        work = Tick(self, self._engine, trigger, deadline_s, dry=dry).work()
        return await asyncio.shield(self._engine.background.start(work))


class Tick:
    """One tick under way."""

    def __init__(self, ticker: Ticker, engine: Engine, trigger: str, deadline_s: float | None, *, dry: bool) -> None:
        self.ticker = ticker
        self.engine = engine
        self.trigger = trigger
        self.dry = dry
        self.started = monotonic()
        self.total_s = deadline_s if deadline_s is not None else engine.settings.job_deadline_s
        self.tick_id = new_id()
        self.claim_id = new_claim_id()
        self.ran: list[Ran] = []

    @property
    def left_s(self) -> float:
        """Return the seconds that runs may still use."""
        return self.started + self.total_s - monotonic() - OWN_S

    async def work(self) -> TickOutcome:
        """Claim and run until nothing is due or the time is used; say what waits. Raises DatabaseAway."""
        try:
            at = await (self.run_dry() if self.dry else self.run_due())
            waiting = await self.count_waiting(at)
        except TimeoutError as error:
            raise DatabaseAway(str(error)) from error
        if not self.dry:
            self.ticker.upkeep_soon()
            if self.left_s > MIN_SLICE_S:
                await self.ticker.audit(within_s=min(self.left_s, PASS_S))
            if self.engine.alerts is not None:
                self.engine.alerts.evaluate_soon()
        self.engine.log.info(
            "tick.ended",
            tick_id=str(self.tick_id),
            trigger=self.trigger,
            ran=[f"{ran.job}:{ran.status}" for ran in self.ran],
            waiting=waiting,
        )
        return TickOutcome(self.tick_id, at, self.ran, waiting, round((monotonic() - self.started) * 1000))

    async def run_due(self) -> datetime:
        """Claim, run, and claim again, as a job that comes after another is due only then; return the time."""
        while True:
            at = await self.engine.read_clock(max(self.left_s, MIN_SLICE_S / 2))
            if self.is_over:
                return at
            newest = self.ticker.newest_slots(at, busy={ran.job for ran in self.ran})
            lease_s = max(self.left_s, MIN_SLICE_S) + LEASE_MARGIN_S
            claimed = await self.ticker.claim(newest, claim_id=self.claim_id, lease_s=lease_s)
            if not claimed:
                return at
            await self.run_claimed(claimed)

    async def run_claimed(self, claimed: list[ClaimedSlot]) -> None:
        """Run the slots in order; what the time does not allow is given back."""
        for place, slot in enumerate(claimed):
            if self.is_over:
                await self.ticker.release(claimed[place:], self.claim_id)
                return
            outcome = await self.engine.run(
                slot.job,
                slot=slot.slot,
                trigger=self.trigger,
                deadline_s=self.slice_s(slot.job, [other.job for other in claimed[place:]]),
            )
            self.ran.append(Ran(slot.job, outcome.job_id, outcome.state))
            await self.ticker.settle(slot, self.claim_id, outcome)

    async def run_dry(self) -> datetime:
        """Run dry what a tick would run now; return the time."""
        at = await self.engine.read_clock(self.left_s)
        newest = self.ticker.newest_slots(at)
        step = partial(job_slots.list_claimable, newest=newest)
        jobs = await self.engine.background.within(STATEMENT_LIMIT_S, self.engine.database.run(step))
        due = [slot for slot in newest if slot.job in jobs]
        for place, slot in enumerate(due):
            if self.is_over:
                break
            outcome = await self.engine.run(
                slot.job,
                slot=slot.slot,
                trigger=self.trigger,
                deadline_s=self.slice_s(slot.job, [other.job for other in due[place:]]),
                dry=True,
            )
            self.ran.append(Ran(slot.job, outcome.job_id, outcome.state))
        return at

    def slice_s(self, job: str, jobs_left: Sequence[str]) -> float:
        """Return an equal part of what is left, among those jobs that can run, or the least the job can use.

        A run that needs less leaves the rest to the others.
        """
        able = sum(1 for name in jobs_left if not self.engine.missing(self.engine.jobs[name]))
        least_s = min(self.engine.jobs[job].least_s, max(self.left_s, MIN_SLICE_S))
        return max(self.left_s / max(able, 1), min(least_s, self.total_s))

    @property
    def is_over(self) -> bool:
        """Return whether no further run may begin; the first always may."""
        return self.engine.stopping.is_set() or (bool(self.ran) and self.left_s < MIN_SLICE_S)

    async def count_waiting(self, at: datetime) -> int:
        """Count the jobs whose newest slot has not succeeded."""
        step = partial(job_slots.count_waiting, newest=self.ticker.newest_slots(at))
        limit_s = max(self.started + self.total_s - ANSWER_BEFORE_S - monotonic(), 0.1)
        return await self.engine.background.within(limit_s, self.engine.database.run(step))
