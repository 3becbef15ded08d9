"""stripe_events: each event of Stripe once, in the transaction of what it causes.

Nothing here answers Stripe with an error for what an event holds: it would post the same for three days. What cannot be
applied is rolled back alone, kept as `failed` with its reason, opens an alert, and is tried again when it is resent.
Locks: the event → its subscription, payment or charge → the purchase → its wallet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from uuid import UUID

import psycopg

from nightmail.rules.stripe_objects import (
    BadStripeEvent,
    MeterErrors,
    NotOurs,
    StripeEvent,
    kept_of,
    read_invoice,
    read_invoice_payment,
    read_refund,
    read_session,
    read_subscription,
)
from nightmail.store.database import Connection, is_data_fault
from nightmail.store.overage import mark_refused_later
from nightmail.store.stripe_payments import note_invoice, note_payment, settle_subscription, take_pack, take_refund
from nightmail.store.stripe_subscriptions import Applied, link_subscription, pay_subscription, take_subscription

Outcome = Literal["applied", "ignored", "stale", "failed", "repeated"]

SUBSCRIPTION_TYPES = frozenset(
    f"customer.subscription.{change}" for change in ("created", "updated", "deleted", "paused", "resumed")
)
SESSION_TYPES = frozenset({"checkout.session.completed", "checkout.session.async_payment_succeeded"})
METER_TYPES = frozenset({"v1.billing.meter.error_report_triggered", "v1.billing.meter.no_meter_found"})
# What the endpoint must be subscribed to, and what a separate one for thin events: docs/stripe.md lists them.
SNAPSHOT_TYPES = SUBSCRIPTION_TYPES | SESSION_TYPES | {"invoice.paid", "invoice_payment.paid", "charge.refunded"}
REASON_CHARACTERS = 500


@dataclass(frozen=True, slots=True)
class Received:
    """What became of an event; `error` is the reason when it is `failed` or `ignored`."""

    outcome: Outcome
    error: str | None = None


# A second delivery at the same time waits here for the first to commit, and then finds the row. What failed is tried
# again.
REMEMBER = """
INSERT INTO stripe_events AS e (id, type, created_at, outcome, error)
VALUES (%(id)s, %(type)s, %(created_at)s, 'failed', 'not applied')
ON CONFLICT (id) DO UPDATE
SET received_at = nm_now()
WHERE e.outcome = 'failed'
"""

SETTLE = """
UPDATE stripe_events
SET outcome = %(outcome)s, org_id = %(org_id)s, purchase_id = %(purchase_id)s, error = %(error)s
WHERE id = %(id)s
"""


async def receive_event(conn: Connection, event: StripeEvent, errors: MeterErrors | None = None) -> Received:
    """Apply an event once; `errors` are those that an event about a meter tells of."""
    async with conn.transaction():
        remember = {"id": event.id, "type": event.type, "created_at": event.created_at}
        if (await conn.execute(REMEMBER, remember)).rowcount == 0:
            return Received("repeated")
        applied = await _apply_alone(conn, event, errors)
        error = applied.why[:REASON_CHARACTERS] if applied.why else None
        await conn.execute(
            SETTLE,
            {
                "id": event.id,
                "outcome": applied.outcome,
                "org_id": applied.org_id,
                "purchase_id": applied.purchase_id,
                "error": error,
            },
        )
    return Received(applied.outcome, error)


async def _apply_alone(conn: Connection, event: StripeEvent, errors: MeterErrors | None) -> Applied:
    """Apply within a savepoint, so that what fails leaves nothing but its reason."""
    try:
        async with conn.transaction():
            return await _apply(conn, event, errors)
    except (NotOurs, BadStripeEvent) as error:
        return Applied("failed", why=str(error))
    except OverflowError as error:
        return Applied("failed", why=str(error))
    except psycopg.Error as error:
        if not is_data_fault(error):
            raise
        return Applied("failed", why=f"{type(error).__name__}: {error.diag.message_primary}")


async def _apply(conn: Connection, event: StripeEvent, errors: MeterErrors | None) -> Applied:
    kind = event.type
    if kind in SUBSCRIPTION_TYPES:
        state = kept_of(event.object)
        told = read_subscription(state)
        applied = await take_subscription(conn, told, state, kind, event.created_at)
        await settle_subscription(conn, told.id)
        return applied
    if kind in SESSION_TYPES:
        session = read_session(event.object)
        if session.mode == "payment":
            return await take_pack(conn, session)
        if session.mode == "subscription":
            applied = await link_subscription(conn, session)
            await settle_subscription(conn, session.subscription_id or "")
            return applied
        return Applied("ignored", why=f"a session of mode {session.mode} buys nothing")
    if kind == "invoice.paid":
        invoice = read_invoice(event.object)
        await note_invoice(conn, invoice)
        applied = await pay_subscription(conn, invoice, event.created_at)
        await settle_subscription(conn, invoice.subscription_id or "")
        return applied
    if kind == "invoice_payment.paid":
        return await note_payment(conn, *read_invoice_payment(event.object))
    if kind == "charge.refunded":
        return await take_refund(conn, read_refund(event.object))
    if kind in METER_TYPES:
        return await _take_meter_errors(conn, errors or MeterErrors(0, {}, "the event told nothing"))
    return Applied("ignored", why="not a type that means something here")


async def _take_meter_errors(conn: Connection, errors: MeterErrors) -> Applied:
    """Mark the reports that Stripe could not count; what it does not name is for a person to look up."""
    orgs = await mark_refused_later(conn, dict(errors.by_identifier))
    if errors.total > len(orgs):
        first = next(iter(errors.by_identifier.values()), "")
        return Applied(
            "failed",
            why=f"a meter could not count {errors.total} events, {len(orgs)} of them named and ours: "
            f"{errors.summary} {first}",
        )
    return Applied("applied", org_id=orgs[0] if len(set(orgs)) == 1 else None)


@dataclass(frozen=True, slots=True)
class EventView:
    """An event as it was taken."""

    id: str
    type: str
    outcome: str
    org_id: UUID | None
    purchase_id: UUID | None
    error: str | None
    created_at: datetime
    received_at: datetime


LIST = """
SELECT id, type, outcome, org_id, purchase_id, error, created_at, received_at
FROM stripe_events
WHERE %(outcome)s::text IS NULL OR outcome = %(outcome)s
ORDER BY received_at DESC, id DESC
LIMIT %(limit)s
"""


async def list_events(conn: Connection, *, outcome: str | None, limit: int) -> Sequence[EventView]:
    """Return the newest events, those of one outcome if it is given."""
    cursor = await conn.execute(LIST, {"outcome": outcome, "limit": limit})
    return [EventView(*row) for row in await cursor.fetchall()]
