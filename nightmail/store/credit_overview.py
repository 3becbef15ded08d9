"""What the dashboard reads of credits: wallets of all orgs, their batches, movements and purchases; nothing written.

A page costs the same with ten wallets and with a million, and however long one has existed: every statement follows
an index and stops at a LIMIT. Batches that are used up are in no index of their wallet, so those shown are the ones
that still hold something and the ones that the newest movements touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from nightmail.store.credits import Wallet
from nightmail.store.database import Connection
from nightmail.store.overview import PAGE, SCAN

MAX_BATCHES = 200
# Movements whose batches are listed besides those that hold something.
RECENT_ENTRIES = 200
POINTS = 240
# Lines shown of one transaction: a spend has one for each batch that it took from.
MAX_LINES = 20
MAX_PURCHASES = 50
LAST_ACCOUNT = 2**63 - 1


@dataclass(frozen=True, slots=True)
class WalletRow:
    """A wallet as it stands now: `ended` is what waits to be booked as expired, `held` is in its batches in all."""

    id: int
    org_id: UUID
    org: str
    env: str
    user_id: str
    balance: int
    entries: int
    low_below: int | None
    created_at: datetime
    spendable: int
    held: int
    next_expiry_at: datetime | None
    next_expiry: int
    next_grant_at: datetime | None
    next_grant: int | None

    @property
    def wallet(self) -> Wallet:
        """Return what the ledger calls it."""
        return Wallet(self.org_id, self.env, self.user_id)

    @property
    def reserved(self) -> int:
        """Return what is set aside: the balance counts it, `remaining` of its batches does not."""
        return self.balance - self.held

    @property
    def ended(self) -> int:
        """Return what can no longer be spent and is not booked as expired yet."""
        return self.held - self.spendable

    @property
    def is_low(self) -> bool:
        """Return whether less can be spent than the owner wants to be told of."""
        return self.low_below is not None and self.spendable < self.low_below


@dataclass(frozen=True, slots=True)
class WalletFilter:
    """Which wallets; None or '' leaves it open. `user` is any part of the user id, in whichever case."""

    org_id: UUID | None = None
    env: str | None = None
    user: str = ""


@dataclass(frozen=True, slots=True)
class WalletPage:
    """Wallets; `next_before` continues, None at the end. `scanned` when the look ended before it."""

    rows: list[WalletRow] = field(default_factory=list)
    next_before: int | None = None
    scanned: bool = False


# Sums and dates of the wallets that are shown only: credit_batches_burn and purchases_of_account.
STANDING = """
SELECT a.id, a.org_id, coalesce(o.name, ''), a.env, a.user_id, a.balance, a.seq, a.low_below, a.created_at,
       b.spendable, b.held, b.next_at, coalesce(n.amount, 0), g.next_grant_at, g.credits
FROM shown AS a
LEFT JOIN orgs AS o ON o.id = a.org_id
CROSS JOIN LATERAL (
    SELECT coalesce(sum(remaining) FILTER (WHERE expires_at IS NULL OR expires_at > nm_now()), 0)::bigint AS spendable,
           coalesce(sum(remaining), 0)::bigint AS held,
           min(expires_at) FILTER (WHERE expires_at > nm_now()) AS next_at
    FROM credit_batches
    WHERE account_id = a.id
      AND is_open
) AS b
LEFT JOIN LATERAL (
    SELECT sum(remaining)::bigint AS amount
    FROM credit_batches
    WHERE account_id = a.id
      AND is_open
      AND expires_at = b.next_at
) AS n ON true
LEFT JOIN LATERAL (
    SELECT p.next_grant_at, p.quantity * l.credits AS credits
    FROM purchases AS p
    JOIN plans AS l ON l.id = p.plan_id
    WHERE p.account_id = a.id
      AND p.next_grant_at IS NOT NULL
      AND (p.holds_from IS NULL OR p.next_grant_at < p.holds_from)
    ORDER BY p.next_grant_at, p.id
    LIMIT 1
) AS g ON true
"""

# Newest first over the primary key; a part of a user id is looked for in SCAN wallets.
NEWEST_SHOWN = """
WITH shown AS MATERIALIZED (
    SELECT *
    FROM (
        SELECT *
        FROM credit_accounts
        WHERE id < %(before)s
        ORDER BY id DESC
        LIMIT %(scan)s
    ) AS scanned
    WHERE (%(env)s::text IS NULL OR env = %(env)s)
      AND (%(user)s = '' OR strpos(lower(user_id), lower(%(user)s)) > 0)
    ORDER BY id DESC
    LIMIT %(limit)s + 1
)"""
LIST_WALLETS = NEWEST_SHOWN + STANDING + "ORDER BY a.id DESC\n"

# An org's in the order of their user ids, which is that of the unique index. The one whose id is exactly what was
# searched for comes first, however many there are.
ORG_SHOWN = """
WITH near AS MATERIALIZED (
    SELECT *, false AS is_exact
    FROM (
        SELECT *
        FROM credit_accounts
        WHERE org_id = %(org_id)s
          AND (env, user_id) > (
              coalesce((SELECT env FROM credit_accounts WHERE id = %(before)s), ''),
              coalesce((SELECT user_id FROM credit_accounts WHERE id = %(before)s), '')
          )
        ORDER BY env, user_id
        LIMIT %(scan)s
    ) AS scanned
    WHERE (%(env)s::text IS NULL OR env = %(env)s)
      AND (%(user)s = '' OR strpos(lower(user_id), lower(%(user)s)) > 0)
      AND user_id <> %(user)s
    ORDER BY env, user_id
    LIMIT %(limit)s + 1
), exact AS (
    SELECT *, true AS is_exact
    FROM credit_accounts
    WHERE org_id = %(org_id)s
      AND env IN ('live', 'test')
      AND user_id = %(user)s
      AND (%(env)s::text IS NULL OR env = %(env)s)
      AND %(is_first)s
), shown AS MATERIALIZED (
    SELECT * FROM near
    UNION ALL
    SELECT * FROM exact
)"""
LIST_WALLETS_OF_ORG = ORG_SHOWN + STANDING + "ORDER BY a.is_exact DESC, a.env, a.user_id\n"

LAST_SCANNED = """
SELECT id
FROM credit_accounts
WHERE id < %(before)s
ORDER BY id DESC
LIMIT 1 OFFSET %(scan)s - 1
"""
LAST_SCANNED_OF_ORG = """
SELECT id
FROM credit_accounts
WHERE org_id = %(org_id)s
  AND (env, user_id) > (
      coalesce((SELECT env FROM credit_accounts WHERE id = %(before)s), ''),
      coalesce((SELECT user_id FROM credit_accounts WHERE id = %(before)s), '')
  )
