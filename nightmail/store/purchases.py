"""purchases: who bought what. A pack gives its credits at once, a subscription its first month; the job gives the rest.

Locks: the purchase → its wallet. Every change ends by granting what is due by then, in the same transaction, so that
nobody waits for midnight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Literal, LiteralString
from uuid import UUID

from nightmail.ids import new_id
from nightmail.rules.credits import (
    MOST_MONTHS_AT_ONCE,
    PurchaseStatus,
    billing_end,
    first_period,
    holds_from,
    last_period,
    period_expiry,
    period_start,
)
from nightmail.store.audit_logs import insert_audit_log
from nightmail.store.credit_grants import NewGrant, grant, grant_purchase
from nightmail.store.credits import Done, Wallet
from nightmail.store.database import Connection
from nightmail.store.plans import Plan, get_plan


@dataclass(frozen=True, slots=True)
class NewPurchase:
    """What somebody buys.

    `anchor` None is now; a subscription's months begin there. `grants_from` None grants from the month that runs now.
    `trial_ends_at` begins with a trial: the anchor is its end. `external_ref` is the payment system's id.
    """

    plan_id: str
    external_ref: str | None = None
    anchor: datetime | None = None
    grants_from: datetime | None = None
    trial_ends_at: datetime | None = None
    quantity: int = 1


@dataclass(frozen=True, slots=True)
class PurchaseView:
    """A purchase as it stands."""

    id: UUID
    org_id: UUID
    env: str
    user_id: str
    plan_id: str
    external_ref: str | None
    status: PurchaseStatus
    anchor: datetime
    grants_from: datetime
    next_period: int
    next_grant_at: datetime | None
    holds_from: datetime | None
    past_due_at: datetime | None
    ends_at: datetime | None
    grant_error: str | None
    created_at: datetime
    billed_from: datetime | None
    quantity: int = 1

    @property
    def wallet(self) -> Wallet:
        """Return whose credits it gives."""
        return Wallet(self.org_id, self.env, self.user_id)


ACCOUNT = """
WITH made AS (
    INSERT INTO credit_accounts (org_id, env, user_id)
    VALUES (%(org_id)s, %(env)s, %(user_id)s)
    ON CONFLICT DO NOTHING
    RETURNING id
)
SELECT id FROM made
UNION ALL
SELECT id FROM credit_accounts WHERE org_id = %(org_id)s AND env = %(env)s AND user_id = %(user_id)s
"""

INSERT = """
INSERT INTO purchases (
    id, org_id, env, account_id, plan_id, quantity, external_ref, status, anchor, grants_from, next_period,
    next_grant_at, holds_from
)
VALUES (
    %(id)s, %(org_id)s, %(env)s, %(account_id)s, %(plan_id)s, %(quantity)s, %(external_ref)s, %(status)s, %(anchor)s,
    %(grants_from)s, %(next_period)s, %(next_grant_at)s, %(holds_from)s
)
ON CONFLICT (org_id, env, external_ref) WHERE external_ref IS NOT NULL DO NOTHING
"""


async def create_purchase(
    conn: Connection, wallet: Wallet, new: NewPurchase, *, actor: str
) -> PurchaseView | Literal["unknown_plan", "too_long_ago", "other_body"]:
    """Make a purchase and give what is due at once; one with the same `external_ref` is returned as it is."""
    async with conn.transaction():
        plan = await get_plan(conn, new.plan_id)
        if plan is None:
            return "unknown_plan"
        at = await _read_clock(conn)
        purchase_id = new_id()
        row = _row(purchase_id, wallet, plan, new, at)
        if last_period(row["anchor"], at) - row["next_period"] >= MOST_MONTHS_AT_ONCE:
            return "too_long_ago"
        # Looked for first, so that a request which is refused does not leave an account behind.
        found = await _find(conn, GET_BY_REFERENCE, wallet=wallet, external_ref=new.external_ref)
        if found is None:
            account_id = await _account(conn, wallet)
            cursor = await conn.execute(INSERT, {**row, "account_id": account_id})
            if cursor.rowcount == 0:
                found = await _find(conn, GET_BY_REFERENCE, wallet=wallet, external_ref=new.external_ref)
                assert found is not None, "the insert met it"
        if found is not None:
            is_same = (found.user_id, found.plan_id, found.quantity) == (wallet.user_id, new.plan_id, new.quantity)
            return found if is_same else "other_body"
        await insert_audit_log(
            conn,
            actor=actor,
            action="purchase.created",
            org_id=wallet.org_id,
            target=str(purchase_id),
            detail={"user_id": wallet.user_id, "plan": plan.id},
        )
        await _give_at_once(conn, wallet, purchase_id, plan, new, at)
        made = await _find(conn, GET, purchase_id=purchase_id)
        assert made is not None, "it was inserted above"
        return made


async def _give_at_once(
    conn: Connection, wallet: Wallet, purchase_id: UUID, plan: Plan, new: NewPurchase, at: datetime
) -> None:
    if plan.kind == "pack":
        ends = at + timedelta(days=plan.lifetime_days) if plan.lifetime_days is not None else None
        first = NewGrant(
            new.quantity * plan.credits, f"purchase:{purchase_id}", "purchase", plan.priority, ends,
            counter=f"payment:{new.external_ref or purchase_id}", purchase_id=purchase_id,
        )  # fmt: skip
    elif new.trial_ends_at is not None:
        first = NewGrant(
            new.quantity * plan.trial_credits, f"trial:{purchase_id}", "subscription", plan.priority, new.trial_ends_at,
            purchase_id=purchase_id,
        )  # fmt: skip
    else:
        await grant_purchase(conn, purchase_id)
        return
    if first.amount > 0:
        await _must_grant(conn, wallet, first)


async def _account(conn: Connection, wallet: Wallet) -> int:
    """Return the account's id; makes it when there is none."""
    wanted = {"org_id": wallet.org_id, "env": wallet.env, "user_id": wallet.user_id}
    while True:  # a concurrent insert is seen by the next statement only
        row = await (await conn.execute(ACCOUNT, wanted)).fetchone()
        if row is not None:
            return int(row[0])


