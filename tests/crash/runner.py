"""Runners of send-scheduled as processes of their own, to be killed, frozen and woken.

`python -m tests.crash.runner` is their nurse. It imports everything once (a second of processor time), then forks a
runner for each Order (JSON, one line) it reads, and prints what really happens to its children, as waitpid says:

    {"pid": 17, "event": "started"}   {"pid": 17, "event": "stopped"}   {"pid": 17, "event": "over", "code": -9}

It ends with its standard input, and takes its children with it. A runner writes its Report to the order's file; on
SIGTERM it stops as the job does.

The crash points are the job's own, and two more inside transactions, after their last statement and before COMMIT:
gate_uncommitted, record_uncommitted. (A set of test messages is one statement: there is no such moment in it.)
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from nightmail.engine.crash import CrashPoints
from nightmail.engine.deadline import Deadline
from nightmail.engine.job import JobContext
from nightmail.errors import DatabaseAway
from nightmail.ids import new_id
from nightmail.jobs.send_scheduled import work_lanes
from nightmail.ports import Accepted, OutgoingEmail
from nightmail.settings import load
from nightmail.store import gate, record
from nightmail.store.database import Connection, Database
from nightmail.store.rating import Ended, settle_messages
from tests.crash.world import QUIET
from tests.ports import make_ports
from tests.providers.conftest import make_sender

__all__ = ["INSIDE", "Order", "Report"]

INSIDE = {"gate_uncommitted": gate, "record_uncommitted": record}
IDLE_S = 0.02


class Order(msgspec.Struct, frozen=True):
    """What to do. `loop` works until SIGTERM, else one run; a message whose subject is `deadly` kills the process.

    In a loop, `pause_s` passes between runs; without one only when nothing was due.
    """

    database_url: str
    http_url: str
    smtp_url: str
    settings: dict[str, Any]
    sender: str = "ses"
    lanes: tuple[str, ...] = ("live:email", "live:sms", "test")
    crash: str | None = None
    loop: bool = False
    pause_s: float = 0.0
    deadline_s: float = 25.0
    deadly: str | None = None
    report: str = "/dev/null"


class Report(msgspec.Struct, frozen=True):
    """What came of it."""

    counts: dict[str, int]
    more: bool = False
    runs: int = 0
    error: str | None = None


class Deadly:
    """The real adapter, except that one subject is kill -9: a message that takes its runner with it."""

    def __init__(self, inner: Any, subject: str | None) -> None:
        self.inner, self.subject, self.name = inner, subject, inner.name

    async def send_email(self, email: OutgoingEmail, *, timeout_s: float) -> Accepted:
        """Send, or die."""
        if email.subject == self.subject:
            os.kill(os.getpid(), signal.SIGKILL)
        accepted: Accepted = await self.inner.send_email(email, timeout_s=timeout_s)
        return accepted

    async def close(self) -> None:
        """Close the real one."""
        await self.inner.close()


def crash_inside(crash: CrashPoints) -> None:
    """Let the transactions of gate and record pass a crash point just before they commit."""

    def with_point(point: str) -> Any:
        async def settle_and_reach(conn: Connection, ended: Sequence[Ended], *, shard: int) -> None:
            await settle_messages(conn, ended, shard=shard)
            crash.reach(f"send-scheduled:{point}")

        return settle_and_reach

    for point, module in INSIDE.items():
        # The name by which the step calls it: mypy knows no name that a module only imports.
        module.settle_messages = with_point(point)  # type: ignore[attr-defined]


def print_tasks() -> None:
    """Print where every task waits: a runner that hangs is asked."""
    for task in asyncio.all_tasks():
        print(f"task {task.get_name()}:", flush=True)
        waiting: Any = task.get_coro()
        while waiting is not None:
            frame = getattr(waiting, "cr_frame", None) or getattr(waiting, "gi_frame", None)
            print(f"  {frame.f_code.co_qualname} line {frame.f_lineno}" if frame else f"  {waiting!r}", flush=True)
            waiting = getattr(waiting, "cr_await", None) or getattr(waiting, "gi_yieldfrom", None)


async def work(order: Order) -> Report:
    """Carry out the order."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, print_tasks)
    settings = load({"nightmail_env": "test", **order.settings})
    database = Database(order.database_url, pool_max=6)
    urls = {"http_url": order.http_url, "smtp_url": order.smtp_url}
    email = make_sender(order.sender, **urls, concurrency=settings.send_concurrency)
    # SMS has the same code path; its client would cost every runner 0.2 s.
    ports = make_ports(email=Deadly(email, order.deadly))
    crash = CrashPoints.parse(order.crash)
    crash_inside(crash)
    counts: Counter[str] = Counter()
    runs, more, error = 0, False, None
    await database.open()
    while not stopping.is_set():
        ctx = JobContext(
            job_id=new_id(),
            job="send-scheduled",
            database=database,
            ports=ports,
            settings=settings,
            deadline=Deadline.after(order.deadline_s),
            runner=f"runner-{os.getpid()}",
            log=QUIET,
            stopping=stopping,
            crash=crash,
        )
        runs += 1
        try:
            came, more = await work_lanes(ctx, order.lanes)
            counts.update(came)
        except DatabaseAway as problem:
            error = f"DatabaseAway: {problem}"
            came = Counter()
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
            break
        if not order.loop:
            break
        if order.pause_s or not came["claimed"]:
            await asyncio.sleep(order.pause_s or IDLE_S)
    await email.close()
    await database.close()
    return Report(dict(counts), more, runs, error)


def run_order(order: Order) -> int:
    """Be a runner: work, report, and return the exit code."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        report = runner.run(work(order))
    Path(order.report).write_bytes(msgspec.json.encode(report))
    return 1 if report.error else 0


def fork_runner(order: Any, run: Callable[[Any], int]) -> int:
    """Return the pid of a new runner; its log goes beside its report."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(f"{order.report}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(number, target)
        code = run(order)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(order_type: type = Order, run: Callable[[Any], int] = run_order) -> None:
    """Fork runners and tell what becomes of them until standard input ends."""
    woken, wakes = socket.socketpair()
    for end in (woken, wakes):
        end.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: set[int] = set()
    unread = b""
    while True:
        readable, _, _ = select.select([0, woken.fileno()], [], [])
        if woken.fileno() in readable:
            woken.recv(4096)
            for pid, status in changes():
                if os.WIFSTOPPED(status):
                    tell(pid, "stopped")
                else:
                    children.discard(pid)
                    tell(pid, "over", os.waitstatus_to_exitcode(status))
        if 0 in readable:
            data = os.read(0, 65536)
            if not data:
                break
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                pid = fork_runner(msgspec.json.decode(line, type=order_type), run)
                children.add(pid)
                tell(pid, "started")
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def changes() -> Iterator[tuple[int, int]]:
    """Yield what has happened to children since last asked."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


def tell(pid: int, event: str, code: int = 0) -> None:
    """Print one event."""
    print(msgspec.json.encode({"pid": pid, "event": event, "code": code}).decode(), flush=True)


if __name__ == "__main__":
    main()
