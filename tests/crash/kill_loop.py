"""Kill runners without end under load, drain, and compare the books: `python -m tests.crash.kill_loop --seconds 60`.

A runner dies by kill -9 only when its claim is visible in the database (every other time: when its call is too), or
is frozen past its lease and woken. Another takes its place at once. Exit code 1 when anything was lost, counted twice,
or sent more often than the bound allows:

    calls(i) <= 1 + takeovers(i)              for every message
    doubles  <= rows with a call of unknown end, summed over the interruptions; a call that timed out and a lease
                that was lost without an interruption count too (a busy machine has them)
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
from rich.console import Console
from rich.progress import Progress

from nightmail.embedded import start
from nightmail.schema.migrate import migrate
from tests.crash.processes import Nurse, RunnerProcess
from tests.crash.world import Account, World, start_provider

__all__ = ["KillLoop", "print_account"]

SETTINGS: dict[str, Any] = {"send_lease_s": 2.0, "send_concurrency": 8, "provider_timeout_s": 1.0}
FROZEN_SHARE = 0.15

# What the victim holds: its claims' rows, how many of them have an intent, and the claims.
HELD = """
SELECT count(q.message_id), count(q.intent_at), coalesce(array_agg(DISTINCT c.claim_id), '{}')
FROM claims AS c
LEFT JOIN message_queue AS q USING (claim_id)
WHERE c.runner = %s
"""

TAKEN_OVER = "SELECT count(*) FROM takeover_book WHERE claim_id = ANY (%s)"
NOT_INTERRUPTED = "SELECT count(*) FROM takeover_book WHERE claim_id <> ALL (%s)"


@dataclass
class KillLoop:
    """The loop's state and what it counted."""

    world: World
    nurse: Nurse
    seconds: float
    seed: int = 0
    runners: list[RunnerProcess] = field(default_factory=list)
    frozen: list[tuple[float, RunnerProcess]] = field(default_factory=list)
    kills: int = 0
    freezes: int = 0
    in_flight: int = 0
    interrupted: list[UUID] = field(default_factory=list)  # claims
    uninterrupted: int = 0  # takeovers that no interruption made
    account: Account = field(default_factory=Account)
    broken: list[str] = field(default_factory=list)

    def start_runner(self) -> RunnerProcess:
        """Start a runner that works until it is told to stop, or dies."""
        return self.nurse.start(self.world, settings=SETTINGS, loop=True, lanes=("live:email", "test"))

    def run(self, progress: Progress | None = None) -> None:
        """Kill for `seconds` or until nothing is left, then drain."""
        chance = random.Random(self.seed)
        self.runners = [self.start_runner() for _ in range(4)]
        end = time.monotonic() + self.seconds
        task = progress.add_task("killing", total=self.seconds) if progress else None
        with psycopg.connect(self.world.database_url, autocommit=True) as conn:
            while (left := end - time.monotonic()) > 0:
                self.interrupt(conn, chance, until=end)
                self.wake_the_frozen()
                if progress and task is not None:
                    progress.update(task, completed=self.seconds - left, description=f"killed {self.kills}")
        self.wake_the_frozen(at_once=True)
        for runner in self.runners:
            runner.send(signal.SIGTERM)
        for runner in self.runners:
            runner.wait()
        asyncio.run(self.drain())
        self.uninterrupted += self.world.ask(NOT_INTERRUPTED, self.interrupted)[0]
        self.account = self.world.account()
        self.broken = asyncio.run(self.world.broken())

    async def drain(self) -> None:
        """Finish what is left, in this process."""
        await self.world.drain(limit_s=300, **{**SETTINGS, "send_concurrency": 32})
        await self.world.close()

    def interrupt(self, conn: psycopg.Connection[Any], chance: random.Random, *, until: float) -> None:
        """Kill or freeze a random runner as soon as the database shows that it holds something."""
        number = chance.randrange(len(self.runners))
        victim = self.runners[number]
        wants_intent = chance.random() < 0.5
        for _ in range(500):
            held, intents, _ = self.held_by(conn, victim)
            if intents if wants_intent else held:
                break
            if time.monotonic() > until:
                return
            time.sleep(0.002)
        else:
            return
        freeze = chance.random() < FROZEN_SHARE
        victim.send(signal.SIGSTOP if freeze else signal.SIGKILL)
        victim.wait()
        _, intents, claims = self.held_by(conn, victim)
        self.in_flight += intents
        self.interrupted += claims
        self.uninterrupted += (conn.execute(TAKEN_OVER, [claims]).fetchone() or (0,))[0]
        if freeze:
            self.freezes += 1
            self.frozen.append((time.monotonic() + SETTINGS["send_lease_s"] + 1.0, victim))
        else:
            self.kills += 1
        self.runners[number] = self.start_runner()

    def held_by(self, conn: psycopg.Connection[Any], runner: RunnerProcess) -> tuple[int, int, list[UUID]]:
        """Return how many rows it holds, how many of them have an intent, and its claims."""
        return conn.execute(HELD, [f"runner-{runner.pid}"]).fetchone() or (0, 0, [])

    @property
    def unknown_ends(self) -> int:
        """Return how many calls may have ended unseen: each may have been made again, once."""
        return self.in_flight + self.uninterrupted

    def wake_the_frozen(self, *, at_once: bool = False) -> None:
        """Wake those whose lease has long ended; they finish as zombies and stop."""
        for wake_at, runner in list(self.frozen):
            if at_once or time.monotonic() >= wake_at:
                self.frozen.remove((wake_at, runner))
                runner.send(signal.SIGCONT)
                runner.send(signal.SIGTERM)
                self.in_flight += SETTINGS["send_concurrency"] if at_once else 0
                runner.wait()

    @property
    def violations(self) -> dict[str, Any]:
        """Return what must never be."""
        wrong = self.account.violations
        if self.account.doubles > self.account.takeovers:
            wrong["doubles above takeovers"] = (self.account.doubles, self.account.takeovers)
        if self.account.doubles > self.unknown_ends:
            wrong["doubles above calls of unknown end"] = (self.account.doubles, self.unknown_ends)
        if self.broken:
            wrong["invariants"] = self.broken
        if self.account.queue_left:
            wrong["queue_left"] = self.account.queue_left
        return wrong


