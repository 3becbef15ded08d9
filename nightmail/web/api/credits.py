"""/credits/{user}: what a user can spend, spending it, and what became of it.

Credits belong to a user of an org, in one env: `user` is any string of yours. Nothing here makes credits (see
credit_grants), so that an org key may do all of it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from nightmail.rules.credits import MAX_AMOUNT, UNNAMED_SERVICE, fingerprint
from nightmail.store import credit_history, credits
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
from nightmail.web.api.credit_items import (
    Balance,
    EntryExplained,
    EntryItem,
    InsufficientCredits,
    ReservationSettled,
    Spent,
    balance_item,
    entry_item,
    explained_item,
)
from nightmail.web.operation import Call, Operation, PathKind, Reply
from nightmail.web.paging import ListOf
from nightmail.web.problems import Problem, invalid, missing_field, not_found

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


class EntryPage(Owner, kw_only=True):
    """Which part of the history."""

    limit: Annotated[int, Meta(ge=1, le=100, description="How many, 1 to 100.")] = 20
    after: Annotated[EntryId | None, Meta(description="Continue with what is older than this id.")] = None
    before: Annotated[EntryId | None, Meta(description="Continue with what is newer than this id.")] = None

    def __post_init__(self) -> None:
        """Refuse two directions at once."""
        if self.after is not None and self.before is not None:
            raise invalid("Use either `after` or `before`, not both.")


async def get_credits(call: Call[None]) -> Reply:
    """Return what a user can spend."""
    return await _show(call, await wallet_of(call))


async def _show(call: Call[Any], wallet: Wallet) -> Reply:
    async with call.services.database.connection() as conn:
        view = await credit_history.get_balance(conn, wallet)
    if view is None:
        raise not_found("Credit account")
    return Reply(balance_item(view))


async def change_credits(call: Call[ChangeCredits]) -> Reply:
    """Choose when credits.low is told."""
    wallet = await wallet_of(call)
    if not await call.services.database.run(lambda conn: credits.set_low_below(conn, wallet, call.body.low_below)):
        raise not_found("Credit account")
    return await _show(call, wallet)


async def consume_credits(call: Call[Spend]) -> Reply:
    """Spend credits."""
    return await _spend(call, "consume", credits.consume)


async def reserve_credits(call: Call[Spend]) -> Reply:
    """Set credits aside, to be captured or released."""
    return await _spend(call, "reserve", credits.reserve)


async def _spend(
    call: Call[Spend], kind: Literal["consume", "reserve"], operation: Callable[..., Awaitable[Any]]
) -> Reply:
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
        try:
            amount = body.amount or await _price(conn, wallet, body)
        except Problem:
            # The price is gone, and what was spent while there was one is spent: its request must not look refused.
            before = await credits.find_spend(conn, wallet, kind=kind, reference=reference, request=request)
            if before is not None:
                return before
            raise
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
    return Reply(explained_item(wallet, found))


def _reply(result: Any, kind: type[msgspec.Struct], what: str) -> Reply:
    """Return the answer that the ledger keeps, or raise the Problem that a refusal is."""
    if not isinstance(result, Done):
        raise refusal(result, what)
    headers: Sequence[tuple[bytes, bytes]] = [(b"idempotent-replayed", b"true")] if result.is_replay else []
    return Reply(msgspec.convert(result.answer, kind), 200, headers)


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
