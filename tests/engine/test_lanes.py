"""Parts that run side by side: all of them end before anybody goes on, also when one fails."""

from __future__ import annotations

import asyncio

import pytest

from nightmail.engine.lanes import side_by_side

pytestmark = pytest.mark.anyio


async def test_results_come_in_the_order_of_the_parts() -> None:
    async def part(number: int) -> int:
        for _ in range(5 - number):
            await asyncio.sleep(0)
        return number

    assert await side_by_side(part(number) for number in range(5)) == [0, 1, 2, 3, 4]


async def test_the_first_error_ends_the_others_which_have_cleaned_up_when_it_is_raised() -> None:
    ended: list[str] = []

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("forever")

    async def fails() -> None:
        await asyncio.sleep(0)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await side_by_side([forever(), fails()])
    assert ended == ["forever"]


async def test_a_cancelled_run_leaves_no_part_behind() -> None:
    begun: list[asyncio.Event] = [asyncio.Event(), asyncio.Event()]
    ended: list[int] = []

    async def forever(number: int) -> None:
        begun[number].set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(number)

    run = asyncio.ensure_future(side_by_side(forever(number) for number in range(2)))
    for event in begun:
        await event.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert ended == [0, 1]
