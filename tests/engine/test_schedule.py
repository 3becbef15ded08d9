"""Which slot a call belongs to."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from nightmail.engine.schedule import BadSlot, named_slot, next_slot, previous_slot, slot_of_call
from nightmail.jobs.table import JOBS

MINUTE, DAILY, MONTHLY = "* * * * *", "0 3 * * *", "0 6 1 * *"


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("schedule", "now", "slot"),
    [
        (DAILY, "2026-03-01T03:00:00", "2026-03-01T03:00:00"),
        (DAILY, "2026-03-01T02:59:59.999999", "2026-02-28T03:00:00"),
        (DAILY, "2024-02-29T23:59:59", "2024-02-29T03:00:00"),
        (MINUTE, "2026-12-31T23:59:59", "2026-12-31T23:59:00"),
        (MONTHLY, "2026-03-01T05:59:00", "2026-02-01T06:00:00"),
        ("*/15 * * * *", "2026-03-29T01:14:59", "2026-03-29T01:00:00"),
    ],
)
def test_newest_slot_is_the_last_occurrence_at_or_before_now(schedule: str, now: str, slot: str) -> None:
    assert previous_slot(schedule, at(now)) == at(slot)


@pytest.mark.parametrize(
    ("schedule", "now", "slot"),
    [
        (DAILY, "2026-03-01T02:59:00", "2026-03-01T03:00:00"),
        (DAILY, "2026-03-01T02:58:59", "2026-02-28T03:00:00"),
        (DAILY, "2026-03-01T14:00:00", "2026-03-01T03:00:00"),
        (MINUTE, "2026-03-01T12:00:29", "2026-03-01T12:00:00"),
        (MINUTE, "2026-03-01T12:00:31", "2026-03-01T12:01:00"),
        (MONTHLY, "2026-03-01T05:59:30", "2026-03-01T06:00:00"),
    ],
)
def test_a_call_counts_for_the_coming_slot_when_it_is_a_little_early(schedule: str, now: str, slot: str) -> None:
    assert slot_of_call(schedule, at(now)) == at(slot)


@pytest.mark.parametrize(
    ("text", "slot"),
    [
        ("2026-03-01T03:00:00Z", "2026-03-01T03:00:00"),
        ("2026-03-01T05:00:00+02:00", "2026-03-01T03:00:00"),
        ("2026-03-01T03:00:00.123456Z", "2026-03-01T03:00:00"),
        ("1772334000", "2026-03-01T03:00:00"),
        ("2026-02-27T10:00:00Z", "2026-02-27T03:00:00"),
    ],
)
def test_a_platform_may_name_the_slot(text: str, slot: str) -> None:
    assert named_slot(DAILY, text, at("2026-03-01T03:00:10")) == at(slot)


@pytest.mark.parametrize(
    "text", ["", "now", "2026-03-01T03:00:00", "2026-03-01T03:01:11Z", "9" * 30, "9" * 5000, "²", "-1", "1900-01-01"]
)
def test_an_unusable_slot_is_refused(text: str) -> None:
    with pytest.raises(BadSlot):
        named_slot(DAILY, text, at("2026-03-01T03:00:10"))


def test_every_schedule_of_the_table_has_a_slot_before_and_after_any_time() -> None:
    for spec in JOBS:
        for day in range(0, 800, 17):
            now = at("2027-12-31T23:59:59") + timedelta(days=day)
            assert previous_slot(spec.schedule, now) <= now < next_slot(spec.schedule, now)
