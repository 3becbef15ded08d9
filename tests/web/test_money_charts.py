"""What is drawn of money: batches by their ends, a balance over time, months by who paid."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest

from nightmail.clock import now
from nightmail.ids import new_id
from nightmail.store.credit_overview import BatchRow
from nightmail.store.usage_overview import MonthUsage
from nightmail.web import money_charts
from nightmail.web.dashboard_usage import months_before


def batch_of(held: int, *, reserved: int = 0, ends: datetime | None = None, is_ended: bool = False) -> BatchRow:
    """Return a batch that holds so much."""
    return BatchRow(new_id(), held, held - reserved, reserved, 0, 0, 100, "bonus", now(), ends, None, is_ended)


def test_the_batches_stand_in_the_order_of_their_ends_and_fill_the_bar() -> None:
    soon, later = now() + timedelta(days=1), now() + timedelta(days=90)
    stack = money_charts.draw_batches(
        [batch_of(1), batch_of(1_000_000, ends=later), batch_of(300, reserved=100, ends=soon), batch_of(0, ends=soon)]
    )
    assert stack is not None
    assert [bar.tone for bar in stack.bars] == ["bonus", "bonus waits", "bonus", "bonus"]
    first, waits, second, last = stack.bars
    assert first.width == pytest.approx(2 * waits.width, abs=0.1)
    assert last.width >= money_charts.STACK_LEAST
    assert second.width > 900
    assert last.x + last.width == pytest.approx(stack.width, abs=0.1)
    assert all(one.x + one.width <= two.x + 0.02 for one, two in zip(stack.bars, stack.bars[1:], strict=False))
    assert money_charts.draw_batches([batch_of(0)]) is None
    many = money_charts.draw_batches([batch_of(1) for _ in range(100)])
    assert many is not None
    assert (len(many.bars), many.others) == (60, 40)


def test_a_balance_is_drawn_in_steps_up_to_now() -> None:
    at = now()
    line = money_charts.draw_balance([(at - timedelta(hours=4), 100), (at - timedelta(hours=1), 25)], at)
    assert line is not None
    assert (line.path, line.top) == ("M0 120V0.0H750.0V90.0H1000", 100)
    assert line.area.endswith("V120Z")
    hours = [at - timedelta(hours=n) for n in (4, 2, 3, -1)]
    back = money_charts.draw_balance([(hour, 100) for hour in hours], at)
    assert back is not None
    assert re.findall(r"H([\d.]+)", back.path) == ["500.0", "500.0", "1000.0", "1000"]
    empty = money_charts.draw_balance([(at, 0)], at)
    assert empty is not None
    assert empty.path == "M0 120V120.0H1000"
    assert money_charts.draw_balance([], at) is None


def test_months_stack_by_who_paid_and_the_quota_is_drawn_where_it_says_something() -> None:
    months = [
        MonthUsage(new_id(), "email", "2026-01", included=100, credits=50, metered=50),
        MonthUsage(new_id(), "email", "2026-02", included=1, included_reserved=1),
    ]
    plot = money_charts.draw_months(months, 100, "2026-01")
    assert plot.quota_y == money_charts.MONTHS_HEIGHT / 2
    full, small = plot.months
    assert [bar.tone for bar in full.bars] == ["included", "credits", "metered"]
    assert full.bars[-1].y == pytest.approx(0, abs=0.1)
    assert sum(bar.height for bar in full.bars) == pytest.approx(plot.height, abs=0.2)
    assert [bar.height for bar in small.bars] == [2.0, 2.0]
    assert (small.is_later, full.is_later) == (True, False)
    assert money_charts.draw_months(months, 100_000, "2026-01").quota_y is None
    assert money_charts.draw_months([], None, "2026-01").months == []


def test_months_are_counted_back_over_the_turn_of_the_year() -> None:
    assert months_before(datetime(2026, 2, 3, tzinfo=UTC), 3) == ["2025-11", "2025-12", "2026-01"]
