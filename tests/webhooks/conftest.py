"""The world of these tests: a database, an org, a receiver, and runs of the real delivery code against them."""

from collections.abc import AsyncIterator

import pytest

from nightmail.fakes.webhook_receiver import Receiver
from tests.crash.fixtures import provider, provider_session, world
from tests.webhooks.desk import Desk

__all__ = ["desk", "provider", "provider_session", "receiver", "world"]


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A receiver in this process, on loopback."""
    async with Receiver() as receiver:
        yield receiver


@pytest.fixture
async def desk(database_url: str, receiver: Receiver) -> AsyncIterator[Desk]:
    """An org that wants to be told of everything."""
    async with Desk.open(database_url, receiver) as desk:
        yield desk
