"""How many requests a key may make: the generic cell rate algorithm, shared through Valkey when there is one.

A process asks Valkey for a tenth of a second's worth of requests at a time and uses them up by itself, so that most
requests cost no round trip; what is not used within LEASE_S lapses. A refusal is remembered until its time. When
Valkey is absent, slow or down, each process counts by itself, and looks for Valkey again only every CIRCUIT_S, so that
a dead one does not slow anything.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID

import structlog
from valkey.asyncio import Valkey
from valkey.exceptions import NoScriptError, ValkeyError

from nightmail.web.problems import Header, Problem

# A round trip on one machine or in one data centre is under 2 ms.
VALKEY_TIMEOUT_S = 0.05
CIRCUIT_S = 5.0
LEASE_S = 0.2
MAX_KEYS = 20_000

# KEYS[1] holds the theoretical arrival time in microseconds. Takes up to ARGV[1] of ARGV[2] per second, bursts of one
# second. Returns how many were granted, how many are left, and microseconds until the next one.
SCRIPT = """
local wanted, rate = tonumber(ARGV[1]), tonumber(ARGV[2])
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local cell = 1000000 / rate
local arrival = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), now)
local free = math.floor((now + 1000000 - arrival) / cell + 0.000001)
local granted = math.max(0, math.min(wanted, free))
if granted > 0 then
    arrival = arrival + granted * cell
    redis.call('SET', KEYS[1], string.format('%.0f', arrival), 'PX', 2000)
end
local wait = 0
if free < 1 then
    wait = math.ceil(arrival + cell - 1000000 - now)
end
return {granted, math.max(0, free - granted), wait}
"""
SCRIPT_SHA = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()  # Valkey's name for the script


@dataclass(slots=True)
class _State:
    """One key in this process; times are of the monotonic clock."""

    arrival: float = 0.0
    leased: int = 0
    leased_until: float = 0.0
    left: int = 0
    refused_until: float = 0.0
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)

    def take_leased(self, now: float) -> float | None:
        """Use up one leased request: return 0, the seconds to wait while refused, or None to ask Valkey."""
        if self.leased > 0 and now < self.leased_until:
            self.leased -= 1
            return 0.0
        return self.refused_until - now if now < self.refused_until else None


class RateLimiter:
    """Decides for each request of a key whether it may go on, and writes the `ratelimit-*` headers."""

    def __init__(self, valkey: Valkey | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._valkey = valkey
        self._clock = clock
        self._states: dict[UUID, _State] = {}
        self._open_until = 0.0

    @property
    def is_shared(self) -> bool:
        """Return whether Valkey counts for all processes now."""
        return self._valkey is not None and self._clock() >= self._open_until

    async def take(self, key: UUID, rate: int) -> list[Header]:
        """Count one request and return the headers that describe what is left. Raises Problem (429)."""
        state = self._states.get(key)
        if state is None:
            if len(self._states) >= MAX_KEYS:
                self._states.pop(next(iter(self._states)))
            state = self._states[key] = _State()
        now = self._clock()
        if self._valkey is not None and now >= self._open_until:
            wait = await self._take_shared(self._valkey, key, rate, state)
        else:
            wait = _take_alone(rate, state, now)
        if wait > 0:
            raise _too_many(rate, wait)
        return headers(rate, state.left + state.leased, 1)

    async def _take_shared(self, valkey: Valkey, key: UUID, rate: int, state: _State) -> float:
        """Count one request against what Valkey granted; return 0 or the seconds to wait."""
        wait = state.take_leased(self._clock())
        if wait is not None:
            return wait
        # One request of a key asks for all that came meanwhile; each for itself would lease the whole limit away.
        async with state.asking:
            wait = state.take_leased(self._clock())
            if wait is not None:
                return wait
            if self._clock() < self._open_until or not await self._lease(valkey, key, rate, state):
                return _take_alone(rate, state, self._clock())
        return state.take_leased(self._clock()) or 0.0

    async def _lease(self, valkey: Valkey, key: UUID, rate: int, state: _State) -> bool:
        """Ask Valkey for a lease or a refusal; return whether it answered."""
        if self._open_until:
            # This request finds out whether Valkey is back; the others count alone meanwhile.
            self._open_until = self._clock() + CIRCUIT_S
        try:
            async with asyncio.timeout(VALKEY_TIMEOUT_S):
                granted, left, wait_us = await _ask(valkey, key, max(1, rate // 10), rate)
        except (TimeoutError, OSError, ValkeyError) as error:
            self._open_until = self._clock() + CIRCUIT_S
            structlog.get_logger().warning("rate_limit.valkey_away", error=type(error).__name__, retry_s=CIRCUIT_S)
            return False
        self._open_until = 0.0
        now = self._clock()
        state.leased, state.leased_until, state.left = granted, now + LEASE_S, left
        if granted == 0:
            state.refused_until = now + max(wait_us, 1) / 1e6
        return True


async def _ask(valkey: Valkey, key: UUID, wanted: int, rate: int) -> tuple[int, int, int]:
    name = f"nightmail:rate:{key}"
    try:
        answer = await valkey.evalsha(SCRIPT_SHA, 1, name, str(wanted), str(rate))  # type: ignore[misc]
    except NoScriptError:
        answer = await valkey.eval(SCRIPT, 1, name, str(wanted), str(rate))  # type: ignore[misc]
    return int(answer[0]), int(answer[1]), int(answer[2])


def _take_alone(rate: int, state: _State, now: float) -> float:
    """Count one request in this process; return 0 or the seconds to wait."""
    cell = 1 / rate
    arrival = max(state.arrival, now)
    free = math.floor((now + 1 - arrival) / cell + 1e-6)
    state.leased = 0
    if free < 1:
        state.left = 0
        return max(arrival + cell - 1 - now, 1e-3)
    state.arrival, state.left = arrival + cell, free - 1
    return 0.0


def headers(limit: int, remaining: int, reset_s: int) -> list[Header]:
    """Return the three `ratelimit-*` headers; the window is one second."""
    return [
        (b"ratelimit-limit", b"%d" % limit),
        (b"ratelimit-remaining", b"%d" % min(limit, remaining)),
        (b"ratelimit-reset", b"%d" % reset_s),
    ]


def _too_many(rate: int, wait: float) -> Problem:
    seconds = max(1, math.ceil(wait))
    return Problem(
        429,
        "rate_limit_exceeded",
        f"Too many requests. This key may make {rate} requests per second.",
        [*headers(rate, 0, seconds), (b"retry-after", b"%d" % seconds)],
    )
