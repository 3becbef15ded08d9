"""A process that takes the lease of a whole-table job and keeps it until it is killed: `python -m … URL`."""

from __future__ import annotations

import asyncio
import sys

from nightmail.engine.job import JobContext, JobResult
from tests.engine.place import job, place


async def hold(ctx: JobContext) -> JobResult:
    print("holding", flush=True)
    await asyncio.sleep(60)
    raise AssertionError("the test kills this process")


async def main(url: str) -> None:
    async with place(url, [job("whole", hold, holds="table")]) as here:
        await here.engine.run("whole", trigger="test")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
