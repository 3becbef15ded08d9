"""A world per test: a fresh database, an org, and the session's fake provider process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.crash.processes import Nurse
from tests.crash.world import FakeProviderProcess, World, start_provider


@pytest.fixture(scope="session")
def provider_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeProviderProcess]:
    """One fake provider for all tests; messages are told apart by their ids."""
    provider = start_provider(tmp_path_factory.mktemp("provider"))
    yield provider
    assert provider.stop() == 0


@pytest.fixture
def provider(provider_session: FakeProviderProcess) -> FakeProviderProcess:
    """The fake provider with the plain script."""
    provider_session.follow(slow_ms=300)
    return provider_session


@pytest.fixture
async def world(database_url: str, provider: FakeProviderProcess) -> AsyncIterator[World]:
    """A database with an org, and the provider behind SES."""
    world = await World.make(database_url, provider)
    yield world
    await world.close()


@pytest.fixture(scope="session")
def nurse() -> Iterator[Nurse]:
    """The process that forks runners."""
    nurse = Nurse()
    yield nurse
    nurse.close()
