"""What Stripe's events hold, read into our own words. Pure: nothing here knows who pays for what.

Fields have moved between versions of Stripe's API, and an endpoint speaks the version it was made with: both places are
read. What an event must have and has not raises BadStripeEvent; what it tells of an owner that cannot be ours (an org
that is no UUID, an env nobody has) raises NotOurs with words for the operator, who wrote that metadata.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

MAX_TEXT = 255
DETAIL_CHARACTERS = 300
_PLAN = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
# Two events of one subscription may bear the same second: what was made before what.
_TYPE_RANK = {"customer.subscription.created": 0, "customer.subscription.deleted": 2}
_STATUS_RANK = {"incomplete": 0, "trialing": 1, "incomplete_expired": 3, "canceled": 3}
_USUAL_RANK = {"type": 1, "status": 2}


class BadStripeEvent(ValueError):
    """The body is no event of Stripe, or lacks what every event of its type has."""


class NotOurs(ValueError):
    """The event cannot be applied; the message says what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class StripeEvent:
    """An event; a thin one has no `object` but perhaps `data`, else it must be fetched."""

    id: str
    type: str
    created_at: datetime
    is_thin: bool
    object: Mapping[str, Any]
    data: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Owner:
    """Metadata of a session or subscription: who pays for what of ours."""

    org_id: UUID | None = None
    env: str = "live"
    user_id: str | None = None
    plan_id: str | None = None
    org_plan: str | None = None

    def over(self, other: Owner) -> Owner:
        """Return this owner, what it leaves open taken from the other, unless they are of two orgs."""
        if self.org_id is None:
            return other
        if other.org_id != self.org_id:
            return self
        return Owner(
            self.org_id,
            self.env,
            self.user_id or other.user_id,
            self.plan_id or other.plan_id,
            self.org_plan or other.org_plan,
        )


@dataclass(frozen=True, slots=True)
class Price:
    """A price of a subscription's item; a metered one has no quantity."""

    id: str
    lookup_key: str | None
    quantity: int | None


@dataclass(frozen=True, slots=True)
class Subscription:
    """A subscription as one event tells it.

    `anchor` is where its billing periods begin, which may be to come; `ends_at` is when it ends or has ended, None
    when it goes on.
    """

    id: str
    status: str
    customer: str
    owner: Owner
    prices: tuple[Price, ...]
    anchor: datetime
    started_at: datetime
    trial_ends_at: datetime | None = None
    ends_at: datetime | None = None
    latest_invoice: str | None = None


@dataclass(frozen=True, slots=True)
class Session:
    """A checkout session that was completed; `payment_id` is its payment intent, None when nothing was to pay."""

    id: str
    mode: str
    is_paid: bool
    owner: Owner
    quantity: int
    subscription_id: str | None
    payment_id: str | None


@dataclass(frozen=True, slots=True)
class Invoice:
    """A paid invoice of a subscription, and what time it pays for."""

    id: str
    subscription_id: str | None
    payment_ids: tuple[str, ...]
    since: datetime | None
    until: datetime | None


@dataclass(frozen=True, slots=True)
class Refund:
    """A charge and how much of it was paid back in all; `payment_ids` are names its payment may be known by."""

    charge_id: str
    payment_ids: tuple[str, ...]
    paid: int
    refunded: int


@dataclass(frozen=True, slots=True)
class MeterErrors:
    """What Stripe could not count after it had accepted it: why, by identifier; `total` counts all of them."""

    total: int
    by_identifier: Mapping[str, str]
    summary: str


def read_event(value: Any) -> StripeEvent:
    """Return the event that a body is. Raises BadStripeEvent."""
    if not isinstance(value, dict):
        raise BadStripeEvent("it is not a JSON object")
    kind = value.get("object")
    if kind not in ("event", "v2.core.event"):
        raise BadStripeEvent("`object` is neither `event` nor `v2.core.event`")
    is_thin = kind == "v2.core.event"
    data = value.get("data")
    thing = None if is_thin or not isinstance(data, dict) else data.get("object")
    if not is_thin and not isinstance(thing, dict):
        raise BadStripeEvent("`data.object` is missing")
    return StripeEvent(
        _text(value, "id"),
        _text(value, "type"),
        _iso(value, "created") if is_thin else _time(value, "created"),
        is_thin,
        thing or {},
        data if is_thin and isinstance(data, dict) else None,
    )


def order_of(event_type: str, status: str) -> int:
    """Return what orders events of one subscription that were made in the same second."""
    by_type = _TYPE_RANK.get(event_type, _USUAL_RANK["type"])
    return by_type * 10 + _STATUS_RANK.get(status, _USUAL_RANK["status"])


