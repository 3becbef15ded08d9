"""The shared send rate, in PostgreSQL and in Valkey."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from nightmail.engine.send_rate import (
    PostgresSendRate,
    Rates,
    Unlimited,
    ValkeySendRate,
    build_send_rate,
    burst_of,
    connect_valkey,
)
from nightmail.ports import SendRate
from nightmail.store.database import Database
from tests.engine.place import settings_of

pytestmark = pytest.mark.anyio

EMAIL, SMS = "live:email:ses", "live:sms:sns"


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url, pool_max=8)
    await database.open()
    yield database
    await database.close()


@pytest.fixture(params=["postgres", "valkey"])
async def rate_of(
    request: pytest.FixtureRequest, database: Database, valkey_url: str
) -> AsyncIterator[Callable[[float], SendRate]]:
    client = connect_valkey(valkey_url)

    def make(per_s: float) -> SendRate:
        rates = Rates({"email": per_s})
        postgres = PostgresSendRate(database, rates)
        return ValkeySendRate(client, rates, Refusing()) if request.param == "valkey" else postgres

    yield make
    await client.aclose()


class Refusing:
    """A fallback that must not be asked."""

    async def take(self, account: str, wanted: int) -> int:
        raise AssertionError("Valkey is there")


async def test_no_more_than_the_rate_and_a_burst_is_granted_to_all_takers_together(
    rate_of: Callable[[float], SendRate],
) -> None:
    per_s, granted = 40.0, 0
    loop = asyncio.get_running_loop()
    began = loop.time()
    while loop.time() - began < 1.5:
        granted += sum(await asyncio.gather(*(rate_of(per_s).take(EMAIL, 3) for _ in range(6))))
        await asyncio.sleep(0.03)
    took = loop.time() - began
    assert granted <= per_s * took + burst_of(per_s) + 1
    assert granted >= per_s * took * 0.6


async def test_a_burst_is_granted_and_then_nothing(rate_of: Callable[[float], SendRate]) -> None:
    slow = rate_of(0.01)
    assert [await slow.take(EMAIL, 5) for _ in range(3)] == [1, 0, 0]
    assert await slow.take("live:email:smtp", 5) == 1


async def test_an_account_without_a_rate_is_unlimited(rate_of: Callable[[float], SendRate]) -> None:
    assert await rate_of(1.0).take(SMS, 500) == 500


async def test_postgres_decides_while_valkey_is_away_and_valkey_is_left_alone(database: Database) -> None:
    client = connect_valkey("valkey://127.0.0.1:9")
    rate = ValkeySendRate(client, Rates({"email": 0.01}), PostgresSendRate(database, Rates({"email": 0.01})))
    assert [await rate.take(EMAIL, 5) for _ in range(3)] == [1, 0, 0]
    assert rate._not_before > 0
    await client.aclose()


async def test_a_clock_that_was_set_back_does_not_stop_an_account(database: Database) -> None:
    rate = PostgresSendRate(database, Rates({"email": 50.0}))
    await rate.take(EMAIL, 1)
    async with database.connection() as conn:
        await conn.execute("UPDATE send_rates SET next_free_at = now() + interval '1 day'")
    assert await rate.take(EMAIL, 1) == 1


async def test_settings_choose(database: Database) -> None:
    client: Any = connect_valkey("valkey://127.0.0.1:9")
    assert isinstance(build_send_rate(settings_of(), database, client), Unlimited)
    assert isinstance(build_send_rate(settings_of(send_rate_sms_per_s=2), database, client), ValkeySendRate)
    assert isinstance(build_send_rate(settings_of(send_rate_sms_per_s=2), database, None), PostgresSendRate)
    assert await Unlimited().take(EMAIL, 7) == 7
