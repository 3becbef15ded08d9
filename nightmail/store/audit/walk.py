"""The full audit: every scope in chunks, each in a short transaction of its own that can only read.

A chunk sees one moment (REPEATABLE READ), and every invariant is about what is inside one chunk: so no snapshot has to
live as long as the audit, which would keep every claim of the queue from being cleaned up behind it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any, LiteralString

from nightmail.store.audit.credits import CREDITS
from nightmail.store.audit.invariant import Chunk, Finding, Scope, Tally, check_rows, finding_of
from nightmail.store.audit.messages import MESSAGES
from nightmail.store.audit.overage import OVERAGE
from nightmail.store.audit.replay import replay_accounts
from nightmail.store.audit.tables import TABLES
from nightmail.store.audit.usage import USAGE
from nightmail.store.audit.webhooks import WEBHOOKS
from nightmail.store.database import Connection

INVARIANTS = (*MESSAGES, *USAGE, *WEBHOOKS, *CREDITS, *OVERAGE, *TABLES)

# Told after each chunk: the scope, how many of its things were looked at, and how many there are (None: unknown).
Progress = Callable[[Scope, int, int | None], None]

# The least id of each scope that is walked by ids, and how many are a chunk. A wallet may have millions of entries, and
# an org millions of messages: then its chunk is that large, and PostgreSQL sorts it on disk.
FIRST: dict[Scope, Any] = {
    "messages": "00000000-0000-0000-0000-000000000000",
    "orgs": "00000000-0000-0000-0000-000000000000",
    "overage": "00000000-0000-0000-0000-000000000000",
    "endpoints": "00000000-0000-0000-0000-000000000000",
    "accounts": 0,
}
SIZE: dict[Scope, int] = {"messages": 2000, "orgs": 20, "overage": 200, "endpoints": 500, "accounts": 500}
ORDER: tuple[Scope, ...] = ("now", "messages", "orgs", "written", "endpoints", "accounts", "overage", "tables")
SPAN = timedelta(hours=6)
# Deliveries are kept for 30 days: events before that can no longer be compared with them.
KEPT = timedelta(days=29)
# Without it the planner prefers hashes of whole tables; and chunks are too short for compiling to pay.
TUNE = """
SELECT set_config('random_page_cost', '1.1', true), set_config('jit', 'off', true),
       set_config('enable_seqscan', %(seqscan)s, true)
"""
# A chunk of these is a small part of its tables.
BY_INDEX: tuple[Scope, ...] = ("accounts", "messages", "written", "endpoints")


@asynccontextmanager
async def reading(conn: Connection, *, limit_s: float = 0.0, by_index: bool = False) -> AsyncIterator[None]:
    """Begin a transaction of one moment that PostgreSQL lets write nothing; `limit_s` bounds a statement, 0: no bound.

    `by_index`: no table is read from end to end, whatever stale statistics make the planner think of a chunk.

    Inside the caller's own transaction there is nothing to begin: then it sees and may do what that one does.
    """
    is_inner = conn.info.transaction_status.name != "IDLE"
    async with conn.transaction():
        if not is_inner:
            await conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        await conn.execute(
            "SELECT set_config('statement_timeout', %(limit)s, true)", {"limit": f"{round(limit_s * 1000)}"}
        )
        await conn.execute(TUNE, {"seqscan": "off" if by_index else "on"})
        yield


async def check_chunk(conn: Connection, chunk: Chunk, *, limit_s: float = 0.0) -> dict[str, Tally]:
    """Check every invariant of the chunk's scope in one read-only transaction; a tally for each."""
    async with reading(conn, limit_s=limit_s, by_index=chunk.scope in BY_INDEX):
        tallies = {
            invariant.name: await check_rows(conn, invariant, chunk)
            for invariant in INVARIANTS
            if invariant.scope == chunk.scope and invariant.rows is not None
        }
        if chunk.scope == "accounts":
            tallies |= await replay_accounts(conn, chunk.keys)
    return tallies


async def audit(conn: Connection, progress: Progress = lambda scope, done, total: None) -> list[Finding]:
    """Check everything, chunk by chunk; a finding for each invariant, in their order."""
    tallies = {invariant.name: Tally() for invariant in INVARIANTS}
    for scope in ORDER:
        total = await _count(conn, scope)
        done = 0
        progress(scope, done, total)
        async for chunk in chunks(conn, scope):
            for name, tally in (await check_chunk(conn, chunk)).items():
                tallies[name].add(tally)
            done += len(chunk.keys) or 1
            progress(scope, done, total)
    return [finding_of(invariant, tallies[invariant.name]) for invariant in INVARIANTS]


async def chunks(conn: Connection, scope: Scope) -> AsyncIterator[Chunk]:
    """Yield the chunks of a scope that together are all of it."""
    if scope in ("now", "tables"):
        yield Chunk(scope)
        return
    if scope == "written":
        start, end = await read_span(conn)
        while start < end:
            yield Chunk(scope, start=start, end=start + SPAN)
            start += SPAN
        return
    after = FIRST[scope]
    while keys := await list_keys(conn, scope, after=after, limit=SIZE[scope]):
        yield Chunk(scope, keys)
        after = keys[-1]


KEYS: dict[Scope, LiteralString] = {
    "accounts": "SELECT id FROM credit_accounts WHERE id > %(after)s ORDER BY id LIMIT %(limit)s",
    "messages": "SELECT id FROM messages WHERE id > %(after)s ORDER BY id LIMIT %(limit)s",
    "orgs": "SELECT id FROM orgs WHERE id > %(after)s ORDER BY id LIMIT %(limit)s",
    "endpoints": "SELECT id FROM webhook_endpoints WHERE id > %(after)s ORDER BY id LIMIT %(limit)s",
    # Only who pays for overage, or did.
    "overage": """
        SELECT id FROM orgs
        WHERE id > %(after)s
          AND (billing = 'metered' OR EXISTS (SELECT FROM overage_reports AS r WHERE r.org_id = orgs.id))
        ORDER BY id LIMIT %(limit)s
    """,
}


async def list_keys(conn: Connection, scope: Scope, *, after: Any, limit: int) -> list[Any]:
    """Return the next ids of a scope that is walked by ids."""
    cursor = await conn.execute(KEYS[scope], {"after": after, "limit": limit})
    return [row[0] for row in await cursor.fetchall()]


# The statistics know well enough for a bar; they are -1 for a table that was never looked at.
COUNT = """
SELECT greatest(reltuples, 0)::bigint
FROM pg_class
WHERE oid = %(name)s::regclass
"""
TABLE_OF: dict[Scope, str] = {
    "accounts": "credit_accounts",
    "messages": "messages",
    "orgs": "orgs",
    "endpoints": "webhook_endpoints",
}


async def _count(conn: Connection, scope: Scope) -> int | None:
    if scope not in TABLE_OF:
        return 1 if scope in ("now", "tables") else None
    row = await (await conn.execute(COUNT, {"name": TABLE_OF[scope]})).fetchone()
    return int(row[0]) if row and row[0] else None


# By the server's own clock, as what it is compared with.
SPAN_OF_ALL = """
SELECT greatest(min(created_at), clock_timestamp() - %(kept)s), clock_timestamp() + interval '1 second'
FROM orgs
"""


async def read_span(conn: Connection) -> tuple[datetime, datetime]:
    """Return from when until when events can be compared with their deliveries."""
    row = await (await conn.execute(SPAN_OF_ALL, {"kept": KEPT})).fetchone()
    assert row is not None, "an aggregate has one row"
    return row[0] or row[1], row[1]
