"""Messages with attachments are held in memory during their call: few at once, and nobody waits for them."""

from __future__ import annotations

import asyncio
from uuid import UUID

import pytest

from nightmail.jobs.send_scheduled import MAX_FILE_BYTES
from nightmail.ports import Accepted, Attachment, OutgoingEmail
from tests.crash.world import World
from tests.ports import make_ports

pytestmark = pytest.mark.anyio

SIZE = 6_000_000
FILES = [Attachment("a.txt", b"x" * SIZE, "text/plain")]


class Counting:
    """A sender that holds mail with attachments until others have passed, and counts what it holds."""

    name = "counting"

    def __init__(self, plain: int) -> None:
        self.plain_left = plain
        self.plain_done = asyncio.Event()
        self.holding: set[UUID] = set()
        self.most = 0

    async def send_email(self, email: OutgoingEmail, *, timeout_s: float) -> Accepted:
        if email.attachments:
            assert email.attachments[0].content == FILES[0].content
            self.holding.add(email.message_id)
            self.most = max(self.most, len(self.holding))
            async with asyncio.timeout(timeout_s):
                await self.plain_done.wait()
            self.holding.discard(email.message_id)
        else:
            self.plain_left -= 1
            if self.plain_left == 0:
                self.plain_done.set()
        return Accepted(f"id_{email.message_id}")

    async def close(self) -> None: ...


async def test_few_messages_with_attachments_are_called_at_once_and_plain_ones_pass_them(world: World) -> None:
    await world.accept(6, attachments=FILES)
    await world.accept(20)
    sender = Counting(plain=20)
    ports = make_ports(email=sender)

    counts = await world.run(ports=ports, send_concurrency=32)

    assert counts["sent"] == 26
    assert sender.most == MAX_FILE_BYTES // SIZE