def _row(purchase_id: UUID, wallet: Wallet, plan: Plan, new: NewPurchase, at: datetime) -> dict[str, Any]:
    """Return the columns of a new purchase but for the account."""
    row = {
        "org_id": wallet.org_id,
        "env": wallet.env,
        "id": purchase_id,
        "plan_id": plan.id,
        "quantity": new.quantity,
        "external_ref": new.external_ref,
    }
    if plan.kind == "pack":
        return {
            **row,
            "status": "paid",
            "anchor": at,
            "grants_from": at,
            "next_period": 0,
            "next_grant_at": None,
            "holds_from": None,
        }
    status: PurchaseStatus = "trialing" if new.trial_ends_at is not None else "active"
    anchor = new.trial_ends_at or new.anchor or at
    grants_from = new.grants_from or period_start(anchor, max(last_period(anchor, at), 0))
    period = first_period(anchor, grants_from)
    return {
        **row,
        "status": status,
        "anchor": anchor,
        "grants_from": grants_from,
        "next_period": period,
        "next_grant_at": period_start(anchor, period),
        "holds_from": holds_from(
            status, anchor=anchor, past_due_at=None, past_due_days=plan.past_due_days, ends_at=None
        ),
    }


COLUMNS = """
SELECT p.id, p.org_id, p.env, a.user_id, p.plan_id, p.external_ref, p.status, p.anchor, p.grants_from, p.next_period,
       p.next_grant_at, p.holds_from, p.past_due_at, p.ends_at, p.grant_error, p.created_at, p.billed_from, p.quantity
FROM purchases AS p
JOIN credit_accounts AS a ON a.id = p.account_id
"""
GET = COLUMNS + "WHERE p.id = %(purchase_id)s"
GET_BY_REFERENCE = COLUMNS + "WHERE p.org_id = %(org_id)s AND p.env = %(env)s AND p.external_ref = %(external_ref)s"
LOCK = GET + " FOR UPDATE OF p"


