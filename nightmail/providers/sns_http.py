"""Amazon SNS over HTTPS: certificates of its signatures, and the confirmation of a subscription.

The caller has checked that the URL is on an SNS host. The session is guarded all the same: a resolver that lies about
that host leads nowhere private.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence

import aiohttp
from yarl import URL

from nightmail.errors import Permanent, Retryable
from nightmail.providers.guarded_http import (
    FOREIGN_ERRORS,
    Guard,
    Lookup,
    SystemLookup,
    guarded_session,
    provider_error,
)
from nightmail.rules.networks import Network
from nightmail.rules.webhook_urls import check_webhook_url

__all__ = ["HttpSnsHost"]

LIMIT_S = 5.0
BYTES_MAX = 32 * 1024  # a certificate with its chain has about 6 KB
CONNECTIONS_MAX = 4


class HttpSnsHost:
    """Gets what SNS offers; `allow`, `resolver` and `tls` as in HttpWebhookSender."""

    def __init__(
        self,
        allow: Sequence[Network] = (),
        *,
        resolver: Lookup | None = None,
        tls: ssl.SSLContext | None = None,
        limit_s: float = LIMIT_S,
    ) -> None:
        self._allow = allow
        self._lookup = resolver
        self._tls = tls
        self._timeout = aiohttp.ClientTimeout(total=limit_s, ceil_threshold=float("inf"))
        self._session: aiohttp.ClientSession | None = None

    async def fetch_certificate(self, url: str) -> bytes:
        """Return the PEM certificate at `url`. Raises Retryable."""
        return await self._get(url)

    async def confirm_subscription(self, url: str) -> None:
        """Visit the confirmation link. Raises Retryable."""
        await self._get(url)

    async def close(self) -> None:
        """Release connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _get(self, url: str) -> bytes:
        session = self._session or self._open()
        try:
            target = URL(check_webhook_url(url, allow_http=True), encoded=True)
            async with session.get(target, timeout=self._timeout, allow_redirects=False) as response:
                if response.status != 200:
                    raise Retryable("bad_reply", f"SNS answered with status {response.status}")
                octets = b""
                async for chunk in response.content.iter_any():
                    octets += chunk
                    if len(octets) > BYTES_MAX:
                        response.close()
                        raise Retryable("bad_reply", f"SNS answered with more than {BYTES_MAX} bytes")
                return octets
        except Permanent as error:  # DNS that lies for a while is no reason to give SNS up
            raise Retryable(error.code, error.detail) from error
        except FOREIGN_ERRORS as error:
            ours = provider_error(error)
            raise Retryable(ours.code, ours.detail) from error

    def _open(self) -> aiohttp.ClientSession:
        guard = Guard(self._lookup or SystemLookup(), self._allow)
        self._session = guarded_session(
            guard, concurrency=CONNECTIONS_MAX, headers={"user-agent": "Nightmail/1"}, tls=self._tls
        )
        return self._session
