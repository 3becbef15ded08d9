"""The calendar of subscriptions, against an oracle that walks from day to day."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from nightmail.rules.credits import (
    PurchaseStatus,
    billing_end,
    first_period,
    holds_from,
    last_period,
    period_expiry,
    period_start,
)
from tests.credits.calendar import ANCHORS, walk


@pytest.mark.parametrize("anchor", ANCHORS, ids=str)
def test_periods_begin_on_the_anchors_day_or_the_last_of_a_shorter_month(anchor: datetime) -> None:
    expected = list(walk(anchor, anchor + timedelta(days=4 * 366)))
    assert [period_start(anchor, n) for n in range(len(expected))] == expected
    assert len(expected) >= 48


@pytest.mark.parametrize("anchor", ANCHORS[::6], ids=str)
def test_first_and_last_period_are_the_inverse(anchor: datetime) -> None:
    for n in range(30):
        start = period_start(anchor, n)
        assert (first_period(anchor, start), last_period(anchor, start)) == (n, n)
        later = start + timedelta(seconds=1)
        assert (first_period(anchor, later), last_period(anchor, later)) == (n + 1, n)
    before = anchor - timedelta(seconds=1)
    assert (first_period(anchor, before), last_period(anchor, before)) == (0, -1)


def test_a_zone_changes_nothing() -> None:
    anchor = datetime.fromisoformat("2028-01-31T23:30:00-05:00")
    assert period_start(anchor, 1) == datetime(2028, 3, 1, 4, 30, tzinfo=UTC), "in UTC it is the first of February"


def test_expiry_is_the_next_period_and_the_grace() -> None:
    anchor = datetime(2027, 1, 31, 8, tzinfo=UTC)
    assert period_expiry(anchor, 0, grace_days=0) == datetime(2027, 2, 28, 8, tzinfo=UTC)
    assert period_expiry(anchor, 1, grace_days=3) == datetime(2027, 4, 3, 8, tzinfo=UTC)


@pytest.mark.parametrize(
    ("interval", "at", "end"),
    [
        (1, "2027-02-27T00:00:00+00:00", "2027-02-28T00:00:00+00:00"),
        (1, "2027-02-28T00:00:00+00:00", "2027-03-31T00:00:00+00:00"),
        (12, "2027-02-28T00:00:00+00:00", "2028-01-31T00:00:00+00:00"),
        (12, "2028-01-31T00:00:00+00:00", "2029-01-31T00:00:00+00:00"),
        (12, "2027-01-01T00:00:00+00:00", "2027-01-31T00:00:00+00:00"),
    ],
)
def test_a_canceled_subscription_ends_with_its_billing_interval(interval: int, at: str, end: str) -> None:
    anchor = datetime(2027, 1, 31, tzinfo=UTC)
    assert billing_end(anchor, interval, datetime.fromisoformat(at)) == datetime.fromisoformat(end)


def test_what_is_held_is_held_from_the_earliest_reason() -> None:
    anchor, day = datetime(2027, 1, 31, tzinfo=UTC), timedelta(days=1)

    def held(status: PurchaseStatus, past_due: datetime | None = None, ends: datetime | None = None) -> datetime | None:
        return holds_from(status, anchor=anchor, past_due_at=past_due, past_due_days=3, ends_at=ends)

    assert held("active") is None
    assert held("trialing") == anchor
    assert held("past_due", anchor + 40 * day) == anchor + 43 * day
    assert held("canceled", None, anchor + 60 * day) == anchor + 60 * day
    assert held("canceled", anchor + 40 * day, anchor + 365 * day) == anchor + 43 * day, "unpaid stays unpaid"
