"""What the hourly pass keeps: whose turn it is, how far it has come, what it found.

A writer of anything here names the turn's claim; a holder that was taken for dead writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from nightmail.store.audit.invariant import Offender
from nightmail.store.database import Connection

# More open findings than this are not looked at again in one pass.
MOST_FINDINGS = 10_000

# The last condition heals a lease written before the database's clock was set back.
TAKE_TURN = """
UPDATE audit_turn
SET claim_id = %(claim_id)s,
    lease_until = nm_now() + make_interval(secs => %(lease_s)s)
WHERE (%(is_early)s OR next_at <= nm_now())
  AND (claim_id IS NULL OR lease_until <= nm_now() OR lease_until > nm_now() + interval '2 hours')
"""

IS_DUE = """
SELECT next_at <= nm_now() AND (claim_id IS NULL OR lease_until <= nm_now())
FROM audit_turn
"""


async def take_turn(conn: Connection, *, claim_id: UUID, lease_s: float, is_early: bool = False) -> bool:
    """Take the turn, if one is due (or `is_early`) and nobody is at it; a look before spares the row many ask for."""
    row = await (await conn.execute(IS_DUE)).fetchone()
    if not is_early and (row is None or not row[0]):
        return False
    cursor = await conn.execute(TAKE_TURN, {"claim_id": claim_id, "lease_s": lease_s, "is_early": is_early})
    return cursor.rowcount == 1


END_TURN = """
UPDATE audit_turn
SET claim_id = NULL,
    lease_until = NULL,
    next_at = CASE WHEN %(is_done)s THEN nm_now() + make_interval(secs => %(every_s)s) ELSE next_at END,
    finished_at = CASE WHEN %(is_done)s THEN nm_now() ELSE finished_at END,
    checked = CASE WHEN %(is_done)s THEN %(checked)s ELSE checked END
WHERE claim_id = %(claim_id)s
"""


async def end_turn(conn: Connection, *, claim_id: UUID, is_done: bool, every_s: float, checked: int) -> bool:
    """Give the turn back; the next one is due `every_s` later, or at once when this one left work."""
    cursor = await conn.execute(
        END_TURN, {"claim_id": claim_id, "is_done": is_done, "every_s": every_s, "checked": checked}
    )
    return cursor.rowcount == 1


MARK = """
SELECT audited_to
FROM audit_marks
WHERE scope = %(scope)s
"""

# The row lock on the turn keeps a successor from beginning between the look and the write.
SET_MARK = """
WITH turn AS MATERIALIZED (
    SELECT FROM audit_turn WHERE claim_id = %(claim_id)s FOR UPDATE
)
INSERT INTO audit_marks AS m (scope, audited_to)
SELECT %(scope)s, %(audited_to)s
FROM turn
ON CONFLICT (scope) DO UPDATE SET audited_to = greatest(m.audited_to, excluded.audited_to)
"""


async def get_mark(conn: Connection, scope: str) -> datetime | None:
    """Return until when the scope has been looked at, None when it never was."""
    row = await (await conn.execute(MARK, {"scope": scope})).fetchone()
    return row[0] if row else None


# A transaction writes rows with times and ids of its own duration: what is older than every transaction that has
# written something is all there. The margin is for one that has taken the time and not yet written.
HORIZON = """
SELECT date_trunc(
    'milliseconds',
    least(clock_timestamp() - make_interval(secs => %(margin_s)s), min(xact_start))
)
FROM pg_stat_activity
WHERE datname = current_database()
  AND pid <> pg_backend_pid()
  AND backend_xid IS NOT NULL
"""


async def read_horizon(conn: Connection, *, margin_s: float) -> datetime:
    """Return the moment before which nothing more will appear, by the server's own clock."""
    row = await (await conn.execute(HORIZON, {"margin_s": margin_s})).fetchone()
    assert row is not None, "an aggregate has one row"
    at: datetime = row[0]
    return at


CHANGED_ACCOUNTS = """
SELECT DISTINCT account_id
FROM credit_transactions
WHERE id >= nm_uuid_at(%(start)s)
  AND id < nm_uuid_at(%(end)s)
"""

CHANGED_MESSAGES = """
SELECT DISTINCT message_id
FROM message_events
WHERE recorded_at >= %(start)s
  AND recorded_at < %(end)s
"""


