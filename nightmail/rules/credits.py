"""Credits: which months a subscription has, when what they gave ends, and what a request is recognised by.

A period is a month of the subscription: period n begins n months after the anchor, in UTC, with the day clamped to the
month's end and never chained (31 Jan → 28 Feb → 31 Mar). The database counts the same way (nm_period_start).
"""

from __future__ import annotations

import calendar
import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import msgspec

# JSON readers that use doubles are exact up to 2^53: a thousandth of that leaves room for sums.
MAX_AMOUNT = 10**12
# A purchase that would have to be given more months than this when it is made is a mistake.
MOST_MONTHS_AT_ONCE = 120
# A refund of credits whose batch has ended, or is about to, can still be used for this long.
REFUND_DAYS = 30
# What is spent by amount, without naming a service.
UNNAMED_SERVICE = "direct"

PurchaseStatus = Literal["trialing", "active", "past_due", "canceled", "paid"]


def period_start(anchor: datetime, n: int) -> datetime:
    """Return when period n begins."""
    anchor = anchor.astimezone(UTC)
    years, month = divmod(anchor.month - 1 + n, 12)
    year = anchor.year + years
    day = min(anchor.day, calendar.monthrange(year, month + 1)[1])
    return anchor.replace(year=year, month=month + 1, day=day)


def first_period(anchor: datetime, grants_from: datetime) -> int:
    """Return the first period that begins at or after `grants_from`."""
    anchor, grants_from = anchor.astimezone(UTC), grants_from.astimezone(UTC)
    if grants_from <= anchor:
        return 0
    n = (grants_from.year - anchor.year) * 12 + grants_from.month - anchor.month
    return n if period_start(anchor, n) >= grants_from else n + 1


def last_period(anchor: datetime, at: datetime) -> int:
    """Return the period that runs at this moment, -1 before the anchor."""
    following = first_period(anchor, at)
    return following if period_start(anchor, following) == at.astimezone(UTC) else following - 1


def period_expiry(anchor: datetime, n: int, *, grace_days: int) -> datetime:
    """Return when the credits of period n end: when the next one begins, and the plan's grace."""
    return period_start(anchor, n + 1) + timedelta(days=grace_days)


def billing_end(anchor: datetime, interval_months: int, at: datetime) -> datetime:
    """Return when the billing interval that runs at this moment ends; the anchor before it."""
    intervals = (last_period(anchor, at) // interval_months) + 1
    return period_start(anchor, intervals * interval_months)


def holds_from(
    status: PurchaseStatus,
    *,
    anchor: datetime,
    past_due_at: datetime | None,
    past_due_days: int,
    ends_at: datetime | None,
) -> datetime | None:
    """Return from when on periods are not granted, None when none is held.

    A trial's first paid period waits for the payment; an unpaid subscription has some days, canceled or not; a canceled
    one keeps what it has paid for.
    """
    holds = [anchor] if status == "trialing" else []
    if past_due_at is not None:
        holds.append(past_due_at + timedelta(days=past_due_days))
    if ends_at is not None:
        holds.append(ends_at)
    return min(holds, default=None)


def fingerprint(*parts: Any) -> bytes:
    """Return what tells a repeated request from another one with the same reference."""
    return hashlib.sha256(msgspec.json.encode(parts)).digest()[:16]
