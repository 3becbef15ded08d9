"""What scheduled_at may say."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from nightmail.rules.schedule_text import BadSchedule, parse_schedule

NOW = datetime(2026, 8, 5, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-08-05T13:00:00Z", datetime(2026, 8, 5, 13, tzinfo=UTC)),
        ("2026-08-05T13:00:00.858Z", datetime(2026, 8, 5, 13, 0, 0, 858000, tzinfo=UTC)),
        ("2026-08-05t13:00:00z", datetime(2026, 8, 5, 13, tzinfo=UTC)),
        ("2026-08-05 13:00:00.858123+00:00", datetime(2026, 8, 5, 13, 0, 0, 858123, tzinfo=UTC)),
        ("2026-08-05 13:00:00+00", datetime(2026, 8, 5, 13, tzinfo=UTC)),
        ("2026-08-05T13:00-0500", datetime(2026, 8, 5, 18, tzinfo=UTC)),
        ("2026-08-05 13:00:00 Z", datetime(2026, 8, 5, 13, tzinfo=UTC)),
        ("2026-08-05 15:00:00 +02:00", datetime(2026, 8, 5, 13, tzinfo=UTC)),
        ("in 1 minute", NOW + timedelta(minutes=1)),
        ("in 10 min", NOW + timedelta(minutes=10)),
        ("in 90 mins", NOW + timedelta(minutes=90)),
        ("In 1 Hour", NOW + timedelta(hours=1)),
        ("in an hour", NOW + timedelta(hours=1)),
        ("in 3 hours", NOW + timedelta(hours=3)),
        ("in a day", NOW + timedelta(days=1)),
        ("in 366 days", NOW + timedelta(days=366)),
        ("in 0 minutes", NOW),
        (" in 1 day ", NOW + timedelta(days=1)),
        # within the grace: now, never in the past
        ("2026-08-05T11:59:00Z", NOW),
        ("2026-08-05T11:59:59.999Z", NOW),
    ],
)
def test_times_that_are_understood(text: str, expected: datetime) -> None:
    when = parse_schedule(text, now=NOW)
    assert when == expected
    assert when.tzinfo is UTC


@pytest.mark.parametrize(
    "text",
    [
        "", "now", "tomorrow", "infinity", "-infinity", "in minutes", "in -1 hours", "in 1.5 hours", "in 1 year",
        "in 367 days", "in 9999999 minutes", "in 99999999999999999999 days", "in ١ hour", "in 1 hour; DROP",
        "2026-08-05T13:00:00", "2026-08-05", "13:00Z", "1754398800", "2026-13-05T13:00:00Z", "2026-02-30T13:00:00Z",
        "2026-08-05T24:00:00Z", "2026-08-05T13:00:60Z", "2026-08-05T13:00:00+99:00", "2026-W32-3T13:00:00Z",
        "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2026-08-05T11:58:59Z", "2020-01-01T00:00:00Z",
        "2027-08-07T12:00:00Z", "12026-08-05T13:00:00Z", "2026-08-05T13:00:00Z\x00", "2026-08-05T13:00:00Z" + " " * 99
        + "x", "٢٠٢٦-08-05T13:00:00Z", "2026-08-05T13:00:00[Europe/Berlin]",
    ],
)  # fmt: skip
def test_times_that_are_refused(text: str) -> None:
    with pytest.raises(BadSchedule) as refused:
        parse_schedule(text, now=NOW)
    assert str(refused.value)


def test_a_missing_zone_is_named() -> None:
    with pytest.raises(BadSchedule, match="time zone"):
        parse_schedule("2026-08-05T13:00:00", now=NOW)
