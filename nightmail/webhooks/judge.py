"""What the end of a POST means: pure, so that each row of the specification's table is one line here."""

from __future__ import annotations

import random
from datetime import datetime
from functools import partial

from nightmail.errors import ProviderError
from nightmail.ports import WebhookReply
from nightmail.rules.webhooks import MAX_RETRY_AFTER_S, next_wait_s
from nightmail.store.webhook_attempts import Outcome
from nightmail.store.webhook_deliveries import Claimed

MAX_ERROR = 500


def judge_reply(
    one: Claimed, reply: WebhookReply, sent_at: datetime, *, duration_ms: int, jitter: random.Random
) -> Outcome:
    """Return what an answer means: 2xx is delivered, 410 ends the endpoint, anything else is tried again.

    429 and 503 may say when: the whole endpoint is left alone until then, at most an hour.
    """
    outcome = partial(
        Outcome,
        one.endpoint_id,
        one.event_id,
        one.claim_id,
        sent_at=sent_at,
        duration_ms=duration_ms,
        is_healthy=one.is_healthy,
        url=one.url,
        http_status=reply.status,
        response=reply.body,
    )
    if 200 <= reply.status < 300:
        return outcome(kind="delivered")
    if reply.status == 410:
        return outcome(kind="failed", is_gone=True)
    asked_s = reply.retry_after_s if reply.status in (429, 503) else None
    wait_s = next_wait_s(one.schedule, one.attempts, retry_after_s=asked_s, jitter=jitter)
    block_s = min(asked_s or 0.0, MAX_RETRY_AFTER_S)
    if wait_s is None:
        return outcome(kind="failed", block_s=block_s)
    return outcome(kind="retry", wait_s=wait_s, block_s=block_s)


def judge_error(
    one: Claimed, error: ProviderError, sent_at: datetime, *, duration_ms: int, jitter: random.Random
) -> Outcome:
    """Return the outcome of an attempt without an answer: tried again while there are attempts."""
    wait_s = next_wait_s(one.schedule, one.attempts, jitter=jitter)
    return Outcome(
        one.endpoint_id,
        one.event_id,
        one.claim_id,
        "failed" if wait_s is None else "retry",
        sent_at,
        duration_ms,
        one.is_healthy,
        error=str(error)[:MAX_ERROR],
        wait_s=wait_s or 0.0,
        url=one.url,
    )


def cut(one: Claimed, sent_at: datetime, *, duration_ms: int) -> Outcome:
    """Return the outcome of an attempt that we broke off because the run ended."""
    error = f"broken off after {duration_ms} ms: the run ended"
    return Outcome(
        one.endpoint_id,
        one.event_id,
        one.claim_id,
        "cut",
        sent_at,
        duration_ms,
        one.is_healthy,
        error=error,
        url=one.url,
    )


def slept(one: Claimed, sent_at: datetime, *, duration_ms: int) -> Outcome:
    """Return the outcome of an attempt during which our process did not run: no fault of the endpoint's."""
    error = f"no answer seen: the process stood still, {duration_ms} ms in all"
    return Outcome(
        one.endpoint_id,
        one.event_id,
        one.claim_id,
        "cut",
        sent_at,
        duration_ms,
        one.is_healthy,
        error=error,
        is_telling=False,
    )


def unsent(one: Claimed, at: datetime) -> Outcome:
    """Return the outcome of a claim that was given back: no attempt was made."""
    return Outcome(
        one.endpoint_id, one.event_id, one.claim_id, "unsent", at, 0, one.is_healthy, is_post=False, is_telling=False
    )


def exhausted(one: Claimed, at: datetime) -> Outcome:
    """Return the outcome of a delivery that runner after runner died of, as it seems."""
    error = f"attempts exhausted: {one.takeovers} runners died while they held it"
    return Outcome(
        one.endpoint_id,
        one.event_id,
        one.claim_id,
        "failed",
        at,
        0,
        one.is_healthy,
        error=error,
        is_post=False,
        is_telling=False,
    )
