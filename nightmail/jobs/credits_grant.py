"""Grant the months of subscriptions that have begun.

Path      /api/jobs/credits/grant, 00:00 every day
Reads     purchases whose next month has begun and is not held                       (store.credit_grants.grant_chunk)
Writes    credit_grants, credit_batches, ledger, accounts, purchases, deliveries     (one transaction per chunk)
Safe      to run twice or at once: purchases are locked, and a month is granted once (unique in credit_grants)
Late      whatever the gap: every month that was missed is granted, in the order of the months
Fails     by itself: a chunk that PostgreSQL refuses is halved down to the purchase, which is left, noted and counted
Result    processed, successful, skipped (granted before, or of no credits), failed: numbers of months
Source    credits cron jobs, grant credits endpoint
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import psycopg

from nightmail.engine.job import JobContext, JobResult
from nightmail.engine.lanes import side_by_side
from nightmail.store import credit_grants
from nightmail.store.credit_grants import START, Cursor, Lane
from nightmail.store.database import is_away

KEYS = ("processed", "successful", "skipped", "failed")
# 2,500 months take a sixth of a second, and more while PostgreSQL waits for the disk: so long their locks are held.
CHUNK = 2500
# PostgreSQL works off one statement on one core; two lanes are 1.6 times as fast where it has two.
LANES = 2


@dataclass(slots=True)
class Tally:
    """What a run, or one of its lanes, has done so far."""

    processed: int = 0
    successful: int = 0
    failed: int = 0
    is_cut: bool = False

    def add(self, other: Tally) -> None:
        """Count what a lane has done."""
        self.processed += other.processed
        self.successful += other.successful
        self.failed += other.failed
        self.is_cut |= other.is_cut

    def result(self) -> JobResult:
        """Return the run's counts."""
        skipped = self.processed - self.successful - self.failed
        return JobResult(
            dict(zip(KEYS, (self.processed, self.successful, skipped, self.failed), strict=True)), self.is_cut
        )


async def run(ctx: JobContext) -> JobResult:
    """Grant in chunks until nothing is due or the deadline is near."""
    if ctx.dry:
        return Tally(*await ctx.database.run(credit_grants.count_due_grants)).result()
    tally = Tally()
    # Again and again: a month that was granted may have made the next one due. What an earlier run could not grant
    # comes when nothing else is left, so that it cannot keep the others waiting.
    while await _go_through(ctx, tally, again=False) or await _go_through(ctx, tally, again=True):
        continue
    return tally.result()


async def _go_through(ctx: JobContext, tally: Tally, *, again: bool) -> bool:
    """Go once through what is due; return whether there was anything, and time is left to look again."""
    if tally.is_cut:
        return False
    done = await side_by_side(_go_along(ctx, Lane(number, LANES), again) for number in range(LANES))
    for part in done:
        tally.add(part)
    return any(part.processed for part in done) and not tally.is_cut


async def _go_along(ctx: JobContext, lane: Lane, again: bool) -> Tally:
    """Go once through what is due in a lane."""
    tally, after, limit = Tally(), START, CHUNK
    while not (ctx.deadline.is_over or ctx.stopping.is_set()):
        try:
            chunk = await ctx.database.run(
                partial(credit_grants.grant_chunk, job_id=ctx.job_id, after=after, limit=limit, again=again, lane=lane)
            )
        except psycopg.Error as error:
            if is_away(error):
                raise
            if limit > 1:
                limit //= 2
            elif (failed := await _note_failure(ctx, after, again, lane, error)) is not None:
                tally.processed, tally.failed, after = tally.processed + 1, tally.failed + 1, failed
            continue
        if chunk is None:
            return tally
        tally.processed, tally.successful = tally.processed + chunk.processed, tally.successful + chunk.successful
        after, limit = chunk.cursor, min(limit * 2, CHUNK)
        ctx.reach("chunk_granted")
    tally.is_cut = True
    return tally


async def _note_failure(ctx: JobContext, after: Cursor, again: bool, lane: Lane, error: psycopg.Error) -> Cursor | None:
    """Write down why the first due purchase was not granted; return where it stands, None when it is due no more."""
    text = f"{type(error).__name__}: {error.diag.message_primary}"
    noted = await ctx.database.run(
        partial(credit_grants.mark_grant_failed, job_id=ctx.job_id, after=after, error=text, again=again, lane=lane)
    )
    if noted is not None:
        ctx.log.error("credits.grant_failed", purchase_id=str(noted.id), error=text)
    return noted
