"""The dates on which months begin, found by looking at every single day: no month arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

DAY = timedelta(days=1)
# Every day of a leap year.
ANCHORS = [datetime(2028, 1, 1, 6, 30, tzinfo=UTC) + number * DAY for number in range(366)]


def walk(anchor: datetime, until: datetime) -> Iterator[datetime]:
    """Yield the days up to `until` that have the anchor's number, or are the last of a month that is shorter."""
    day = anchor
    while day <= until:
        is_last = (day + DAY).month != day.month
        if day.day == anchor.day or (is_last and day.day < anchor.day):
            yield day
        day += DAY
