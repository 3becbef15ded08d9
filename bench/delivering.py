"""What a worker needs to measure the shipped deliveries from within."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from nightmail.clock import monotonic
from nightmail.engine.job import JobContext
from nightmail.ports import WebhookReply, WebhookSender
from nightmail.webhooks.deliver import DeliveryRun, Held


class TimedRun(DeliveryRun):
    """A run that keeps how long each of its claims took, the making of bodies included."""

    def __init__(self, ctx: JobContext) -> None:
        super().__init__(ctx)
        self.claims_ms: list[float] = []

    async def claim(self, limit: int) -> list[Held]:
        """Claim as the run does, and note the time."""
        began = monotonic()
        claimed = await super().claim(limit)
        self.claims_ms.append((monotonic() - began) * 1000)
        return claimed


class FirstReplies:
    """A sender that notes when `wanted` posts were answered with 200, and then stops the run."""

    def __init__(self, sender: WebhookSender, wanted: int, stopping: asyncio.Event) -> None:
        self.complete_at: float | None = None
        self._sender = sender
        self._missing = wanted
        self._stopping = stopping

    async def post(self, url: str, *, body: bytes, headers: Mapping[str, str], timeout_s: float) -> WebhookReply:
        """Post, and count the answer."""
        reply = await self._sender.post(url, body=body, headers=headers, timeout_s=timeout_s)
        if reply.status == 200:
            self._missing -= 1
            if not self._missing:
                self.complete_at = monotonic()
                self._stopping.set()
        return reply

    async def close(self) -> None:
        """Release connections."""
        await self._sender.close()
