"""What the demonstration shows: bars where somebody watches, plain lines where a log is kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

# A log gets a line about progress at most this often.
PLAIN_EVERY_S = 2.0


@dataclass(frozen=True, slots=True)
class Expectation:
    """Something that must have happened; `seen` says what did."""

    text: str
    is_met: bool
    seen: str


class Screen:
    """Says lines, and draws how far each step has come; use as a context while bars are shown."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("  {task.description:<24}"),
            BarColumn(bar_width=36, complete_style="blue", finished_style="green"),
            MofNCompleteColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._plain: dict[str, tuple[int, int, str]] = {}
        self._said = ""
        self._next_plain = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._say_plain()

    def title(self, text: str, note: str = "") -> None:
        """Print a heading."""
        self.console.print(Text.assemble((text, "bold"), (f"  {note}" if note else "", "dim")))

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(Text(f"  {text}"))

    def pair(self, name: str, value: str) -> None:
        """Print a named value, such as an address."""
        self.console.print(Text.assemble((f"  {name:<12}", "dim"), value))

    def count(self, step: str, done: int, total: int, note: str = "") -> None:
        """Show how far a step has come."""
        if not self.console.is_terminal:
            self._plain[step] = (done, total, note)
            if time.monotonic() >= self._next_plain:
                self._say_plain()
            return
        if step not in self._tasks:
            self._tasks[step] = self._progress.add_task(step, total=total, note=note)
        self._progress.update(self._tasks[step], completed=done, total=total, note=note)

    def verdict(self, expectations: Sequence[Expectation]) -> bool:
        """Print what was expected and what was seen; return whether all of it came true."""
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(ratio=3)
        table.add_column(ratio=2)
        for expectation in expectations:
            mark = Text("✓", "green") if expectation.is_met else Text("✗", "bold red")
            seen = Text(expectation.seen, "dim" if expectation.is_met else "red")
            table.add_row(Text.assemble("  ", mark), Text(expectation.text), seen)
            if not self.console.is_terminal:
                self.say(f"{mark} {expectation.text}: {expectation.seen}")
        if self.console.is_terminal:
            self.console.print(table)
        missed = sum(not expectation.is_met for expectation in expectations)
        met = len(expectations) - missed
        text = f"  {met} of {len(expectations)} expectations met"
        self.console.print(Text(text, "bold red" if missed else "bold green"))
        return missed == 0

    def _say_plain(self) -> None:
        """Print one line with all steps, unless the last one said the same."""
        line = ", ".join(f"{step} {done}/{total}" for step, (done, total, _) in self._plain.items())
        if line and line != self._said:
            self._said = line
            self._next_plain = time.monotonic() + PLAIN_EVERY_S
            self.say(line)
