"""What a sender is told when the rating refuses: nothing was stored, and the same request may succeed later."""

from __future__ import annotations

from nightmail.store.rating import QuotaExceeded, Refusal
from nightmail.web.problems import Problem

NOUNS = {"email": "emails", "sms": "SMS segments"}


def refused_by_rating(refusal: Refusal) -> Problem:
    """429 `monthly_quota_exceeded` (Resend's name), 402 `insufficient_credits`."""
    if isinstance(refusal, QuotaExceeded):
        noun = NOUNS[refusal.channel]
        return Problem(
            429,
            "monthly_quota_exceeded",
            f"The plan includes {refusal.limit} {noun} in {refusal.period}: {refusal.used} are used or scheduled and "
            f"{refusal.required} more were asked for. The quota resets at {refusal.resets_at:%Y-%m-%dT%H:%M:%SZ}; "
            "until then send less, or ask for a larger plan.",
        )
    return Problem(
        402,
        "insufficient_credits",
        f"Not enough credits: {refusal.required} required, {refusal.available} available, {refusal.missing} missing. "
        "Buy credits and send the same request again.",
    )
