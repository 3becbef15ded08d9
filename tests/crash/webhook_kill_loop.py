"""Kill webhook runners without end under load and account for every fact: `python -m tests.crash.webhook_kill_loop`.

While facts are made (and every fourth transaction is taken back), runners die by kill -9 or are frozen past their lease
and woken, and the receiver answers now well, now with an error, a reset or not at all. Then all is drained and three
books are compared: the facts that were committed, the deliveries, and the receiver's log. Exit code 1 when a fact never
arrived, a number is missing, a body changed between attempts, a post was made that nobody asked for, or two posts of
one delivery were open at once without a freeze.
"""

from __future__ import annotations

import argparse
import asyncio
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

import aiohttp
import psycopg
from rich.console import Console
from rich.progress import Progress

from nightmail.embedded import start
from nightmail.ids import new_id
from nightmail.schema.migrate import migrate
from nightmail.store.fan_out import Fact, fan_out
from tests.crash.processes import RunnerProcess
from tests.crash.webhook_world import ReceiverProcess, WebhookAccount, WebhookNurse
from tests.webhooks.desk import Desk

__all__ = ["WebhookKillLoop", "print_account"]

SETTINGS: dict[str, Any] = {
    "webhook_lease_s": 1.5,
    "webhook_timeout_s": 0.4,
    "webhook_concurrency": 12,
    "webhook_endpoint_concurrency": 6,
}
RUNNERS = 3
FROZEN_SHARE = 0.15
TOPICS = ("domain.created", "domain.verified", "domain.failed")
ANSWERS = ("ok", "delay 0.02", "delay 0.1", "status 500", "status 503", "reset", "close", "garbage", "delay 0.6")
WEIGHTS = (12, 6, 3, 1, 1, 1, 1, 1, 1)
# Twenty short waits: nothing runs out of attempts here, which test_deliver.py is about.
SCHEDULE = " ".join(["1s"] * 20)
DRAIN_AHEAD = "1 hour"

HELD = "SELECT count(*) FROM webhook_deliveries WHERE claim_id IS NOT NULL"

# Written down at each claim of a delivery whose last claim never told how it ended.
TAKEOVER_BOOK = """
CREATE TABLE takeover_book (event_id uuid NOT NULL);
CREATE FUNCTION note_takeover() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO takeover_book VALUES (NEW.event_id);
    RETURN NULL;
END $$;
CREATE TRIGGER note_takeover AFTER UPDATE OF claim_id ON webhook_deliveries
    FOR EACH ROW WHEN (OLD.claim_id IS NOT NULL AND NEW.claim_id <> OLD.claim_id) EXECUTE FUNCTION note_takeover();
"""
# Of each delivery: attempts that were written, those of them that failed, and takeovers.
TOLD = """
SELECT d.event_id::text,
       (SELECT count(*) FROM webhook_attempts AS a WHERE a.endpoint_id = d.endpoint_id AND a.event_id = d.event_id),
       (SELECT count(*) FROM webhook_attempts AS a WHERE a.endpoint_id = d.endpoint_id AND a.event_id = d.event_id
                                                     AND a.http_status IS DISTINCT FROM 200),
       (SELECT count(*) FROM takeover_book AS t WHERE t.event_id = d.event_id)
FROM webhook_deliveries AS d
"""


