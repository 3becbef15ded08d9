"""Who pays for the units of a message that ended with fewer of them."""

from __future__ import annotations

from datetime import UTC, date, timedelta

from hypothesis import given
from hypothesis import strategies as st

from nightmail.rules.rating import Split, quota_resets_at

units = st.integers(0, 60)
splits = st.builds(Split, units, units, units)


@given(splits, st.data())
def test_what_was_dropped_takes_away_the_dearest_units_first(split: Split, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, split.units))
    # One word per unit, cheapest first: what is left are the first of them.
    words = ["included"] * split.included + ["credits"] * split.credits + ["metered"] * split.metered
    left = words[:count]
    assert split.used(count) == Split(left.count("included"), left.count("credits"), left.count("metered"))


@given(splits)
def test_the_dearest_kind_stands_for_the_message(split: Split) -> None:
    paid = [rating for rating, count in split.parts() if count]
    assert split.rating == (paid or ["included"])[-1]
    assert split.used(split.units) == split


@given(st.dates(date(1970, 1, 1), date(9998, 12, 31)))
def test_the_quota_resets_when_the_next_month_begins(at: date) -> None:
    resets = quota_resets_at(f"{at:%Y-%m}")
    assert resets.day == 1
    last = resets - timedelta(microseconds=1)
    assert (last.year, last.month, last.tzinfo) == (at.year, at.month, UTC)
