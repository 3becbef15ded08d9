"""/credits/{user}: what a user can spend, spending it, and what became of it.

Credits belong to a user of an org, in one env: `user` is any string of yours. Nothing here makes credits (see
credit_grants), so that an org key may do all of it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from nightmail.rules.credits import MAX_AMOUNT, UNNAMED_SERVICE, fingerprint
from nightmail.store import credit_history, credits
from nightmail.store.credit_history import BalanceView, BatchView, EntryView, Explanation
from nightmail.store.credit_prices import get_price
from nightmail.store.credits import Done, Insufficient, Wallet
from nightmail.store.database import Connection
from nightmail.web.api.credit_fields import (
    MESSAGE_SERVICES,
    Amount,
    Owner,
    Reference,
    Service,
    read_own_reference,
    refusal,
    wallet_of,
)
from nightmail.web.operation import Call, Operation, PathKind, Reply
from nightmail.web.paging import ListOf
from nightmail.web.problems import invalid, missing_field, not_found

# More movements than any wallet will have; a double holds it exactly.
MAX_SEQ = 10**15
EntryId = Annotated[int, Meta(ge=1, le=MAX_SEQ)]


class Spend(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What to spend: an amount, or units of a service that has a price (see /credit-prices)."""

    reference_id: Reference
    amount: Amount | None = None
    service: Annotated[Service | None, Meta(description="What it is for; with an amount, only a name.")] = None
    quantity: Annotated[int, Meta(ge=1, le=1_000_000, description="Units of the service.")] | None = None


class Capture(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which reservation to spend, and how much of it: all when left out. The rest goes back."""

    reference_id: Reference
    amount: Amount | None = None


class Release(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which reservation to give back."""

    reference_id: Reference


class ChangeCredits(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Below which balance a spend makes the event credits.low; null for none."""

    low_below: Annotated[int, Meta(ge=1, le=MAX_AMOUNT)] | None


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


class EntryPage(Owner, kw_only=True):
    """Which part of the history."""

    limit: Annotated[int, Meta(ge=1, le=100, description="How many, 1 to 100.")] = 20
    after: Annotated[EntryId | None, Meta(description="Continue with what is older than this id.")] = None
    before: Annotated[EntryId | None, Meta(description="Continue with what is newer than this id.")] = None

    def __post_init__(self) -> None:
        """Refuse two directions at once."""
        if self.after is not None and self.before is not None:
            raise invalid("Use either `after` or `before`, not both.")


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


async def get_credits(call: Call[None]) -> Reply:
    """Return what a user can spend."""
    return await _show(call, await wallet_of(call))


async def _show(call: Call[Any], wallet: Wallet) -> Reply:
    async with call.services.database.connection() as conn:
        view = await credit_history.get_balance(conn, wallet)
    if view is None:
        raise not_found("Credit account")
    return Reply(_balance(view))


async def change_credits(call: Call[ChangeCredits]) -> Reply:
    """Choose when credits.low is told."""
    wallet = await wallet_of(call)
    if not await call.services.database.run(lambda conn: credits.set_low_below(conn, wallet, call.body.low_below)):
        raise not_found("Credit account")
    return await _show(call, wallet)


async def consume_credits(call: Call[Spend]) -> Reply:
    """Spend credits."""
    return await _spend(call, credits.consume)


async def reserve_credits(call: Call[Spend]) -> Reply:
    """Set credits aside, to be captured or released."""
    return await _spend(call, credits.reserve)


async def _spend(call: Call[Spend], operation: Callable[..., Awaitable[Any]]) -> Reply:
    body = call.body
    reference = read_own_reference(body.reference_id)
    wallet = await wallet_of(call)
    if body.service in MESSAGE_SERVICES:
        raise invalid("Invalid `service` field: `email` and `sms` are what Nightmail itself charges messages as.")
    if body.amount is None and body.service is None:
        raise missing_field("amount")
    if body.amount is not None and body.quantity is not None:
        raise invalid("Use either `amount`, or `service` with `quantity`.")
    # Of the request as it came: when the price changes, the same request still gets its first answer.
    request = fingerprint(body.amount, body.service, body.quantity)

    async def step(conn: Connection) -> Any:
        amount = body.amount or await _price(conn, wallet, body)
        service = body.service or UNNAMED_SERVICE
        return await operation(conn, wallet, amount=amount, reference=reference, service=service, request=request)

    result = await call.services.database.run(step)
    if isinstance(result, Insufficient):
        message = f"{result.required} credits are needed and {result.available} can be spent: {result.missing} missing."
        return Reply(
            InsufficientCredits(
                message=message, required=result.required, available=result.available, missing=result.missing
            ),
            402,
        )
    return _reply(result, Spent, "Credit account")


async def _price(conn: Connection, wallet: Wallet, body: Spend) -> int:
    assert body.service is not None, "an amount or a service was given"
    price = await get_price(conn, org_id=wallet.org_id, env=wallet.env, service=body.service)
    if price is None:
        raise invalid(f"The service `{body.service}` has no price: set one with PUT /credit-prices/{body.service}.")
    amount = price * (body.quantity or 1)
    if amount > MAX_AMOUNT:
        raise invalid(f"That is {amount} credits; at most {MAX_AMOUNT} can be spent at once.")
    return amount


async def capture_credits(call: Call[Capture]) -> Reply:
    """Spend what was set aside."""
    reference = read_own_reference(call.body.reference_id)
    wallet = await wallet_of(call)
    result = await call.services.database.run(
        lambda conn: credits.capture(conn, wallet, reference=reference, amount=call.body.amount)
    )
    return _reply(result, ReservationSettled, "Reservation")


async def release_credits(call: Call[Release]) -> Reply:
    """Give back what was set aside."""
    reference = read_own_reference(call.body.reference_id)
    wallet = await wallet_of(call)
    result = await call.services.database.run(lambda conn: credits.release(conn, wallet, reference=reference))
    return _reply(result, ReservationSettled, "Reservation")


async def list_history(call: Call[None]) -> Reply:
    """List the movements of a user's credits, newest first."""
    page: EntryPage = call.query
    wallet = await wallet_of(call)
    async with call.services.database.connection() as conn:
        views, has_more = await credit_history.list_history(
            conn, wallet, limit=page.limit, after=page.after, before=page.before
        )
        if not views and await credit_history.get_balance(conn, wallet) is None:
            raise not_found("Credit account")
    return Reply(ListOf(data=[entry_item(view) for view in views], has_more=has_more))


async def explain_entry(call: Call[None]) -> Reply:
    """Explain a movement: the whole transaction, the batch, and what it corrects."""
    text = call.ids["entry"]
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise invalid("The `entry` must be a number.")
    wallet = await wallet_of(call)
    async with call.services.database.connection() as conn:
        found = await credit_history.explain_entry(conn, wallet, int(text))
    if found is None:
        raise not_found("Credit entry")
    return Reply(_explained(wallet, found))


def _reply(result: Any, kind: type[msgspec.Struct], what: str) -> Reply:
    """Return the answer that the ledger keeps, or raise the Problem that a refusal is."""
    if not isinstance(result, Done):
        raise refusal(result, what)
    headers: Sequence[tuple[bytes, bytes]] = [(b"idempotent-replayed", b"true")] if result.is_replay else []
    return Reply(msgspec.convert(result.answer, kind), 200, headers)


def _balance(view: BalanceView) -> Balance:
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
        batches=[_batch(batch) for batch in view.batches],
    )


def _batch(view: BatchView) -> BatchItem:
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


def _explained(wallet: Wallet, found: Explanation) -> EntryExplained:
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
        batch=_batch(found.batch),
        corrects=f"{found.corrects[0]}:{found.corrects[1]}" if found.corrects else None,
        answer=found.answer,
    )


