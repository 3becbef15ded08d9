"""Book the expiry of credits whose time has come.

Path      /api/jobs/credits/expire, 01:00 every day, after credits-grant
Reads     credit_batches that ended before the run began and have something left     (store.credit_expiry.expire_chunk)
Writes    credit_batches, ledger, accounts, deliveries                               (one transaction per chunk)
Safe      to run twice or at once: accounts are locked, and a batch has nothing left after the first time
Late      harmless: a batch that has ended cannot be spent, booked or not
Fails     by itself: a chunk that PostgreSQL refuses is halved down to the account, which is left and logged
Result    processed_batches, processed_users, total_expired_amount (credits)
Source    credits cron jobs, expire credits endpoint; it was what ended credits, here it only books
"""

from __future__ import annotations

from datetime import datetime
from functools import partial

import psycopg

from nightmail.engine.job import JobContext, JobResult
from nightmail.engine.lanes import side_by_side
from nightmail.store import credit_expiry
from nightmail.store.credit_grants import START, Lane
from nightmail.store.database import is_away
from nightmail.store.queue import read_clock

KEYS = ("processed_batches", "processed_users", "total_expired_amount")
CHUNK = 5000
# As in credits-grant.
LANES = 2


async def run(ctx: JobContext) -> JobResult:
    """Book in chunks until nothing is left that had ended when the run began, or the deadline is near."""
    if ctx.dry:
        return JobResult(dict(zip(KEYS, await ctx.database.run(credit_expiry.count_ended), strict=True)))
    until = await ctx.database.run(read_clock)
    done = await side_by_side(_go_along(ctx, Lane(number, LANES), until) for number in range(LANES))
    return JobResult(
        {key: sum(part.counts[key] for part in done) for key in KEYS}, more=any(part.more for part in done)
    )


async def _go_along(ctx: JobContext, lane: Lane, until: datetime) -> JobResult:
    """Book what has ended in a lane."""
    counts = dict.fromkeys(KEYS, 0)
    after, limit = START, CHUNK
    while not (ctx.deadline.is_over or ctx.stopping.is_set()):
        try:
            chunk = await ctx.database.run(
                partial(credit_expiry.expire_chunk, until=until, after=after, limit=limit, lane=lane)
            )
        except psycopg.Error as error:
            if is_away(error):
                raise
            if limit > 1:
                limit //= 2
                continue
            failed = await ctx.database.run(partial(credit_expiry.first_ended, until=until, after=after, lane=lane))
            if failed is not None:
                text = f"{type(error).__name__}: {error.diag.message_primary}"
                ctx.log.error("credits.expire_failed", batch_id=str(failed.id), error=text)
                after = failed
            continue
        if chunk is None:
            return JobResult(counts)
        for key, value in zip(KEYS, (chunk.batches, chunk.users, chunk.amount), strict=True):
            counts[key] += value
        after, limit = chunk.cursor, min(limit * 2, CHUNK)
        ctx.reach("chunk_booked")
    return JobResult(counts, more=True)
