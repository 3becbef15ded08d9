"""stripe_subscriptions: the newest state of each, and what follows from it: months of credits, an org's plan.

Stripe promises no order. Every event about a subscription carries all of its state, so the newest is enough: an older
one (by the second in which Stripe made it, and within a second by what must come after what) is `stale`. Who owns a
subscription may be known only by its checkout session, which may come later: until then its state waits here.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from psycopg.types.json import Jsonb

from nightmail.errors import UnknownPlan
from nightmail.rules.credits import PurchaseStatus
from nightmail.rules.stripe_objects import Invoice, NotOurs, Owner, Session, Subscription, order_of, read_subscription
from nightmail.store.credits import Wallet
from nightmail.store.database import Connection
from nightmail.store.orgs import OrgChange, change_org, get_org
from nightmail.store.plans import get_plan
from nightmail.store.purchases import (
    Followed,
    NewPurchase,
    PurchaseView,
    create_purchase,
    find_purchase,
    follow_subscription,
    get_purchase,
)

ACTOR = "stripe"
# What an org falls back to when nobody pays for its plan any more.
UNPAID_PLAN, UNPAID_BILLING = "free", "quota"
LIVE = frozenset({"trialing", "active", "past_due"})
ENDED = frozenset({"canceled", "incomplete_expired"})


@dataclass(frozen=True, slots=True)
class Applied:
    """What an event came to; `why` for people."""

    outcome: Literal["applied", "ignored", "stale", "failed"]
    org_id: UUID | None = None
    purchase_id: UUID | None = None
    why: str | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """The row of a subscription, locked."""

    changed_at: datetime | None
    rank: int
    state: dict[str, Any] | None
    owner: Owner
    purchase_id: UUID | None
    paid_org_id: UUID | None


LOCK = """
INSERT INTO stripe_subscriptions AS s (id)
VALUES (%(id)s)
ON CONFLICT (id) DO UPDATE SET rank = s.rank
RETURNING changed_at, rank, state, org_id, coalesce(env, 'live'), user_id, plan_id, org_plan, purchase_id,
          paid_org_id
