"""What a job is to the engine: a row of the job table, the context of one run, and what the run came to."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal
from uuid import UUID

import structlog

from nightmail.engine.crash import CrashPoints
from nightmail.engine.deadline import Deadline
from nightmail.ports import Ports
from nightmail.settings import Settings
from nightmail.store.database import Database


@dataclass(frozen=True, slots=True)
class JobResult:
    """Counts by name (snake_case), every key of the job present; `more` says that work was left at the deadline."""

    counts: Mapping[str, int]
    more: bool = False


@dataclass(slots=True)
class JobContext:
    """One run of one job: everything it may use.

    `dry` runs report what would happen and change nothing. `stopping` is set when the process is asked to end:
    finish what has begun, begin nothing.
    """

    job_id: UUID
    job: str
    database: Database
    ports: Ports
    settings: Settings
    deadline: Deadline
    runner: str
    log: structlog.typing.FilteringBoundLogger
    dry: bool = False
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    crash: CrashPoints = field(default_factory=CrashPoints)
    jitter: random.Random = field(default_factory=random.Random)

    def reach(self, point: str) -> None:
        """Pass a named crash point of this job."""
        self.crash.reach(f"{self.job}:{point}")


Run = Callable[[JobContext], Awaitable[JobResult]]


@dataclass(frozen=True, slots=True)
class JobSpec:
    """A row of the job table.

    `title` and `starting` are the words of its log lines. `holds` says what keeps two runs apart: `rows` (they claim
    disjoint rows and run side by side) or `table` (a lease on the whole job; a second caller is told who holds it).
    `run` is None while the job is not built: its path answers 501. `after` names jobs a tick must run first. `least_s`
    is the deadline in seconds below which a run is hardly of use: a tick's fair slice is not made smaller. `destroys`
    says that a wrong clock would do harm that cannot be undone: such a job refuses to run while the clock is in doubt.
    """

    name: str
    path: str
    schedule: str
    title: str
    starting: str
    keys: tuple[str, ...]
    holds: Literal["rows", "table"]
    run: Run | None = None
    missing: Callable[[Settings], list[str]] = field(default=lambda settings: [])
    after: tuple[str, ...] = ()
    least_s: float = 1.0
    destroys: bool = False
