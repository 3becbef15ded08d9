"""Who is asking: an API key of an org, or the operator's ADMIN_TOKEN. Decided before a body is read.

A key is looked up by the SHA-256 of what was sent, so the comparison tells nothing about the secret. What was found is
kept in the process for at most CACHE_S: that long a key revoked in another process may still work.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal
from uuid import UUID

import structlog
from starlette.types import Scope

from nightmail.ids import sha256
from nightmail.settings import LOOPBACK_HOSTS
from nightmail.store.api_keys import ApiKey, find_api_key
from nightmail.store.database import Database
from nightmail.web.client_address import Network, client_address, is_within
from nightmail.web.failures import Failures
from nightmail.web.problems import Problem, invalid_api_key, missing_api_key, restricted_api_key
from nightmail.web.services import Services

Access = Literal["open", "sending", "full", "full_or_admin", "admin"]
"""open: anyone; sending: any API key; full: an API key with full access; admin: ADMIN_TOKEN;
full_or_admin: either, told apart by the `nm_` that API keys begin with."""

CACHE_S = 5.0
MAX_CACHED = 10_000
# What a proxy adds; a request with one of these may come from anywhere, whatever its peer is.
FORWARDED = (b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip", b"via")
_HOST = re.compile(r"(\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[^:\[\]]+))(:[0-9]{1,5})?")
_TOKEN = re.compile(r"nm_(live|test)_[A-Za-z0-9_-]{43}")


@dataclass(frozen=True, slots=True)
class _Known:
    """A key, until a moment of the monotonic clock."""

    key: ApiKey
    until: float


class KeyCache:
    """API keys by the digest of their token, at most CACHE_S old and MAX_CACHED of them."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[bytes, _Known] = {}

    async def find(self, token: str) -> ApiKey | None:
        """Return the key that the token stands for, None when it may not be used. Raises DatabaseAway."""
        now, digest = time.monotonic(), sha256(token)
        known = self._known.get(digest)
        if known is not None and now < known.until:
            return known.key
        if _TOKEN.fullmatch(token) is None:
            return None
        async with self._database.connection() as conn:
            key = await find_api_key(conn, digest)
        if key is None:
            # Not kept: unknown tokens have no bound on their number, and would push out the known ones.
            self._known.pop(digest, None)
            return None
        if len(self._known) >= MAX_CACHED:
            self._known.pop(next(iter(self._known)))
        life = CACHE_S if key.expires_in_s is None else min(CACHE_S, key.expires_in_s)
        self._known[digest] = _Known(key, now + life)
        return key

    def forget(self, key_id: UUID) -> None:
        """Drop a key that was changed in this process."""
        for digest in [d for d, known in self._known.items() if known.key.id == key_id]:
            del self._known[digest]


async def authenticate(
    services: Services,
    keys: KeyCache,
    failures: Failures,
    scope: Scope,
    headers: Mapping[bytes, bytes],
    access: Access,
) -> ApiKey | None:
    """Return the caller's key (None for open access and the admin token). Raises Problem: 401, 403, 429 or 503."""
    if access == "open":
        return None
    if access == "admin":
        check_admin(services, failures, scope, headers)
        return None
    token = bearer_of(headers)
    if not token:
        raise missing_api_key()
    if access == "full_or_admin" and not token.startswith("nm_"):
        check_admin(services, failures, scope, headers)
        return None
    key = await keys.find(token)
    if key is None:
        raise invalid_api_key()
    if key.cidrs:
        address = client_address(scope, services.settings.trusted_proxies)
        if address is None or not is_within(address, _networks(tuple(key.cidrs))):
            raise invalid_api_key("This API key may not be used from your address.")
    if access in ("full", "full_or_admin") and key.permission != "full_access":
        raise restricted_api_key()
    return key


def bearer_of(headers: Mapping[bytes, bytes]) -> str:
    """Return the bearer token, '' when there is none."""
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    return token.strip().decode("latin-1") if scheme.lower() == b"bearer" else ""


def check_admin(services: Services, failures: Failures, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
    """Let the operator pass. Raises Problem: 401, 403, 429 after too many wrong tokens, or as check_open does."""
    expected = services.settings.admin_token
    if expected is None:
        check_open(services, headers)
        return
    token = bearer_of(headers)
    if not token:
        raise missing_api_key()
    if hmac.compare_digest(token.encode("latin-1"), expected.get_secret_value().encode()):
        return
    address = str(client_address(scope, services.settings.trusted_proxies))
    if failures.is_over(address):
        raise Problem(
            429, "rate_limit_exceeded", "Too many wrong admin tokens; try again in a minute.", [(b"retry-after", b"60")]
        )
    failures.note(address)
    structlog.get_logger().warning("admin.unauthorized", address=address)
    raise invalid_api_key("The admin token is invalid.")


def check_open(services: Services, headers: Mapping[bytes, bytes]) -> None:
    """Let this machine pass where no ADMIN_TOKEN is set, in development. Raises Problem (503)."""
    if not services.is_open_to_loopback or not is_local_call(headers):
        raise Problem(503, "application_error", "The admin API is closed: set ADMIN_TOKEN (16 characters or more).")
    _warn_open()


def is_local_call(headers: Mapping[bytes, bytes]) -> bool:
    """Return whether a request that reached a loopback address was made for it, by somebody on this machine.

    The Host header must name this machine, so that a web page which resolves its own name to 127.0.0.1 gets nothing;
    and no proxy may have passed the request on, because then the world may stand behind it.
    """
    return is_loopback_host(headers.get(b"host", b"")) and not any(name in headers for name in FORWARDED)


def is_loopback_host(host: bytes) -> bool:
    """Return whether a Host header names this machine."""
    match = _HOST.fullmatch(host.decode("latin-1").lower())
    return match is not None and (match["v6"] or match["name"]) in LOOPBACK_HOSTS


@lru_cache(maxsize=1)
def _warn_open() -> None:
    structlog.get_logger().warning("admin.open", hint="no ADMIN_TOKEN: open to this machine, because it is development")


@lru_cache(maxsize=4096)
def _networks(cidrs: tuple[str, ...]) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(text, strict=False) for text in cidrs)
