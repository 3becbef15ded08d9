"""credit_entries: what a wallet holds, what became of it, and why. Reading only.

The balance shown is what can be spent now: batches that have ended count for nothing, booked or not, and what is
reserved is shown beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from nightmail.store.credits import Wallet
from nightmail.store.database import Connection

# Batches listed with a balance; the sums count all.
MAX_BATCHES = 200


@dataclass(frozen=True, slots=True)
class BatchView:
    """Credits that can be spent now."""

    id: UUID
    remaining: int
    granted: int
    priority: int
    source: str
    issued_at: datetime
    expires_at: datetime | None
    purchase_id: UUID | None


@dataclass(frozen=True, slots=True)
class NextGrant:
    """The next month that a subscription of the wallet gives."""

    at: datetime
    amount: int
    purchase_id: UUID
    plan: str


@dataclass(frozen=True, slots=True)
class BalanceView:
    """A wallet; `batches` in the order in which they are spent, at most MAX_BATCHES of them."""

    user_id: str
    balance: int
    reserved: int
    low_below: int | None
    batches: list[BatchView]
    next_expiry: tuple[datetime, int] | None
    next_grant: NextGrant | None


# One statement, so that all of it is of one moment.
BALANCE = """
SELECT a.id, a.low_below,
       (SELECT coalesce(sum(r.amount), 0)::bigint FROM credit_reservations AS r WHERE r.account_id = a.id),
       b.id, b.remaining, b.granted, b.priority, b.source, b.issued_at, b.expires_at, b.purchase_id,
       (sum(b.remaining) OVER ())::bigint,
       (min(b.expires_at) OVER ()),
       (sum(b.remaining) OVER (PARTITION BY b.expires_at))::bigint
FROM credit_accounts AS a
LEFT JOIN credit_batches AS b ON b.account_id = a.id
                             AND b.is_open
                             AND (b.expires_at IS NULL OR b.expires_at > nm_now())
WHERE a.org_id = %(org_id)s
  AND a.env = %(env)s
  AND a.user_id = %(user_id)s
ORDER BY b.priority, b.expires_at, b.issued_at, b.id
"""

NEXT_GRANT = """
SELECT p.next_grant_at, p.quantity * n.credits, p.id, n.id
FROM purchases AS p
JOIN plans AS n ON n.id = p.plan_id
WHERE p.account_id = %(account_id)s
  AND p.next_grant_at IS NOT NULL
  AND (p.holds_from IS NULL OR p.next_grant_at < p.holds_from)
ORDER BY p.next_grant_at, p.id
LIMIT 1
"""


async def get_balance(conn: Connection, wallet: Wallet) -> BalanceView | None:
    """Return what the wallet holds; None when there is no such account."""
    rows = await (await conn.execute(BALANCE, _named(wallet))).fetchall()
    if not rows:
        return None
    account_id, low_below, reserved, *_ = rows[0]
    grant = await (await conn.execute(NEXT_GRANT, {"account_id": account_id})).fetchone()
    batches = [row[3:] for row in rows if row[3] is not None]
    return BalanceView(
        user_id=wallet.user_id,
        balance=batches[0][8] if batches else 0,
        reserved=reserved,
        low_below=low_below,
        batches=[BatchView(*batch[:8]) for batch in batches[:MAX_BATCHES]],
        next_expiry=next(((b[6], b[10]) for b in batches if b[6] is not None and b[6] == b[9]), None),
        next_grant=NextGrant(*grant) if grant else None,
    )


@dataclass(frozen=True, slots=True)
class EntryView:
    """One movement of a wallet; `seq` counts them from 1 without holes, `balance_after` includes what is reserved."""

    seq: int
    kind: str
    amount: int
    balance_after: int
    reference: str | None
    reason: str | None
    batch_id: UUID
    transaction_id: UUID
    created_at: datetime
    purchase_id: UUID | None
    period_start: datetime | None

    @property
    def reference_id(self) -> str:
        """Return the caller's reference, or what stands for it where a job did it."""
        if self.reference is not None:
            return self.reference
        if self.kind == "expire":
            return f"expire:{self.batch_id}"
        if self.kind == "refund":  # a further batch of one whose first has the reference
            return f"refund:{self.batch_id}"
        start = f"{self.period_start:%Y-%m-%dT%H:%M:%SZ}" if self.period_start else ""
        return f"{self.kind}:{self.purchase_id}:{start}"


