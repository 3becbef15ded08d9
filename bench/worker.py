"""One worker process of a benchmark: prints `ready`, waits for `go`, works, prints what it measured as JSON.

    python -m bench.worker '{"kind": "job", "url": "postgresql://…", "lanes": ["test"]}'

Kinds: job (the real send-scheduled), engine (the whole Engine.run around it), deliver and deliver_first (the real
deliveries, all of them or the first), peer, and the floors: floor_test, floor_live, floor_fan_out, floor_deliver.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
import uvloop

from bench import floor, floor_webhooks, peer
from bench.delivering import FirstReplies, TimedRun
from nightmail.clock import monotonic
from nightmail.engine.crash import CrashPoints
from nightmail.engine.deadline import Deadline
from nightmail.engine.heap import settle_heap
from nightmail.engine.job import JobContext
from nightmail.engine.runner import Engine
from nightmail.engine.send_rate import Unlimited
from nightmail.ids import new_id
from nightmail.jobs.send_scheduled import work_lanes
from nightmail.jobs.table import JOBS
from nightmail.ports import EmailSender, Ports
from nightmail.providers.capture import CaptureSender
from nightmail.providers.ses import SesSender
from nightmail.providers.sns_http import HttpSnsHost
from nightmail.providers.stripe_meter import StripeMeter
from nightmail.providers.webhook_http import HttpWebhookSender
from nightmail.settings import Settings
from nightmail.store.database import Database

NEVER_S = 3600.0
Task = dict[str, Any]


class Stopwatch:
    """Waits for `go`, and measures time and memory from then on."""

    def __init__(self) -> None:
        self.began = 0.0
        self.resident_kib = 0

    async def ready(self) -> None:
        """Say that preparations are done and wait for the start."""
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        self.resident_kib = _kib("VmRSS")
        self.began = monotonic()

    def report(self, items: int, ended: float | None = None, **more: Any) -> str:
        """Return the measurements as JSON; memory is the highest residence since the process began, less the start."""
        ended = ended or monotonic()
        memory_mib = (_kib("VmHWM") - self.resident_kib) / 1024
        return json.dumps({"items": items, "began": self.began, "ended": ended, "memory_mib": memory_mib, **more})


@asynccontextmanager
async def _opened(task: Task) -> AsyncIterator[tuple[Settings, Database, Ports]]:
    settings = Settings(**task.get("settings", {}))
    database = Database(task["url"], pool_max=settings.db_pool_max)
    await database.open()
    async with database.connection():
        pass  # connected before the clock starts, as the floor is
    ports = Ports(
        email=_email_sender(task, settings),
        sms=CaptureSender(),
        send_rate=Unlimited(),
        webhooks=HttpWebhookSender(settings.webhook_allow_cidrs, allow_http=True),
        sns=HttpSnsHost(),
        meter=StripeMeter(api_key=None),
    )
    yield settings, database, ports
    await ports.email.close()
    await ports.webhooks.close()
    await ports.sns.close()
    await database.close()


async def run_job(task: Task, watch: Stopwatch) -> str:
    """Drain lanes with the shipped job code."""
    async with _opened(task) as (settings, database, ports):
        return await _drain(task, watch, settings, database, ports)


async def _drain(task: Task, watch: Stopwatch, settings: Settings, database: Database, ports: Ports) -> str:
    await watch.ready()
    ctx = _context("send-scheduled", settings, database, ports, NEVER_S)
    counts, more = await work_lanes(ctx, task["lanes"])
    assert not more, "the lanes were not drained"
    return watch.report(counts["sent"])


def _context(job: str, settings: Settings, database: Database, ports: Ports, deadline_s: float) -> JobContext:
    return JobContext(
        job_id=new_id(),
        job=job,
        database=database,
        ports=ports,
        settings=settings,
        deadline=Deadline.after(deadline_s),
        runner="bench",
        log=structlog.get_logger(),
    )


async def run_deliver(task: Task, watch: Stopwatch) -> str:
    """Deliver all that is due with the shipped code."""
    async with _opened(task) as (settings, database, ports):
        await watch.ready()
        run = TimedRun(_context("retry-webhooks", settings, database, ports, NEVER_S))
        counts, _ = await run.drain()
        return watch.report(counts["delivered"], claims_ms=run.claims_ms)


async def run_deliver_first(task: Task, watch: Stopwatch) -> str:
    """Deliver, for as long as a run may take, until `wanted` posts were answered; the time ends with that answer."""
    async with _opened(task) as (settings, database, ports):
        stopping = asyncio.Event()
        replies = FirstReplies(ports.webhooks, task["wanted"], stopping)
        await watch.ready()
        ctx = _context("retry-webhooks", settings, database, replace(ports, webhooks=replies), settings.job_deadline_s)
        ctx.stopping = stopping
        run = TimedRun(ctx)
        counts, _ = await run.drain()
        assert replies.complete_at is not None, f"one run delivered only {counts['delivered']}"
        return watch.report(counts["delivered"], replies.complete_at, claims_ms=run.claims_ms)


async def run_engine(task: Task, watch: Stopwatch) -> str:
    """Drain everything with one call of the engine: slot, run record, job, record."""
    async with _opened(task) as (settings, database, ports):
        engine = Engine(JOBS, database, ports, settings, "bench", asyncio.Event(), CrashPoints())
        await watch.ready()
        outcome = await engine.run("send-scheduled", trigger="bench", deadline_s=NEVER_S)
        report = watch.report(outcome.counts["sent"])
        assert outcome.state == "succeeded", outcome.error
        await engine.close()
        return report


def _email_sender(task: Task, settings: Settings) -> EmailSender:
    if "endpoint" not in task:
        return CaptureSender()
    return SesSender(region="eu-west-1", concurrency=settings.send_concurrency, endpoint_url=task["endpoint"])


async def run_floor_test(task: Task, watch: Stopwatch) -> str:
    """Drain the test lane with the floor."""
    conn = await floor.connect(task["url"])
    await watch.ready()
    report = watch.report(await floor.drain_test(conn, shard=task["shard"]))
    await conn.close()
    return report


async def run_floor_live(task: Task, watch: Stopwatch) -> str:
    """Drain live email with the floor."""
    conn = await floor.connect(task["url"])
    await watch.ready()
    options = {name: task[name] for name in ("endpoint", "concurrency", "shard")}
    report = watch.report(await floor.drain_live(conn, task["url"], **options))
    await conn.close()
    return report


async def run_floor_fan_out(task: Task, watch: Stopwatch) -> str:
    """Drain the test lane with the floor that writes deliveries too."""
    conn = await floor.connect(task["url"])
    await watch.ready()
    statement = floor_webhooks.FINISH_AND_TELL
    report = watch.report(await floor.drain_test(conn, shard=task["shard"], statement=statement))
    await conn.close()
    return report


async def run_floor_deliver(task: Task, watch: Stopwatch) -> str:
    """Sign and post as many bodies, without a database."""
    await watch.ready()
    options = {name: task[name] for name in ("posts", "paths", "concurrency")}
    return watch.report(await floor_webhooks.post_all(task["sink"], **options))


async def run_peer(task: Task, watch: Stopwatch) -> str:
    """Drain the peer's queue."""
    await watch.ready()
    items, ended = await peer.drain(task["url"])
    return watch.report(items, ended=ended or monotonic())


KINDS: dict[str, Callable[[Task, Stopwatch], Awaitable[str]]] = {
    "job": run_job,
    "engine": run_engine,
    "deliver": run_deliver,
    "deliver_first": run_deliver_first,
    "floor_test": run_floor_test,
    "floor_live": run_floor_live,
    "floor_fan_out": run_floor_fan_out,
    "floor_deliver": run_floor_deliver,
    "peer": run_peer,
}


def _kib(name: str) -> int:
    """Return a figure of /proc/self/status; VmHWM is the highest VmRSS since the program began."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise AssertionError(f"Linux has {name}")


async def main() -> None:
    """Do the task of the command line."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    task: Task = json.loads(sys.argv[1])
    settle_heap()  # as every process of ours does; the floors too
    print(await KINDS[task["kind"]](task, Stopwatch()), flush=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
