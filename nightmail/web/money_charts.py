"""Geometry of the plots about credits and usage: numbers in, coordinates out. The templates draw them as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from nightmail.store.credit_overview import BatchRow
from nightmail.store.usage_overview import MonthUsage
from nightmail.web.charts import Bar
from nightmail.web.wording import amount

STACK_WIDTH, STACK_HEIGHT = 1000, 34
# A batch of one credit beside one of a million must still be seen and pointed at.
STACK_LEAST = 6.0
STACK_GAP = 2.0
LINE_WIDTH, LINE_HEIGHT = 1000, 120
MONTHS_HEIGHT, MONTHS_STEP, MONTHS_BAR = 110, 100, 56
# Who paid, from the ground up: what is cheapest for the org stands lowest.
PARTS = (
    ("included", "included", "included, used"),
    ("included_reserved", "included waits", "included, reserved"),
    ("credits", "credits", "by credits, used"),
    ("credits_reserved", "credits waits", "by credits, reserved"),
    ("metered", "metered", "metered, used"),
    ("metered_reserved", "metered waits", "metered, reserved"),
)


@dataclass(frozen=True, slots=True)
class Stack:
    """Segments side by side; `others` batches were too many to be drawn."""

    width: int
    height: int
    bars: Sequence[Bar]
    sources: Sequence[str]
    has_reserved: bool
    has_ended: bool
    others: int


@dataclass(frozen=True, slots=True)
class Line:
    """A path of steps and the area below it, as SVG path data; `top` is the value at full height."""

    width: int
    height: int
    path: str
    area: str
    top: int
    starts_at: datetime
    points: int


@dataclass(frozen=True, slots=True)
class Month:
    """A column of a month; `is_later` when it has not begun."""

    period: str
    x: float
    bars: Sequence[Bar]
    total: int
    is_later: bool


@dataclass(frozen=True, slots=True)
class Months:
    """Columns over a base line; `quota_y` is where the quota's line runs, None where there is none."""

    width: int
    height: int
    months: Sequence[Month]
    top: int
    quota: int | None
    quota_y: float | None


def draw_batches(batches: Sequence[BatchRow], most: int = 60) -> Stack | None:
    """Draw what each batch holds, the one that ends first leftmost; None when nothing is held.

    A batch is as wide as what remains and what is reserved of it together, the reserved part paler.
    """
    holding = [batch for batch in batches if batch.held]
    holding.sort(key=lambda b: (b.expires_at is None, b.expires_at or b.issued_at, b.priority, b.id))
    drawn = holding[:most]
    if not drawn:
        return None
    whole = sum(batch.held for batch in drawn)
    room = STACK_WIDTH - STACK_GAP * (len(drawn) - 1) - STACK_LEAST * len(drawn)
    bars, x = [], 0.0
    for batch in drawn:
        width = STACK_LEAST + room * batch.held / whole
        free = width * batch.remaining / batch.held
        tone, label = batch.source, _label(batch)
        if free:
            ended = "ended" if batch.is_ended else tone
            bars.append(Bar(round(x, 2), 0, round(free, 2), STACK_HEIGHT, ended, label))
        if width - free > 0.01:
            bars.append(Bar(round(x + free, 2), 0, round(width - free, 2), STACK_HEIGHT, f"{tone} waits", label))
        x += width + STACK_GAP
    return Stack(
        STACK_WIDTH,
        STACK_HEIGHT,
        bars,
        sorted({batch.source for batch in drawn if batch.reserved or not batch.is_ended}),
        any(batch.reserved for batch in drawn),
        any(batch.is_ended and batch.remaining for batch in drawn),
        len(holding) - len(drawn),
    )


def _label(batch: BatchRow) -> str:
    ends = f"{batch.expires_at:%Y-%m-%d %H:%M} UTC" if batch.expires_at else "never"
    verb = "ended" if batch.is_ended else "ends"
    reserved = f", {amount(batch.reserved)} reserved" if batch.reserved else ""
    return f"{batch.source}: {amount(batch.remaining)} of {amount(batch.granted)} left{reserved}; {verb} {ends}"


def draw_balance(balances: Sequence[tuple[datetime, int]], now: datetime) -> Line | None:
    """Draw a balance over time up to now, in steps because it never slopes; None without any movement."""
    if not balances:
        return None
    starts_at = balances[0][0]
    span = max((now - starts_at).total_seconds(), 1.0)
    top = max(balance for _, balance in balances) or 1
    places: list[tuple[float, float]] = []
    for at, balance in balances:
        share = min(max((at - starts_at).total_seconds() / span, 0.0), 1.0)
        # Machines' clocks differ a little, and the line never runs back.
        x = max(round(share * LINE_WIDTH, 1), places[-1][0] if places else 0.0)
        places.append((x, round(LINE_HEIGHT * (1 - balance / top), 1)))
    steps = [f"M0 {LINE_HEIGHT}V{places[0][1]}"]
    steps += [f"H{x}V{y}" for x, y in places[1:]]
    path = "".join([*steps, f"H{LINE_WIDTH}"])
    return Line(
        LINE_WIDTH, LINE_HEIGHT, path, f"{path}V{LINE_HEIGHT}Z", max(balance for _, balance in balances), starts_at,
        len(balances),
    )  # fmt: skip


def draw_months(months: Sequence[MonthUsage], quota: int | None, this_period: str) -> Months:
    """Draw one column per month, oldest left, by who paid; the line is the quota of today's plan."""
    # A quota far above what is used would flatten the columns: then it is said in words only.
    highest = max((month.total for month in months), default=0)
    is_drawn = quota is not None and 0 < quota <= 4 * highest
    top = max(highest, quota if quota is not None and is_drawn else 0, 1)
    columns = []
    for index, month in enumerate(months):
        left = index * MONTHS_STEP + (MONTHS_STEP - MONTHS_BAR) / 2
        columns.append(Month(month.period, left, _column(month, left, top), month.total, month.period > this_period))
    quota_y = round(MONTHS_HEIGHT * (1 - quota / top), 1) if quota is not None and is_drawn else None
    return Months(len(months) * MONTHS_STEP, MONTHS_HEIGHT, columns, highest, quota, quota_y)


def _column(month: MonthUsage, left: float, top: int) -> list[Bar]:
    bars, y = [], float(MONTHS_HEIGHT)
    for name, tone, words in PARTS:
        value = getattr(month, name)
        if value > 0:
            height = min(round(max(2.0, value / top * MONTHS_HEIGHT), 1), max(y, 2.0))
            y = max(0.0, round(y - height, 1))
            bars.append(Bar(left, y, MONTHS_BAR, height, tone, f"{month.period}: {amount(value)} {words}"))
    return bars
