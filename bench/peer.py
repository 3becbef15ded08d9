"""A public peer: pgqueuer, coalesced as a careful user would.

Handlers that run at the same moment share one bulk `enqueue` for their follow-ups, and each returns only after its own
is stored. The peer keeps its own job rows only: no message row, no event, no usage, no fence.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta
from typing import Any

import psycopg
from pgqueuer import PgQueuer
from pgqueuer.adapters.drivers.psycopg import PsycopgDriver
from pgqueuer.adapters.persistence.queries import Queries
from pgqueuer.models import Job
from pgqueuer.types import QueueExecutionMode

from bench.server import Connection
from nightmail.clock import monotonic

BATCH = 500
COALESCE_S = 0.002
FOLLOW_UP = "followed"

SEED = """
INSERT INTO pgqueuer (priority, created, updated, heartbeat, execute_after, status, entrypoint, payload)
SELECT 0, now(), now(), now(), now() - interval '1 minute', 'queued', 'send', convert_to(uuidv7()::text, 'UTF8')
FROM generate_series(1, %(jobs)s)
"""


async def _connect(url: str) -> psycopg.AsyncConnection[Any]:
    return await psycopg.AsyncConnection.connect(url, autocommit=True)


async def install(url: str) -> None:
    """Create the peer's own tables."""
    conn = await _connect(url)
    await Queries(PsycopgDriver(conn)).install()
    await conn.close()


def seed(conn: Connection, jobs: int) -> None:
    """Queue jobs in SQL."""
    conn.execute(SEED, {"jobs": jobs})


class FollowUps:
    """Stores follow-ups of handlers that run at the same moment in one bulk enqueue."""

    def __init__(self, queries: Queries) -> None:
        self._queries = queries
        self._waiting: list[tuple[bytes, asyncio.Future[None]]] = []
        self._flushing: asyncio.Task[None] | None = None
        self.stored = 0
        self.ended = 0.0

    async def store(self, payload: bytes) -> None:
        """Return when the follow-up is stored."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((payload, future))
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush())
        await future

    async def _flush(self) -> None:
        while self._waiting:
            await asyncio.sleep(COALESCE_S)
            batch, self._waiting = self._waiting, []
            count = len(batch)
            await self._queries.enqueue([FOLLOW_UP] * count, [payload for payload, _ in batch], [0] * count)
            self.stored += count
            self.ended = monotonic()
            for _, future in batch:
                future.set_result(None)
        self._flushing = None


async def drain(url: str) -> tuple[int, float]:
    """Work all jobs off; return how many this process did and when the last follow-up was stored.

    What the peer takes to notice that it is done and to stop is not counted.
    """
    logging.getLogger("pgqueuer").setLevel(logging.ERROR)
    conn, second = await _connect(url), await _connect(url)
    follow_ups = FollowUps(Queries(PsycopgDriver(second)))
    queuer = PgQueuer.from_psycopg_connection(conn)

    @queuer.entrypoint("send")
    async def send(job: Job) -> None:
        await follow_ups.store(job.payload or b"")

    await queuer.run(
        batch_size=BATCH,
        mode=QueueExecutionMode.drain,
        dequeue_timeout=timedelta(seconds=0.2),
        log_aggregation_interval=timedelta(0),
    )
    await second.close()
    await conn.close()
    return follow_ups.stored, follow_ups.ended