_USER: dict[str, PathKind] = {"user": "text"}
_TAG = "Credits"

OPERATIONS = (
    Operation(
        method="GET", path="/credits/{user}", handler=get_credits, summary="Get what a user can spend",
        access="full_or_admin", tag=_TAG, path_kinds=_USER, query=Owner, reply=Balance, errors=(404,),
        description="The balance is what can be spent now: credits that have ended count for nothing.",
    ),
    Operation(
        method="PATCH", path="/credits/{user}", handler=change_credits, summary="Choose when credits.low is told",
        access="full_or_admin", tag=_TAG, path_kinds=_USER, query=Owner, body=ChangeCredits, reply=Balance,
        errors=(404,), example={"low_below": 100},
    ),
    Operation(
        method="POST", path="/credits/{user}/consume", handler=consume_credits, summary="Spend credits",
        access="full_or_admin", tag=_TAG, path_kinds=_USER, query=Owner, body=Spend, reply=Spent,
        errors=(402, 404, 409), example={"amount": 5, "reference_id": "render-17"},
        description="By priority, then expiry, then age of the batches. 402 says what was missing, and nothing has "
        "changed. The same `reference_id` again gets the same answer.",
    ),
    Operation(
        method="POST", path="/credits/{user}/reserve", handler=reserve_credits, summary="Set credits aside",
        access="full_or_admin", tag=_TAG, path_kinds=_USER, query=Owner, body=Spend, reply=Spent,
        errors=(402, 404, 409), example={"amount": 5, "reference_id": "render-18"},
    ),
    Operation(
        method="POST", path="/credits/{user}/capture", handler=capture_credits, summary="Spend what was set aside",
        access="full_or_admin", tag=_TAG, path_kinds=_USER, query=Owner, body=Capture, reply=ReservationSettled,
        errors=(404, 409), example={"reference_id": "render-1"},
    ),
    Operation(
        method="POST", path="/credits/{user}/release", handler=release_credits, summary="Give back what was set aside",
        access="full_or_admin", tag=_TAG, path_kinds=_USER, query=Owner, body=Release, reply=ReservationSettled,
        errors=(404, 409), example={"reference_id": "render-2"},
    ),
    Operation(
        method="GET", path="/credits/{user}/history", handler=list_history, summary="List a user's movements",
        access="full_or_admin", tag=_TAG, path_kinds=_USER, query=EntryPage, reply=ListOf[EntryItem], errors=(404,),
    ),
    Operation(
        method="GET", path="/credits/{user}/entries/{entry}", handler=explain_entry, summary="Explain a movement",
        access="full_or_admin", tag=_TAG, path_kinds={"user": "text", "entry": "text"}, query=Owner,
        reply=EntryExplained, errors=(404,),
    ),
)  # fmt: skip
