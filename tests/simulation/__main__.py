"""`python -m tests.simulation --seeds N`: search N interleavings, then show that every mutant is found."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import uvloop
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from nightmail.embedded import start
from nightmail.schema.migrate import migrate
from tests.simulation.mutants import MUTANTS, SHIPPED
from tests.simulation.search import search, shrink
from tests.simulation.world import open_connections


async def run(database_url: str, options: argparse.Namespace, console: Console) -> int:
    """Search; return the exit code."""
    connections = await open_connections(database_url)
    first = options.first
    seeds = range(first, first + options.seeds)
    steps = 0
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
        task = progress.add_task("schedules", total=len(seeds))
        started = time.monotonic()

        def told(result: object) -> None:
            nonlocal steps
            steps += getattr(result, "steps", 0)
            progress.advance(task)

        failures = await search(connections, seeds, SHIPPED, told=told)
        took = time.monotonic() - started
    console.print(f"{len(seeds):,} schedules, {steps:,} steps in {took:.1f} s: {len(seeds) / took:.0f} schedules/s")
    for failure in failures[:3]:
        console.print(f"[bold red]seed {failure.seed}[/]: {failure.result.violation} (trace {failure.result.hash})")
        for line in (await shrink(connections, failure.seed, SHIPPED)).trace:
            console.print("  " + line, highlight=False)
    console.print(f"violated in {len(failures)} of {len(seeds)} schedules")
    missed = 0
    if options.mutant_seeds:
        table = Table("mutant", "found in", "first seed", "its violation")
        for mutant in MUTANTS.values():
            found = await search(connections, range(first, first + options.mutant_seeds), mutant)
            missed += not found
            share = f"{100 * len(found) / options.mutant_seeds:.1f} %"
            table.add_row(
                mutant.name,
                share,
                str(found[0].seed) if found else "-",
                found[0].result.violation if found else "MISSED",
            )
        console.print(table)
    for connection in connections:
        await connection.close()
    return 1 if failures or missed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run on an embedded server of its own."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="first seed; one failing seed: --first N --seeds 1")
    parser.add_argument("--mutant-seeds", type=int, default=100)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="nightmail-simulation-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        settings = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}
        with start(folder / "servers", valkey=False, extra_settings=settings) as servers:
            migrate(servers.database_url)
            return uvloop.run(run(servers.database_url, options, Console()))


if __name__ == "__main__":
    sys.exit(main())
