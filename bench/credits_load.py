"""A load generator for POST /credits/{user}/consume: a new reference in each request, 1,000 users in turn.

python -m bench.credits_load URL TOKEN SECONDS WARM_SECONDS      prints JSON: requests, failed, seconds
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import httptools
import uvloop

from bench.load import Client
from nightmail.clock import monotonic

CONCURRENCY = 32
USERS = 1000


class Spender(Client):
    """One connection that spends."""

    def _next(self) -> None:
        self._number += 1
        self._parser = httptools.HttpResponseParser(self)
        self._sent_at = monotonic()
        body = b'{"amount":3,"reference_id":"%s-%d"}' % (self._name.encode(), self._number)
        user = hash((self._name, self._number)) % USERS + 1
        head = self._head % (user, len(body))
        self.transport.write(head + body)


async def main(url: str, token: str, seconds: float, warm_s: float) -> dict[str, Any]:
    """Run the load and return what it came to."""
    parts = urlsplit(url)
    head = (
        f"POST /credits/user-%d/consume HTTP/1.1\r\nhost: {parts.netloc}\r\nauthorization: Bearer {token}\r\n"
        "content-type: application/json\r\ncontent-length: %d\r\n\r\n"
    ).encode()
    loop = asyncio.get_running_loop()
    warm_until = monotonic() + warm_s
    until = warm_until + seconds
    prefix = os.urandom(6).hex()
    clients = []
    for number in range(CONCURRENCY):
        _, client = await loop.create_connection(
            partial(Spender, head, f"{prefix}-{number}", warm_until, until),
            str(parts.hostname),
            parts.port or 80,
        )
        clients.append(client)
    await asyncio.gather(*(client.ended for client in clients))
    return {
        "requests": sum(len(client.latencies) for client in clients),
        "failed": sum(client.failed for client in clients),
        "seconds": monotonic() - warm_until,
    }


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])))))