def read_owner(metadata: Any) -> Owner:
    """Return the owner that metadata names. Raises NotOurs."""
    given = metadata if isinstance(metadata, dict) else {}

    def text(name: str, limit: int = 200) -> str | None:
        value = given.get(name)
        if value in (None, ""):
            return None
        if not isinstance(value, str) or len(value) > limit or "\0" in value:
            raise NotOurs(f"metadata {name} must be text of at most {limit} characters")
        return value

    org = text("nightmail_org")
    if org is None:
        return Owner()
    try:
        org_id = UUID(org)
    except ValueError:
        raise NotOurs("metadata nightmail_org must be the id of an org, a UUID") from None
    env = text("nightmail_env") or "live"
    if env not in ("live", "test"):
        raise NotOurs("metadata nightmail_env must be live or test")
    plans = {name: text(name, 64) for name in ("nightmail_plan", "nightmail_org_plan")}
    for name, plan in plans.items():
        if plan is not None and not _PLAN.fullmatch(plan):
            raise NotOurs(f"metadata {name} must be the id of a plan: a-z, 0-9, `_`, `.` and `-`")
    return Owner(org_id, env, text("nightmail_user"), plans["nightmail_plan"], plans["nightmail_org_plan"])


def read_subscription(value: Mapping[str, Any]) -> Subscription:
    """Return a subscription. Raises BadStripeEvent or NotOurs."""
    listed = value.get("items")
    entries = listed.get("data") if isinstance(listed, dict) else None
    items = [item for item in entries if isinstance(item, dict)] if isinstance(entries, list) else []
    prices = tuple(_price(item) for item in items)
    ended = _maybe_time(value, "ended_at")
    if ended is None and value.get("status") == "canceled":
        ended = _maybe_time(value, "canceled_at")
    if ended is None:
        ended = _maybe_time(value, "cancel_at")
    if ended is None and value.get("cancel_at_period_end") is True:
        ends = [_maybe_time(item, "current_period_end") for item in items]
        ended = _maybe_time(value, "current_period_end") or max((end for end in ends if end), default=None)
    started = _maybe_time(value, "start_date") or _maybe_time(value, "created")
    anchor = _maybe_time(value, "billing_cycle_anchor") or started
    if anchor is None:
        raise BadStripeEvent("`billing_cycle_anchor` is missing")
    return Subscription(
        _text(value, "id"),
        _text(value, "status"),
        _id_of(value, "customer") or "",
        read_owner(value.get("metadata")),
        prices,
        anchor,
        started or anchor,
        _maybe_time(value, "trial_end"),
        ended,
        _id_of(value, "latest_invoice"),
    )


KEPT = (
    "id", "status", "customer", "metadata", "billing_cycle_anchor", "start_date", "created", "trial_end", "ended_at",
    "canceled_at", "cancel_at", "cancel_at_period_end", "current_period_end", "latest_invoice",
)  # fmt: skip
ITEM_KEPT = ("price", "quantity", "current_period_end")


