"""/stripe: what its prices buy, what its events came to, and what was reported to it. Bearer ADMIN_TOKEN."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from nightmail.store import plan_prices
from nightmail.store.overage import list_reports
from nightmail.store.plan_prices import PlanPrice
from nightmail.store.stripe_events import list_events
from nightmail.web.operation import Call, Operation, PathKind, Reply
from nightmail.web.paging import ListOf
from nightmail.web.problems import Problem, invalid, not_found

_PRICE = re.compile(r"[A-Za-z0-9_.:-]{1,255}")
Limit = Annotated[int, Meta(ge=1, le=100, description="How many, 1 to 100, the newest.")]


class SetPlanOfPrice(msgspec.Struct, forbid_unknown_fields=True):
    """The plan that the price buys: a subscription."""

    plan: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}\Z")]


class PlanPriceItem(msgspec.Struct, kw_only=True):
    """A price of Stripe, by id or lookup key, and the plan it buys."""

    price: str
    plan: str
    object: Literal["plan_price"] = "plan_price"


class PlanPriceDeleted(msgspec.Struct, kw_only=True):
    """The price that buys nothing any more."""

    price: str
    deleted: bool = True
    object: Literal["plan_price"] = "plan_price"


class StripeEventPage(msgspec.Struct, kw_only=True):
    """Which events."""

    limit: Limit = 20
    outcome: Literal["applied", "ignored", "stale", "failed"] | None = None


class StripeEventItem(msgspec.Struct, kw_only=True):
    """An event of Stripe and what it came to; `reason` says why it failed or was ignored."""

    id: str
    type: str
    outcome: str
    reason: str | None
    org_id: str | None
    purchase_id: str | None
    created_at: datetime
    received_at: datetime
    object: Literal["stripe_event"] = "stripe_event"


class OverageReportPage(msgspec.Struct, kw_only=True):
    """Which reports."""

    limit: Limit = 20
    state: Literal["pending", "calling", "reported", "too_old", "failed"] | None = None


class OverageReportItem(msgspec.Struct, kw_only=True):
    """A meter event: what became metered in a month since the revision before."""

    org_id: str
    channel: str
    period: str
    revision: int
    units: int
    total: int
    identifier: str
    event_name: str
    stripe_customer_id: str
    state: str
    attempts: int
    error: str | None
    event_at: datetime
    reported_at: datetime | None
    object: Literal["overage_report"] = "overage_report"


async def list_plan_prices(call: Call[None]) -> Reply:
    """List what prices buy."""
    async with call.services.database.connection() as conn:
        found = await plan_prices.list_plan_prices(conn)
    return Reply(ListOf(data=[PlanPriceItem(price=p.price, plan=p.plan_id) for p in found], has_more=False))


async def set_plan_price(call: Call[SetPlanOfPrice]) -> Reply:
    """Say which plan a price buys."""
    new = PlanPrice(_read_price(call.ids["price"]), call.body.plan)
    came = await call.services.database.run(lambda conn: plan_prices.put_plan_price(conn, new, actor=call.actor))
    if came == "unknown_plan":
        raise invalid(f"Invalid `plan` field: there is no plan `{new.plan_id}`.")
    if came == "not_a_subscription":
        raise invalid("Invalid `plan` field: a pack is bought by a checkout session whose metadata name it.")
    if came == "too_many":
        raise Problem(409, "too_many_prices", f"There are {plan_prices.MAX_PRICES} prices already: delete one first.")
    return Reply(PlanPriceItem(price=new.price, plan=new.plan_id))


async def delete_plan_price(call: Call[None]) -> Reply:
    """Forget a price."""
    price = _read_price(call.ids["price"])
    if not await call.services.database.run(lambda conn: plan_prices.delete_plan_price(conn, price, actor=call.actor)):
        raise not_found("Price")
    return Reply(PlanPriceDeleted(price=price))


async def list_stripe_events(call: Call[None]) -> Reply:
    """List events, newest first."""
    page: StripeEventPage = call.query
    async with call.services.database.connection() as conn:
        found = await list_events(conn, outcome=page.outcome, limit=page.limit)
    items = [
        StripeEventItem(
            id=e.id,
            type=e.type,
            outcome=e.outcome,
            reason=e.error,
            org_id=str(e.org_id) if e.org_id else None,
            purchase_id=str(e.purchase_id) if e.purchase_id else None,
            created_at=e.created_at.astimezone(UTC),
            received_at=e.received_at.astimezone(UTC),
        )
        for e in found
    ]
    return Reply(ListOf(data=items, has_more=len(items) == page.limit))


async def list_overage_reports(call: Call[None]) -> Reply:
    """List what was reported, newest first."""
    page: OverageReportPage = call.query
    async with call.services.database.connection() as conn:
        found = await list_reports(conn, state=page.state, limit=page.limit)
    items = [
        OverageReportItem(
            org_id=str(r.org_id),
            channel=r.channel,
            period=r.period,
            revision=r.revision,
            units=r.units,
            total=r.total,
            identifier=r.identifier,
            event_name=r.event_name,
            stripe_customer_id=r.stripe_customer_id,
            state=r.state,
            attempts=r.attempts,
            error=r.error,
            event_at=r.event_at.astimezone(UTC),
            reported_at=r.reported_at.astimezone(UTC) if r.reported_at else None,
        )
        for r in found
    ]
    return Reply(ListOf(data=items, has_more=len(items) == page.limit))


def _read_price(text: str) -> str:
    if not _PRICE.fullmatch(text):
        raise invalid("The `price` must be an id or a lookup key: 1 to 255 of A-Z, a-z, 0-9, `_`, `.`, `:` and `-`.")
    return text


_PRICE_KIND: dict[str, PathKind] = {"price": "text"}
_TAG = "Stripe (admin)"

OPERATIONS = (
    Operation(
        method="GET", path="/stripe/prices", handler=list_plan_prices, summary="List what prices of Stripe buy",
        access="admin", tag=_TAG, reply=ListOf[PlanPriceItem],
    ),
    Operation(
        method="PUT", path="/stripe/prices/{price}", handler=set_plan_price, summary="Say which plan a price buys",
        access="admin", tag=_TAG, path_kinds=_PRICE_KIND, body=SetPlanOfPrice, reply=PlanPriceItem, errors=(409,),
        example={"plan": "monthly"},
    ),
    Operation(
        method="DELETE", path="/stripe/prices/{price}", handler=delete_plan_price, summary="Forget a price",
        access="admin", tag=_TAG, path_kinds=_PRICE_KIND, reply=PlanPriceDeleted, errors=(404,),
    ),
    Operation(
        method="GET", path="/stripe/events", handler=list_stripe_events, summary="List events of Stripe",
        access="admin", tag=_TAG, query=StripeEventPage, reply=ListOf[StripeEventItem],
        description="What came to /inbound/stripe. A `failed` one is tried again when it is resent from Stripe.",
    ),
    Operation(
        method="GET", path="/stripe/reports", handler=list_overage_reports, summary="List reports of overage",
        access="admin", tag=_TAG, query=OverageReportPage, reply=ListOf[OverageReportItem],
    ),
)  # fmt: skip
