"""Send scheduled messages that are due.

Path      /api/cron/send-scheduled, every minute
Claims    message_queue: due and free rows, lane by lane; rows of dead claims are rescued first   (store.queue)
Gates     just before the calls: lease alive, recipients not suppressed, attempts left            (store.gate)
Calls     EmailSender / SmsSender, outside any transaction, one attempt per claim
Writes    queue, messages, events, usage in one transaction per set of results                    (store.record)
Test env  no outside effect: claimed and recorded in one transaction, set by set                  (store.test_sends)
Safe      to run twice or at once: every write after the claim names the claim_id
Result    claimed, sent, canceled, retried, failed, ambiguous, lost: numbers of messages
Source    messaging cron specification, send-scheduled

The three lanes (live:email, live:sms, test) are worked side by side. In a live lane three things happen at once: the
main loop claims as capacity frees, gates exactly the messages whose calls can start now, and starts them; the
recorder writes results in small sets; the heartbeat renews the claims' leases. A row whose calls ended twice with a
dead runner is worked alone, so that it cannot take others with it.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from uuid import UUID

import psycopg

from nightmail.clock import monotonic
from nightmail.engine.job import JobContext, JobResult
from nightmail.errors import UNSENT_CODES, DatabaseAway, InDoubt, Permanent, Retryable, Throttled
from nightmail.ports import Accepted, OutgoingEmail, OutgoingSms
from nightmail.rules.messages import MAX_ATTEMPTS, SOLO_AFTER_TAKEOVERS, next_backoff_s, next_throttle_s
from nightmail.store import gate, queue, record, test_sends
from nightmail.store.database import is_data_fault
from nightmail.store.gate import Passed
from nightmail.store.queue import Claimed
from nightmail.store.record import Outcome

KEYS = ("claimed", "sent", "canceled", "retried", "failed", "ambiguous", "lost")
LIVE_LANES = ("live:email", "live:sms")

# A provider call may take half of a run's time, up to 10 s: below this, slow but sound calls would be cut.
LEAST_S = 12.0
FLUSH_AFTER_S = 0.1
FLUSH_AT = 100
# With calls in flight and nothing due, how soon the queue is asked again.
IDLE_CLAIM_S = 0.05
# Attachments held at once in a lane, in bytes; one message may be larger. Its MIME form takes half as much again.
MAX_FILE_BYTES = 16_000_000
# A refusal with a longer wait than this (a daily quota, sending paused) ends the lane's run.
LANE_STOP_S = 60.0


async def run(ctx: JobContext) -> JobResult:
    """Claim, send and record until nothing is due or the deadline is near."""
    if ctx.dry:
        backlog = await ctx.database.run(queue.count_backlog)
        return JobResult({**dict.fromkeys(KEYS, 0), "claimed": backlog.due})
    # Once a run, not each time a dispatcher works a lane: with 20,000 hints it takes 0.2 s.
    await ctx.database.run(queue.prune_turns)
    counts, more = await work_lanes(ctx, (*LIVE_LANES, "test"))
    return JobResult({key: counts[key] for key in KEYS}, more)


async def work_lanes(ctx: JobContext, lanes: Sequence[str]) -> tuple[Counter[str], bool]:
    """Work the lanes side by side; return the counts and whether work was left.

    Raises DatabaseAway when PostgreSQL went away; what was begun is then with its claims, to be rescued.
    """
    await ctx.database.run(partial(queue.rescue_expired, evidence_wait_s=evidence_wait_s(ctx)))
    results = await asyncio.gather(
        *(drain_test(ctx) if lane == "test" else LaneRun(ctx, lane).drain() for lane in lanes), return_exceptions=True
    )
    for result in results:
        if isinstance(result, BaseException):
            raise result
    done = [result for result in results if not isinstance(result, BaseException)]
    return sum((counts for counts, _ in done), Counter()), any(more for _, more in done)


def evidence_wait_s(ctx: JobContext) -> float:
    """Return how long a call of unknown end waits for evidence; 0 when no evidence can come."""
    return ctx.settings.evidence_wait_s if ctx.settings.evidence_configured else 0.0


async def drain_test(ctx: JobContext) -> tuple[Counter[str], bool]:
    """Finish due test messages set by set."""
    counts: Counter[str] = Counter()
    step = partial(test_sends.finish_due_test_messages, limit=ctx.settings.send_batch, shard=ctx.job_id.int)
    while not (ctx.deadline.is_over or ctx.stopping.is_set()):
        done = await ctx.database.run(step)
        counts.update(claimed=done.claimed, sent=done.sent, canceled=done.canceled)
        ctx.reach("test_set_recorded")
        if not done.claimed:
            return counts, False
    return counts, True


def raise_of_dead(helpers: Sequence[asyncio.Task[None]]) -> None:
    """Raise the error of a helper that died: it is the run's error."""
    for helper in helpers:
        if helper.done():
            helper.result()


