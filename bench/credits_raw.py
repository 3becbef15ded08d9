"""The floor of spending over HTTP: a raw ASGI handler that takes the amount from one row, and no more.

    python -m bench.credits_raw DATABASE_URL          prints `ready http://127.0.0.1:PORT`

No key, no reference, no batches, no ledger: it could not say afterwards what it has done. Autocommit, durable.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys

import msgspec
import uvicorn
from psycopg_pool import AsyncConnectionPool
from uvloop import new_event_loop

from bench.raw_accept import POOL_MAX, Message, Pool, Receive, Send

SPEND = """
UPDATE credit_accounts
SET balance = balance - %(amount)s
WHERE org_id = '00000000-0000-7000-8000-000000000001'
  AND env = 'live'
  AND user_id = %(user)s
RETURNING balance
"""


class RawSpend:
    """The ASGI app."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._decode = msgspec.json.Decoder().decode

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        event = await receive()
        user = scope["path"].split("/")[2]
        async with self._pool.connection() as conn:
            cursor = await conn.execute(SPEND, {"amount": self._decode(event["body"])["amount"], "user": user})
            row = await cursor.fetchone()
        assert row is not None
        answer = b'{"balance":%d}' % row[0]
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})


async def main() -> None:
    """Serve until the process is ended."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    kwargs = {"autocommit": True, "prepare_threshold": 2}
    pool: Pool = AsyncConnectionPool(sys.argv[1], kwargs=kwargs, min_size=POOL_MAX, open=False)
    await pool.open(wait=True)
    config = uvicorn.Config(
        RawSpend(pool), http="httptools", ws="none", lifespan="off", access_log=False, log_level="warning"
    )
    host, port = listener.getsockname()
    print(f"ready http://{host}:{port}", flush=True)
    await uvicorn.Server(config).serve([listener])
    os._exit(0)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main())
