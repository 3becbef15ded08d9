"""How the pages say times, amounts and where a message stands."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from nightmail.rules.messages import MAX_ATTEMPTS
from nightmail.store.overview import COUNT_MAX, MessageDetail


def amount(value: int) -> str:
    """Return the number with commas."""
    return f"{value:,}"


def bounded(value: int) -> str:
    """Return a count that stopped at COUNT_MAX as what it is: a lower bound."""
    return f"{COUNT_MAX:,}+" if value >= COUNT_MAX else f"{value:,}"


def duration(milliseconds: float) -> str:
    """Return a span of time in the unit that fits: `12 ms`, `1.4 s`, `3 min 20 s`, `5 h 10 min`, `12 d`."""
    if milliseconds < 1000:
        return f"{milliseconds:.0f} ms"
    seconds = milliseconds / 1000
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole < 600 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min" if whole < 86_400 else f"{whole // 86_400} d"


def distance(moment: datetime, now: datetime) -> str:
    """Return how far a moment is from now: `now`, `12 s ago`, `in 3 min`."""
    seconds = (moment - now).total_seconds()
    if abs(seconds) < 1:
        return "now"
    size = abs(seconds)
    for limit, unit, name in ((60, 1, "s"), (3600, 60, "min"), (172_800, 3600, "h")):
        if size < limit:
            text = f"{size // unit:.0f} {name}"
            break
    else:
        text = f"{size // 86_400:.0f} d"
    return f"in {text}" if seconds > 0 else f"{text} ago"


def utc(moment: datetime) -> str:
    """Return the moment in full."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def precise(moment: datetime) -> str:
    """Return the moment in full, with milliseconds."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}"[:-3] + " UTC"


def spaced(name: str) -> str:
    """Return a stored word as people write it: `not_configured` → `not configured`."""
    return name.replace("_", " ")


def byte_size(size: int) -> str:
    """Return a size in bytes, kB or MB."""
    if size < 1000:
        return f"{size} B"
    return f"{size / 1000:.1f} kB" if size < 1_000_000 else f"{size / 1_000_000:.1f} MB"


def standing(message: MessageDetail, now: datetime) -> str:
    """Return in one sentence where the message stands and why."""
    match message.state:
        case "scheduled":
            return _waiting(message, now)
        case "sending" if message.intent_at is not None and message.runner is None:
            return (
                "The end of its last call is not known (a timeout, or a runner that died); "
                f"it is looked at again {_when(message.due_at, now)}, policy {message.send_policy}."
            )
        case "sending":
            return f"The call to the provider began {distance(message.intent_at or now, now)}."
        case "sent":
            return _sent(message)
        case "suppressed":
            return "Every recipient is on the suppression list: nothing was sent, nothing is charged."
        case "canceled":
            return "Canceled on request before its call began: nothing was sent, nothing is charged."
        case "failed":
            return f"Not sent: {message.last_error or message.reason or 'no reason recorded'}."
        case "ambiguous":
            return (
                "A call was interrupted and its end is not known. The policy is at_most_once, so it waits for you: "
                f"POST /emails/{message.id}/release with action resend, mark_sent or cancel."
            )
        case _:
            return f"The provider reported: {message.state}."


def payment(message: MessageDetail) -> str:
    """Return in one sentence who pays for the message's units, and whether that is settled."""
    if message.env == "test":
        return "Test env: nobody is charged."
    included = message.units - message.credit_units - message.metered_units
    parts = [
        f"{amount(included)} included" if included else "",
        f"{amount(message.credit_units)} by {amount(message.credits)} credits" if message.credit_units else "",
        f"{amount(message.metered_units)} metered" if message.metered_units else "",
    ]
    said = ", ".join(part for part in parts if part)
    match message.state:
        case "ambiguous":
            return f"{said}; reserved until its end is known."
        case "scheduled" | "sending":
            return f"{said}; reserved until it is sent."
        case "canceled" | "suppressed" | "failed":
            return f"{said}; given back, as nothing was sent."
        case _:
            return f"{said}; settled when it was sent."


def _when(moment: datetime | None, now: datetime) -> str:
    return distance(moment, now) if moment is not None else "soon"


def _waiting(message: MessageDetail, now: datetime) -> str:
    if message.runner is not None:
        return f"Held by {message.runner}, its call has not begun; it can still be canceled."
    if message.last_error:
        tried = f"Attempt {message.attempts} of {MAX_ATTEMPTS} was" if message.attempts else "It was"
        return f"{tried} not accepted: {message.last_error}. The next attempt comes {_when(message.due_at, now)}."
    if message.due_at is not None and message.due_at > now:
        return f"Leaves {distance(message.due_at, now)}; until then it can be canceled or moved."
    return "Due now and waiting for a runner."


def _sent(message: MessageDetail) -> str:
    if message.env == "test":
        return "Test env: recorded as sent, and no provider was called."
    due_at = max(message.created_at, message.scheduled_at or message.created_at)
    late = (message.sent_at or due_at) - due_at
    return f"Taken by the provider and recorded {duration(late / timedelta(milliseconds=1))} after it was due."