ORDER BY env, user_id
LIMIT 1 OFFSET %(scan)s - 1
"""


async def list_wallets(conn: Connection, wanted: WalletFilter, *, before: int | None = None) -> WalletPage:
    """Return a page of wallets: newest first, or those of one org by user id."""
    is_org = wanted.org_id is not None
    arguments = {
        "org_id": wanted.org_id,
        "env": wanted.env,
        "user": wanted.user,
        "before": LAST_ACCOUNT if before is None else before,
        "is_first": before is None,
        "scan": SCAN,
        "limit": PAGE,
    }
    cursor = await conn.execute(LIST_WALLETS_OF_ORG if is_org else LIST_WALLETS, arguments)
    rows = [WalletRow(*row) for row in await cursor.fetchall()]
    exact = sum(is_org and row.user_id == wanted.user for row in rows)
    if len(rows) - exact > PAGE:
        return WalletPage(rows[: PAGE + exact], rows[PAGE + exact - 1].id)
    if not (wanted.env or wanted.user):
        return WalletPage(rows)
    last = await (await conn.execute(LAST_SCANNED_OF_ORG if is_org else LAST_SCANNED, arguments)).fetchone()
    return WalletPage(rows, last[0] if last else None, last is not None)


ONE_SHOWN = """
WITH shown AS MATERIALIZED (
    SELECT *
    FROM credit_accounts
    WHERE id = %(account_id)s
)"""
GET_WALLET = ONE_SHOWN + STANDING


async def get_wallet(conn: Connection, account_id: int) -> WalletRow | None:
    """Return any org's wallet, None when there is none with this id."""
    row = await (await conn.execute(GET_WALLET, {"account_id": account_id})).fetchone()
    return WalletRow(*row) if row else None


FIND_WALLET = """
SELECT id
FROM credit_accounts
WHERE org_id = %(org_id)s
  AND env = %(env)s
  AND user_id = %(user_id)s
"""


async def find_wallet(conn: Connection, wallet: Wallet) -> int | None:
    """Return the number of a wallet, None while it has never held anything."""
    arguments = {"org_id": wallet.org_id, "env": wallet.env, "user_id": wallet.user_id}
    row = await (await conn.execute(FIND_WALLET, arguments)).fetchone()
    return row[0] if row else None


@dataclass(frozen=True, slots=True)
class BatchRow:
    """Credits that came together; `is_ended` when they can no longer be spent, booked or not."""

    id: UUID
    granted: int
    remaining: int
    reserved: int
    consumed: int
    expired: int
    priority: int
    source: str
    issued_at: datetime
    expires_at: datetime | None
    purchase_id: UUID | None
    is_ended: bool

    @property
    def held(self) -> int:
        """Return what is in it, reserved or not."""
        return self.remaining + self.reserved


BATCHES = """
SELECT b.id, b.granted, b.remaining, b.reserved, b.consumed, b.expired, b.priority, b.source, b.issued_at, b.expires_at,
       b.purchase_id, coalesce(b.expires_at <= nm_now(), false)
FROM credit_batches AS b
WHERE b.account_id = %(account_id)s
  AND b.id IN (
      (
          SELECT id
          FROM credit_batches
          WHERE account_id = %(account_id)s
            AND is_open
          ORDER BY priority, expires_at, issued_at, id
          LIMIT %(limit)s
      )
      UNION
      (
          SELECT batch_id
          FROM (
              SELECT batch_id
              FROM credit_reservations
              WHERE account_id = %(account_id)s
              LIMIT %(scan)s
          ) AS held
          GROUP BY batch_id
          LIMIT %(limit)s
      )
      UNION
      (
          SELECT batch_id
          FROM credit_entries
          WHERE account_id = %(account_id)s
            AND seq IS NOT NULL
          ORDER BY seq DESC
          LIMIT %(recent)s
      )
  )
ORDER BY b.remaining + b.reserved = 0, b.priority, b.expires_at, b.issued_at, b.id
LIMIT %(limit)s
"""


