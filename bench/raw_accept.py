"""The floor of accepting one email: a raw ASGI handler on uvicorn that writes the rows our API writes, and no more.

    python -m bench.raw_accept DATABASE_URL          prints `ready http://127.0.0.1:PORT`

No routing, no key look-up, no validation, no replay: the body is decoded, one statement writes message, body, queue
row, fair-share hint, usage and the idempotency row, and the id is the answer. Everything is in autocommit, durable.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import msgspec
import psycopg
import uvicorn
import uvloop
from psycopg_pool import AsyncConnectionPool

from nightmail.ids import new_id
from nightmail.store.usage_records import SHARDS

ORG = UUID("00000000-0000-7000-8000-000000000001")
POOL_MAX = 20

WRITE = """
WITH message AS (
    INSERT INTO messages (id, org_id, env, channel, sender, subject, addresses, units, period, created_at)
    VALUES (%(id)s, %(org_id)s, 'live', 'email', %(sender)s, %(subject)s, %(to)s, 1, '2020-01', statement_timestamp())
), body AS (
    INSERT INTO message_bodies (message_id, to_addresses, html, text)
    VALUES (%(id)s, %(to)s, %(html)s, %(text)s)
), queued AS (
    INSERT INTO message_queue (message_id, org_id, lane, due_at)
    VALUES (%(id)s, %(org_id)s, 'live:email', statement_timestamp())
), turn AS (
    INSERT INTO queue_turns (lane, due_minute, org_id)
    VALUES ('live:email', date_trunc('minute', statement_timestamp()), %(org_id)s)
    ON CONFLICT DO NOTHING
), key AS (
    INSERT INTO idempotency_keys (org_id, env, key, request_sha256, status, response, created_at, expires_at)
    VALUES (%(org_id)s, 'live', %(key)s, %(sha256)s, 200, %(response)s, statement_timestamp(),
            statement_timestamp() + interval '24 hours')
)
INSERT INTO usage_records AS u (org_id, channel, env, period, rating, shard, reserved)
VALUES (%(org_id)s, 'email', 'live', '2020-01', 'included', %(shard)s, 1)
ON CONFLICT (org_id, channel, env, period, rating, shard)
DO UPDATE SET reserved = u.reserved + excluded.reserved
"""

Pool = AsyncConnectionPool[psycopg.AsyncConnection[Any]]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class RawAccept:
    """The ASGI app."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._decode = msgspec.json.Decoder().decode
        self._digest = bytes(32)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        body = b""
        while True:
            event = await receive()
            body += event["body"]
            if not event["more_body"]:
                break
        email = self._decode(body)
        message_id = new_id()
        answer = f'{{"id":"{message_id}"}}'
        key = next(value for name, value in scope["headers"] if name == b"idempotency-key")
        arguments = {
            "id": message_id,
            "org_id": ORG,
            "sender": email["from"],
            "subject": email["subject"],
            "to": email["to"],
            "html": email["html"],
            "text": email["text"],
            "key": key.decode(),
            "sha256": self._digest,
            "response": answer,
            "shard": message_id.int % SHARDS,
        }
        async with self._pool.connection() as conn:
            await conn.execute(WRITE, arguments)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer.encode()})


async def main() -> None:
    """Serve until the process is ended."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    pool: Pool = AsyncConnectionPool(
        sys.argv[1], kwargs={"autocommit": True, "prepare_threshold": 2}, min_size=POOL_MAX, open=False
    )
    await pool.open(wait=True)
    config = uvicorn.Config(
        RawAccept(pool), http="httptools", ws="none", lifespan="off", access_log=False, log_level="warning"
    )
    host, port = listener.getsockname()
    print(f"ready http://{host}:{port}", flush=True)
    await uvicorn.Server(config).serve([listener])
    os._exit(0)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
