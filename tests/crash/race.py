"""Four runners and five callers at once on thousands of due messages: `python -m tests.crash.race --messages 20000`.

A caller is a process that runs the job once a second, as a cron platform does; a runner works without a pause.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from nightmail.embedded import start
from nightmail.schema.migrate import migrate
from tests.crash.processes import Nurse
from tests.crash.world import Account, World, start_provider

__all__ = ["race"]

RUNNERS, CALLERS = 4, 5


def race(world: World, nurse: Nurse, *, limit_s: float) -> tuple[Account, int]:
    """Let all of them work until nothing is left; return the account and how many of them sent something."""
    settings = {"send_concurrency": 16}
    runners = [nurse.start(world, settings=settings, loop=True) for _ in range(RUNNERS)]
    callers = [nurse.start(world, settings=settings, loop=True, pause_s=0.5, deadline_s=3.0) for _ in range(CALLERS)]
    end = time.monotonic() + limit_s
    while time.monotonic() < end and world.ask("SELECT count(*) FROM message_queue") != [0]:
        time.sleep(0.1)
    for runner in (*runners, *callers):
        runner.send(signal.SIGTERM)
    codes = [runner.wait() for runner in (*runners, *callers)]
    assert codes == [0] * len(codes)
    reports = [runner.report() for runner in (*runners, *callers)]
    return world.account(), sum(report.counts.get("sent", 0) > 0 for report in reports)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the race on an embedded server of its own."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash.race")
    parser.add_argument("--messages", type=int, default=20_000)
    options = parser.parse_args(arguments)
    console = Console()
    with tempfile.TemporaryDirectory(prefix="nightmail-race-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        with start(folder / "servers", valkey=False) as servers:
            migrate(servers.database_url)
            provider, nurse = start_provider(folder), Nurse()
            try:
                world = asyncio.run(World.make(servers.database_url, provider))
                asyncio.run(world.accept(options.messages))
                started = time.monotonic()
                account, workers = race(world, nurse, limit_s=300)
                took = time.monotonic() - started
            finally:
                nurse.close()
                provider.stop()
    is_kept = not account.violations and not account.doubles and account.calls == account.sent == options.messages
    console.print(
        f"{'kept' if is_kept else 'VIOLATED'}: {account.sent:,} of {options.messages:,} sent by "
        f"{workers} of {RUNNERS + CALLERS} processes ({RUNNERS} runners, {CALLERS} callers) in {took:.1f} s, "
        f"{account.calls:,} calls taken, doubles {account.doubles}, "
        f"lost {len(account.lost)}, takeovers {account.takeovers}",
        soft_wrap=True,
        highlight=False,
    )
    return 0 if is_kept else 1


if __name__ == "__main__":
    sys.exit(main())
