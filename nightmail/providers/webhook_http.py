"""Webhooks by HTTP: one signed POST to an endpoint that a customer chose.

Whatever the endpoint does, a post ends within its time and keeps little: up to 1 KB of the answer's body is read, then
the connection is closed instead of drained. Once the head of the answer is there it is a reply, because the endpoint
has spoken: a body that hangs, breaks off or cannot be understood is cut, for the status is what counts.
"""

from __future__ import annotations

import codecs
import ssl
from collections.abc import Mapping, Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache

import aiohttp
from yarl import URL

from nightmail import clock
from nightmail.errors import Permanent, Retryable
from nightmail.ports import WebhookReply
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

__all__ = ["HttpWebhookSender", "retry_after_s"]

BODY_BYTES_MAX = 1024
RETRY_AFTER_DIGITS_MAX = 9
HEADERS = {"user-agent": "Nightmail-Webhooks/1", "content-type": "application/json", "accept": "*/*"}


class HttpWebhookSender:
    """Posts to public addresses and to those in `allow`.

    Connections are not limited here: several runs of a process share the sender, each bounds its own posts, and a wait
    for a connection would look like an endpoint that does not answer.

    Without `allow_http` nothing is posted in the clear, whatever was allowed when the endpoint was made. `resolver`
    looks names up instead of the system's; `tls` replaces the system's certificate authorities.
    """

    def __init__(
        self,
        allow: Sequence[Network] = (),
        *,
        allow_http: bool = False,
        resolver: Lookup | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._allow = allow
        self._allow_http = allow_http
        self._lookup = resolver
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None
        self._timeout = _timeout(0.0)

    async def post(self, url: str, *, body: bytes, headers: Mapping[str, str], timeout_s: float) -> WebhookReply:
        """Make one attempt within `timeout_s` seconds; raises Retryable or Permanent("address_refused")."""
        target = _target(url, self._allow_http)
        session = self._session or self._open()
        if self._timeout.total != timeout_s:
            self._timeout = _timeout(timeout_s)
        try:
            response = await session.post(
                target, data=body, headers=headers, timeout=self._timeout, allow_redirects=False
            )
        except FOREIGN_ERRORS as error:
            raise provider_error(error) from error
        try:
            text = await _beginning(response)
        finally:
            # Nothing but a finished answer leaves a connection that can be used again.
            response.close()
        if not 200 <= response.status <= 599:
            raise Retryable("bad_reply", f"answered with status {response.status}")
        wish = response.headers.get("retry-after")
        return WebhookReply(response.status, text, retry_after_s(wish, now=clock.now()) if wish else None)

    async def close(self) -> None:
        """Release connections; a later post opens them anew."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open(self) -> aiohttp.ClientSession:
        # Only now, because a session belongs to the loop it is made in.
        guard = Guard(self._lookup or SystemLookup(), self._allow)
        self._session = guarded_session(guard, concurrency=0, headers=HEADERS, tls=self._tls)
        return self._session


@lru_cache(maxsize=4096)
def _target(url: str, allow_http: bool) -> URL:
    """Return the URL as it goes out: byte for byte, since a signed query would not survive being quoted again.

    It was checked when the endpoint was made, maybe before the server was in production; and the code below must not
    be fed anything else.
    """
    try:
        return URL(check_webhook_url(url, allow_http=allow_http), encoded=True)
    except ValueError as error:
        raise Permanent("address_refused", f"the URL {error}") from error


def _timeout(total_s: float) -> aiohttp.ClientTimeout:
    # aiohttp rounds limits above the threshold up to whole seconds; ours is a promise.
    return aiohttp.ClientTimeout(total=total_s, ceil_threshold=float("inf"))


async def _beginning(response: aiohttp.ClientResponse) -> str:
    """Return the beginning of the body as text, without what broke it off."""
    octets = b""
    content = response.content
    try:
        while len(octets) < BODY_BYTES_MAX and not content.at_eof():
            octets += await content.readany()
    except FOREIGN_ERRORS:
        pass
    return _text(octets) if octets else ""


def _text(octets: bytes) -> str:
    # A character cut in half at the limit is dropped; NUL is what PostgreSQL's text cannot hold.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(octets[:BODY_BYTES_MAX], final=len(octets) <= BODY_BYTES_MAX).replace("\0", "\ufffd")
    # What is no UTF-8 has grown: each octet of it is three now.
    return text.encode()[:BODY_BYTES_MAX].decode("utf-8", "ignore")


def retry_after_s(value: str, *, now: datetime) -> float | None:
    """Return how long a Retry-After header asks to wait, in seconds from `now` and at least 0; None if unreadable.

    It is seconds or a date (RFC 9110, section 10.2.3), and not limited here.
    """
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(text) if len(text) <= RETRY_AFTER_DIGITS_MAX else float(10**RETRY_AFTER_DIGITS_MAX)
    try:
        date = parsedate_to_datetime(text)
        return max(0.0, (date - now).total_seconds())
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
