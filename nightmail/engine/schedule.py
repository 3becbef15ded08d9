"""Cron expressions and slots. All times are UTC."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import lru_cache

from cronsim import CronSim

# A call this much before a slot counts for it; for jobs that run more often than every two minutes, half a period.
EARLY = timedelta(seconds=60)
# A platform may name a slot at most this far ahead.
AHEAD = timedelta(seconds=60)


class BadSlot(ValueError):
    """The named slot is not a time with zone, or too far ahead; the message says what would do."""


def previous_slot(schedule: str, now: datetime) -> datetime:
    """Return the newest occurrence at or before `now`."""
    return _previous(schedule, now.replace(second=0, microsecond=0))


@lru_cache(maxsize=256)
def _previous(schedule: str, minute: datetime) -> datetime:
    # CronSim looks strictly before its start, so start a minute later.
    return next(CronSim(schedule, minute + timedelta(minutes=1), reverse=True))


def next_slot(schedule: str, now: datetime) -> datetime:
    """Return the first occurrence after `now`."""
    return next(CronSim(schedule, now))


def slot_of_call(schedule: str, now: datetime) -> datetime:
    """Return the slot an unnamed call made at `now` belongs to: the newest, or the coming one when it is near."""
    newest, coming = previous_slot(schedule, now), next_slot(schedule, now)
    return coming if coming - now <= min(EARLY, (coming - newest) / 2) else newest


def named_slot(schedule: str, text: str, now: datetime) -> datetime:
    """Return the occurrence a platform named by an ISO 8601 time with zone or Unix seconds.

    A time between two occurrences means the one before it. Raises BadSlot.
    """
    try:
        named = datetime.fromtimestamp(int(text), UTC) if text.isdigit() else datetime.fromisoformat(text)
        if named.tzinfo is None:
            raise ValueError(text)
        named = named.astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        raise BadSlot("slot must be an ISO 8601 time with zone, such as 2026-01-01T00:00:00Z") from None
    if named > now + AHEAD:
        raise BadSlot("slot must not be more than 60 s ahead")
    if named < now - timedelta(days=366):
        raise BadSlot("slot must not be more than a year ago")
    return previous_slot(schedule, named)
