"""What the credit operations answer, and how it is made from what the store returns."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from nightmail.store.credit_history import BalanceView, BatchView, EntryView, Explanation
from nightmail.store.credits import Wallet


class Part(msgspec.Struct):
    """Credits of one batch."""

    id: str
    amount: int


class Spent(msgspec.Struct, kw_only=True):
    """What was spent or set aside, from which batches, and what can be spent after it."""

    reference_id: str
    amount: int
    service: str
    balance: int
    batches: list[Part]
    object: Literal["credit_spend"] = "credit_spend"


class ReservationSettled(msgspec.Struct, kw_only=True):
    """What became of a reservation: spent, given back, or expired because its batch had ended."""

    reference_id: str
    captured: int
    released: int
    expired: int
    object: Literal["credit_settlement"] = "credit_settlement"


class InsufficientCredits(msgspec.Struct, rename={"status_code": "statusCode"}, kw_only=True):
    """Nothing was spent: what was needed, what can be spent, and what was missing."""

    status_code: int = 402
    name: str = "insufficient_credits"
    message: str
    required: int
    available: int
    missing: int


class BatchItem(msgspec.Struct, kw_only=True):
    """Credits that came together and end together; `expires_at` null: never."""

    id: str
    remaining: int
    granted: int
    priority: int
    source: str
    issued_at: datetime
    expires_at: datetime | None
    purchase_id: str | None


class NextExpiry(msgspec.Struct):
    """The next credits that end unless they are spent."""

    at: datetime
    amount: int


class NextGrantItem(msgspec.Struct):
    """The next month of a subscription."""

    at: datetime
    amount: int
    plan: str
    purchase_id: str


class Balance(msgspec.Struct, kw_only=True):
    """What a user can spend now; `batches` in the order in which they are spent (the first 200)."""

    user_id: str
    balance: int
    reserved: int
    low_below: int | None
    next_expiry: NextExpiry | None
    next_grant: NextGrantItem | None
    batches: list[BatchItem]
    object: Literal["credits"] = "credits"


class EntryItem(msgspec.Struct, kw_only=True):
    """A movement of credits in or out; `id` counts a user's movements from 1.

    `balance_after` is the ledger's: with what is reserved, and with what has ended and is not booked yet.
    """

    id: int
    kind: str
    amount: int
    balance_after: int
    reference_id: str
    reason: str | None
    batch_id: str
    created_at: datetime
    object: Literal["credit_entry"] = "credit_entry"


class LineItem(msgspec.Struct, kw_only=True):
    """One side of the movement: an account of the ledger and what it gained."""

    account: str
    amount: int
    batch_id: str | None
    entry: int | None


class EntryExplained(msgspec.Struct, kw_only=True):
    """Why an entry is there: a sentence, and the whole transaction, whose lines sum to zero."""

    entry: EntryItem
    explanation: str
    lines: list[LineItem]
    batch: BatchItem
    corrects: str | None
    answer: dict[str, Any] | None
    object: Literal["credit_entry_explanation"] = "credit_entry_explanation"


def balance_item(view: BalanceView) -> Balance:
    """Return a wallet as clients see it."""
    grant = view.next_grant
    return Balance(
        user_id=view.user_id,
        balance=view.balance,
        reserved=view.reserved,
        low_below=view.low_below,
        next_expiry=NextExpiry(view.next_expiry[0].astimezone(UTC), view.next_expiry[1]) if view.next_expiry else None,
        next_grant=NextGrantItem(grant.at.astimezone(UTC), grant.amount, grant.plan, str(grant.purchase_id))
        if grant
        else None,
        batches=[batch_item(batch) for batch in view.batches],
    )


def batch_item(view: BatchView) -> BatchItem:
    """Return a batch as clients see it."""
    return BatchItem(
        id=str(view.id),
        remaining=view.remaining,
        granted=view.granted,
        priority=view.priority,
        source=view.source,
        issued_at=view.issued_at.astimezone(UTC),
        expires_at=view.expires_at and view.expires_at.astimezone(UTC),
        purchase_id=str(view.purchase_id) if view.purchase_id else None,
    )


def entry_item(view: EntryView) -> EntryItem:
    """Return an entry as clients see it."""
    return EntryItem(
        id=view.seq,
        kind=view.kind,
        amount=view.amount,
        balance_after=view.balance_after,
        reference_id=view.reference_id,
        reason=view.reason,
        batch_id=str(view.batch_id),
        created_at=view.created_at.astimezone(UTC),
    )


SENTENCES = {
    "grant": "{amount} credits were given to {user} from {others}.",
    "consume": "{user} spent {amount} credits of this batch on {others}.",
    "capture": "{amount} credits that {user} had set aside were spent on {others}.",
    "release": "{amount} credits that were set aside came back after their batch had ended, and expired.",
    "refund": "{amount} credits came back to {user} from {others}.",
    "clawback": "{amount} credits of this batch were taken back by {others}.",
    "expire": "{amount} credits of this batch were left when it ended.",
    "rollover": "{amount} credits moved between two months of the subscription.",
}


def explained_item(wallet: Wallet, found: Explanation) -> EntryExplained:
    """Return an entry with its explanation as clients see it."""
    others = sorted({line.account for line in found.lines if line.account != "wallet"})
    sentence = SENTENCES[found.entry.kind].format(
        amount=abs(found.entry.amount), user=wallet.user_id, others=" and ".join(others)
    )
    lines = [
        LineItem(
            account=f"wallet:{wallet.user_id}" if line.account == "wallet" else line.account,
            amount=line.amount,
            batch_id=str(line.batch_id) if line.batch_id else None,
            entry=line.seq,
        )
        for line in found.lines
    ]
    return EntryExplained(
        entry=entry_item(found.entry),
        explanation=sentence,
        lines=lines,
        batch=batch_item(found.batch),
        corrects=f"{found.corrects[0]}:{found.corrects[1]}" if found.corrects else None,
        answer=found.answer,
    )
