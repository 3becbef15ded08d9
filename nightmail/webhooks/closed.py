"""Deliveries with nowhere to go: their endpoint is disabled, or removed."""

from __future__ import annotations

from functools import partial
from uuid import UUID

from nightmail.clock import monotonic
from nightmail.engine.job import JobContext
from nightmail.store import webhook_deliveries
from nightmail.store.database import Connection
from nightmail.webhooks.stamp import keep_bodies

CLOSED_PER_STEP = 100
FAILED_PER_STEP = 2000


async def fail_closed(ctx: JobContext, *, seconds: float) -> tuple[int, bool]:
    """Fail what is pending for endpoints that are disabled or removed, for at most so long.

    Returns how many deliveries that were, and whether any are left.
    """
    until = monotonic() + seconds
    failed = 0
    while True:
        endpoints = await ctx.database.run(partial(webhook_deliveries.list_closed_endpoints, limit=CLOSED_PER_STEP))
        done = 0
        for endpoint_id in endpoints:
            if monotonic() >= until or ctx.stopping.is_set():
                return failed + done, True
            done += await ctx.database.run(partial(_fail_closed, endpoint_id=endpoint_id))
        failed += done
        if not done:
            return failed, False


async def _fail_closed(conn: Connection, endpoint_id: UUID) -> int:
    """Fail one set of an endpoint's deliveries, in a transaction; a disabled one's are numbered first, to be pulled."""
    async with conn.transaction():
        locked = await webhook_deliveries.lock_endpoint(conn, endpoint_id)
        if locked is not None:
            dialect, status = locked
            if status != "disabled":  # it was enabled again meanwhile
                return 0
            stamped = await webhook_deliveries.number_fresh(conn, endpoint_id, limit=FAILED_PER_STEP)
            await keep_bodies(conn, stamped, [dialect] * len(stamped))
        return await webhook_deliveries.fail_pending(
            conn, endpoint_id, is_removed=locked is None, limit=FAILED_PER_STEP
        )
