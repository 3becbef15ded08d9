"""Orgs that pay for messages, and their books, for the tests of rating. There is no provider: its answers are given."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg

from nightmail.ids import new_id
from nightmail.rules.rating import Split
from nightmail.store import gate, queue, record
from nightmail.store.accept import AcceptResult, Idempotency, NewMessage, accept_messages
from nightmail.store.audit import audit
from nightmail.store.credit_grants import NewGrant, grant
from nightmail.store.credits import Wallet
from nightmail.store.database import Connection, Database
from nightmail.store.orgs import NewOrg, create_org
from nightmail.store.record import Outcome

# Small enough to be used up: ten emails and four segments, then three credits an email and five a segment.
PLAN = (
    "INSERT INTO message_plans VALUES ('tiny', 10, 4, 3, 5), ('hundred', 100, 100, 3, 5), ('thousand', 1000, 0, 3, 5),"
    " ('none', 0, 0, 3, 5)"
)
TOLD = ("usage.threshold", "credits.low")


def new_message(units: int, *, at: datetime | None = None, channel: Any = "email", tag: str = "a") -> NewMessage:
    """Return an email to that many recipients, or an SMS of that many segments."""
    count = units if channel == "email" else 1
    addresses = [f"{tag}{number}@recipient.test" for number in range(count)]
    return NewMessage(
        new_id(),
        channel,
        "post@sender.test",
        "s",
        addresses,
        addresses,
        [],
        [],
        [],
        None,
        "text",
        [],
        [],
        (),
        units,
        at,
    )


@dataclass
class Till:
    """One org, and what it is charged."""

    database: Database
    conninfo: str
    org_id: UUID
    grants: int = 0
    ids: list[UUID] = field(default_factory=list)

    async def give(self, credits: int, *, low_below: int | None = None) -> None:
        """Put credits into the org's wallet."""
        self.grants += 1
        wallet = Wallet(self.org_id, "live", "billing")
        async with self.database.connection() as conn:
            await grant(conn, wallet, NewGrant(credits, f"grant-{self.grants}"))
        if low_below is not None:
            self.tell("UPDATE credit_accounts SET low_below = %s WHERE org_id = %s", low_below, self.org_id)

    async def offer(self, *messages: NewMessage, env: str = "live", key: str | None = None) -> AcceptResult:
        """Ask for messages to be accepted, all or none."""
        idempotency = Idempotency(key, b"digest" * 5 + b"ab", 200, "{}") if key else None
        return await accept_messages(
            self.database, org_id=self.org_id, env=env, messages=messages, idempotency=idempotency
        )

    async def accept(self, units: int, **fields: Any) -> UUID:
        """Accept a message."""
        message = new_message(units, **fields)
        assert await self.offer(message) == "accepted"
        return message.id

    async def begin(self, *ids: UUID, channel: str = "email") -> list[gate.Passed]:
        """Claim what is due and let these through the gate; the rest is given back."""
        async with self.database.connection() as conn:
            rows = await queue.claim_due(conn, f"live:{channel}", runner="till", limit=500, lease_s=60)
            passed: list[gate.Passed] = []
            for claim_id in {row.claim_id for row in rows}:
                mine = [row.message_id for row in rows if row.claim_id == claim_id and row.message_id in ids]
                if mine:
                    passed += (await gate.pass_gate(conn, claim_id, mine, call_s=5, shard=1)).passed
            others = [row.message_id for row in rows if row.message_id not in ids]
            await queue.release_claims(conn, claim_ids=[row.claim_id for row in rows], not_begun=others)
        return passed

    async def record(self, passed: gate.Passed, kind: Any, *, refused: Sequence[str] = ()) -> None:
        """Write down what the provider said."""
        outcome = Outcome(
            passed.message_id,
            passed.claim_id,
            kind,
            passed.units - len(refused) if kind == "sent" else 0,
            "ses",
            "provider-id" if kind == "sent" else None,
            refused=dict.fromkeys(refused, "550"),
        )
        async with self.database.connection() as conn:
            await record.record_outcomes(conn, [outcome], shard=2)

    async def finish(self, *ids: UUID, kind: str = "sent", channel: str = "email") -> None:
        """Send these messages, or let them fail."""
        for passed in await self.begin(*ids, channel=channel):
            await self.record(passed, kind)

    # ── the books ──

    def split(self, message_id: UUID) -> Split:
        """Return how a message was rated."""
        ((units, credit_units, metered_units),) = self.ask(
            "SELECT units, credit_units, metered_units FROM messages WHERE id = %s", message_id
        )
        return Split(units - credit_units - metered_units, credit_units, metered_units)

    def usage(self, period: str | None = None) -> dict[str, tuple[int, int]]:
        """Return (reserved, used) units by rating, where there are any."""
        rows = self.ask(
            "SELECT rating, sum(reserved)::int, sum(used)::int FROM usage_records"
            " WHERE org_id = %s AND (%s::text IS NULL OR period = %s) GROUP BY rating",
            self.org_id, period, period,
        )  # fmt: skip
        return {rating: (reserved, used) for rating, reserved, used in rows if reserved or used}

    def taken(self) -> list[int]:
        """Return what the quota rows hold, by channel and month."""
        query = "SELECT taken::int FROM usage_quotas WHERE org_id = %s ORDER BY channel, period"
        return [taken for (taken,) in self.ask(query, self.org_id)]

    def wallet(self) -> tuple[int, int, int]:
        """Return credits that can be spent, are reserved, were spent."""
        ((remaining, reserved, consumed),) = self.ask(
            "SELECT coalesce(sum(remaining), 0)::int, coalesce(sum(reserved), 0)::int, coalesce(sum(consumed), 0)::int"
            " FROM credit_batches JOIN credit_accounts AS a ON a.id = account_id WHERE org_id = %s",
            self.org_id,
        )
        return remaining, reserved, consumed

    def told(self) -> list[tuple[str, dict[str, Any]]]:
        """Return what the org's endpoint was told about usage and credits, oldest first."""
        return self.ask("SELECT topic, data FROM webhook_deliveries WHERE org_id = %s ORDER BY event_id", self.org_id)

    async def check(self) -> None:
        """Audit everything."""
        async with self.database.connection() as conn:
            assert await violations(conn) == []

    def ask(self, query: str, *arguments: Any) -> list[Any]:
        """Return the rows of a query."""
        with psycopg.connect(self.conninfo, autocommit=True) as conn:
            return conn.execute(query, arguments or None).fetchall()

    def tell(self, statement: str, *arguments: Any) -> None:
        """Run a statement."""
        with psycopg.connect(self.conninfo, autocommit=True) as conn:
            conn.execute(statement, arguments or None)


async def violations(conn: Connection) -> list[str]:
    """Return the names of the invariants that do not hold."""
    return [finding.name for finding in await audit(conn) if finding.violations]


@asynccontextmanager
async def open_till(
    conninfo: str, billing: str, plan: str = "tiny", *, credits: int = 0, low_below: int | None = None
) -> AsyncIterator[Till]:
    """Lend an org of this billing, with an endpoint that listens to usage and credits."""
    database = Database(conninfo, pool_max=8)
    await database.open()
    try:
        with psycopg.connect(conninfo, autocommit=True) as plain:
            plain.execute(PLAN + " ON CONFLICT DO NOTHING")
        async with database.connection() as conn:
            org, _, _ = await create_org(conn, NewOrg("Payer", plan, billing), actor="test")
        till = Till(database, conninfo, org.id)
        till.tell(
            "INSERT INTO webhook_endpoints (id, org_id, env, url, dialect, types, topics, secret)"
            " VALUES (%s, %s, 'live', 'https://x.test/', 'nightmail', %s, %s, 'whsec_x')",
            new_id(),
            org.id,
            list(TOLD),
            list(TOLD),
        )
        if credits:
            await till.give(credits, low_below=low_below)
        yield till
    finally:
        await database.close()
