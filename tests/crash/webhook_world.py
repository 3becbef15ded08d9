"""What the crash tests of webhooks share: a receiver process whose log is the truth, runners, and the final account.

Each endpoint has topics of its own, so that an event goes to one endpoint and an id in the log is one delivery.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec

from nightmail.fakes.webhook_receiver import Receiver
from tests.crash.processes import Nurse, RunnerProcess
from tests.crash.webhook_runner import WebhookOrder

__all__ = ["Post", "ReceiverProcess", "WebhookAccount", "WebhookNurse"]


class Post(msgspec.Struct, frozen=True):
    """One POST as the receiver saw it."""

    at: float
    path: str
    webhook_id: str
    open_at_once: int
    headers: dict[str, str]
    body: str


@dataclass
class ReceiverProcess:
    """The receiver as a process, and its log."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    @classmethod
    @contextmanager
    def start(cls, folder: Path, behaviours: dict[str, str] | None = None) -> Iterator[ReceiverProcess]:
        """Start one with its log in `folder`; stop it at the end."""
        log = folder / "posts.jsonl"
        log.touch()
        command = [sys.executable, "-m", "nightmail.fakes.webhook_receiver", "--log", str(log), "--exit-with-parent"]
        command.append("--count-only")
        for path, text in (behaviours or {}).items():
            command += ["--behave", path, text]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        ready, url = process.stdout.readline().split()
        assert ready == "ready"
        try:
            yield cls(process, int(url.rpartition(":")[2]), log)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=10)
            process.stdout.close()

    def address(self) -> Receiver:
        """Return what knows the receiver's URLs; it is not entered."""
        return Receiver(port=self.port)

    def posts(self, prefix: str) -> list[Post]:
        """Return the POSTs to paths that begin so, in the order in which they came."""
        with self.log.open("rb") as lines:
            posts = [msgspec.json.decode(line, type=Post) for line in lines if line.endswith(b"\n")]
        return [post for post in posts if post.path.startswith(prefix)]


class WebhookNurse(Nurse):
    """The process that forks runners of retry-webhooks."""

    module = "tests.crash.webhook_runner"

    def begin(self, database_url: str, settings: dict[str, Any], **fields: Any) -> RunnerProcess:
        """Start a runner; one thread at a time."""
        return self.fork(WebhookOrder(database_url, settings, report=self.next_report(), **fields))


@dataclass
class WebhookAccount:
    """What became of every fact, by the receiver's log and the database."""

    facts: int
    posts: list[Post]
    states: Counter[str]
    numbers: dict[UUID, list[int | None]]
    attempts: int
    timed_out: int
    """Of the attempts, those without an answer in time: a frozen runner's may never have reached the receiver."""
    by_id: dict[str, list[Post]] = field(init=False)

    def __post_init__(self) -> None:
        self.by_id = defaultdict(list)
        for post in self.posts:
            self.by_id[post.webhook_id].append(post)

    @classmethod
    def read(cls, desk: Any, receiver: ReceiverProcess, prefix: str, endpoints: Sequence[UUID], facts: int) -> Any:
        """Read both books."""
        return cls(
            facts,
            receiver.posts(prefix),
            desk.states(),
            {endpoint: desk.numbers(endpoint) for endpoint in endpoints},
            *desk.ask("SELECT count(*), count(*) FILTER (WHERE error LIKE 'timeout%') FROM webhook_attempts")[0],
        )

    @property
    def overlaps(self) -> int:
        """Return how many posts came while another one of the same delivery was open."""
        return sum(post.open_at_once > 1 for post in self.posts)

    @property
    def unrecorded(self) -> int:
        """Return how many posts nobody lived to record."""
        return len(self.posts) - self.attempts

    @property
    def violations(self) -> dict[str, Any]:
        """Return what must never be, whoever was killed."""
        wrong: dict[str, Any] = {}
        if self.states != {"delivered": self.facts}:
            wrong["states"] = dict(self.states)
        if len(self.by_id) != self.facts:
            wrong["distinct ids, facts"] = (len(self.by_id), self.facts)
        for endpoint, numbers in self.numbers.items():
            if numbers != list(range(1, len(numbers) + 1)):
                wrong[f"gap at {endpoint}"] = len(numbers)
        if changed := [name for name, posts in self.by_id.items() if len({post.body for post in posts}) > 1]:
            wrong["another body"] = changed
        if self.unrecorded < -self.timed_out:
            wrong["attempts without a post"] = -self.unrecorded
        return wrong