async def find_purchase(conn: Connection, org_id: UUID, env: str, external_ref: str) -> PurchaseView | None:
    """Return the purchase with the payment system's id, None when there is none."""
    return await _find(conn, GET_BY_REFERENCE, org_id=org_id, env=env, external_ref=external_ref)


async def get_purchase(conn: Connection, purchase_id: UUID) -> PurchaseView | None:
    """Return a purchase, None when there is none of this id."""
    return await _find(conn, GET, purchase_id=purchase_id)


LIST = (
    COLUMNS
    + """WHERE (%(org_id)s::uuid IS NULL OR p.org_id = %(org_id)s)
  AND (%(after)s::uuid IS NULL OR p.id < %(after)s)
ORDER BY p.id DESC
LIMIT %(limit)s + 1
"""
)
LIST_BEFORE = LIST.replace("%(after)s::uuid IS NULL OR p.id < %(after)s", "p.id > %(before)s").replace(
    "ORDER BY p.id DESC", "ORDER BY p.id"
)


async def list_purchases(
    conn: Connection, *, org_id: UUID | None, limit: int, after: UUID | None, before: UUID | None
) -> tuple[list[PurchaseView], bool]:
    """Return up to `limit` purchases, newest first, and whether there are more in the direction asked."""
    arguments = {"org_id": org_id, "limit": limit, "after": after, "before": before}
    cursor = await conn.execute(LIST if before is None else LIST_BEFORE, arguments)
    views = [PurchaseView(*row) for row in await cursor.fetchall()]
    page = views[:limit]
    return (page if before is None else page[::-1]), len(views) > limit


UPDATE = """
UPDATE purchases
SET plan_id = %(plan_id)s,
    quantity = %(quantity)s,
    status = %(status)s,
    past_due_at = %(past_due_at)s,
    ends_at = %(ends_at)s,
    holds_from = %(holds_from)s,
    billed_from = %(billed_from)s,
    next_period = %(next_period)s,
    next_grant_at = %(next_grant_at)s
WHERE id = %(id)s
"""


async def set_status(
    conn: Connection,
    purchase_id: UUID,
    status: Literal["active", "past_due", "canceled"],
    *,
    actor: str,
    at_period_end: bool = True,
    ends_at: datetime | None = None,
) -> PurchaseView | Literal["not_found", "not_a_subscription"]:
    """Say that a subscription is paid, unpaid or canceled, and grant what is due by then.

    A canceled one ends when its billing interval does, at once without `at_period_end`, or at `ends_at`. Paid again
    after `past_due`, it is given the months that waited. A canceled one that is made active goes on: when it had ended,
    with the month that runs, because nobody has paid for those between.
    """
    async with conn.transaction():
        found = await _find(conn, LOCK, purchase_id=purchase_id)
        if found is None or found.status == "paid":
            return "not_found" if found is None else "not_a_subscription"
        plan = await get_plan(conn, found.plan_id)
        assert plan is not None, "a plan that was bought is not deleted"
        at = await _read_clock(conn)
        if status == "past_due":
            return await _change(conn, replace(found, past_due_at=found.past_due_at or at), plan, status, actor)
        if status == "active":
            resumed = replace(found, past_due_at=None, ends_at=None)
            if found.ends_at is not None and found.ends_at <= at:
                resumed = replace(resumed, next_period=max(found.next_period, last_period(found.anchor, at)))
            return await _change(conn, resumed, plan, status, actor)
        ends_at = ends_at or _end_of(found, plan, at, at_period_end=at_period_end)
        return await _change(conn, replace(found, ends_at=ends_at), plan, status, actor)


def _end_of(found: PurchaseView, plan: Plan, at: datetime, *, at_period_end: bool) -> datetime:
    """Return when a subscription ends that is canceled now; what has ended stays so, and a trial has no paid month."""
    if found.ends_at is not None and found.ends_at <= at:
        return found.ends_at
    if found.status == "trialing":
        return found.anchor if at_period_end else min(found.anchor, at)
    return billing_end(found.billed_from or found.anchor, plan.interval_months, at) if at_period_end else at