async def list_changed_accounts(conn: Connection, *, start: datetime, end: datetime) -> list[int]:
    """Return the wallets that have a transaction written in this span."""
    cursor = await conn.execute(CHANGED_ACCOUNTS, {"start": start, "end": end})
    return [row[0] for row in await cursor.fetchall()]


async def list_changed_messages(conn: Connection, *, start: datetime, end: datetime) -> list[UUID]:
    """Return the messages that have an event written in this span."""
    cursor = await conn.execute(CHANGED_MESSAGES, {"start": start, "end": end})
    return [row[0] for row in await cursor.fetchall()]


LENGTHS = """
SELECT id, seq
FROM credit_accounts
WHERE id = ANY (%(account_ids)s::bigint[])
"""


async def read_lengths(conn: Connection, account_ids: Sequence[int]) -> dict[int, int]:
    """Return how many entries each of these wallets has, which is what it costs to look at it."""
    return dict(await (await conn.execute(LENGTHS, {"account_ids": list(account_ids)})).fetchall())


@dataclass(frozen=True, slots=True)
class OpenFinding:
    """Something that was found and has not been seen to be right since."""

    invariant: str
    offender: str
    key: str


OPEN = """
SELECT invariant, offender, key
FROM audit_findings
WHERE cleared_at IS NULL
ORDER BY invariant, offender
LIMIT %(limit)s
"""


async def list_open(conn: Connection) -> list[OpenFinding]:
    """Return the open findings."""
    cursor = await conn.execute(OPEN, {"limit": MOST_FINDINGS})
    return [OpenFinding(*row) for row in await cursor.fetchall()]


FOUND = """
WITH turn AS MATERIALIZED (
    SELECT FROM audit_turn WHERE claim_id = %(claim_id)s FOR UPDATE
)
INSERT INTO audit_findings AS f (invariant, offender, key, first_seen, last_seen)
SELECT %(invariant)s, o.id, o.key, nm_now(), nm_now()
FROM unnest(%(ids)s::text[], %(keys)s::text[]) AS o (id, key)
CROSS JOIN turn
ORDER BY o.id
ON CONFLICT (invariant, offender) DO UPDATE
SET key = excluded.key,
    first_seen = CASE WHEN f.cleared_at IS NULL THEN f.first_seen ELSE excluded.first_seen END,
    last_seen = excluded.last_seen,
    cleared_at = NULL
"""

CLEAR = """
WITH turn AS MATERIALIZED (
    SELECT FROM audit_turn WHERE claim_id = %(claim_id)s FOR UPDATE
), past AS MATERIALIZED (
    SELECT f.invariant, f.offender
    FROM audit_findings AS f
    JOIN unnest(%(invariants)s::text[], %(offenders)s::text[]) AS o (invariant, offender)
      ON o.invariant = f.invariant AND o.offender = f.offender
    WHERE f.cleared_at IS NULL
    ORDER BY f.invariant, f.offender
    FOR UPDATE OF f
)
UPDATE audit_findings AS f
SET cleared_at = nm_now()
FROM past
CROSS JOIN turn
WHERE f.invariant = past.invariant
  AND f.offender = past.offender
"""


async def record_chunk(
    conn: Connection,
    *,
    claim_id: UUID,
    found: dict[str, Sequence[Offender]],
    cleared: Sequence[OpenFinding] = (),
    scope: str | None = None,
    audited_to: datetime | None = None,
) -> None:
    """Write what a look found, what it saw to be right again, and how far it came; one transaction."""
    async with conn.transaction():
        if scope is not None:
            await conn.execute(SET_MARK, {"claim_id": claim_id, "scope": scope, "audited_to": audited_to})
        for invariant, offenders in sorted(found.items()):
            distinct = {offender.id: offender.key for offender in offenders}
            if distinct:
                await conn.execute(
                    FOUND,
                    {
                        "claim_id": claim_id,
                        "invariant": invariant,
                        "ids": list(distinct),
                        "keys": list(distinct.values()),
                    },
                )
        if cleared:
            await conn.execute(
                CLEAR,
                {
                    "claim_id": claim_id,
                    "invariants": [finding.invariant for finding in cleared],
                    "offenders": [finding.offender for finding in cleared],
                },
            )