"""


async def _lock(conn: Connection, subscription_id: str) -> Held:
    row = await (await conn.execute(LOCK, {"id": subscription_id})).fetchone()
    assert row is not None, "an upsert has one row"
    return Held(row[0], row[1], row[2], Owner(*row[3:8]), row[8], row[9])


KEEP = """
UPDATE stripe_subscriptions
SET changed_at = %(changed_at)s, rank = %(rank)s, state = %(state)s
WHERE id = %(id)s
"""


async def take_subscription(
    conn: Connection, told: Subscription, state: dict[str, Any], kind: str, at: datetime
) -> Applied:
    """Follow a subscription that Stripe tells of as it was at a moment."""
    held = await _lock(conn, told.id)
    rank = order_of(kind, told.status)
    if held.changed_at is not None and (at, rank) < (held.changed_at, held.rank):
        return Applied("stale", held.owner.org_id, held.purchase_id, "a newer state is known")
    await conn.execute(KEEP, {"id": told.id, "changed_at": at, "rank": rank, "state": Jsonb(state)})
    return await _follow(conn, told, told.owner.over(held.owner), held, at)


LINK = """
UPDATE stripe_subscriptions
SET org_id = %(org_id)s, env = %(env)s, user_id = %(user_id)s, plan_id = %(plan_id)s, org_plan = %(org_plan)s
WHERE id = %(id)s
"""


async def link_subscription(conn: Connection, session: Session) -> Applied:
    """Note who a subscription belongs to, and follow it as far as it is known."""
    if session.owner.org_id is None or session.subscription_id is None:
        return Applied("ignored", why="no metadata nightmail_org")
    held = await _lock(conn, session.subscription_id)
    owner = session.owner
    await conn.execute(
        LINK,
        {
            "id": session.subscription_id,
            "org_id": owner.org_id,
            "env": owner.env,
            "user_id": owner.user_id,
            "plan_id": owner.plan_id,
            "org_plan": owner.org_plan,
        },
    )
    if held.state is None or held.changed_at is None:
        await _check_org(conn, owner)
        return Applied("applied", owner.org_id)
    told = read_subscription(held.state)
    return await _follow(conn, told, told.owner.over(owner), held, held.changed_at)


async def pay_subscription(conn: Connection, invoice: Invoice, at: datetime) -> Applied:
    """A paid invoice makes a subscription active that was past due, unless something newer is known of it."""
    if invoice.subscription_id is None:
        return Applied("ignored", why="an invoice without a subscription")
    held = await _lock(conn, invoice.subscription_id)
    if held.state is None or held.changed_at is None:
        return Applied("ignored", why="the subscription is not known yet: its own events tell that it is paid")
    told = read_subscription(held.state)
    if told.status not in ("past_due", "unpaid") or told.latest_invoice not in (None, invoice.id):
        return Applied("ignored", held.owner.org_id, held.purchase_id, "the subscription was not waiting for it")
    rank = order_of("customer.subscription.updated", "active")
    if (at, rank) < (held.changed_at, held.rank):
        return Applied("stale", held.owner.org_id, held.purchase_id, "a newer state is known")
    state = {**held.state, "status": "active"}
    await conn.execute(KEEP, {"id": told.id, "changed_at": at, "rank": rank, "state": Jsonb(state)})
    paid = read_subscription(state)
    return await _follow(conn, paid, paid.owner.over(held.owner), held, at)


async def _follow(conn: Connection, told: Subscription, owner: Owner, held: Held, at: datetime) -> Applied:
    if owner.org_id is None:
        await _follow_org(conn, told, held, owner)
        return Applied("ignored", why="no metadata nightmail_org, on the subscription or its checkout session")
    await _check_org(conn, owner)
    if owner.user_id is None and owner.org_plan is None:
        raise NotOurs("metadata names an org, but neither nightmail_user nor nightmail_org_plan: what was bought?")
    await _follow_org(conn, told, held, owner)
    if owner.user_id is None:
        return Applied("applied", owner.org_id)
    followed = await _follow_credits(conn, told, owner, held.purchase_id, at)
    if followed is None:
        return Applied("ignored" if owner.org_plan is None else "applied", owner.org_id, why=f"it is {told.status}")
    return Applied("applied", owner.org_id, followed)


ORG = "SELECT EXISTS (SELECT FROM orgs WHERE id = %(id)s)"


async def _check_org(conn: Connection, owner: Owner) -> None:
    row = await (await conn.execute(ORG, {"id": owner.org_id})).fetchone()
    if not (row and row[0]):
        raise NotOurs(f"there is no org {owner.org_id}: check metadata nightmail_org")


BIND = """
UPDATE stripe_subscriptions
SET purchase_id = %(purchase_id)s
WHERE id = %(id)s
"""


async def _follow_credits(
    conn: Connection, told: Subscription, owner: Owner, purchase_id: UUID | None, at: datetime
) -> UUID | None:
    """Make or change the purchase; return its id, None when there is nothing to give yet, or never was."""
    assert owner.org_id is not None, "the caller looked"
    assert owner.user_id is not None, "the caller looked"
    purchase = await get_purchase(conn, purchase_id) if purchase_id else None
    if purchase is None:
        purchase = await find_purchase(conn, owner.org_id, owner.env, told.id)
    # Nothing is given for what is not paid, nor was before as far as is known: its payment makes the purchase.
    if purchase is None and told.status not in ("trialing", "active"):
        return None
    if purchase is not None and told.status in ENDED:
        # It must end, also when its price has no plan any more.
        plan_id, quantity = purchase.plan_id, purchase.quantity
    else:
        plan_id, quantity = await _plan_of(conn, told, owner)
    if purchase is None:
        if quantity == 0:
            return None
        wallet = Wallet(owner.org_id, owner.env, owner.user_id)
        purchase = await _create(conn, wallet, told, plan_id, quantity, at)
    status, ends_at = _status_of(told, purchase), told.ends_at
    if quantity == 0:
        # Nothing is paid for nothing: as one that ended, which goes on when there is a quantity again.
        status, quantity = "canceled", purchase.quantity
        ends_at = min(known for known in (at, ends_at, purchase.ends_at) if known is not None)
    now = Followed(
        plan_id,
        status,
        at,
        told.trial_ends_at if status == "trialing" and told.trial_ends_at else _anchor_of(told, at),
        (ends_at or at) if status == "canceled" else None,
        quantity,
        {"active": "paid", "trialing": "paid", "past_due": "due", "unpaid": "due"}.get(told.status, "unchanged"),
    )
    changed = await follow_subscription(conn, purchase.id, now, actor=ACTOR)
    if not isinstance(changed, PurchaseView):
        raise NotOurs(f"subscription {told.id} cannot follow: {changed.replace('_', ' ')} ({plan_id})")
    await conn.execute(BIND, {"id": told.id, "purchase_id": purchase.id})
    return purchase.id


async def _create(
    conn: Connection, wallet: Wallet, told: Subscription, plan_id: str, quantity: int, at: datetime
) -> PurchaseView:
    plan = await get_plan(conn, plan_id)
    if plan is None or plan.kind != "subscription":
        raise NotOurs(f"plan {plan_id} is no subscription of ours")
    trial = told.trial_ends_at if told.status == "trialing" else None
    anchor = None if trial else _anchor_of(told, at)
    new = NewPurchase(plan_id, told.id, anchor=anchor, trial_ends_at=trial, quantity=quantity)
    made = await create_purchase(conn, wallet, new, actor=ACTOR)
    if not isinstance(made, PurchaseView):
        raise NotOurs(f"subscription {told.id} was not taken: {made.replace('_', ' ')}")
    return made


def _anchor_of(told: Subscription, at: datetime) -> datetime:
    """Return where the months begin: with the billing periods, or at the start when those begin later."""
    return told.anchor if told.anchor <= at else told.started_at


def _status_of(told: Subscription, purchase: PurchaseView) -> PurchaseStatus:
    if told.status in ENDED or told.ends_at is not None:
        return "canceled"
    if told.status == "trialing":
        return "trialing"
    if told.status in ("past_due", "unpaid"):
        return "past_due"
    if told.status in ("paused", "incomplete"):
        # A trial that ended without a way to pay: its first month waits, as in the trial.
        return "trialing" if purchase.status == "trialing" else "past_due"
    return "active"


PLANS_OF_PRICES = """
SELECT w.nth, coalesce(by_id.plan_id, by_key.plan_id, same.id)
FROM unnest(%(ids)s::text[], %(keys)s::text[]) WITH ORDINALITY AS w (id, key, nth)
LEFT JOIN plan_prices AS by_id ON by_id.price = w.id
LEFT JOIN plan_prices AS by_key ON by_key.price = w.key
LEFT JOIN plans AS same ON same.id = w.key
ORDER BY w.nth
"""


async def _plan_of(conn: Connection, told: Subscription, owner: Owner) -> tuple[str, int]:
    """Return the plan and how many of it: by the first price that has one, else as the metadata say. Raises NotOurs."""
    keys = {"ids": [p.id for p in told.prices], "keys": [p.lookup_key for p in told.prices]}
    for nth, plan_id in await (await conn.execute(PLANS_OF_PRICES, keys)).fetchall():
        if plan_id is not None:
            quantity = told.prices[nth - 1].quantity
            return plan_id, 1 if quantity is None else quantity
    if owner.plan_id is not None:
        # A metered price has no quantity; if all others have none of it, that is how many are paid for.
        quantities = [price.quantity for price in told.prices if price.quantity is not None]
        return owner.plan_id, next((quantity for quantity in quantities if quantity), 0 if quantities else 1)
    names = ", ".join(price.id for price in told.prices) or "none"
    raise NotOurs(f"no plan for the prices {names}: PUT /stripe/prices/{{price}}, or set metadata nightmail_plan")


LOCK_ORGS = """
SELECT id
FROM orgs
WHERE id = ANY (%(ids)s)
ORDER BY id
FOR NO KEY UPDATE
"""

PAY = """
UPDATE stripe_subscriptions
SET paid_org_id = %(org_id)s, paid_plan = %(plan)s
WHERE id = %(id)s
"""

OTHER = """
SELECT paid_plan, state
FROM stripe_subscriptions
WHERE paid_org_id = %(org_id)s
ORDER BY changed_at DESC, id DESC
LIMIT 1
"""


async def _follow_org(conn: Connection, told: Subscription, held: Held, owner: Owner) -> None:
    """Give the org the plan that is paid for, metered; an org it paid for before what another subscription pays for."""
    plan = owner.org_plan if told.status in LIVE else None
    org_id = owner.org_id if plan is not None else None
    orgs = [known for known in (org_id, held.paid_org_id) if known is not None]
    if not orgs:
        return
    # Of two subscriptions of one org that end at once, the second one sees here that the first one has ended.
    await conn.execute(LOCK_ORGS, {"ids": orgs})
    await conn.execute(PAY, {"id": told.id, "org_id": org_id, "plan": plan})
    if org_id is not None and plan is not None:
        await _set_plan(conn, org_id, plan, "metered", told.customer)
    if held.paid_org_id is None or held.paid_org_id == org_id:
        return
    row = await (await conn.execute(OTHER, {"org_id": held.paid_org_id})).fetchone()
    if row is None:
        await _set_plan(conn, held.paid_org_id, UNPAID_PLAN, UNPAID_BILLING, "")
    else:
        await _set_plan(conn, held.paid_org_id, row[0], "metered", read_subscription(row[1]).customer)


async def _set_plan(conn: Connection, org_id: UUID, plan: str, billing: str, customer: str) -> None:
    """Change a locked org, unless it is so already; its customer stays for what is still to be billed."""
    org = await get_org(conn, org_id)
    assert org is not None, "it is locked"
    customer = customer or org.stripe_customer_id or ""
    if (org.plan, org.billing, org.stripe_customer_id or "") == (plan, billing, customer):
        return
    change = OrgChange(plan, billing, sets_customer=customer != "", stripe_customer_id=customer or None)
    try:
        await change_org(conn, org_id, change, actor=ACTOR)
    except UnknownPlan:
        raise NotOurs(f"there is no plan of messages {plan}: check metadata nightmail_org_plan") from None
