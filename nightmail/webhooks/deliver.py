"""Deliver what is due: claim, sign, post, record.

Three things happen at once, as in send-scheduled: the main loop claims as capacity frees and starts the posts, each
post makes one attempt, the recorder writes results in small sets. Some are claimed ahead, so that slots do not wait
for PostgreSQL; a lease outlasts that wait, the post and the writing of its result, and is never renewed.

Fairness: a claim gives each endpoint with something due an equal share, and never more posts at once than its own
limit; one that hangs holds its slots until the timeout, and after ten failures in a row a single one. An endpoint whose
last attempt failed is begun only when its whole timeout still fits into the run; others while a third of it does.
What is under way at the end is broken off: not counted, and due again at once.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from uuid import UUID

import msgspec
import psycopg

from nightmail.clock import monotonic, now
from nightmail.engine.job import JobContext
from nightmail.errors import DatabaseAway, ProviderError
from nightmail.store import webhook_attempts, webhook_deliveries
from nightmail.store.database import Connection
from nightmail.store.webhook_attempts import Disabled, Kind, Outcome
from nightmail.store.webhook_deliveries import Claimed
from nightmail.webhooks.judge import cut, exhausted, judge_error, judge_reply, slept, unsent
from nightmail.webhooks.notice import tell_disabled
from nightmail.webhooks.signature import signature_headers
from nightmail.webhooks.stamp import keep_bodies

JOB = "retry-webhooks"
KEYS = ("claimed", "delivered", "retried", "failed", "disabled")
COUNTED_AS: Mapping[Kind, str] = {"delivered": "delivered", "failed": "failed", "retry": "retried", "cut": "retried"}
# The source says 100 a batch. A claim lasts as long as a commit: with more, posts wait for none (docs/decisions/0018).
CLAIM_LIMIT = 400
# Rounds that are claimed ahead.
ROUNDS_AHEAD = 4
# Posts to endpoints in good health begin until this part of the timeout is left of the run.
LEAST_PART = 1 / 3
# What is under way is broken off this long before the run must have ended, so that it can still be written.
CUT_BEFORE_S = 0.75
# A delivery whose runner died so often may be what kills it. Far above what a crash loop of another cause reaches: most
# of what a runner holds when it dies was not even begun.
MAX_TAKEOVERS = 100
# An endpoint that answered this soon keeps its right to all slots; the others together get at most QUICK_PART less.
QUICK_S = 1.0
QUICK_PART = 1 / 4
# A post that took this much longer than its timeout did so because the process stood still.
SLEPT_S = 3.0
FLUSH_AFTER_S = 0.1
FLUSH_AT = 100
IDLE_CLAIM_S = 0.05
# With something due that cannot be claimed, because others hold the endpoints' rows, a run goes on looking this long.
LOOK_AGAIN_S = 1.0
REPEATS_EVERY_S = 0.25
# A probe that takes longer than this is made less often.
PROBE_S = 0.005
# When the process ends, what is under way gets this long.
STOP_S = 3.0


class Held(msgspec.Struct, frozen=True):
    """A claimed delivery with its body, and the monotonic time until which its post may begin."""

    claimed: Claimed
    body: bytes
    begin_before: float


class DeliveryRun:
    """One run's deliveries. All state is of this run; what matters is in PostgreSQL.

    `only_healthy` leaves endpoints alone whose last attempt failed.
    """

    def __init__(self, ctx: JobContext, *, only_healthy: bool = False) -> None:
        self.ctx = ctx
        self.only_healthy = only_healthy
        self.lease_s = ctx.settings.webhook_lease_s
        self.timeout_s = min(ctx.settings.webhook_timeout_s, self.lease_s / 2)
        if not only_healthy:
            # A run shorter than the timeout tries failing endpoints with what it has: perhaps all runs are so short.
            whole_s = ctx.deadline.left_s - CUT_BEFORE_S
            self.timeout_s = max(min(self.timeout_s, 0.75 * whole_s), self.timeout_s * LEAST_PART)
        # After the longest post there is still this much of the lease to write its result in.
        self.write_s = self.lease_s / 4
        self.limit = ctx.settings.webhook_concurrency
        self.per_endpoint = ctx.settings.webhook_endpoint_concurrency
        self.counts: Counter[str] = Counter()
        self.held: deque[Held] = deque()
        self.posts: dict[asyncio.Task[None], tuple[Claimed, bool]] = {}  # and whether it was begun as a slow one
        self.flying: Counter[UUID] = Counter()  # posts under way, by endpoint
        # Endpoints whose last answer was quick. The others, slow or not yet known, never get all slots: however many
        # hang or dawdle, some are left for the quick.
        self.quick: set[UUID] = set()
        self.slow_limit = max(1, int(self.limit * (1 - QUICK_PART)))
        self.slow_posts = 0
        # By endpoint: held, under way, or failed and not yet recorded. Until then the claim knows nothing of a failure,
        # and an endpoint that has just failed or gone must not be given more: nothing held for it is begun either.
        self.busy: Counter[UUID] = Counter()
        self.failed: Counter[UUID] = Counter()
        self.failed_meanwhile: set[UUID] = set()  # since the claim under way began, which may not know it
        self.ailing: set[UUID] = set()  # failed in this run, so that a success has something to put right
        self.notices: set[asyncio.Task[None]] = set()
        self.results: list[Outcome] = []
        self.result_arrived = asyncio.Event()
        self.set_is_full = asyncio.Event()
        self.post_ended = asyncio.Event()
        self.flushing = asyncio.Lock()
        self.is_restricted = only_healthy  # the last claim left out endpoints that the deadline has no room for
        self.next_claim_at = 0.0
        self.claimed_at = monotonic()  # when a claim last found something
        self.broken: BaseException | None = None

    # ── the run ──

    async def drain(self) -> tuple[Counter[str], bool]:
        """Deliver until nothing is due, the deadline is near or the process is asked to stop.

        Returns the counts and whether work was left. Raises DatabaseAway.
        """
        recorder = asyncio.create_task(self.keep_recording())
        try:
            try:
                while not self.must_stop:
                    if recorder.done():
                        recorder.result()
                    if not await self.advance():
                        break
            except asyncio.CancelledError:
                await self.finish_posts(0.0)
                raise
            except Exception:
                await self.finish_posts(self.left_s)
                await self.flush()
                raise
            await self.finish_posts(self.left_s)
            await self.flush()
            if self.notices:
                await asyncio.wait(self.notices, timeout=max(self.left_s, 0.1))
            if self.broken is not None:
                raise self.broken
        finally:
            recorder.cancel()
            await asyncio.wait({recorder})
            if self.results:  # the run is cut: what has ended is still written, by a task of its own
                with suppress(DatabaseAway, psycopg.Error):
                    await asyncio.shield(asyncio.create_task(self.flush()))
        return self.counts, await self.ctx.database.run(webhook_deliveries.has_work)

    @property
    def left_s(self) -> float:
        """Return how long posts under way may still take."""
        left_s = self.ctx.deadline.left_s - CUT_BEFORE_S
        return min(left_s, STOP_S) if self.ctx.stopping.is_set() else left_s

    @property
    def must_stop(self) -> bool:
        """Return whether no further post may begin."""
        is_late = self.ctx.deadline.left_s < self.timeout_s * LEAST_PART
        return is_late or self.broken is not None or self.ctx.stopping.is_set()

    async def advance(self) -> bool:
        """Claim and begin what can begin now, else wait for a change; return False when there is nothing left to do."""
        # Small claims cost as much as large ones, so room for a round is waited for.
        room = ROUNDS_AHEAD * self.limit - len(self.held)
        if monotonic() >= self.next_claim_at and room >= self.limit:
            claimed = await self.claim(min(room, CLAIM_LIMIT))
            for one in claimed:
                if one.claimed.endpoint_id in self.failed_meanwhile:
                    self.put_back(one)
                else:
                    self.held.append(one)
            self.begin()
            if claimed:
                return True
        if self.posts or self.held:
            await self.wait_for_end(IDLE_CLAIM_S)
            return True
        return await self.look_again()

    async def look_again(self) -> bool:
        """Return whether to go on although the last claim found nothing.

        Perhaps the recorder held an endpoint's row just then, or had yet to write that it is up again; or another run
        claimed for the same endpoints at that moment.
        """
        self.next_claim_at = 0.0
        if self.results or self.flushing.locked():
            await self.flush()
            return True
        if self.is_restricted or monotonic() > self.claimed_at + LOOK_AGAIN_S:
            return False
        if not await self.ctx.database.run(webhook_deliveries.has_work):
            return False
        await asyncio.sleep(self.ctx.jitter.uniform(0.1, 1.0) * IDLE_CLAIM_S)
        return True

    async def wait_for_end(self, timeout_s: float) -> None:
        """Wait until a post ends, at most `timeout_s`."""
        self.post_ended.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.post_ended.wait()

    # ── claim ──

    async def claim(self, limit: int) -> list[Held]:
        """Take up to `limit` deliveries, ahead of the slots that are to come free."""
        begin_before = monotonic() + self.lease_s - self.write_s - self.timeout_s
        self.failed_meanwhile.clear()
        claimed = await self.ctx.database.run(partial(self.claim_step, limit=limit))
        self.ctx.reach("claimed")
        if claimed:
            self.claimed_at = monotonic()
        self.next_claim_at = 0.0 if claimed else monotonic() + IDLE_CLAIM_S
        self.counts["claimed"] += len(claimed)
        self.busy.update(one.endpoint_id for one, _ in claimed)
        return [Held(one, body.encode(), begin_before) for one, body in claimed]

    async def claim_step(self, conn: Connection, limit: int) -> list[tuple[Claimed, str]]:
        """Claim, and make the bodies of those that have none, in one transaction."""
        self.is_restricted = self.only_healthy or self.ctx.deadline.left_s < self.timeout_s + CUT_BEFORE_S
        # In a pipeline the four statements of this transaction wait for PostgreSQL twice: each wait takes a turn of a
        # loop that is busy posting, and so the claim, not the posts, would bound the rate.
        async with conn.pipeline(), conn.transaction():
            claimed = await webhook_deliveries.claim_deliveries(
                conn,
                limit=limit,
                per_endpoint=2 * self.per_endpoint,  # as many waiting as under way
                lease_s=self.lease_s,
                busy=self.busy,
                only_healthy=self.is_restricted,
                only=list(self.quick) if self.slow_posts >= self.slow_limit else None,
            )
            fresh = [(one.fresh, one.dialect) for one in claimed if one.fresh is not None]
            made = iter(await keep_bodies(conn, [one for one, _ in fresh], [dialect for _, dialect in fresh]))
        return [(one, one.body if one.body is not None else next(made)) for one in claimed]

    # ── post ──

    def begin(self) -> None:
        """Start what is held, in order, as far as there are slots, and its endpoint has one and has not just failed."""
        waiting: list[Held] = []
        while self.held and len(self.posts) < self.limit:
            one = self.held.popleft()
            endpoint_id = one.claimed.endpoint_id
            if endpoint_id in self.failed:
                self.put_back(one)
                continue
            is_slow = endpoint_id not in self.quick
            if self.flying[endpoint_id] >= self.per_endpoint or (is_slow and self.slow_posts >= self.slow_limit):
                waiting.append(one)
                continue
            self.slow_posts += is_slow
            task = asyncio.create_task(self.post(one))
            self.posts[task] = (one.claimed, is_slow)
            self.flying[endpoint_id] += 1
            task.add_done_callback(self.ended)
        self.held.extendleft(reversed(waiting))

    def ended(self, task: asyncio.Task[None]) -> None:
        """Give the slot to what is held; an error here is a defect of ours, with which the run ends."""
        one, is_slow = self.posts.pop(task)
        self.slow_posts -= is_slow
        _take_off(self.flying, one.endpoint_id)
        _take_off(self.busy, one.endpoint_id)
        self.post_ended.set()
        if not task.cancelled() and task.exception() is not None:
            self.broken = self.broken or task.exception()
            self.ctx.log.error("webhook.post_broken", event_id=str(one.event_id), exc_info=task.exception())
        if self.held and not self.must_stop:
            self.begin()

    def put_back(self, one: Held) -> None:
        """Give back what was held and not begun; it is surely not posted."""
        self.keep(unsent(one.claimed, now()))
        _take_off(self.busy, one.claimed.endpoint_id)

    async def post(self, held: Held) -> None:
        """Make the one attempt of this claim and keep its outcome for the recorder."""
        one, body = held.claimed, held.body
        sent_at, began = now(), monotonic()
        if began > held.begin_before:
            # It waited too long, or the process slept: another runner may hold the row by now.
            self.keep(unsent(one, sent_at))
            return
        if one.takeovers > MAX_TAKEOVERS:
            self.keep(exhausted(one, sent_at))
            return
        self.ctx.reach("posting")
        headers = signature_headers(
            one.secrets, webhook_id=str(one.event_id), timestamp=int(sent_at.timestamp()), body=body
        )
        try:
            reply = await self.ctx.ports.webhooks.post(one.url, body=body, headers=headers, timeout_s=self.timeout_s)
        except ProviderError as error:
            duration_ms = _ms_since(began)
            if duration_ms > (self.timeout_s + SLEPT_S) * 1000:
                outcome = slept(one, sent_at, duration_ms=duration_ms)
            else:
                outcome = judge_error(one, error, sent_at, duration_ms=duration_ms, jitter=self.ctx.jitter)
        except asyncio.CancelledError:
            # Broken off by us: the endpoint may have it, so it is posted again under the same id.
            self.keep(cut(one, sent_at, duration_ms=_ms_since(began)))
            raise
        else:
            outcome = judge_reply(one, reply, sent_at, duration_ms=_ms_since(began), jitter=self.ctx.jitter)
        self.ctx.reach("posted")
        if outcome.http_status is not None and outcome.duration_ms < QUICK_S * 1000:
            self.quick.add(one.endpoint_id)
        else:
            self.quick.discard(one.endpoint_id)
        self.keep(outcome)

    async def finish_posts(self, seconds: float) -> None:
        """Put back what is held and wait for the posts under way, at most so long; then break them off."""
        while self.held:
            self.put_back(self.held.popleft())
        if self.posts:
            await asyncio.wait(self.posts, timeout=max(seconds, 0.0))
        while self.posts:
            for task in list(self.posts):
                task.cancel()
            await asyncio.wait(self.posts, timeout=0.5)

    # ── record ──

    def keep(self, outcome: Outcome) -> None:
        """Hand an outcome to the recorder."""
        if outcome.kind != "delivered":
            self.busy[outcome.endpoint_id] += 1
            self.failed[outcome.endpoint_id] += 1
            self.failed_meanwhile.add(outcome.endpoint_id)
            self.ailing.add(outcome.endpoint_id)
        elif outcome.endpoint_id in self.ailing:
            outcome = msgspec.structs.replace(outcome, is_healthy=False)
        self.results.append(outcome)
        self.result_arrived.set()
        if len(self.results) >= FLUSH_AT or outcome.is_gone:
            self.set_is_full.set()

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
        async with self.flushing:
            while self.results:
                outcomes, self.results = self.results, []
                self.ctx.reach("before_record")
                recorded = await asyncio.shield(asyncio.create_task(self.record_while_leased(outcomes)))
                self.ctx.reach("recorded")
                for outcome in outcomes:
                    if outcome.kind != "delivered":
                        _take_off(self.busy, outcome.endpoint_id)
                        _take_off(self.failed, outcome.endpoint_id)
                self.tally(outcomes, recorded.lost)
                for endpoint in recorded.disabled:
                    self.notices.add(asyncio.create_task(self.tell(endpoint)))

    async def record_while_leased(self, outcomes: list[Outcome]) -> webhook_attempts.Recorded:
        """Write the outcomes, again and again while PostgreSQL is away and the leases last.

        What is given up is due again when its lease ends, and is posted once more under the same id.
        """
        give_up_at = min(monotonic() + self.write_s / 2, self.ctx.deadline.at - CUT_BEFORE_S)
        while True:
            try:
                return await self.ctx.database.run(partial(webhook_attempts.record_attempts, outcomes=outcomes))
            except DatabaseAway:
                if monotonic() >= give_up_at:
                    self.ctx.log.error("webhook.outcomes_unrecorded", attempts=len(outcomes))
                    raise
                await asyncio.sleep(0.25)

    def tally(self, outcomes: Sequence[Outcome], lost: set[int]) -> None:
        """Count what was written; log the single attempts that failed."""
        for place, outcome in enumerate(outcomes):
            if place in lost:
                self.ctx.log.warning("webhook.result_lost", event_id=str(outcome.event_id), kind=outcome.kind)
            elif outcome.kind == "unsent":
                self.counts["claimed"] -= 1
            else:
                self.counts[COUNTED_AS[outcome.kind]] += 1
                if outcome.kind != "delivered":
                    self.log_failure(outcome)

    def log_failure(self, outcome: Outcome) -> None:
        """Log one attempt that did not deliver, with what was decided."""
        self.ctx.log.warning(
            "webhook.not_delivered",
            endpoint_id=str(outcome.endpoint_id),
            event_id=str(outcome.event_id),
            kind=outcome.kind,
            status=outcome.http_status,
            error=outcome.error,
            wait_s=round(outcome.wait_s, 1),
        )

    async def tell(self, endpoint: Disabled) -> None:
        """Say that an endpoint was disabled; its event is written already."""
        self.counts["disabled"] += 1
        self.ctx.log.error(
            "webhook.disabled", endpoint_id=str(endpoint.id), org_id=str(endpoint.org_id), reason=endpoint.reason
        )
        await tell_disabled(self.ctx, endpoint)


def _take_off(counter: Counter[UUID], endpoint_id: UUID) -> None:
    """Count one less, and forget an endpoint that has none left."""
    counter[endpoint_id] -= 1
    if counter[endpoint_id] <= 0:
        del counter[endpoint_id]


def _ms_since(began: float) -> int:
    return round((monotonic() - began) * 1000)


class Probe:
    """The dispatcher's probe: looks for fresh deliveries each time, for repeats every REPEATS_EVERY_S.

    With thousands of paused or resting endpoints a look takes long; then it looks less often, a tenth of the time.
    """

    def __init__(self) -> None:
        self._repeats_at = 0.0
        self._look_at = 0.0

    async def __call__(self, conn: Connection) -> list[str]:
        """Return one name when a claim made now would find something."""
        began = monotonic()
        if began < self._look_at:
            return []
        with_repeats = began >= self._repeats_at
        if with_repeats:
            self._repeats_at = began + REPEATS_EVERY_S
        is_found = await webhook_deliveries.has_work(conn, with_repeats=with_repeats)
        self._look_at = monotonic() + 9 * max(monotonic() - began - PROBE_S, 0.0)
        return ["deliveries"] if is_found else []


async def work(ctx: JobContext, names: Sequence[str]) -> tuple[Counter[str], bool]:
    """Deliver what is due: the dispatcher's work.

    What came while the run ended is no sign that the run was stopped: the next probe finds it.
    """
    counts, _ = await DeliveryRun(ctx).drain()
    return counts, False


async def deliver_after(ctx: JobContext) -> None:
    """Deliver at the end of another job's run what it has just made, to endpoints in good health."""
    if ctx.job == JOB:
        return
    if await ctx.database.run(webhook_deliveries.has_work):
        await DeliveryRun(ctx, only_healthy=True).drain()
