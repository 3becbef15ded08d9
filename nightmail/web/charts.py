"""Geometry of the pages' small plots: numbers in, coordinates out. The templates draw them as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from nightmail.store.overview import MINUTES_DRAWN, RunView
from nightmail.store.webhook_overview import HOURS_DRAWN, AttemptCounts
from nightmail.web.wording import amount, duration

SPARK_HEIGHT, SPARK_STEP, SPARK_BAR = 22, 5, 3
PLOT_HEIGHT, PLOT_STEP, PLOT_BAR = 96, 24, 19
WEEK_HEIGHT, WEEK_STEP, WEEK_BAR = 96, 7, 6
DAY_HOURS = 24


@dataclass(frozen=True, slots=True)
class Bar:
    """One upright bar; `tone` is the class that colours it, `label` what a pointer at rest reads."""

    x: float
    y: float
    width: float
    height: float
    tone: str
    label: str


@dataclass(frozen=True, slots=True)
class Plot:
    """Bars over a base line; `top` is the value at full height, `total` their sum."""

    width: int
    height: int
    bars: Sequence[Bar]
    top: int
    total: int


def draw_runs(runs: Sequence[RunView]) -> Plot:
    """Draw one bar per run, oldest left; the square root keeps short runs visible beside long ones."""
    top = max((run.duration_ms or 0 for run in runs), default=0)
    bars = []
    for index, run in enumerate(runs):
        share = ((run.duration_ms or 0) / top) ** 0.5 if top else 0.0
        height = round(max(2.0, share * SPARK_HEIGHT), 1)
        took = duration(run.duration_ms) if run.duration_ms is not None else "running"
        label = f"{run.started_at:%d %b %H:%M:%S} UTC, {run.state}, {took}"
        x = index * SPARK_STEP + (SPARK_STEP - SPARK_BAR) / 2
        bars.append(Bar(x, SPARK_HEIGHT - height, SPARK_BAR, height, run.state, label))
    return Plot(len(runs) * SPARK_STEP, SPARK_HEIGHT, bars, top, len(runs))


def draw_minutes(this_minute: datetime, counts: Mapping[datetime, int]) -> Plot:
    """Draw one bar per minute of the last half hour, this minute at the right edge."""
    minutes = [this_minute - timedelta(minutes=back) for back in reversed(range(MINUTES_DRAWN))]
    values = [counts.get(minute, 0) for minute in minutes]
    top = max(values)
    bars = []
    for index, (minute, value) in enumerate(zip(minutes, values, strict=True)):
        if value:
            height = round(max(2.0, value / top * PLOT_HEIGHT), 1)
            label = f"{minute:%H:%M} UTC: {amount(value)} sent"
            x = index * PLOT_STEP + (PLOT_STEP - PLOT_BAR) / 2
            bars.append(Bar(x, PLOT_HEIGHT - height, PLOT_BAR, height, "sent", label))
    return Plot(MINUTES_DRAWN * PLOT_STEP, PLOT_HEIGHT, bars, top, sum(values))


def draw_day(counts: AttemptCounts) -> Plot:
    """Draw the attempts of the last 24 hours, one small bar per hour."""
    return _draw_hours(counts, DAY_HOURS, SPARK_HEIGHT, SPARK_STEP, SPARK_BAR)


def draw_week(counts: AttemptCounts) -> Plot:
    """Draw the attempts of the last week, one bar per hour."""
    return _draw_hours(counts, HOURS_DRAWN, WEEK_HEIGHT, WEEK_STEP, WEEK_BAR)


def _draw_hours(counts: AttemptCounts, hours: int, full_height: int, step: int, width: int) -> Plot:
    """Draw one bar per hour, this hour at the right edge: what failed stands on what succeeded."""
    moments = [counts.this_hour - timedelta(hours=back) for back in reversed(range(hours))]
    values = [counts.by_hour.get(moment, (0, 0)) for moment in moments]
    top = max(map(sum, values))
    bars = []
    for index, (moment, (delivered, failed)) in enumerate(zip(moments, values, strict=True)):
        label = f"{moment:%d %b %H:%M} UTC: {amount(delivered)} delivered, {amount(failed)} failed"
        x, y = index * step + (step - width) / 2, float(full_height)
        for value, tone in ((delivered, "delivered"), (failed, "failed")):
            if value:
                # A single failure among thousands must be seen, and nothing may stand out at the top.
                height = min(round(max(2.0, value / top * full_height), 1), max(y, 2.0))
                y = max(0.0, round(y - height, 1))
                bars.append(Bar(x, y, width, height, tone, label))
    return Plot(hours * step, full_height, bars, top, sum(map(sum, values)))