async def cancel_until_over(helpers: Sequence[asyncio.Task[None]]) -> None:
    """Cancel helpers as often as it takes.

    One cancellation can be lost: before Python 3.12 asyncio.wait_for, which the pool waits with, swallows it when what
    it waits for ends in the same moment. A heartbeat that outlived its run would renew its claims for ever.
    """
    while alive := [helper for helper in helpers if not helper.done()]:
        for helper in alive:
            helper.cancel()
        await asyncio.wait(alive, timeout=0.5)
    for helper in helpers:
        if not helper.cancelled():
            helper.exception()  # seen here: what matters of it was raised before


class LaneRun:
    """One run's work on one live lane. All state is of this run; what matters is in PostgreSQL."""

    def __init__(self, ctx: JobContext, lane: str) -> None:
        self.ctx = ctx
        self.lane = lane
        self.sender_name = ctx.ports.email.name if lane == "live:email" else ctx.ports.sms.name
        self.counts: Counter[str] = Counter()
        self.held: deque[Claimed] = deque()
        self.solo: deque[Claimed] = deque()
        self.claims: dict[UUID, float] = {}  # claim_id → monotonic time until which the lease surely holds
        self.calls: set[asyncio.Task[None]] = set()
        self.file_bytes: dict[UUID, int] = {}  # attachments of messages whose call is under way
        self.results: list[Outcome] = []
        self.result_arrived = asyncio.Event()
        self.set_is_full = asyncio.Event()
        self.flushing = asyncio.Lock()
        self.slot_freed = asyncio.Event()
        self.limit = ctx.settings.send_concurrency  # lowered by throttling, raised again by success
        self.paused_until = 0.0
        self.is_stopped = False  # the provider asked for a long wait
        self.is_exhausted = False  # the last claim found nothing
        self.broken: BaseException | None = None  # a defect of ours in a call: the run ends with it
        self.next_claim_at = 0.0
        # The same for all calls of a run, and none begins that could not take it: one cut short by the run's deadline
        # would be in doubt for no fault of the provider's, and be sent again.
        self.call_s = min(ctx.settings.provider_call_s, max(ctx.deadline.left_s / 2, 0.25))

    # ── the run ──

    async def drain(self) -> tuple[Counter[str], bool]:
        """Work the lane until nothing is due, the deadline is near, or the process is asked to stop."""
        helpers = [asyncio.create_task(self.keep_leases()), asyncio.create_task(self.keep_recording())]
        try:
            try:
                while not self.must_stop and self.broken is None:
                    raise_of_dead(helpers)
                    if not await self.advance():
                        break
            except Exception:
                # What has begun is worth its end: every call given up here is one in doubt.
                await self.finish_calls()
                await self.flush()
                raise
            await self.finish_calls()
            await self.flush()
            raise_of_dead(helpers)  # also one that died with the last set of results
            if self.broken is not None:
                raise self.broken
        finally:
            await cancel_until_over(helpers)
            if self.results:  # the run is cut: what has ended is still written, by a task of its own
                with suppress(DatabaseAway, psycopg.Error):
                    await asyncio.shield(asyncio.create_task(self.flush()))
            for call in self.calls:
                call.cancel()
            not_begun = [row.message_id for row in (*self.held, *self.solo)]
            release = partial(queue.release_claims, claim_ids=list(self.claims), not_begun=not_begun)
            with suppress(DatabaseAway):
                await self.ctx.database.run(release)
        more = not self.is_exhausted or bool(self.held or self.solo)
        return self.counts, more

    @property
    def must_stop(self) -> bool:
        """Return whether no further call may begin."""
        return self.is_stopped or self.ctx.stopping.is_set() or self.ctx.deadline.left_s < self.call_s

    async def advance(self) -> bool:
        """Begin what can begin now, else wait for a change; return False when there is nothing left to do."""
        free = self.limit - len(self.calls)
        wait = self.paused_until - monotonic()
        if self.solo:
            await self.advance_solo()
            return True
        if wait <= 0 and free > 0:
            if len(self.startable(free)) < free and monotonic() >= self.next_claim_at:
                await self.claim()
            if self.held and await self.begin(free):
                return True
        if not self.held and not self.calls and not self.solo and self.is_exhausted:
            return False
        await self.wait_for_slot(min(max(wait, 0.005), 1.0) if wait > 0 else IDLE_CLAIM_S)
        return True

    async def advance_solo(self) -> None:
        """Work one suspicious row with nothing else in flight and nothing unrecorded."""
        await self.finish_calls()
        await self.flush()
        self.held, others = deque([self.solo.popleft()]), self.held
        if not await self.begin(1):
            await asyncio.sleep(IDLE_CLAIM_S)
        await self.finish_calls()
        await self.flush()
        self.solo.extendleft(self.held)
        self.held = others

    async def wait_for_slot(self, timeout_s: float) -> None:
        """Wait until a call ends, at most `timeout_s`."""
        self.slot_freed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.slot_freed.wait()

    # ── claim, gate, call ──

    async def claim(self) -> None:
        """Take what the free capacity and one round more can work on, within the batch limit."""
        settings = self.ctx.settings
        plain = sum(1 for row in self.held if not row.file_bytes)
        wanted = min(2 * self.limit - len(self.calls) - plain, settings.send_batch - len(self.held))
        if wanted <= 0:
            return
        sure_until = monotonic() + settings.send_lease_s
        rows = await self.ctx.database.run(
            partial(
                queue.claim_due,
                lane=self.lane,
                runner=self.ctx.runner,
                limit=wanted,
                lease_s=settings.send_lease_s,
            )
        )
        self.ctx.reach("claimed")
        self.is_exhausted = len(rows) == 0
        self.next_claim_at = 0.0 if len(rows) == wanted else monotonic() + IDLE_CLAIM_S
        self.counts["claimed"] += len(rows)
        for row in rows:
            self.claims[row.claim_id] = sure_until
            (self.solo if row.takeovers >= SOLO_AFTER_TAKEOVERS else self.held).append(row)

    async def begin(self, free: int) -> bool:
        """Gate and start up to `free` held messages; return whether any left the hold."""
        account = f"{self.lane}:{self.sender_name}"
        startable = self.startable(free)
        if not startable:
            return False
        granted = await self.ctx.ports.send_rate.take(account, len(startable))
        if not granted:
            return False
        by_claim: dict[UUID, list[UUID]] = {}
        for row in startable[:granted]:
            self.held.remove(row)
            by_claim.setdefault(row.claim_id, []).append(row.message_id)
        for claim_id, message_ids in by_claim.items():
            await self.begin_claim(claim_id, message_ids)
        return True

    def startable(self, free: int) -> list[Claimed]:
        """Return up to `free` held messages in order, passing over those with attachments while enough are worked."""
        file_bytes = sum(self.file_bytes.values())
        rows: list[Claimed] = []
        for row in self.held:
            if len(rows) == free:
                break
            if row.file_bytes:
                if file_bytes and file_bytes + row.file_bytes > MAX_FILE_BYTES:
                    continue
                file_bytes += row.file_bytes
            rows.append(row)
        return rows

    async def begin_claim(self, claim_id: UUID, message_ids: list[UUID]) -> None:
        """Pass the gate with messages of one claim and start their calls."""
        sure_until = self.claims.get(claim_id)
        if sure_until is None:  # the heartbeat found the claim gone
            self.counts["lost"] += len(message_ids)
            return
        call_s = self.call_s
        self.ctx.reach("before_gate")
        result = await self.ctx.database.run(
            partial(gate.pass_gate, claim_id=claim_id, message_ids=message_ids, call_s=call_s, shard=self.shard)
        )
        self.ctx.reach("gated")
        self.counts.update(
            canceled=result.suppressed,
            sent=result.evidenced,
            ambiguous=result.ambiguous,
            failed=result.exhausted,
            lost=result.lost,
        )
        for passed in result.passed:
            task = asyncio.create_task(self.call(passed, begin_before=sure_until - call_s))
            self.calls.add(task)
            if isinstance(passed.outgoing, OutgoingEmail) and passed.outgoing.attachments:
                self.file_bytes[passed.message_id] = sum(len(file.content) for file in passed.outgoing.attachments)
            task.add_done_callback(partial(self.call_ended, passed.message_id))

    def call_ended(self, message_id: UUID, task: asyncio.Task[None]) -> None:
        """Free the slot; an error here is a defect of ours: nothing more is begun, and the run ends with it."""
        self.calls.discard(task)
        self.file_bytes.pop(message_id, None)
        self.slot_freed.set()
        if not task.cancelled() and task.exception() is not None:
            self.broken = self.broken or task.exception()
            self.ctx.log.error("send.call_broken", exc_info=task.exception())

    async def call(self, passed: Passed, *, begin_before: float) -> None:
        """Make the one provider call of this claim and keep its outcome for the recorder."""
        if monotonic() > begin_before:
            # The process slept: the lease may have ended since the gate. Surely not called, so if the row is still
            # ours it goes back without a doubt.
            self.keep(Outcome(passed.message_id, passed.claim_id, "throttled", code="not_called"))
            return
        self.ctx.reach("calling")
        outcome = await self.attempt(passed, self.call_s)
        self.ctx.reach("called")
        self.keep(outcome)

    def keep(self, outcome: Outcome) -> None:
        """Hand an outcome to the recorder."""
        self.results.append(outcome)
        self.result_arrived.set()
        if len(self.results) >= FLUSH_AT:
            self.set_is_full.set()

    async def attempt(self, passed: Passed, timeout_s: float) -> Outcome:
        """Call the provider once and say how it ended, whatever it raised."""
        outcome = partial(Outcome, passed.message_id, passed.claim_id, provider=self.sender_name)
        jitter = self.ctx.jitter
        try:
            async with asyncio.timeout(timeout_s + 0.5):  # adapters keep the bound; this one holds if one does not
                accepted = await self.send(passed, timeout_s)
        except Throttled as error:
            wait_s = next_throttle_s(error.retry_after_s, jitter=jitter)
            self.slow_down(wait_s)
            return outcome(kind="throttled", code=error.code, detail=error.detail, wait_s=wait_s)
        except Retryable as error:
            if error.code in UNSENT_CODES:
                return outcome(
                    kind="throttled",
                    code=error.code,
                    detail=error.detail,
                    wait_s=next_throttle_s(None, jitter=jitter),
                )
            if passed.attempts >= MAX_ATTEMPTS:
                return outcome(kind="failed", code="attempts exhausted", detail=str(error))
            wait_s = next_backoff_s(passed.attempts, jitter=jitter)
            return outcome(kind="retry", code=error.code, detail=error.detail, wait_s=wait_s)
        except Permanent as error:
            return outcome(kind="failed", code=error.code, detail=error.detail)
        except (InDoubt, TimeoutError) as error:
            return self.doubt(passed, error)
        except Exception as error:
            # A defect in an adapter is no reason to lose the message: it may have been sent, as after a crash.
            self.ctx.log.error("send.adapter_broken", message_id=str(passed.message_id), exc_info=error)
            return self.doubt(passed, error)
        self.limit = min(self.limit + 1, self.ctx.settings.send_concurrency)
        return outcome(
            kind="sent",
            units=passed.units if passed.channel == "sms" else max(passed.units - len(accepted.detail), 0),
            provider_message_id=accepted.provider_message_id,
            refused=accepted.detail,
            suppressed=passed.suppressed,
        )

    async def send(self, passed: Passed, timeout_s: float) -> Accepted:
        """Hand the message to its channel's provider."""
        if isinstance(passed.outgoing, OutgoingSms):
            return await self.ctx.ports.sms.send_sms(passed.outgoing, timeout_s=timeout_s)
        return await self.ctx.ports.email.send_email(passed.outgoing, timeout_s=timeout_s)

    def doubt(self, passed: Passed, error: BaseException) -> Outcome:
        """Return the outcome of a call whose end is unknown: it waits for evidence, at least its backoff."""
        return Outcome(
            passed.message_id,
            passed.claim_id,
            "in_doubt",
            provider=self.sender_name,
            code=error.code if isinstance(error, InDoubt) else type(error).__name__,
            detail=str(error)[:500],
            wait_s=max(evidence_wait_s(self.ctx), next_backoff_s(passed.attempts, jitter=self.ctx.jitter)),
        )

    def slow_down(self, wait_s: float) -> None:
        """Halve the concurrency and pause the lane; a long wait ends its run."""
        self.limit = max(1, self.limit // 2)
        self.paused_until = monotonic() + min(wait_s, 1.0)
        self.is_stopped = self.is_stopped or wait_s >= LANE_STOP_S

    # ── record ──

    async def keep_recording(self) -> None:
        """Write results in sets: FLUSH_AT of them, or what came within FLUSH_AFTER_S."""
        while True:
            await self.result_arrived.wait()
            self.result_arrived.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_AFTER_S):
                    await self.set_is_full.wait()
            self.set_is_full.clear()
            await self.flush()

    async def flush(self) -> None:
        """Record what has ended. Raises DatabaseAway when it cannot be written while the leases hold."""
        async with self.flushing:  # nobody returns while a set is still being written
            while self.results:
                outcomes, self.results = self.results, []
                self.ctx.reach("before_record")
                try:
                    # A run that is cut does not take a set with it that is being written.
                    recorded = await asyncio.shield(asyncio.create_task(self.record_while_leased(outcomes)))
                except Exception:
                    self.results = outcomes + self.results
                    raise
                self.ctx.reach("recorded")
                self.tally(outcomes, recorded)

    async def record_while_leased(self, outcomes: list[Outcome]) -> record.Recorded:
        """Write the outcomes, again and again while PostgreSQL refuses and the leases last: they are worth it.

        After a long freeze too there is a second try. Data that PostgreSQL will never take is parted from the rest.
        """
        give_up_at = min(monotonic() + self.ctx.settings.send_lease_s / 2, self.ctx.deadline.at - 0.75)
        tries = 0
        while True:
            tries += 1
            try:
                return await self.ctx.database.run(partial(record.record_outcomes, outcomes=outcomes, shard=self.shard))
            except (DatabaseAway, psycopg.Error) as error:
                if is_data_fault(error):
                    return await self.record_apart(outcomes, error)
                if monotonic() >= give_up_at and tries > 1:
                    for outcome in outcomes:
                        self.ctx.log.error(
                            "send.outcome_unrecorded",
                            message_id=str(outcome.message_id),
                            kind=outcome.kind,
                            provider_message_id=outcome.provider_message_id,
                        )
                    raise
                await asyncio.sleep(0.25)

    async def record_apart(self, outcomes: list[Outcome], error: Exception) -> record.Recorded:
        """Write the outcomes one half at a time, down to the one that cannot be written, which is left in doubt."""
        if len(outcomes) == 1:
            self.ctx.log.error("send.outcome_refused", message_id=str(outcomes[0].message_id), exc_info=error)
            return record.Recorded({}, [outcomes[0].message_id])
        middle = len(outcomes) // 2
        halves = [await self.record_while_leased(half) for half in (outcomes[:middle], outcomes[middle:])]
        return record.Recorded(halves[0].written | halves[1].written, halves[0].lost + halves[1].lost)

    def tally(self, outcomes: list[Outcome], recorded: record.Recorded) -> None:
        """Count what was written; log the single messages that did not leave."""
        names = {"sent": "sent", "failed": "failed"}
        self.counts.update(names.get(kind, "retried") for kind in recorded.written.values())
        self.counts["lost"] += len(recorded.lost)
        for outcome in outcomes:
            if outcome.kind != "sent" or outcome.message_id not in recorded.written:
                self.ctx.log.warning(
                    "send.not_sent",
                    message_id=str(outcome.message_id),
                    kind=outcome.kind if outcome.message_id in recorded.written else "lost",
                    code=outcome.code,
                    wait_s=round(outcome.wait_s, 1),
                )

    async def finish_calls(self) -> None:
        """Wait for the calls in flight; each is bounded by its own timeout."""
        while self.calls:
            await asyncio.wait(self.calls)

    # ── leases ──

    async def keep_leases(self) -> None:
        """Renew every live claim each third of a lease; drop what belongs to a claim that is gone."""
        lease_s = self.ctx.settings.send_lease_s
        while True:
            await asyncio.sleep(lease_s / 3)
            sure_until = monotonic() + lease_s
            try:
                for claim_id in await self.ctx.database.run(partial(queue.end_claims, claim_ids=list(self.claims))):
                    del self.claims[claim_id]
                claim_ids = list(self.claims)
                alive = await self.ctx.database.run(partial(queue.renew_claims, claim_ids=claim_ids, lease_s=lease_s))
            except DatabaseAway:
                continue  # begin_before keeps calls from outliving what was surely ours
            for claim_id in claim_ids:
                if claim_id in alive:
                    self.claims[claim_id] = sure_until
                else:
                    self.drop_claim(claim_id)

    def drop_claim(self, claim_id: UUID) -> None:
        """Forget a claim that ended without us: its rows belong to others now."""
        del self.claims[claim_id]
        for rows in (self.held, self.solo):
            kept = [row for row in rows if row.claim_id != claim_id]
            self.counts["lost"] += len(rows) - len(kept)
            rows.clear()
            rows.extend(kept)

    @property
    def shard(self) -> int:
        """Return this run's usage shard seed."""
        return self.ctx.job_id.int