@dataclass
class WebhookKillLoop:
    """The loop's state and what it counted."""

    desk: Desk
    receiver: ReceiverProcess
    nurse: WebhookNurse
    seconds: float
    seed: int = 0
    pause_s: float = 0.05
    """How long the tellers wait between transactions."""
    prefix: str = field(default_factory=lambda: f"/kill/{new_id()}")
    endpoints: list[UUID] = field(default_factory=list)
    runners: list[RunnerProcess] = field(default_factory=list)
    frozen: list[tuple[float, RunnerProcess]] = field(default_factory=list)
    facts: int = 0
    kills: int = 0
    freezes: int = 0
    takeovers: int = 0
    without_reason: list[str] = field(default_factory=list)
    """Deliveries posted more often than once, plus once for each attempt that failed and each takeover."""
    unwritten: list[str] = field(default_factory=list)
    """Deliveries with more posts that nobody wrote down than takeovers."""
    account: WebhookAccount = field(init=False)

    async def run(self, progress: Progress | None = None) -> None:
        """Tell and kill for `seconds`, then drain and read the books."""
        chance = random.Random(self.seed)
        self.desk.execute(TAKEOVER_BOOK)
        for number, topic in enumerate(TOPICS):
            path = f"{self.prefix}/{number}"
            await self.behave(path, *chance.choices(ANSWERS, WEIGHTS, k=5000))
            self.endpoints.append(self.desk.add_endpoint(path, types=[topic], schedule=SCHEDULE))
        self.runners = [self.start_runner() for _ in range(RUNNERS)]
        end = time.monotonic() + self.seconds
        telling = asyncio.create_task(self.tell_until(end, random.Random(self.seed + 1)))
        await asyncio.to_thread(self.interrupt_until, end, chance, progress)
        await telling
        self.wake_the_frozen(at_once=True)
        for runner in self.runners:
            runner.send(signal.SIGTERM)
        for runner in self.runners:
            assert await asyncio.to_thread(runner.wait) == 0
        await self.drain()
        self.account = WebhookAccount.read(self.desk, self.receiver, self.prefix, self.endpoints, self.facts)
        for event_id, attempts, failed, takeovers in self.desk.ask(TOLD):
            posts = len(self.account.by_id.get(event_id, ()))
            self.takeovers += takeovers
            if posts > 1 + failed + takeovers:
                self.without_reason.append(event_id)
            if posts - attempts > takeovers:
                self.unwritten.append(f"{event_id}: {posts} posts, {attempts} written, {takeovers} taken over")

    async def behave(self, path: str, *behaviours: str) -> None:
        """Tell the receiver what to do at a path."""
        async with aiohttp.ClientSession() as session:
            asked = {"path": path, "behaviours": behaviours}
            async with session.post(self.receiver.address().url("/_behave"), json=asked) as answer:
                assert answer.status == 200

    def start_runner(self) -> RunnerProcess:
        """Start a runner that works until it is told to stop, or dies."""
        return self.nurse.begin(self.desk.database_url, SETTINGS, loop=True)

    async def tell_until(self, end: float, chance: random.Random) -> None:
        """Make facts in small transactions; every fourth one is taken back."""
        number = 0
        while time.monotonic() < end:
            number += 1
            count = chance.randint(1, 6)
            topic = chance.choice(TOPICS)
            if number % 4:
                self.facts += await self.desk.tell(count, topic=topic)
            else:
                async with self.desk.database.connection() as conn, conn.transaction():
                    assert await fan_out(conn, [Fact(self.desk.org_id, "live", topic)] * count) == count
                    raise psycopg.Rollback
            await asyncio.sleep(self.pause_s)

    def interrupt_until(self, end: float, chance: random.Random, progress: Progress | None) -> None:
        """Kill or freeze a random runner at random moments."""
        task = progress.add_task("killing", total=self.seconds) if progress else None
        with psycopg.connect(self.desk.database_url, autocommit=True) as conn:
            while (left := end - time.monotonic()) > 0:
                self.interrupt(conn, chance, until=end)
                self.wake_the_frozen()
                if progress and task is not None:
                    progress.update(task, completed=self.seconds - left, description=f"killed {self.kills}")

    def interrupt(self, conn: psycopg.Connection[Any], chance: random.Random, *, until: float) -> None:
        """Interrupt a runner while something is claimed, by anybody."""
        number = chance.randrange(len(self.runners))
        victim = self.runners[number]
        while not self.held(conn):
            if time.monotonic() > until:
                return
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 0.15))
        freeze = chance.random() < FROZEN_SHARE
        victim.send(signal.SIGSTOP if freeze else signal.SIGKILL)
        victim.wait()
        if freeze:
            self.freezes += 1
            self.frozen.append((time.monotonic() + SETTINGS["webhook_lease_s"] + 0.5, victim))
        else:
            self.kills += 1
        self.runners[number] = self.start_runner()

    def held(self, conn: psycopg.Connection[Any]) -> int:
        """Return how many deliveries are claimed."""
        return int((conn.execute(HELD).fetchone() or (0,))[0])

    def wake_the_frozen(self, *, at_once: bool = False) -> None:
        """Wake those whose lease has long ended; they finish as zombies and stop."""
        for wake_at, runner in list(self.frozen):
            if at_once:
                time.sleep(max(0.0, wake_at - time.monotonic()))
            if time.monotonic() >= wake_at:
                self.frozen.remove((wake_at, runner))
                runner.send(signal.SIGCONT)
                runner.send(signal.SIGTERM)
                runner.wait()

    async def drain(self) -> None:
        """Let the receiver be well, and deliver what is left."""
        for number in range(len(TOPICS)):
            await self.behave(f"{self.prefix}/{number}", "ok")
        async with asyncio.timeout(120):
            while self.desk.states()["pending"]:
                await self.desk.deliver(offset=DRAIN_AHEAD)

    @property
    def violations(self) -> dict[str, Any]:
        """Return what must never be."""
        wrong = self.account.violations
        if self.without_reason:
            wrong["posts without a reason"] = self.without_reason
        if self.unwritten:
            wrong["posts unwritten without a takeover"] = self.unwritten
        if self.account.overlaps > self.freezes * SETTINGS["webhook_concurrency"]:
            wrong["posts of one delivery at once, freezes"] = (self.account.overlaps, self.freezes)
        return wrong


def print_account(console: Console, loop: WebhookKillLoop) -> None:
    """Print what happened beside what was promised."""
    account = loop.account
    console.print(f"interrupted      {loop.kills} × kill -9, {loop.freezes} × SIGSTOP past the lease")
    console.print(f"facts            {loop.facts:,}, deliveries {dict(account.states)}")
    console.print(f"distinct ids     {len(account.by_id):,} at the receiver; lost {loop.facts - len(account.by_id)}")
    console.print(f"posts            {len(account.posts):,}, of them without a reason {len(loop.without_reason)}")
    console.print(f"unwritten posts  {account.unrecorded}, claims taken over {loop.takeovers}")
    console.print(f"at once          {account.overlaps} posts of a delivery that another one was posting")
    numbers = {str(endpoint)[-4:]: len(found) for endpoint, found in account.numbers.items()}
    console.print(f"numbers          {numbers}, gaps {sum('gap' in name for name in loop.violations)}")


async def run_loop(folder: Path, database_url: str, seconds: float, seed: int, progress: Progress) -> WebhookKillLoop:
    """Run the loop in a fresh database."""
    with ReceiverProcess.start(folder) as receiver:
        nurse = WebhookNurse()
        try:
            async with Desk.open(database_url, receiver.address()) as desk:
                loop = WebhookKillLoop(desk, receiver, nurse, seconds, seed, pause_s=0.01)
                await loop.run(progress)
        finally:
            nurse.close()
        return loop


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the loop on an embedded server of its own."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash.webhook_kill_loop")
    parser.add_argument("--seconds", type=float, default=60.0)
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
            loop = asyncio.run(run_loop(folder, servers.database_url, options.seconds, options.seed, progress))
            console.print(f"seed             {options.seed}")
            print_account(console, loop)
            wrong = loop.violations
    if wrong:
        console.print("[bold red]VIOLATED[/]", wrong)
        return 1
    console.print("[bold green]kept[/]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