async def list_batches(conn: Connection, account_id: int) -> list[BatchRow]:
    """Return the batches that hold something, in the order in which they are spent, then those used up of late."""
    arguments = {"account_id": account_id, "limit": MAX_BATCHES, "scan": SCAN, "recent": RECENT_ENTRIES}
    cursor = await conn.execute(BATCHES, arguments)
    return [BatchRow(*row) for row in await cursor.fetchall()]


GET_BATCH = """
SELECT b.id, b.granted, b.remaining, b.reserved, b.consumed, b.expired, b.priority, b.source, b.issued_at, b.expires_at,
       b.purchase_id, coalesce(b.expires_at <= nm_now(), false)
FROM credit_batches AS b
WHERE b.id = %(batch_id)s
  AND b.account_id = %(account_id)s
"""


async def get_batch(conn: Connection, account_id: int, batch_id: UUID) -> BatchRow | None:
    """Return a batch of this wallet, None when it has none with this id."""
    row = await (await conn.execute(GET_BATCH, {"account_id": account_id, "batch_id": batch_id})).fetchone()
    return BatchRow(*row) if row else None


# Numbers have no holes, so that a drawing of a million movements reads POINTS of them by their numbers.
BALANCES = """
SELECT t.created_at, e.balance_after
FROM (
    SELECT DISTINCT 1 + ((%(newest)s - 1) * n / greatest(%(points)s - 1, 1)) AS seq
    FROM generate_series(0::bigint, %(points)s - 1) AS n
) AS wanted
JOIN credit_entries AS e ON e.account_id = %(account_id)s AND e.seq = wanted.seq
JOIN credit_transactions AS t ON t.id = e.transaction_id
ORDER BY e.seq
"""


async def read_balances(conn: Connection, account_id: int, newest: int) -> list[tuple[datetime, int]]:
    """Return the balance after up to POINTS movements, evenly from the first to the number `newest`, in their order."""
    points = min(newest, POINTS)
    cursor = await conn.execute(BALANCES, {"account_id": account_id, "newest": newest, "points": points})
    return [(row[0], row[1]) for row in await cursor.fetchall()]


@dataclass(frozen=True, slots=True)
class LineRow:
    """One side of a transaction; `seq` and `batch_id` are the wallet's only."""

    account: str
    amount: int
    batch_id: UUID | None
    seq: int | None


LINES = """
SELECT wanted.id, l.account, l.amount, l.batch_id, l.seq
FROM unnest(%(transaction_ids)s::uuid[]) AS wanted (id)
CROSS JOIN LATERAL (
    SELECT account, amount, batch_id, seq, line
    FROM credit_entries
    WHERE transaction_id = wanted.id
    ORDER BY line
    LIMIT %(limit)s
) AS l
ORDER BY wanted.id, l.seq NULLS LAST, l.line
"""


async def list_lines(conn: Connection, transaction_ids: Sequence[UUID]) -> dict[UUID, list[LineRow]]:
    """Return both sides of each transaction, at most MAX_LINES lines of one."""
    wanted = sorted(set(transaction_ids))
    cursor = await conn.execute(LINES, {"transaction_ids": wanted, "limit": MAX_LINES})
    lines: dict[UUID, list[LineRow]] = {}
    for transaction_id, *line in await cursor.fetchall():
        lines.setdefault(transaction_id, []).append(LineRow(*line))
    return lines


@dataclass(frozen=True, slots=True)
class PurchaseRow:
    """What the wallet's user bought; `is_held` when its next month waits for a payment or has been canceled."""

    id: UUID
    plan_id: str
    plan: str
    kind: str
    credits: int
    status: str
    external_ref: str | None
    next_grant_at: datetime | None
    is_held: bool
    ends_at: datetime | None
    grant_error: str | None
    created_at: datetime


PURCHASES = """
SELECT p.id, n.id, n.name, n.kind, p.quantity * n.credits, p.status, p.external_ref, p.next_grant_at,
       coalesce(p.next_grant_at >= p.holds_from, false), p.ends_at, p.grant_error, p.created_at
FROM purchases AS p
JOIN plans AS n ON n.id = p.plan_id
WHERE p.account_id = %(account_id)s
ORDER BY p.id DESC
LIMIT %(limit)s
"""


async def list_purchases(conn: Connection, account_id: int) -> list[PurchaseRow]:
    """Return what the wallet's user bought, newest first, at most MAX_PURCHASES."""
    cursor = await conn.execute(PURCHASES, {"account_id": account_id, "limit": MAX_PURCHASES})
    return [PurchaseRow(*row) for row in await cursor.fetchall()]
