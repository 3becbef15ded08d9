"""A load generator for POST /emails: raw keep-alive sockets, one request at a time on each.

python -m bench.load URL TOKEN CONCURRENCY SECONDS WARM_SECONDS      prints JSON: requests, failed, seconds, p50…
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any
from urllib.parse import urlsplit

import httptools
import uvloop

from nightmail.clock import monotonic

BODY = json.dumps(
    {
        "from": "Acme <hello@acme.test>",
        "to": ["ada@recipient.test"],
        "subject": "Your receipt",
        "html": "<p>" + "The night mail crossing the border. " * 10 + "</p>",
        "text": "The night mail crossing the border. " * 10,
    }
).encode()


class Client(asyncio.Protocol):
    """One connection: sends the next request when an answer is complete, until the time is over."""

    def __init__(self, head: bytes, name: str, warm_until: float, until: float) -> None:
        self._head = head
        self._name = name
        self._number = 0
        self._warm_until = warm_until
        self._until = until
        self._sent_at = 0.0
        self._parser: Any = None
        self.transport: asyncio.Transport
        self.ended = asyncio.get_running_loop().create_future()
        self.latencies: list[float] = []
        self.failed = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        self.transport = transport  # type: ignore[assignment]
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count a connection that ended before its time."""
        if not self.ended.done():
            self.failed += 1
            self.ended.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        """Note how long the answer took and go on."""
        now = monotonic()
        if now >= self._warm_until:
            self.latencies.append(now - self._sent_at)
            self.failed += self._parser.get_status_code() != 200
        if now >= self._until:
            self.ended.set_result(None)
            self.transport.close()
        else:
            self._next()

    def _next(self) -> None:
        self._number += 1
        self._parser = httptools.HttpResponseParser(self)
        self._sent_at = monotonic()
        key = b"idempotency-key: %s-%d\r\n\r\n" % (self._name.encode(), self._number)
        self.transport.write(self._head + key + BODY)


async def main(url: str, token: str, concurrency: int, seconds: float, warm_s: float) -> dict[str, Any]:
    """Run the load and return what it came to."""
    parts = urlsplit(url)
    head = (
        f"POST /emails HTTP/1.1\r\nhost: {parts.netloc}\r\nauthorization: Bearer {token}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(BODY)}\r\n"
    ).encode()
    loop = asyncio.get_running_loop()
    warm_until = monotonic() + warm_s
    until = warm_until + seconds
    prefix = os.urandom(6).hex()
    clients = []
    for number in range(concurrency):
        _, client = await loop.create_connection(
            lambda number=number: Client(head, f"{prefix}-{number}", warm_until, until),  # type: ignore[misc]
            str(parts.hostname),
            parts.port or 80,
        )
        clients.append(client)
    await asyncio.gather(*(client.ended for client in clients))
    took = monotonic() - warm_until
    latencies = sorted(latency * 1000 for client in clients for latency in client.latencies)
    return {
        "requests": len(latencies),
        "failed": sum(client.failed for client in clients),
        "seconds": took,
        "p50": latencies[len(latencies) // 2],
        "p95": latencies[len(latencies) * 95 // 100],
        "p99": latencies[len(latencies) * 99 // 100],
    }


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        arguments = (sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5]))
        print(json.dumps(runner.run(main(*arguments))))
