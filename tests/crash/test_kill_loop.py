"""The kill loop and the race in their short forms; `make chaos` runs the long one."""

from __future__ import annotations

import asyncio
import sys

import pytest
from rich.console import Console

from tests.crash.kill_loop import KillLoop, print_account
from tests.crash.processes import Nurse
from tests.crash.race import race
from tests.crash.world import FakeProviderProcess, World

pytestmark = [pytest.mark.crash, pytest.mark.slow]


def test_runners_killed_again_and_again_lose_nothing_and_count_once(
    database_url: str, provider: FakeProviderProcess, nurse: Nurse
) -> None:
    provider.follow(latency_ms=20)
    world = asyncio.run(World.make(database_url, provider, is_mixed=True))
    asyncio.run(world.give_credits(3000))
    asyncio.run(world.accept(2500))
    loop = KillLoop(world, nurse, seconds=6, seed=1936)
    loop.run()
    print_account(Console(file=sys.stdout, width=110), loop, 2500)
    assert not loop.violations
    assert loop.account.states == {"sent": 2500}
    assert loop.kills + loop.freezes >= 4  # on a busy machine


def test_four_runners_and_five_callers_send_each_message_once(
    database_url: str, provider: FakeProviderProcess, nurse: Nurse
) -> None:
    world = asyncio.run(World.make(database_url, provider))
    asyncio.run(world.accept(2500))
    account, workers = race(world, nurse, limit_s=60)
    assert not account.violations
    assert (account.states, account.calls, account.doubles) == ({"sent": 2500}, 2500, 0)
    assert workers >= 5