def kept_of(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `read_subscription` reads of a subscription, and nothing else: the rest is not ours to keep."""
    listed = value.get("items")
    entries = listed.get("data") if isinstance(listed, dict) else None
    items = [
        {name: item[name] for name in ITEM_KEPT if name in item}
        for item in (entries if isinstance(entries, list) else [])
        if isinstance(item, dict)
    ]
    return {**{name: value[name] for name in KEPT if name in value}, "items": {"data": items}}


def read_session(value: Mapping[str, Any]) -> Session:
    """Return a completed checkout session. Raises BadStripeEvent or NotOurs."""
    metadata = value.get("metadata")
    quantity = metadata.get("nightmail_quantity") if isinstance(metadata, dict) else None
    if quantity is not None and not re.fullmatch(r"[1-9][0-9]{0,3}", str(quantity)):
        raise NotOurs("metadata nightmail_quantity must be a whole number from 1 to 9999")
    return Session(
        _text(value, "id"),
        _text(value, "mode"),
        value.get("payment_status") in ("paid", "no_payment_required"),
        read_owner(metadata),
        int(quantity or 1),
        _id_of(value, "subscription"),
        _id_of(value, "payment_intent"),
    )


def read_invoice(value: Mapping[str, Any]) -> Invoice:
    """Return a paid invoice. Raises BadStripeEvent."""
    parent = value.get("parent")
    details = parent.get("subscription_details") if isinstance(parent, dict) else None
    subscription = _id_of(value, "subscription") or (
        _id_of(details, "subscription") if isinstance(details, dict) else None
    )
    payments = value.get("payments")
    entries = payments.get("data") if isinstance(payments, dict) else None
    names = [_id_of(value, "payment_intent"), _id_of(value, "charge")]
    for entry in entries if isinstance(entries, list) else []:
        payment = entry.get("payment") if isinstance(entry, dict) else None
        if isinstance(payment, dict):
            names += [_id_of(payment, "payment_intent"), _id_of(payment, "charge")]
    listed = value.get("lines")
    lines = listed.get("data") if isinstance(listed, dict) else None
    spans = [line.get("period") for line in (lines if isinstance(lines, list) else []) if isinstance(line, dict)]
    starts = [_maybe_time(span, "start") for span in spans if isinstance(span, dict)]
    ends = [_maybe_time(span, "end") for span in spans if isinstance(span, dict)]
    return Invoice(
        _text(value, "id"),
        subscription,
        tuple(name for name in names if name),
        min((at for at in starts if at), default=None),
        max((at for at in ends if at), default=None),
    )


def read_invoice_payment(value: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Return the invoice and the payments of an `invoice_payment`. Raises BadStripeEvent."""
    payment = value.get("payment")
    names = [_id_of(payment, "payment_intent"), _id_of(payment, "charge")] if isinstance(payment, dict) else []
    invoice = _id_of(value, "invoice")
    if invoice is None:
        raise BadStripeEvent("`invoice` is missing")
    return invoice, tuple(name for name in names if name)


def read_refund(value: Mapping[str, Any]) -> Refund:
    """Return how much of a charge was paid back. Raises BadStripeEvent."""
    charge = _text(value, "id")
    names = [_id_of(value, "payment_intent"), charge, _id_of(value, "invoice")]
    paid, refunded = value.get("amount_captured") or value.get("amount"), value.get("amount_refunded")
    if not isinstance(paid, int) or not isinstance(refunded, int) or not 0 <= refunded <= paid or paid == 0:
        raise BadStripeEvent("`amount` and `amount_refunded` do not fit together")
    return Refund(charge, tuple(name for name in names if name), paid, refunded)


def read_meter_errors(data: Any) -> MeterErrors:
    """Return the errors that the `data` of an event of a meter tells of; what has another shape tells of none."""
    found: dict[str, str] = {}
    reason = _part(data, "reason")
    kinds = reason.get("error_types")
    for kind in kinds if isinstance(kinds, list) else []:
        samples = _part(kind).get("sample_errors")
        for sample in samples if isinstance(samples, list) else []:
            request = _part(sample, "request")
            identifier = request.get("identifier") or request.get("idempotency_key")
            if isinstance(identifier, str):
                text = f"{_part(kind).get('code')}: {_part(sample).get('error_message')}"
                found[identifier] = text[:DETAIL_CHARACTERS]
    total = reason.get("error_count")
    summary = _part(data).get("developer_message_summary") or ""
    return MeterErrors(total if isinstance(total, int) else len(found), found, str(summary)[:DETAIL_CHARACTERS])


def _part(value: Any, name: str | None = None) -> Mapping[str, Any]:
    part = value.get(name) if name is not None and isinstance(value, dict) else value
    return part if isinstance(part, dict) else {}


def _price(item: Mapping[str, Any]) -> Price:
    price = item.get("price")
    if not isinstance(price, dict):
        raise BadStripeEvent("`items.data[].price` is missing")
    key, quantity = price.get("lookup_key"), item.get("quantity")
    return Price(
        _text(price, "id"), key if isinstance(key, str) else None, quantity if isinstance(quantity, int) else None
    )


def _text(value: Mapping[str, Any], name: str) -> str:
    text = value.get(name)
    if not isinstance(text, str) or not 0 < len(text) <= MAX_TEXT or "\0" in text:
        raise BadStripeEvent(f"`{name}` is missing or not text")
    return text


def _id_of(value: Mapping[str, Any], name: str) -> str | None:
    """Return an id, also of an object that was expanded; None when there is none."""
    given = value.get(name)
    if isinstance(given, dict):
        given = given.get("id")
    if given is None:
        return None
    if not isinstance(given, str) or not 0 < len(given) <= MAX_TEXT:
        raise BadStripeEvent(f"`{name}` is no id")
    return given


def _time(value: Mapping[str, Any], name: str) -> datetime:
    at = _maybe_time(value, name)
    if at is None:
        raise BadStripeEvent(f"`{name}` is missing")
    return at


def _maybe_time(value: Mapping[str, Any], name: str) -> datetime | None:
    seconds = value.get(name)
    if seconds is None:
        return None
    # Up to the year 2200: what PostgreSQL and our months can hold with room to spare.
    if not isinstance(seconds, int) or isinstance(seconds, bool) or not 0 <= seconds < 7_258_118_400:
        raise BadStripeEvent(f"`{name}` is no time in seconds")
    return datetime.fromtimestamp(seconds, UTC)


def _iso(value: Mapping[str, Any], name: str) -> datetime:
    try:
        at = datetime.fromisoformat(_text(value, name))
    except ValueError:
        raise BadStripeEvent(f"`{name}` is no time") from None
    if at.tzinfo is None:
        raise BadStripeEvent(f"`{name}` is a time without zone")
    return at.astimezone(UTC)
