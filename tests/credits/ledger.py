"""The real ledger as a plain object: one connection, a clock that is set in days, a transaction that is taken back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID, uuid4

import psycopg
import uvloop

from nightmail.ids import new_id
from nightmail.store import credit_expiry, credit_grants
from nightmail.store.audit import INVARIANTS
from nightmail.store.credit_grants import START, Cursor
from nightmail.store.credits import Wallet
from tests.credits.oracle import NEVER

T = TypeVar("T")
JOB = UUID("00000000-0000-7000-8000-0000000000aa")
# All invariants of wallets in one statement. The replay is the oracle's part.
VIOLATIONS = " UNION ALL ".join(
    f"SELECT '{invariant.name}', seen.id::text FROM ({invariant.rows}) AS seen WHERE seen.is_wrong"
    for invariant in INVARIANTS
    if invariant.scope == "accounts" and invariant.rows is not None
)
ACCOUNTS = "SELECT array_agg(id) FROM credit_accounts WHERE user_id = %s"

BATCHES = """
SELECT b.granted, b.remaining, b.reserved, b.consumed, b.expired, b.priority, b.source, b.expires_at, b.id,
       a.balance
FROM credit_batches AS b
JOIN credit_accounts AS a ON a.id = b.account_id
WHERE a.user_id = %(user_id)s
ORDER BY b.id
"""


class FlatConnection(psycopg.AsyncConnection[Any]):
    """A connection in one transaction that is taken back in the end; `is_flat` saves the round trips of savepoints."""

    is_flat = False

    @asynccontextmanager
    async def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> AsyncIterator[psycopg.AsyncTransaction]:
        """Begin a transaction, or a savepoint; neither while the connection is flat, for nothing that fails."""
        if self.is_flat:
            yield psycopg.AsyncTransaction(self)
        else:
            async with super().transaction(savepoint_name, force_rollback) as transaction:
                yield transaction


@dataclass
class Ledger:
    """One org's ledger on one connection; `start` is day 0."""

    conn: FlatConnection
    loop: asyncio.AbstractEventLoop
    org_id: UUID
    wallet: Wallet
    start: datetime
    days: float = 0
    is_begun: bool = field(default=False)
    histories: int = 0

    @classmethod
    def open(cls, database_url: str) -> Ledger:
        """Connect, and make the org."""
        loop = uvloop.new_event_loop()
        conn = loop.run_until_complete(FlatConnection.connect(database_url, autocommit=True))
        conn.prepare_threshold = 1
        ledger = cls(conn, loop, new_id(), Wallet(new_id(), "live", ""), datetime.min.replace(tzinfo=UTC))
        ledger.tell("INSERT INTO orgs (id, name) VALUES (%s, 'model')", ledger.org_id)
        ledger.begin()
        return ledger

    def begin(self) -> None:
        """Take back what was done, and start again with a new wallet at day 0."""
        self.tell("ROLLBACK; BEGIN" if self.is_begun else "BEGIN")
        self.wallet = Wallet(self.org_id, "live", f"user-{uuid4().hex}")
        self.days = 0
        self.start = self.ask("SELECT set_config('nightmail.clock_offset', '0', false), nm_clock()")[0][1]
        self.is_begun = self.conn.is_flat = True

    @property
    def midnight(self) -> float:
        """Return when the UTC day of the start began, in days."""
        start = self.start.astimezone(UTC)
        return (start.replace(hour=0, minute=0, second=0, microsecond=0) - start) / timedelta(days=1)

    def close(self) -> None:
        """End the connection and the loop."""
        self.do(self.conn.close())
        self.loop.close()

    def do(self, step: Coroutine[Any, Any, T]) -> T:
        """Run one call of the store."""
        return self.loop.run_until_complete(step)

    def commit(self) -> None:
        """Keep what was done, and what follows: rows that were changed can be forgotten then, which long runs need."""
        self.tell("COMMIT")
        self.is_begun = self.conn.is_flat = False

    def tear(self, step: Coroutine[Any, Any, T]) -> T:
        """Run a call that breaks off: its transaction is a savepoint of its own."""
        self.conn.is_flat = False
        try:
            return self.do(step)
        finally:
            self.conn.is_flat = True

    def ask(self, query: str, *arguments: Any, **named: Any) -> list[tuple[Any, ...]]:
        """Return rows."""

        async def fetch() -> list[tuple[Any, ...]]:
            return await (await self.conn.execute(query, named or arguments)).fetchall()

        return self.do(fetch())

    def tell(self, query: str, *arguments: Any, **named: Any) -> None:
        """Run a statement without a result."""

        async def execute() -> None:
            await self.conn.execute(query, named or arguments or None)

        self.do(execute())

    def set_day(self, days: float) -> None:
        """Let the database's clock stand so many days after the start, and a little."""
        self.days = days
        self.tell("SELECT set_config('nightmail.clock_offset', %s, false)", f"{days * 86400:.6f} seconds")

    def at(self, days: float) -> datetime | None:
        """Return the moment of a day of the oracle's."""
        return None if days == NEVER else self.start + timedelta(days=days)

    def day_of(self, at: datetime | None) -> float:
        """Return the oracle's day of a moment; the seconds that a test takes are rounded away."""
        return NEVER if at is None else round((at - self.start) / timedelta(days=1), 2)

    def batches(self) -> tuple[list[str], list[tuple[Any, ...]], int]:
        """Return the ids of the wallet's batches, the batches as the oracle's columns, and the account's balance."""
        rows = self.ask(BATCHES, user_id=self.wallet.user_id)
        return (
            [str(row[8]) for row in rows],
            [(*row[:7], self.day_of(row[7])) for row in rows],
            rows[0][9] if rows else 0,
        )

    def batch_ids(self) -> list[UUID]:
        """Return the ids of the wallet's batches, oldest first."""
        return [row[8] for row in self.ask(BATCHES, user_id=self.wallet.user_id)]

    def grant_due(self, limit: int) -> int:
        """Run the grant job's chunks until nothing is due; return how many periods were granted."""
        granted = 0
        after: Cursor = START
        while True:
            chunk = self.do(credit_grants.grant_chunk(self.conn, job_id=JOB, after=after, limit=limit))
            if chunk is None and after is START:
                return granted
            granted += chunk.successful if chunk else 0
            after = chunk.cursor if chunk and chunk.processed == limit else START

    def expire(self, limit: int) -> tuple[int, int]:
        """Run the expiry job's chunks until nothing is left; return how many batches and credits."""
        batches = amount = 0
        after: Cursor = START
        until = self.ask("SELECT nm_now()")[0][0]
        while chunk := self.do(credit_expiry.expire_chunk(self.conn, until=until, after=after, limit=limit)):
            batches, amount, after = batches + chunk.batches, amount + chunk.amount, chunk.cursor
        return batches, amount

    def is_audited(self) -> bool:
        """Return whether it is this history's turn: each is compared with the oracle, one in four is audited too."""
        self.histories += 1
        return self.histories % 4 == 0

    def violations(self) -> list[tuple[Any, ...]]:
        """Return what breaks the invariants of the wallet, with their names."""
        [(accounts,)] = self.ask(ACCOUNTS, self.wallet.user_id)
        return self.ask(VIOLATIONS, keys=accounts or [])
