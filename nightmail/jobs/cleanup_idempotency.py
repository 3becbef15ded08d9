"""Delete idempotency keys that have expired.

Path      /api/cron/cleanup-idempotency, 03:00 every day
Writes    idempotency_keys, in chunks by expiry, one statement a chunk                      (store.idempotency_keys)
Safe      to run twice or at once: chunks skip what another run holds; look-ups ignore expired keys anyway
Result    deleted: number of keys
Source    messaging cron specification, cleanup-idempotency
"""

from __future__ import annotations

from nightmail.engine.job import JobContext, JobResult
from nightmail.store import idempotency_keys

KEYS = ("deleted",)


async def run(ctx: JobContext) -> JobResult:
    """Delete expired keys chunk by chunk until none is left or the deadline is near."""
    if ctx.dry:
        return JobResult({"deleted": await ctx.database.run(idempotency_keys.count_expired)})
    deleted = 0
    while not (ctx.deadline.is_over or ctx.stopping.is_set()):
        chunk = await ctx.database.run(idempotency_keys.delete_expired)
        deleted += chunk
        ctx.reach("chunk_deleted")
        if chunk < idempotency_keys.CHUNK:
            return JobResult({"deleted": deleted})
    return JobResult({"deleted": deleted}, more=True)
