"""Runners of retry-webhooks as processes of their own, to be killed, frozen and woken.

`python -m tests.crash.webhook_runner` is their nurse, as tests.crash.runner is for send-scheduled: the same protocol,
another job. The crash points are the job's own, and two more inside transactions, after their last statement and before
COMMIT: claim_uncommitted, record_uncommitted.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from nightmail.engine.crash import CrashPoints
from nightmail.engine.deadline import Deadline
from nightmail.engine.job import JobContext
from nightmail.errors import DatabaseAway
from nightmail.ids import new_id
from nightmail.jobs import retry_webhooks
from nightmail.settings import load
from nightmail.store import webhook_attempts
from nightmail.store.database import Database
from nightmail.webhooks import deliver
from tests.crash.runner import Report, main, print_tasks
from tests.crash.world import QUIET
from tests.ports import make_ports

__all__ = ["INSIDE", "WebhookOrder"]

# What each transaction calls last.
INSIDE = {"claim_uncommitted": (deliver, "keep_bodies"), "record_uncommitted": (webhook_attempts, "fan_out")}
IDLE_S = 0.02


class WebhookOrder(msgspec.Struct, frozen=True):
    """What to do: one run of the job, or with `loop` one after the other until SIGTERM."""

    database_url: str
    settings: dict[str, Any]
    crash: str | None = None
    loop: bool = False
    deadline_s: float = 25.0
    report: str = "/dev/null"


def crash_inside(crash: CrashPoints) -> None:
    """Let the transactions of claim and record pass a crash point just before they commit."""

    def with_point(point: str, last: Any) -> Any:
        async def last_and_reach(*arguments: Any) -> Any:
            result = await last(*arguments)
            crash.reach(f"retry-webhooks:{point}")
            return result

        return last_and_reach

    for point, (module, name) in INSIDE.items():
        setattr(module, name, with_point(point, getattr(module, name)))


async def work(order: WebhookOrder) -> Report:
    """Carry out the order."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, print_tasks)
    database = Database(order.database_url, pool_max=4)
    ports = make_ports()
    crash = CrashPoints.parse(order.crash)
    crash_inside(crash)
    counts: Counter[str] = Counter()
    runs, more, error = 0, False, None
    await database.open()
    while not stopping.is_set():
        ctx = JobContext(
            job_id=new_id(),
            job="retry-webhooks",
            database=database,
            ports=ports,
            settings=load({"nightmail_env": "test", **order.settings}),
            deadline=Deadline.after(order.deadline_s),
            runner=f"runner-{os.getpid()}",
            log=QUIET,
            stopping=stopping,
            crash=crash,
        )
        runs += 1
        claimed = 0
        try:
            result = await retry_webhooks.run(ctx)
            counts.update(result.counts)
            claimed, more = result.counts["claimed"], result.more
        except DatabaseAway as problem:
            error = f"DatabaseAway: {problem}"
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
            break
        if not order.loop:
            break
        if not claimed:
            await asyncio.sleep(IDLE_S)
    await ports.webhooks.close()
    await ports.sns.close()
    await database.close()
    return Report(dict(counts), more, runs, error)


def run_order(order: WebhookOrder) -> int:
    """Be a runner: work, report, and return the exit code."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        report = runner.run(work(order))
    Path(order.report).write_bytes(msgspec.json.encode(report))
    return 1 if report.error else 0


if __name__ == "__main__":
    main(WebhookOrder, run_order)
