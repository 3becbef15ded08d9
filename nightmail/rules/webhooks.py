"""Webhook endpoints: what they may subscribe to, what events are called, when an attempt is made again.

Inside, an event has a topic: `email.sent`, `sms.bounced`, `domain.verified`. An endpoint speaks one of two dialects:
Nightmail's names (`message.sent` stands for both channels) or Resend's (`email.delivery_delayed`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from typing import Literal

Dialect = Literal["nightmail", "resend"]
Status = Literal["enabled", "paused", "disabled"]

MESSAGE_KINDS = (
    "scheduled",
    "sent",
    "delivered",
    "delayed",
    "bounced",
    "complained",
    "failed",
    "canceled",
    "suppressed",
    "opened",
    "clicked",
    "unsubscribed",
    "ambiguous",
)
_OTHER_TYPES = (
    *(f"domain.{kind}" for kind in ("created", "verified", "failed", "unverified")),
    *(
        f"{noun}.{kind}"
        for noun in ("brand", "campaign", "phone_number")
        for kind in ("submitted", "verified", "action_required", "failed")
    ),
    "inbound.sms",
    "export.completed",
    "export.failed",
    "credits.granted",
    "credits.expired",
    "credits.low",
    "usage.threshold",
    "webhook.disabled",
)
# Sent on request to one endpoint, subscribed or not.
TEST_TOPIC = "webhook.test"

NIGHTMAIL_TYPES: dict[str, tuple[str, ...]] = {
    **{f"message.{kind}": (f"email.{kind}", f"sms.{kind}") for kind in MESSAGE_KINDS},
    **{name: (name,) for name in _OTHER_TYPES},
}
# Resend knows no names for canceled, unsubscribed and ambiguous, and one for all that becomes of a domain.
RESEND_TYPES: dict[str, tuple[str, ...]] = {
    **{
        f"email.{kind}": (f"email.{kind}",)
        for kind in (
            "sent",
            "scheduled",
            "delivered",
            "complained",
            "bounced",
            "opened",
            "clicked",
            "failed",
            "suppressed",
        )
    },
    "email.delivery_delayed": ("email.delayed",),
    "domain.created": ("domain.created",),
    "domain.updated": ("domain.verified", "domain.failed", "domain.unverified"),
    "domain.deleted": ("domain.deleted",),
}
TYPES: dict[Dialect, dict[str, tuple[str, ...]]] = {"nightmail": NIGHTMAIL_TYPES, "resend": RESEND_TYPES}
_NAMES: dict[Dialect, dict[str, str]] = {
    dialect: {topic: name for name, topics in types.items() for topic in topics} for dialect, types in TYPES.items()
}


def dialect_of(types: Iterable[str]) -> Dialect:
    """Return the dialect whose names these are; names of both dialects alone mean Resend's.

    Raises ValueError, in words for the caller, when a name is in neither or they do not belong together.
    """
    names = list(types)
    unknown = sorted({name for name in names if name not in RESEND_TYPES and name not in NIGHTMAIL_TYPES})
    if unknown:
        raise ValueError(f"unknown event type: {', '.join(unknown)}")
    if all(name in RESEND_TYPES for name in names):
        return "resend"
    if all(name in NIGHTMAIL_TYPES for name in names):
        return "nightmail"
    ours = next(name for name in names if name not in RESEND_TYPES)
    theirs = next(name for name in names if name not in NIGHTMAIL_TYPES)
    raise ValueError(f"{ours} is Nightmail's name and {theirs} is Resend's: use the names of one of them")


def topics_of(dialect: Dialect, types: Iterable[str]) -> list[str]:
    """Return the topics that the names stand for, sorted. Raises KeyError."""
    return sorted({topic for name in types for topic in TYPES[dialect][name]})


def type_of(dialect: Dialect, topic: str) -> str:
    """Return what the dialect calls a topic; one it has no name for (a test event) keeps its own."""
    return _NAMES[dialect].get(topic, topic)


# Svix's schedule: 27 h in all.
DEFAULT_WAITS_S = (5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 36000.0)
LEGACY_ATTEMPTS = 5
MAX_WAITS = 20
MAX_WAIT_S = 86_400.0
MAX_RETRY_AFTER_S = 3600.0
JITTER = 0.2
_WAIT = re.compile(r"([1-9]\d{0,5})([smh])")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_schedule(text: str) -> tuple[float, ...]:
    """Return the waits in seconds of a schedule such as `5s 5m 2h`. Raises ValueError, in words for the caller."""
    waits = []
    for part in text.split(" "):
        found = _WAIT.fullmatch(part)
        if found is None:
            raise ValueError("a schedule is `default`, `legacy` or waits such as `5s 5m 2h`, separated by one space")
        waits.append(int(found[1]) * _SECONDS[found[2]])
    if len(waits) > MAX_WAITS or max(waits) > MAX_WAIT_S:
        raise ValueError(f"a schedule has at most {MAX_WAITS} waits of at most 24h")
    return tuple(waits)


def max_attempts(schedule: str) -> int:
    """Return how many attempts a delivery gets."""
    if schedule == "legacy":
        return LEGACY_ATTEMPTS
    return 1 + len(DEFAULT_WAITS_S if schedule == "default" else parse_schedule(schedule))


def next_wait_s(
    schedule: str, attempts: int, *, retry_after_s: float | None = None, jitter: random.Random
) -> float | None:
    """Return the seconds until the next attempt after `attempts` (≥ 1) failed ones; None when there is none.

    `legacy` is the source document's min(2^attempt, 3600) s + 0-1 s. An endpoint's Retry-After lengthens a wait, up to
    an hour, and never shortens one: it would use the attempts up.
    """
    if attempts >= max_attempts(schedule):
        return None
    if schedule == "legacy":
        wait = min(2.0**attempts, 3600.0) + jitter.random()
    else:
        waits: Sequence[float] = DEFAULT_WAITS_S if schedule == "default" else parse_schedule(schedule)
        wait = waits[attempts - 1] * (1 + JITTER * jitter.random())
    return max(wait, min(retry_after_s or 0.0, MAX_RETRY_AFTER_S))


# Failures in a row after which an endpoint is left alone for a while and then tried with one delivery at a time: it
# saves the slots that a hanging endpoint would hold, and no single delivery has as many attempts.
BREAKER_FAILURES = 10
BREAKER_BASE_S = 15.0
BREAKER_MAX_S = 600.0
# Nothing but failures for this long disables an endpoint.
DISABLE_AFTER_DAYS = 5
SECRET_OVERLAP_HOURS = 24