HISTORY = """
SELECT e.seq, t.kind, e.amount, e.balance_after, t.reference, t.reason, e.batch_id, t.id, t.created_at, b.purchase_id,
       b.period_start AT TIME ZONE 'UTC'
FROM credit_entries AS e
JOIN credit_accounts AS a ON a.id = e.account_id
JOIN credit_transactions AS t ON t.id = e.transaction_id
JOIN credit_batches AS b ON b.id = e.batch_id
WHERE a.org_id = %(org_id)s
  AND a.env = %(env)s
  AND a.user_id = %(user_id)s
  AND e.seq IS NOT NULL
  AND (%(after)s::bigint IS NULL OR e.seq < %(after)s)
ORDER BY e.seq DESC
LIMIT %(limit)s + 1
"""

HISTORY_BEFORE = HISTORY.replace("%(after)s::bigint IS NULL OR e.seq < %(after)s", "e.seq > %(before)s").replace(
    "ORDER BY e.seq DESC", "ORDER BY e.seq"
)


async def list_history(
    conn: Connection, wallet: Wallet, *, limit: int, after: int | None = None, before: int | None = None
) -> tuple[list[EntryView], bool]:
    """Return up to `limit` entries, newest first, and whether there are more in the direction asked."""
    arguments = {**_named(wallet), "limit": limit, "after": after, "before": before}
    cursor = await conn.execute(HISTORY if before is None else HISTORY_BEFORE, arguments)
    views = [EntryView(*row) for row in await cursor.fetchall()]
    page = views[:limit]
    return (page if before is None else page[::-1]), len(views) > limit


@dataclass(frozen=True, slots=True)
class Line:
    """One side of a transaction: a ledger account and what it gained or lost."""

    account: str
    amount: int
    batch_id: UUID | None
    seq: int | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why an entry is there: its transaction with all lines, the batch it concerns, and what it corrects."""

    entry: EntryView
    lines: list[Line]
    batch: BatchView
    corrects: tuple[str, str | None] | None
    answer: dict[str, Any] | None


ENTRY = HISTORY.replace("AND (%(after)s::bigint IS NULL OR e.seq < %(after)s)", "AND e.seq = %(seq)s").replace(
    "ORDER BY e.seq DESC\nLIMIT %(limit)s + 1\n", ""
)

LINES = """
SELECT account, amount, batch_id, seq
FROM credit_entries
WHERE transaction_id = %(transaction_id)s
ORDER BY seq NULLS LAST, line
LIMIT 1000
"""

BATCH = """
SELECT id, remaining, granted, priority, source, issued_at, expires_at, purchase_id
FROM credit_batches
WHERE id = %(batch_id)s
"""

CORRECTS = """
SELECT c.kind, c.reference, t.answer
FROM credit_transactions AS t
LEFT JOIN credit_transactions AS c ON c.id = t.corrects
WHERE t.id = %(transaction_id)s
"""


async def explain_entry(conn: Connection, wallet: Wallet, seq: int) -> Explanation | None:
    """Return why the wallet's entry `seq` is there, None when it has none of that number."""
    row = await (await conn.execute(ENTRY, {**_named(wallet), "seq": seq})).fetchone()
    if row is None:
        return None
    entry = EntryView(*row)
    wanted = {"transaction_id": entry.transaction_id, "batch_id": entry.batch_id}
    lines = [Line(*line) for line in await (await conn.execute(LINES, wanted)).fetchall()]
    batch = await (await conn.execute(BATCH, wanted)).fetchone()
    transaction = await (await conn.execute(CORRECTS, wanted)).fetchone()
    assert batch is not None, "a wallet's entry has a batch"
    assert transaction is not None, "an entry has a transaction"
    corrects = (transaction[0], transaction[1]) if transaction[0] else None
    return Explanation(entry, lines, BatchView(*batch), corrects, transaction[2])


def _named(wallet: Wallet) -> dict[str, Any]:
    return {"org_id": wallet.org_id, "env": wallet.env, "user_id": wallet.user_id}
