"""Runner processes from the parent's side: order them, and wait for what really happens to them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from tests.crash.runner import Order, Report
from tests.crash.world import World
from tests.providers.conftest import AWS_VARIABLES

__all__ = ["Nurse", "RunnerProcess"]

ROOT = Path(__file__).parents[2]
WAIT_S = 40.0


class Nurse:
    """The process that forks runners of `module`, and a thread that reads what it tells of them."""

    module = "tests.crash.runner"

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="nightmail-runners-")
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.module],
            cwd=ROOT,
            env={**os.environ, **AWS_VARIABLES},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._changed = threading.Condition()
        self._started: list[int] = []
        self._events: dict[int, list[tuple[str, int]]] = defaultdict(list)
        self._orders = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = msgspec.json.decode(line)
            with self._changed:
                if told["event"] == "started":
                    self._started.append(told["pid"])
                else:
                    self._events[told["pid"]].append((told["event"], told["code"]))
                self._changed.notify_all()

    def start(self, world: World, *, settings: dict[str, Any], **fields: Any) -> RunnerProcess:
        """Start a runner in a world; one thread at a time."""
        return self.fork(
            Order(
                database_url=world.database_url,
                http_url=world.provider.http_url,
                smtp_url=world.provider.smtp_url,
                sender=world.sender,
                settings=settings,
                report=self.next_report(),
                **fields,
            )
        )

    def next_report(self) -> str:
        """Return where the next runner writes its report."""
        return f"{self._folder.name}/{self._orders}.json"

    def fork(self, order: Any) -> RunnerProcess:
        """Hand an order to the process and return the runner that it forks for it."""
        self._orders += 1
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(order) + b"\n")
        self._process.stdin.flush()
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._started) >= self._orders, WAIT_S), "no runner started"
            return RunnerProcess(self, self._started[self._orders - 1], Path(order.report))

    def wait(self, pid: int, *, count: int) -> tuple[str, int] | None:
        """Wait until `count` things have happened to a runner; return the last of them, None when nothing does."""
        with self._changed:
            if self._changed.wait_for(lambda: len(self._events[pid]) >= count, WAIT_S):
                return self._events[pid][count - 1]
            return None

    def is_over(self, pid: int) -> bool:
        """Return whether a runner has ended."""
        with self._changed:
            return any(event == "over" for event, _ in self._events[pid])

    def close(self) -> None:
        """End it and every runner it still has."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._reader.join(timeout=10)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._folder.cleanup()


@dataclass
class RunnerProcess:
    """One runner."""

    nurse: Nurse
    pid: int
    report_path: Path
    seen: int = 0

    def wait(self) -> int | None:
        """Wait until it is frozen (None) or has ended; return its exit code, or minus the signal."""
        happened = self.nurse.wait(self.pid, count=self.seen + 1)
        if happened is None:
            self.send(signal.SIGUSR1)
            time.sleep(0.5)
            state = re.search(r"State:.*", Path(f"/proc/{self.pid}/status").read_text())
            log = Path(f"{self.report_path}.log").read_text()
            raise AssertionError(f"runner {self.pid} hangs ({state and state[0]}):\n{log[-6000:]}")
        event, code = happened
        if event == "stopped":
            self.seen += 1
            return None
        return code

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it still lives."""
        if not self.nurse.is_over(self.pid):
            os.kill(self.pid, number)

    def report(self) -> Report:
        """Return what it reported. It must have ended by itself."""
        return msgspec.json.decode(self.report_path.read_bytes(), type=Report)
