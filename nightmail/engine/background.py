"""Work that outlives its caller: kept referenced, its errors logged, waited for when the process ends."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import structlog

from nightmail.clock import monotonic

T = TypeVar("T")


class Background:
    """The tasks of a process that nobody may wait for without bound."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin the work; it goes on when its caller is cancelled."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            structlog.get_logger().debug("background.ended_with_error", exc_info=task.exception())

    async def within(self, seconds: float, work: Coroutine[Any, Any, T]) -> T:
        """Return the work's result. Raises TimeoutError after `seconds`: the work is cancelled, not waited for.

        A statement on a frozen server ignores its cancellation for as long as it likes; the caller must not.
        """
        task = self.start(work)
        try:
            done, _ = await asyncio.wait({task}, timeout=max(seconds, 0.0))
        except asyncio.CancelledError:
            task.cancel()
            raise
        if not done:
            task.cancel()
            raise TimeoutError(f"no answer within {seconds:.1f} s")
        return task.result()

    async def drain(self, seconds: float) -> None:
        """Wait until nothing is left, cancel after `seconds`, and give the cancelled a last second."""
        end = monotonic() + seconds
        while self._tasks and monotonic() < end:
            await asyncio.wait(self._tasks, timeout=end - monotonic())
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)


async def pause(stopping: asyncio.Event, seconds: float) -> bool:
    """Wait `seconds` or until the process is asked to stop; return whether it was."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stopping.wait()
    return stopping.is_set()
