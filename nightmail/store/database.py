"""The one connection pool of a process and the policy for what PostgreSQL refuses.

| SQLSTATE | what we do |
| --- | --- |
| 40001, 40P01, 55P03 (serialization, deadlock, lock timeout) | the transaction again, at most 3 times, with jitter |
| the same a fourth time; 57014 (statement timeout) | DatabaseAway: PostgreSQL is too busy to serve us |
| 08xxx, 57P0x, 25006, 25P0x (connection gone, shutdown, read-only) | DatabaseAway: the caller stops; claims remain |
| 42P01, 42703, 42883, 3F000 (no such table …) | DatabaseAway: the schema is not that of this version |
| 53xxx, 58xxx (disk full, too many connections, I/O) | DatabaseAway: nothing is sent, the caller answers 503 |
| anything else | a defect: it is raised as it is |

Connections are in autocommit mode; a transaction is always an explicit `async with conn.transaction()`. Behind
PgBouncer in transaction mode nothing is prepared and no session state is set.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
import psycopg
from psycopg import AsyncConnection
from psycopg.types.json import set_json_loads
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from nightmail.errors import DatabaseAway

T = TypeVar("T")
Connection = AsyncConnection[Any]

RETRIED = frozenset({"40001", "40P01", "55P03"})
AWAY_CLASSES = frozenset({"08", "53", "58"})
AWAY = frozenset({"57P01", "57P02", "57P03", "57P05", "25006", "25P03", "25P04", "57014"})
# Tables, columns or functions of ours are not there: the schema is not migrated yet, or is ahead of this version.
SCHEMA_MISSING = frozenset({"42P01", "42703", "42883", "3F000"})
MAX_RETRIES = 3
CONNECT_TIMEOUT_S = 2
IDLE_S = 30
# A waiter for a connection gives up after this: the caller answers 503 instead of queueing without bound.
POOL_WAIT_S = 5.0
MAX_WAITING = 2000
SESSION_LIMITS = (
    "SET statement_timeout = '30s'; SET lock_timeout = '2s'; SET idle_in_transaction_session_timeout = '30s'"
)


def is_away(error: BaseException) -> bool:
    """Return whether the error means that PostgreSQL cannot be reached or cannot take writes now."""
    if isinstance(error, (PoolTimeout, PoolClosed, TooManyRequests)):
        return True
    if not isinstance(error, psycopg.Error):
        return False
    state = error.sqlstate
    if state is None:
        return isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError))
    return state in AWAY or state in SCHEMA_MISSING or state[:2] in AWAY_CLASSES


def is_data_fault(error: BaseException) -> bool:
    """Return whether PostgreSQL refuses the data itself (22xxx, 23xxx): trying again is of no use."""
    return isinstance(error, psycopg.Error) and (error.sqlstate or "")[:2] in ("22", "23")


class Database:
    """A lazily filled pool of at most `pool_max` connections to one PostgreSQL primary."""

    def __init__(self, conninfo: str, *, pool_max: int = 20, pooler: str = "none", clock_offset: str = "") -> None:
        self._session = clock_offset and f"SET nightmail.clock_offset = '{clock_offset}'"
        self._pooler = pooler
        kwargs: dict[str, Any] = {
            "autocommit": True,
            "connect_timeout": CONNECT_TIMEOUT_S,
            "prepare_threshold": None if pooler == "transaction" else 2,
            "keepalives": 1,
            "keepalives_idle": 5,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 10_000,
            "application_name": "nightmail",
        }
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            conninfo,
            kwargs=kwargs,
            min_size=0 if pooler == "transaction" else 1,
            max_size=pool_max,
            max_idle=IDLE_S,
            max_waiting=MAX_WAITING,
            timeout=POOL_WAIT_S,
            reconnect_timeout=2,
            open=False,
            configure=self._configure,
        )

    async def _configure(self, conn: Connection) -> None:
        set_json_loads(msgspec.json.decode, conn)  # four times as fast as the standard library's
        if self._pooler == "none":
            await conn.execute(SESSION_LIMITS)
        if self._session:
            await conn.execute(self._session)  # tests only: the offset is not user input

    async def open(self) -> None:
        """Start the pool; connections are made when first needed, so this succeeds while PostgreSQL is away."""
        await self._pool.open()

    async def close(self) -> None:
        """Close all connections."""
        await self._pool.close(timeout=2)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lend a connection in autocommit mode. Raises DatabaseAway."""
        try:
            async with self._pool.connection() as conn:
                yield conn
        except Exception as error:
            if is_away(error):
                raise DatabaseAway(_first_line(error)) from error
            raise

    async def run(self, step: Callable[[Connection], Awaitable[T]]) -> T:
        """Run `step`, one statement or one transaction, again when PostgreSQL asks for it. Raises DatabaseAway."""
        for attempt in range(MAX_RETRIES + 1):
            try:
                async with self.connection() as conn:
                    return await step(conn)
            except psycopg.Error as error:
                if error.sqlstate not in RETRIED:
                    raise
                if attempt == MAX_RETRIES:
                    raise DatabaseAway(f"busy: {_first_line(error)}") from error
            await asyncio.sleep(random.uniform(0.005, 0.05) * 2**attempt)
        raise AssertionError("unreachable: the last attempt returns or raises")

    @property
    def in_use(self) -> int:
        """Return how many connections exist now, lent or idle."""
        return int(self._pool.get_stats().get("pool_size", 0))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
