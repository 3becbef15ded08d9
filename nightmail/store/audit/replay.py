"""The replay (L6, L11): every wallet's history once more, from the first transaction, by rules written a second time.

The order of a wallet is that of its transactions' numbers, given under the wallet's lock. What a spend took is
in its entries; what a reservation took is in its answer, because the rows of credit_reservations go when it is settled.
A clawback brings the end of a batch forward to its own time, so the end it has now judges what was before too. But not
in which order: that went by the end it had before, which the clawback's answer keeps.

The transactions are streamed; held in memory are the batches of the chunk's wallets, about half a KB each.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from nightmail.ids import new_claim_id
from nightmail.store.audit.invariant import Offender, Tally
from nightmail.store.database import Connection

NEVER = datetime.max.replace(tzinfo=UTC)
ROWS_AT_ONCE = 2000

Part = tuple[UUID, int]
Order = tuple[int, datetime, datetime, bytes]


@dataclass(frozen=True, slots=True)
class Step:
    """A transaction of a wallet; `entries` are what its batches gained and lost, `parts` what a reservation took."""

    account_id: int
    id: UUID
    kind: str
    at: datetime
    corrects: UUID | None
    captured: int
    entries: Sequence[Part]
    parts: Sequence[Part]


@dataclass(slots=True)
class Batch:
    """A batch as it is stored, and what the replay has made of it; `former_end` is the end by which it was in order."""

    id: UUID
    account_id: int
    priority: int
    issued_at: datetime
    expires_at: datetime
    former_end: datetime
    stored: tuple[int, int, int, int]
    remaining: int = 0
    reserved: int = 0
    consumed: int = 0
    expired: int = 0
    is_open: bool = False

    @property
    def order(self) -> Order:
        """Return the batch's place among those that are spent."""
        return self.priority, self.former_end, self.issued_at, self.id.bytes

    @property
    def is_as_stored(self) -> bool:
        """Return whether the replay came to what is stored."""
        return (self.remaining, self.reserved, self.consumed, self.expired) == self.stored


@dataclass(slots=True)
class Replay:
    """A wallet's history so far. `wrong_spends` are transactions that took in another order, or more than there was."""

    account_id: int
    batches: dict[UUID, Batch]
    held: dict[UUID, Sequence[Part]] = field(default_factory=dict)
    spends: int = 0
    wrong_spends: list[UUID] = field(default_factory=list)
    is_broken: bool = False
    # Batches that may hold something, in the order in which they are spent.
    open: list[tuple[Order, Batch]] = field(default_factory=list)

    def do(self, step: Step) -> None:
        """Do a transaction again."""
        match step.kind:
            case "consume":
                self._spend(step, [(batch_id, -amount) for batch_id, amount in step.entries], is_reserve=False)
            case "reserve":
                self._spend(step, step.parts, is_reserve=True)
            case "capture" | "release":
                self._settle(step)
            case "expire":
                for batch, amount in self._known(step.entries):
                    batch.remaining += amount
                    batch.expired -= amount
            case _:  # a grant, a refund, a clawback, a roll-over from some batches into another
                for batch, amount in self._known(step.entries):
                    self._add(batch, amount)
                    batch.consumed -= min(amount, 0)

    def broken(self) -> list[UUID]:
        """Return the batches of which the replay came to something else than what is stored."""
        return [batch.id for batch in self.batches.values() if not batch.is_as_stored]

    def _spend(self, step: Step, parts: Sequence[Part], *, is_reserve: bool) -> None:
        self.spends += 1
        if list(parts) != self._in_order(step.at, sum(amount for _, amount in parts)):
            self.wrong_spends.append(step.id)
        for batch, amount in self._known(parts):
            batch.remaining -= amount
            if is_reserve:
                batch.reserved += amount
            else:
                batch.consumed += amount
        if is_reserve:
            self.held[step.id] = parts

    def _in_order(self, at: datetime, missing: int) -> list[Part]:
        """Return what so much must be taken from at this time."""
        taken: list[Part] = []
        emptied: list[int] = []
        for place, (_, batch) in enumerate(self.open):
            if missing == 0:
                break
            if batch.remaining <= 0:
                emptied.append(place)
            elif batch.expires_at > at:
                part = min(batch.remaining, missing)
                taken.append((batch.id, part))
                missing -= part
        for place in reversed(emptied):
            self.open[place][1].is_open = False
            del self.open[place]
        return taken

    def _add(self, batch: Batch, amount: int) -> None:
        """Give a batch so much to be spent, or take it."""
        batch.remaining += amount
        if batch.remaining > 0 and not batch.is_open:
            batch.is_open = True
            insort(self.open, (batch.order, batch), key=lambda one: one[0])

    def _settle(self, step: Step) -> None:
        """Capture from the first lines, give the rest back; what has ended meanwhile is expired."""
        left = step.captured
        for batch, amount in self._known(self.held.pop(step.corrects, ()) if step.corrects else ()):
            captured = min(amount, left)
            left -= captured
            batch.reserved -= amount
            batch.consumed += captured
            if batch.expires_at <= step.at:
                batch.expired += amount - captured
            else:
                self._add(batch, amount - captured)

    def _known(self, parts: Sequence[Part]) -> list[tuple[Batch, int]]:
        """Return the batches of parts; one that is not the wallet's cannot be replayed."""
        known = [(self.batches[batch_id], amount) for batch_id, amount in parts if batch_id in self.batches]
        self.is_broken = self.is_broken or len(known) < len(parts)
        return known


