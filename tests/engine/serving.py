"""A process with scheduler and dispatcher that ends at SIGTERM: `python -m … URL`."""

from __future__ import annotations

import asyncio
import signal
import sys

from nightmail.engine.job import JobContext, JobResult
from nightmail.engine.scheduler import Dispatcher, Scheduler
from nightmail.jobs.send_scheduled import work_lanes
from tests.engine.place import job, place


async def work(ctx: JobContext) -> JobResult:
    print("working", flush=True)
    await ctx.stopping.wait()
    return JobResult({"claimed": 1}, more=True)


async def main(url: str) -> None:
    async with place(url, [job("send-scheduled", work)]) as here:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, here.stopping.set)
        dispatcher = Dispatcher(here.engine, "send-scheduled", work_lanes, here.stopping)
        await asyncio.gather(Scheduler(here.engine, here.stopping).run(), dispatcher.run())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
