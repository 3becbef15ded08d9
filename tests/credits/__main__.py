"""`python -m tests.credits [--model N] [--histories N] [--crowd SECONDS]`: the long form of the ledger's tests."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psycopg
from psycopg import sql
from rich.console import Console

from nightmail.embedded import start
from nightmail.schema.migrate import migrate
from tests.credits.burn_order import compare_histories
from tests.credits.test_crowd import REFUSED, run_crowd, violations
from tests.credits.test_model import run_model

HISTORIES_AT_ONCE = 1000
STEPS = 30
_numbers = count(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all three on an embedded server; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.credits")
    parser.add_argument("--model", type=int, default=2000, help="examples of the state machine")
    parser.add_argument("--histories", type=int, default=10_000, help="random histories of spends")
    parser.add_argument("--crowd", type=float, default=60, help="seconds of eight processes that are killed at random")
    options = parser.parse_args(arguments)
    console = Console()
    with tempfile.TemporaryDirectory(prefix="nightmail-credits-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        settings = {"fsync": "off", "full_page_writes": "off"}
        with start(folder / "servers", valkey=False, extra_settings=settings) as servers:
            url = servers.database_url
            if options.model:
                with timed(console, f"{options.model:,} examples of the state machine"), fresh(url) as database:
                    run_model(database, options.model, STEPS)
            if options.histories:
                with timed(console, f"{options.histories:,} histories against the oracle"), fresh(url) as database:
                    for seed in range(0, options.histories, HISTORIES_AT_ONCE):
                        compare_histories(database, min(HISTORIES_AT_ONCE, options.histories - seed), seed)
            wrong = crowds(url, options.crowd, console) if options.crowd else 0
    return 1 if wrong else 0


def crowds(url: str, seconds: float, console: Console) -> int:
    """Let the crowd run as it is, without locks, and without locks and constraints; return how many ended wrong."""
    wrong = 0
    for mutant, kill in (("none", True), ("unlocked", False), ("naked", False)):
        with fresh(url) as database:
            counts = run_crowd(database, seconds=seconds, mutant=mutant, kill=kill)
            found = violations(database)
        console.print(f"crowd, {mutant}: {counts}; audit: {found or 'clean'}")
        refused = sum(counts.get(state, 0) for state in REFUSED)
        # Without the lock a spend may go by an order that it read before it waited; the sums hold all the same.
        drift = set(found) - ({"credit_burn_order"} if mutant == "unlocked" else set())
        wrong += bool(drift) != (mutant == "naked") or (mutant == "unlocked" and refused == 0)
    return wrong


@contextmanager
def fresh(url: str) -> Iterator[str]:
    """Yield the URL of a migrated database of its own."""
    name = f"credits_{next(_numbers)}"
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    made = url.replace("/nightmail?", f"/{name}?", 1)
    migrate(made)
    yield made


@contextmanager
def timed(console: Console, what: str) -> Iterator[None]:
    """Print how long something took."""
    started = time.monotonic()
    yield
    console.print(f"{what}: {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
