"""HTTP to addresses that a stranger chose: one session that cannot be led to a private one.

    name ──look-up──► all answers ──any refused?──► connect to one of them ──refused?──► TLS and HTTP by the name

The name is looked up once per connection and the connection goes to an address of that answer, so a name that means
something else a moment later (DNS rebinding) gains nothing. The second check sees the very address of the socket: a
URL with an address in it is never looked up. There is no proxy, no redirect, no cookie, no netrc, and a reused
connection is one that was checked when it was made.

What is refused is told without the address: whoever registered the name may not learn what it means in our network.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.http_exceptions import HttpProcessingError

from nightmail.errors import Permanent, ProviderError, Retryable
from nightmail.rules.networks import Network, refusal

__all__ = ["FOREIGN_ERRORS", "Guard", "Lookup", "SystemLookup", "guarded_session", "provider_error"]

Lookup = Callable[[str], Awaitable[Sequence[str]]]
"""Returns the addresses of a name, best first; raises OSError when there is none."""

DNS_LIMIT_S = 5.0
DNS_CACHE_S = 10  # endpoints that close each connection would otherwise cost a look-up per post
# A name that hangs holds one thread until the system's resolver gives it up, whoever asks and however often. All
# endpoints that an org may have, 50 in each of two envs, leave most of these to others.
DNS_THREADS = 256
# Shorter than what common servers allow (gunicorn 2 s, Node and uvicorn 5 s): a post on a connection that the server
# is closing fails, and is not repeated.
IDLE_S = 1.5
HEADERS_MAX = 100
HEADER_BYTES_MAX = 8190
READ_BYTES = 4096  # aiohttp stops reading the socket at twice this

# Said by us, because aiohttp's texts hold the URL, and what follows its host may be a secret.
_DETAILS = {
    "dns": "the host name cannot be looked up",
    "timeout": "no answer in time",
    "reset": "the connection was closed before an answer",
    "bad_reply": "the answer is not HTTP as we understand it",
}

FOREIGN_ERRORS = (aiohttp.ClientError, HttpProcessingError, OSError, ValueError, RuntimeError)
"""All that aiohttp, its parser, the loop and the socket raise; TimeoutError and UnicodeError are among them."""


class SystemLookup:
    """Asks the system's resolver, in threads, and gives up after `limit_s` seconds.

    A name is asked for once at a time, and all who wait for it get that answer. Given up, it fails at once until its
    thread has ended. The threads are daemons, not an executor's: one that hangs must not hold up the process's end.
    """

    def __init__(self, *, limit_s: float = DNS_LIMIT_S, threads: int = DNS_THREADS) -> None:
        self._limit_s = limit_s
        self._slots = asyncio.Semaphore(threads)
        self._asked: dict[str, asyncio.Task[list[str]]] = {}
        self._in_thread: set[str] = set()

    async def __call__(self, host: str) -> Sequence[str]:
        """Return the addresses of a name. Raises OSError."""
        task = self._asked.get(host)
        if task is None:
            if host in self._in_thread:
                raise OSError("an earlier look-up of this name still hangs")
            task = self._asked[host] = asyncio.create_task(self._ask(host))
            task.add_done_callback(partial(self._forget, host))
        return await asyncio.shield(task)  # who gives up waiting leaves it to the others

    def _forget(self, host: str, task: asyncio.Task[list[str]]) -> None:
        del self._asked[host]
        if not task.cancelled():
            task.exception()  # seen, though nobody may wait any more

    async def _ask(self, host: str) -> list[str]:
        try:
            async with asyncio.timeout(self._limit_s):
                await self._slots.acquire()
                return await self._start(host)
        except TimeoutError:
            raise OSError(f"no answer from DNS within {self._limit_s:g} s") from None

    def _start(self, host: str) -> asyncio.Future[list[str]]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[str]] = loop.create_future()

        def settle(addresses: list[str], error: Exception | None) -> None:
            self._slots.release()  # only now: a thread that nobody waits for is still a thread
            self._in_thread.discard(host)
            if answer.done():
                return
            if error is None:
                answer.set_result(addresses)
            else:
                answer.set_exception(error)

        def look_up() -> None:
            addresses: list[str] = []
            failed: Exception | None = None
            try:
                found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
                addresses = [str(address[0]) for *_, address in found]
            except (OSError, ValueError) as error:
                failed = error if isinstance(error, OSError) else OSError(str(error))
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(settle, addresses, failed)

        self._in_thread.add(host)
        try:
            threading.Thread(target=look_up, name="nightmail-dns", daemon=True).start()
        except RuntimeError as error:  # the system allows no more threads
            settle([], OSError(str(error)))
        return answer


class Guard(AbstractResolver):
    """Decides where a connection may go: as aiohttp's resolver about names, as its socket factory about addresses."""

    def __init__(self, lookup: Lookup, allow: Sequence[Network]) -> None:
        self._lookup = lookup
        self._allow = tuple(allow)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return all addresses of a name. Raises Permanent when any of them is refused, OSError when there is none."""
        addresses = await self._lookup(host)
        if not addresses:
            raise OSError("the name has no address")
        for address in addresses:
            self._check(address, "the host name leads to an address")
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in addresses
        ]

    def make_socket(self, target: tuple[Any, ...]) -> socket.socket:
        """Return a socket for a target, as `getaddrinfo` describes it, unless its address is refused: Permanent."""
        family, kind, proto, _, address = target
        self._check(address[0], "the URL has an address")
        return socket.socket(family, kind, proto)

    async def close(self) -> None:
        """Release nothing: aiohttp asks for it."""

    def _check(self, address: str, subject: str) -> None:
        if reason := refusal(address, self._allow):
            raise Permanent("address_refused", f"{subject} that is {reason}")


def guarded_session(
    guard: Guard, *, concurrency: int, headers: dict[str, str], tls: ssl.SSLContext | None = None
) -> aiohttp.ClientSession:
    """Return a session whose every connection the guard has passed; needs a running loop.

    At most `concurrency` connections at once, 0 means any number.
    `tls` None means the system's certificate authorities.
    """
    connector = aiohttp.TCPConnector(
        limit=concurrency,
        resolver=guard,
        socket_factory=guard.make_socket,
        ttl_dns_cache=DNS_CACHE_S,
        keepalive_timeout=IDLE_S,
        ssl=tls if tls is not None else True,
    )
    return aiohttp.ClientSession(
        connector=connector,
        headers={"accept-encoding": "identity", **headers},
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        # What an endpoint compresses all the same stays compressed: no small body unpacks to a large one.
        auto_decompress=False,
        read_bufsize=READ_BYTES,
        max_line_size=HEADER_BYTES_MAX,
        max_field_size=HEADER_BYTES_MAX,
        max_headers=HEADERS_MAX,
    )


def provider_error(error: Exception) -> ProviderError:
    """Return our error for one of FOREIGN_ERRORS: Retryable, but Permanent for a URL that cannot be used."""
    match error:
        case aiohttp.InvalidURL():
            return Permanent("address_refused", "the URL cannot be read")
        case TimeoutError():
            return _retryable("timeout")
        case aiohttp.ClientConnectorDNSError():
            return _retryable("dns")
        case aiohttp.ClientConnectorCertificateError():
            return Retryable("tls", _reason(error.certificate_error))
        case aiohttp.ClientSSLError():
            return Retryable("tls", _reason(error.os_error))
        case aiohttp.ClientConnectorError():
            return _connect_error(error.os_error)
        case aiohttp.ClientResponseError() | aiohttp.ClientPayloadError() | HttpProcessingError() | ValueError():
            return _retryable("bad_reply")
        case _:
            return _retryable("reset")


def _retryable(code: str) -> Retryable:
    return Retryable(code, _DETAILS[code])


def _connect_error(error: OSError) -> Retryable:
    if isinstance(error, TimeoutError):
        return _retryable("timeout")
    # A handshake that the other side breaks off is reported like a failed connect.
    if isinstance(error, ConnectionResetError | ConnectionAbortedError | BrokenPipeError):
        return _retryable("reset")
    return Retryable("refused", os.strerror(error.errno) if error.errno else "cannot connect")


def _reason(error: Exception) -> str:
    """Return OpenSSL's words for what is wrong with a certificate or a handshake."""
    words = getattr(error, "verify_message", None) or getattr(error, "reason", None)
    return str(words or "the handshake failed")
