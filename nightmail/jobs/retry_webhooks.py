"""Attempt webhook deliveries that are due, the first time or again.

Path      /api/cron/retry-webhooks, every five minutes
Claims    webhook_deliveries: due, or held by a claim whose lease ran out               (store.webhook_deliveries)
Calls     WebhookSender, outside any transaction, one attempt per claim                 (webhooks.deliver)
Writes    deliveries, attempts, health of endpoints, webhook.disabled in one transaction (store.webhook_attempts)
Safe      to run twice or at once: every write after the claim names the claim_id
Result    claimed, delivered, retried, failed: numbers of deliveries; disabled: endpoints
Source    messaging cron specification, retry-webhooks
"""

from __future__ import annotations

from nightmail.engine.job import JobContext, JobResult
from nightmail.store.webhook_deliveries import count_due
from nightmail.webhooks.closed import fail_closed
from nightmail.webhooks.deliver import KEYS, DeliveryRun

__all__ = ["KEYS", "LEAST_RUN_S", "run"]

# Below this no post could begin: a third of the timeout, and the margin for the answer.
LEAST_RUN_S = 7.0
# Of the run's time, for deliveries with nowhere to go: the others must not wait for them.
CLOSED_PART = 0.2


async def run(ctx: JobContext) -> JobResult:
    """Deliver until nothing is due or the deadline is near; fail what has nowhere to go."""
    if ctx.dry:
        return JobResult({**dict.fromkeys(KEYS, 0), "claimed": await ctx.database.run(count_due)})
    closed, more_closed = await fail_closed(ctx, seconds=ctx.deadline.left_s * CLOSED_PART)
    counts, more = await DeliveryRun(ctx).drain()
    counts["failed"] += closed
    return JobResult({key: counts[key] for key in KEYS}, more or more_closed)
