"""A job that works in several parts of its rows side by side, each over a connection of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def side_by_side(parts: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all parts and return what each came to; the first error ends the others, and is raised when they have ended.

    A part that is ended in the middle of a transaction has done nothing in it.
    """
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
