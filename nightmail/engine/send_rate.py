"""One send rate per provider account that all runners on all machines honour: in Valkey when present, else PostgreSQL.

Both use the generic cell rate algorithm: a single time per account, moved ahead by 1/rate with each call, and a call
may start while that time is less than a burst ahead. When Valkey is away PostgreSQL decides; in the change-over the
account may once see two bursts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import structlog
from valkey.asyncio import Valkey
from valkey.exceptions import ValkeyError

from nightmail.clock import monotonic
from nightmail.ports import SendRate
from nightmail.settings import Settings
from nightmail.store import send_rates
from nightmail.store.database import Database

# Runners ask about every 50 ms; a burst of a fifth of a second keeps what accrues between two asks.
BURST_S = 0.2
VALKEY_LIMIT_S = 0.25
# After a failure Valkey is left alone for this long, so that not every call waits for it.
VALKEY_PAUSE_S = 5.0

# Times in microseconds of the server's clock. ARGV: wanted, microseconds per call, burst. A time a minute beyond the
# burst was written before the clock was set back. The key is forgotten when the account is idle again.
TAKE = """
local now = redis.call('TIME')
now = now[1] * 1000000 + now[2]
local wanted, step, burst = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local free_at = tonumber(redis.call('GET', KEYS[1]) or now)
if free_at < now or free_at > now + burst * step + 60000000 then
  free_at = now
end
local granted = math.min(wanted, math.floor(burst - (free_at - now) / step + 0.000001))
if granted < 1 then
  return 0
end
free_at = free_at + granted * step
redis.call('SET', KEYS[1], string.format('%.0f', free_at), 'PX', math.ceil((free_at - now) / 1000) + 1)
return granted
"""


class Unlimited:
    """No limit of ours: the provider's own refusals slow the runners down."""

    async def take(self, account: str, wanted: int) -> int:
        """Grant everything."""
        return wanted


class Rates:
    """Calls a second by channel; an account is `<env>:<channel>:<provider>`."""

    def __init__(self, per_s: Mapping[str, float]) -> None:
        self._per_s = per_s

    def of(self, account: str) -> float | None:
        """Return the account's calls a second, None when unlimited."""
        parts = account.split(":")
        return self._per_s.get(parts[1]) if len(parts) > 1 else None


def burst_of(per_s: float) -> int:
    """Return how many calls may start at once: a fifth of a second's, at least one."""
    return max(1, math.ceil(per_s * BURST_S))


class PostgresSendRate:
    """The rate as a row of send_rates."""

    def __init__(self, database: Database, rates: Rates) -> None:
        self._database = database
        self._rates = rates

    async def take(self, account: str, wanted: int) -> int:
        """Return how many of `wanted` calls may start now. Raises DatabaseAway."""
        per_s = self._rates.of(account)
        if per_s is None or wanted <= 0:
            return max(wanted, 0)
        return await self._database.run(
            partial(send_rates.take, account=account, wanted=wanted, per_s=per_s, burst=burst_of(per_s))
        )


class ValkeySendRate:
    """The rate as a key in Valkey; asks `fallback` while Valkey is away."""

    def __init__(self, valkey: Valkey, rates: Rates, fallback: SendRate) -> None:
        self._valkey = valkey
        self._take: Any = valkey.register_script(TAKE)
        self._rates = rates
        self._fallback = fallback
        self._not_before = 0.0

    async def take(self, account: str, wanted: int) -> int:
        """Return how many of `wanted` calls may start now. Raises DatabaseAway only while Valkey is away too."""
        per_s = self._rates.of(account)
        if per_s is None or wanted <= 0:
            return max(wanted, 0)
        if monotonic() < self._not_before:
            return await self._fallback.take(account, wanted)
        try:
            granted = await self._take(
                keys=[f"nightmail:send_rate:{account}"], args=[wanted, 1_000_000 / per_s, burst_of(per_s)]
            )
            return int(granted)
        except (ValkeyError, OSError, TimeoutError) as error:
            self._not_before = monotonic() + VALKEY_PAUSE_S
            structlog.get_logger().warning("send_rate.valkey_away", error=type(error).__name__)
        return await self._fallback.take(account, wanted)


def connect_valkey(url: str) -> Valkey:
    """Return a client that gives up quickly and never tries twice; it connects when first used."""
    client: Valkey = Valkey.from_url(
        url,
        socket_timeout=VALKEY_LIMIT_S,
        socket_connect_timeout=VALKEY_LIMIT_S,
        retry=None,
        retry_on_timeout=False,
    )
    return client


def build_send_rate(settings: Settings, database: Database, valkey: Valkey | None) -> SendRate:
    """Return the send rate that the settings ask for."""
    limits = {"email": settings.send_rate_email_per_s, "sms": settings.send_rate_sms_per_s}
    per_s = {channel: rate for channel, rate in limits.items() if rate is not None}
    if not per_s:
        return Unlimited()
    postgres = PostgresSendRate(database, Rates(per_s))
    return ValkeySendRate(valkey, Rates(per_s), postgres) if valkey is not None else postgres
