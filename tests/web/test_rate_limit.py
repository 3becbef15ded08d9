"""Rate limits: exact in one process, shared through Valkey, and never slowed by a dead one."""

from __future__ import annotations

import asyncio
import socket
import time
import uuid
from collections.abc import Callable

import pytest
from valkey.asyncio import Valkey

from nightmail.web.problems import Problem
from nightmail.web.rate_limit import CIRCUIT_S, RateLimiter
from tests.web.serving import serving


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def taken(limiter: RateLimiter, key: uuid.UUID, rate: int, wanted: int) -> int:
    """Return how many of `wanted` requests are let through."""
    count = 0
    for _ in range(wanted):
        try:
            await limiter.take(key, rate)
        except Problem as problem:
            if problem.name != "rate_limit_exceeded":
                raise
        else:
            count += 1
    return count


def test_one_process_alone_lets_through_exactly_the_rate() -> None:
    async def scenario() -> None:
        clock = Clock()
        limiter, key = RateLimiter(None, clock=clock), uuid.uuid4()
        assert await taken(limiter, key, 10, 25) == 10
        clock.now += 0.3
        assert await taken(limiter, key, 10, 25) == 3
        clock.now += 100
        assert await taken(limiter, key, 10, 25) == 10
        assert await taken(limiter, uuid.uuid4(), 10, 25) == 10, "keys do not share"
        assert not limiter.is_shared

    asyncio.run(scenario())


def test_headers_count_down() -> None:
    async def scenario() -> None:
        limiter, key = RateLimiter(None, clock=Clock()), uuid.uuid4()
        left = [int(dict(await limiter.take(key, 3))[b"ratelimit-remaining"]) for _ in range(3)]
        assert left == [2, 1, 0]
        with pytest.raises(Problem) as refused:
            await limiter.take(key, 3)
        assert dict(refused.value.headers) == {
            b"ratelimit-limit": b"3",
            b"ratelimit-remaining": b"0",
            b"ratelimit-reset": b"1",
            b"retry-after": b"1",
        }

    asyncio.run(scenario())


def test_two_processes_share_one_limit_through_valkey(valkey_url: str) -> None:
    async def scenario() -> None:
        first, second = Valkey.from_url(valkey_url), Valkey.from_url(valkey_url)
        limiters, key = [RateLimiter(first), RateLimiter(second)], uuid.uuid4()
        began = time.monotonic()
        # slow enough that what trickles in during the test stays small
        counts = [await taken(limiter, key, 40, 60) for limiter in limiters]
        elapsed = time.monotonic() - began
        assert limiters[0].is_shared
        assert 40 <= sum(counts) <= 40 + 40 * elapsed + 1
        assert counts[0] >= 40
        await asyncio.sleep(1.1)
        assert await taken(limiters[1], key, 40, 60) >= 40, "the limit comes back"
        await first.aclose()
        await second.aclose()

    asyncio.run(scenario())


def test_requests_at_the_same_time_do_not_lease_the_limit_away(valkey_url: str) -> None:
    async def scenario() -> None:
        client = Valkey.from_url(valkey_url)
        limiter, key = RateLimiter(client), uuid.uuid4()
        began = time.monotonic()
        results = await asyncio.gather(*(taken(limiter, key, 100, 1) for _ in range(150)))
        assert 100 <= sum(results) <= 101 + 100 * (time.monotonic() - began)
        await client.aclose()

    asyncio.run(scenario())


def test_most_requests_cost_no_round_trip(valkey_url: str) -> None:
    async def scenario() -> None:
        client = Valkey.from_url(valkey_url)
        limiter, key = RateLimiter(client), uuid.uuid4()
        await limiter.take(key, 1000)
        before = (await client.info("commandstats")).get("cmdstat_evalsha", {}).get("calls", 0)
        for _ in range(99):
            await limiter.take(key, 1000)
        after = (await client.info("commandstats")).get("cmdstat_evalsha", {}).get("calls", 0)
        assert after - before <= 2
        await client.aclose()

    asyncio.run(scenario())


def refusing_port() -> str:
    """Return an address where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"valkey://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["refused", "mute"])
def test_a_dead_valkey_slows_one_request_and_no_other(kind: str) -> None:
    async def scenario() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        url = refusing_port() if kind == "refused" else f"valkey://127.0.0.1:{listener.getsockname()[1]}"
        client = Valkey.from_url(url)
        clock = Clock()
        limiter, key = RateLimiter(client, clock=clock), uuid.uuid4()

        async def timed(step: Callable[[], None] = lambda: None) -> float:
            began = time.monotonic()
            await limiter.take(key, 10)
            return time.monotonic() - began

        assert await timed() < 0.5
        assert not limiter.is_shared
        assert max([await timed() for _ in range(9)]) < 0.01
        assert await taken(limiter, key, 10, 5) == 0, "the limit holds without Valkey"
        clock.now += CIRCUIT_S + 1
        # when it may be back, one request looks; those beside it do not wait
        waits = await asyncio.gather(*(timed() for _ in range(8)))
        assert sorted(waits)[-2] < 0.045
        listener.close()
        await client.aclose()

    asyncio.run(scenario())


def test_the_server_limits_each_key(database_url: str, valkey_url: str) -> None:
    with serving(database_url, valkey_url=valkey_url, api_rate_per_s=5) as server:
        org = server.make_org()
        assert server.call("GET", "/readyz").json()["rate_limits"] == "shared"
        answers = [server.call("GET", "/emails", org.live_key) for _ in range(12)]
        statuses = [answer.status_code for answer in answers]
        assert statuses[:5] == [200] * 5
        assert 429 in statuses[5:7]
        assert answers[0].headers["ratelimit-limit"] == "5"
        assert server.call("GET", "/emails", org.test_key).ok, "another key has its own limit"
        server.rows("UPDATE api_keys SET rate_per_s = 1000 WHERE env = 'live' RETURNING 1")
        made = server.call("POST", "/api-keys", org.test_key, {"name": "fast", "rate_per_s": 500}).json()["token"]
        assert {server.call("GET", "/emails", made).status_code for _ in range(30)} == {200}