async def replay_accounts(conn: Connection, account_ids: Sequence[int]) -> dict[str, Tally]:
    """Replay wallets inside the caller's transaction, which must be REPEATABLE READ; a tally for each invariant."""
    order, result = Tally(), Tally()
    batches = await _batches(conn, account_ids)
    replay: Replay | None = None
    async for step in _steps(conn, account_ids):
        if replay is None or replay.account_id != step.account_id:
            if replay is not None:
                _close(replay, order, result)
            replay = Replay(step.account_id, batches.pop(step.account_id, {}))
        replay.do(step)
    if replay is not None:
        _close(replay, order, result)
    for account_id, unmoved in batches.items():  # batches that no transaction made
        _close(Replay(account_id, unmoved), order, result)
    return {"credit_burn_order": order, "credit_replay": result}


def _close(replay: Replay, order: Tally, result: Tally) -> None:
    key = str(replay.account_id)
    order.add(Tally(replay.spends, len(replay.wrong_spends), [Offender(str(id), key) for id in replay.wrong_spends]))
    broken = [str(id) for id in replay.broken()]
    if replay.is_broken:
        broken.append(f"account {key}")
    result.add(Tally(len(replay.batches), len(broken), [Offender(id, key) for id in broken]))


# The wallets' batches: those their entries name, and open ones that should have entries.
BATCHES = """
SELECT b.id, b.account_id, b.priority, b.issued_at, b.expires_at, b.remaining, b.reserved, b.consumed, b.expired
FROM credit_batches AS b
WHERE b.id = ANY (ARRAY(
    SELECT DISTINCT batch_id
    FROM credit_entries
    WHERE account_id = ANY (%(keys)s::bigint[])
      AND seq IS NOT NULL
))
UNION
SELECT b.id, b.account_id, b.priority, b.issued_at, b.expires_at, b.remaining, b.reserved, b.consumed, b.expired
FROM credit_batches AS b
WHERE b.account_id = ANY (%(keys)s::bigint[])
  AND b.is_open
"""


# What was taken back twice had its own end before the first time.
FORMER_ENDS = """
SELECT DISTINCT ON (corrects) corrects, (answer ->> 'former_end')::timestamptz
FROM credit_transactions
WHERE account_id = ANY (%(keys)s::bigint[])
  AND kind = 'clawback'
  AND reference IS NOT NULL
ORDER BY corrects, nth
"""


async def _batches(conn: Connection, account_ids: Sequence[int]) -> dict[int, dict[UUID, Batch]]:
    found: dict[int, dict[UUID, Batch]] = {}
    arguments = {"keys": list(account_ids)}
    former = dict(await (await conn.execute(FORMER_ENDS, arguments)).fetchall())
    cursor = await conn.execute(BATCHES, arguments)
    async for id, account_id, priority, issued_at, expires_at, *stored in cursor:
        former_end = former.get(id, expires_at) or NEVER
        batch = Batch(id, account_id, priority, issued_at, expires_at or NEVER, former_end, tuple(stored))
        found.setdefault(account_id, {})[id] = batch
    return found


# Transactions without a movement have a reference: reservations, and releases that expired nothing.
STEPS = """
WITH moved AS MATERIALIZED (
    SELECT account_id, transaction_id, array_agg(batch_id ORDER BY seq) AS batch_ids,
           array_agg(amount ORDER BY seq) AS amounts
    FROM credit_entries
    WHERE account_id = ANY (%(keys)s::bigint[])
      AND seq IS NOT NULL
    GROUP BY account_id, transaction_id
), mine AS (
    SELECT id
    FROM credit_transactions
    WHERE id = ANY (ARRAY(SELECT transaction_id FROM moved))
    UNION
    SELECT id
    FROM credit_transactions
    WHERE account_id = ANY (%(keys)s::bigint[])
      AND reference IS NOT NULL
      AND kind IN ('reserve', 'release')
)
SELECT t.account_id, t.id, t.kind, t.created_at, t.corrects, coalesce((t.answer ->> 'captured')::bigint, 0),
       m.batch_ids, m.amounts, CASE WHEN t.kind = 'reserve' THEN t.answer -> 'batches' END
FROM credit_transactions AS t
LEFT JOIN moved AS m ON m.transaction_id = t.id
WHERE t.id = ANY (ARRAY(SELECT id FROM mine))
ORDER BY t.account_id, t.nth
"""


async def _steps(conn: Connection, account_ids: Sequence[int]) -> AsyncIterator[Step]:
    async with conn.cursor(name=f"replay_{new_claim_id().hex}") as cursor:
        cursor.itersize = ROWS_AT_ONCE
        await cursor.execute(STEPS, {"keys": list(account_ids)})
        async for account_id, id, kind, at, corrects, captured, batch_ids, amounts, parts in cursor:
            entries = list(zip(batch_ids or (), amounts or (), strict=True))
            taken = [_part(part) for part in parts or ()]
            yield Step(account_id, id, kind, at, corrects, captured, entries, taken)


def _part(part: dict[str, Any]) -> Part:
    return UUID(part["id"]), part["amount"]