def print_account(console: Console, loop: KillLoop, messages: int) -> None:
    """Print what happened beside what was promised."""
    account = loop.account
    console.print(f"interrupted      {loop.kills} × kill -9, {loop.freezes} × SIGSTOP past the lease")
    console.print(f"sent             {account.sent:,} of {messages:,}")
    console.print(f"lost             {len(account.lost)}")
    console.print(f"double sends     {account.doubles}, bound {loop.unknown_ends} (calls of unknown end:")
    console.print(f"                 {loop.in_flight} at the interruptions, {loop.uninterrupted} without one)")
    console.print(f"                 and bound {account.takeovers} (takeovers of begun calls)")
    console.print(f"beyond 1 + takeovers(i)   {len(account.beyond_bound)}")
    console.print(f"zombies fenced   {account.late_results} late results refused and kept")
    console.print(f"events wrong     {len(account.wrong_events)}")
    console.print(
        f"usage            {account.usage[0]:,} counted, {account.usage[1]:,} sent; {account.reserved_left} reserved"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the loop on an embedded server of its own."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash.kill_loop")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--latency-ms", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args(arguments)
    console = Console()
    with (
        tempfile.TemporaryDirectory(prefix="nightmail-chaos-") as name,
        Progress(console=console) as progress,
    ):
        folder = Path(name)
        folder.chmod(0o755)
        with start(folder / "servers", valkey=False) as servers:
            migrate(servers.database_url)
            provider = start_provider(folder, "--latency-ms", str(options.latency_ms))
            nurse = Nurse()
            try:
                world = asyncio.run(World.make(servers.database_url, provider, is_mixed=True))
                asyncio.run(world.give_credits(options.messages))  # pays for about a third
                asyncio.run(world.accept(options.messages))
                loop = KillLoop(world, nurse, options.seconds, options.seed)
                loop.run(progress)
            finally:
                nurse.close()
                provider.stop()
    console.print(f"seed             {options.seed}, process {os.getpid()}")
    print_account(console, loop, options.messages)
    if loop.violations:
        console.print("[bold red]VIOLATED[/]", loop.violations)
        return 1
    console.print("[bold green]kept[/]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