async def change_plan(
    conn: Connection, purchase_id: UUID, plan_id: str | None, *, actor: str, quantity: int | None = None
) -> PurchaseView | Literal["not_found", "not_a_subscription", "unknown_plan"]:
    """Move a subscription to another plan or quantity from now on; None keeps what it has.

    If the month that runs was granted already and the new plan gives more, the difference is given at once, at most up
    to the new plan's credits however often the plan is changed; a smaller plan begins with the next month. Another
    interval of billing begins now; the months stay where they are.
    """
    async with conn.transaction():
        found = await _find(conn, LOCK, purchase_id=purchase_id)
        if found is None:
            return "not_found"
        plan = await get_plan(conn, plan_id or found.plan_id)
        if plan is None:
            return "unknown_plan"
        if found.status == "paid" or plan.kind == "pack":
            return "not_a_subscription"
        before = await get_plan(conn, found.plan_id)
        assert before is not None, "a plan that was bought is not deleted"
        at = await _read_clock(conn)
        if plan.interval_months != before.interval_months and found.status != "trialing":
            found = replace(found, billed_from=at)
        found = replace(found, quantity=quantity or found.quantity)
        changed = await _change(conn, found, plan, found.status, actor)
        if changed.holds_from is None or changed.holds_from > at:
            await _top_up(conn, changed, plan, at)
        return changed


@dataclass(frozen=True, slots=True)
class Followed:
    """A subscription as the payment system has it; `since` is when it became so, `anchor` where its months begin.

    `payment` is told apart from the status, because a subscription may be canceled and due at once.
    """

    plan_id: str
    status: PurchaseStatus
    since: datetime
    anchor: datetime
    ends_at: datetime | None = None
    quantity: int = 1
    payment: str = "unchanged"


MOVE_ANCHOR = """
UPDATE purchases
SET anchor = %(anchor)s,
    grants_from = %(anchor)s,
    next_grant_at = %(anchor)s
WHERE id = %(id)s
"""


async def follow_subscription(
    conn: Connection, purchase_id: UUID, now: Followed, *, actor: str
) -> PurchaseView | Literal["not_found", "not_a_subscription", "unknown_plan"]:
    """Bring a subscription into the state that the payment system tells, and grant what is due by then.

    Nothing is written when it is in that state. The anchor moves only before the first month was given: when a trial is
    extended or ended early.
    """
    async with conn.transaction():
        found = await _find(conn, LOCK, purchase_id=purchase_id)
        plan = await get_plan(conn, now.plan_id)
        if found is None or plan is None:
            return "not_found" if found is None else "unknown_plan"
        if found.status == "paid" or plan.kind == "pack":
            return "not_a_subscription"
        at = await _read_clock(conn)
        past_due_at = found.past_due_at
        if now.payment != "unchanged":
            past_due_at = (past_due_at or now.since) if now.payment == "due" else None
        elif now.status == "past_due":
            past_due_at = past_due_at or now.since
        wanted = replace(found, quantity=now.quantity, past_due_at=past_due_at, ends_at=now.ends_at)
        before = await get_plan(conn, found.plan_id)
        assert before is not None, "a plan that was bought is not deleted"
        if plan.interval_months != before.interval_months and found.status != "trialing":
            wanted = replace(wanted, billed_from=now.since)
        is_moved = found.status == "trialing" and found.next_period == 0 and now.anchor != found.anchor
        if (wanted, plan.id, now.status) == (found, found.plan_id, found.status) and not is_moved:
            return found
        if is_moved:
            await conn.execute(MOVE_ANCHOR, {"id": found.id, "anchor": now.anchor})
            wanted = replace(wanted, anchor=now.anchor)
        if found.ends_at is not None and found.ends_at <= at and (now.ends_at is None or now.ends_at > at):
            # It had ended and goes on: nobody has paid for the months between.
            wanted = replace(wanted, next_period=max(found.next_period, last_period(wanted.anchor, at)))
        changed = await _change(conn, wanted, plan, now.status, actor)
        is_other = (plan.id, now.quantity) != (found.plan_id, found.quantity)
        # More is given for what is paid: what was made larger while a payment is due waits for it.
        is_paid_now = found.past_due_at is not None or is_other
        if changed.past_due_at is None and is_paid_now and (changed.holds_from is None or changed.holds_from > at):
            await _top_up(conn, changed, plan, at)
        return changed


