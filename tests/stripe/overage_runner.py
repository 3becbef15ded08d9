"""A process that runs report-overage once and dies where it is told: `python -m … URL FAKE_URL OFFSET_S CRASH`."""

from __future__ import annotations

import asyncio
import sys

from nightmail.jobs.table import JOBS
from nightmail.providers.stripe_meter import StripeMeter
from tests.engine.place import place
from tests.ports import make_ports
from tests.stripe.billing import SETTINGS


async def main(url: str, fake_url: str, offset_s: str, crash: str) -> None:
    async with place(url, JOBS, clock_offset=f"{offset_s} seconds", crash=crash, **SETTINGS) as here:
        here.engine.ports = make_ports(meter=StripeMeter(api_key="sk_test_x", api_base=fake_url, timeout_s=5))
        await here.engine.run("report-overage", trigger="test")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
