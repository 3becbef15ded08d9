"""What `scheduled_at` may say: ISO 8601 with a zone, or `in N minutes|hours|days`.

A time without zone means nothing across machines and is refused. A time that passed less than PAST_GRACE ago is taken
as now, because clocks differ and requests take time; an older one is a mistake of the caller and is refused.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

MAX_AHEAD = timedelta(days=366)
PAST_GRACE = timedelta(seconds=60)
MAX_LENGTH = 64
HINT = "use ISO 8601 with a zone (2026-08-05T11:52:01Z) or `in N minutes`, `in N hours`, `in N days`"

_ISO = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,9})?)?"
    r"(?P<zone> ?([Zz]|[+-][0-9]{2}(:?[0-9]{2})?))?"
)
_RELATIVE = re.compile(r"in (?P<count>[0-9]{1,7}|an?) (?P<unit>min|minute|hour|hr|day)s?", re.IGNORECASE)
_UNITS = {
    "min": timedelta(minutes=1),
    "minute": timedelta(minutes=1),
    "hour": timedelta(hours=1),
    "hr": timedelta(hours=1),
    "day": timedelta(days=1),
}


class BadSchedule(ValueError):
    """The text is not a time we can send at; the message says why, for the caller."""


def parse_schedule(text: str, *, now: datetime) -> datetime:
    """Return the time in UTC, never before `now`. Raises BadSchedule."""
    text = text.strip()
    if len(text) > MAX_LENGTH:
        raise BadSchedule(HINT)
    when = _parse_relative(text, now) or _parse_iso(text)
    if when < now - PAST_GRACE:
        raise BadSchedule("must not be in the past")
    if when > now + MAX_AHEAD:
        raise BadSchedule(f"must not be more than {MAX_AHEAD.days} days ahead")
    return max(when, now)


def _parse_relative(text: str, now: datetime) -> datetime | None:
    match = _RELATIVE.fullmatch(text)
    if match is None:
        return None
    count = int(match["count"]) if match["count"][0].isdigit() else 1
    step = _UNITS[match["unit"].lower()]
    if count > MAX_AHEAD / step:
        raise BadSchedule(f"must not be more than {MAX_AHEAD.days} days ahead")
    return now + count * step


def _parse_iso(text: str) -> datetime:
    match = _ISO.fullmatch(text)
    if match is None:
        raise BadSchedule(HINT)
    if match["zone"] is None:
        raise BadSchedule("needs a time zone, such as Z or +02:00")
    try:
        return datetime.fromisoformat(text.upper().replace(" Z", "Z")).astimezone(UTC)
    except (ValueError, OverflowError):
        raise BadSchedule(HINT) from None