async def _change(
    conn: Connection, wanted: PurchaseView, plan: Plan, status: PurchaseStatus, actor: str
) -> PurchaseView:
    """Write what a locked purchase is to be, and grant what is due by then."""
    holds = holds_from(
        status,
        anchor=wanted.anchor,
        past_due_at=wanted.past_due_at,
        past_due_days=plan.past_due_days,
        ends_at=wanted.ends_at,
    )
    if wanted.past_due_at is not None and holds is not None and wanted.next_period == 0:
        # The days without payment are for those who have paid before: after a trial the first month waits for it.
        holds = min(holds, wanted.anchor)
    await conn.execute(
        UPDATE,
        {
            "id": wanted.id,
            "plan_id": plan.id,
            "quantity": wanted.quantity,
            "status": status,
            "past_due_at": wanted.past_due_at,
            "ends_at": wanted.ends_at,
            "holds_from": holds,
            "billed_from": wanted.billed_from,
            "next_period": wanted.next_period,
            "next_grant_at": period_start(wanted.anchor, wanted.next_period),
        },
    )
    await insert_audit_log(
        conn,
        actor=actor,
        action="purchase.changed",
        org_id=wanted.org_id,
        target=str(wanted.id),
        detail={"plan": plan.id, "status": status},
    )
    await grant_purchase(conn, wanted.id)
    changed = await _find(conn, GET, purchase_id=wanted.id)
    assert changed is not None, "it is locked"
    return changed


RAISE = """
UPDATE credit_grants
SET amount = %(amount)s
FROM (
    SELECT amount AS given FROM credit_grants WHERE purchase_id = %(purchase_id)s AND period_start = %(period_start)s
) AS before
WHERE purchase_id = %(purchase_id)s
  AND period_start = %(period_start)s
  AND amount < %(amount)s
RETURNING before.given
"""

ROLLS_OVER = """
UPDATE credit_batches
SET rolls_over = true
WHERE id = %(batch_id)s
"""


async def _top_up(conn: Connection, purchase: PurchaseView, plan: Plan, at: datetime) -> None:
    """Give what the plan gives more than the month that runs was given; nothing when that month is still to come."""
    period = last_period(purchase.anchor, at)
    start = period_start(purchase.anchor, period)
    arguments = {"purchase_id": purchase.id, "period_start": start, "amount": purchase.quantity * plan.credits}
    row = await (await conn.execute(RAISE, arguments)).fetchone()
    if row is None:
        return
    answer = await _must_grant(
        conn,
        purchase.wallet,
        NewGrant(
            purchase.quantity * plan.credits - row[0],
            f"upgrade:{purchase.id}:{start:%Y-%m-%dT%H:%M:%SZ}:{purchase.quantity * plan.credits}",
            "subscription",
            plan.priority,
            period_expiry(purchase.anchor, period, grace_days=plan.grace_days) if plan.expires else None,
            purchase_id=purchase.id,
            period_start=start,
        ),
    )
    if plan.rollover_cap > 0:
        await conn.execute(ROLLS_OVER, {"batch_id": answer["batch_id"]})


async def _must_grant(conn: Connection, wallet: Wallet, new: NewGrant) -> dict[str, Any]:
    """Grant what is part of a larger change: a refusal breaks that off."""
    result = await grant(conn, wallet, new)
    if not isinstance(result, Done):
        raise OverflowError(f"{new.reference} was refused: {result}")
    return result.answer


CLOCK = "SELECT nm_now()"


async def _read_clock(conn: Connection) -> datetime:
    row = await (await conn.execute(CLOCK)).fetchone()
    assert row is not None, "SELECT without FROM has one row"
    at: datetime = row[0]
    return at


async def _find(
    conn: Connection, statement: LiteralString, *, wallet: Wallet | None = None, **named: Any
) -> PurchaseView | None:
    if wallet is not None:
        named.update(org_id=wallet.org_id, env=wallet.env)
    row = await (await conn.execute(statement, named)).fetchone()
    return PurchaseView(*row) if row else None
