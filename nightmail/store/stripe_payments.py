"""stripe_payments and stripe_refunds: packs that were paid, and credits taken back when money goes back.

A refund names a charge, a purchase knows its session or subscription: what is between them (payment intent, invoice) is
noted as it is told, in whatever order. A refund of a share of the payment takes back that share of what the payment
gave, at most what is left of it; refunds of one charge add up, and each part is taken once.
"""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from nightmail.rules.stripe_objects import Invoice, NotOurs, Refund, Session
from nightmail.store.credit_grants import claw_back
from nightmail.store.credits import Wallet
from nightmail.store.database import Connection
from nightmail.store.plans import get_plan
from nightmail.store.purchases import NewPurchase, PurchaseView, create_purchase, get_purchase
from nightmail.store.stripe_subscriptions import ACTOR, Applied

ORG = "SELECT EXISTS (SELECT FROM orgs WHERE id = %(id)s)"


async def take_pack(conn: Connection, session: Session) -> Applied:
    """Give what a one-time checkout bought, when it is paid."""
    owner = session.owner
    if owner.org_id is None:
        return Applied("ignored", why="no metadata nightmail_org")
    if not session.is_paid:
        return Applied("ignored", owner.org_id, why="not paid yet: checkout.session.async_payment_succeeded will tell")
    if owner.user_id is None or owner.plan_id is None:
        raise NotOurs("the metadata of a one-time checkout must name nightmail_user and nightmail_plan")
    row = await (await conn.execute(ORG, {"id": owner.org_id})).fetchone()
    if not (row and row[0]):
        raise NotOurs(f"there is no org {owner.org_id}: check metadata nightmail_org")
    plan = await get_plan(conn, owner.plan_id)
    if plan is None or plan.kind != "pack":
        raise NotOurs(f"plan {owner.plan_id} is no pack of ours: check metadata nightmail_plan")
    wallet = Wallet(owner.org_id, owner.env, owner.user_id)
    new = NewPurchase(plan.id, session.id, quantity=session.quantity)
    made = await create_purchase(conn, wallet, new, actor=ACTOR)
    if not isinstance(made, PurchaseView):
        raise NotOurs(f"session {session.id} was not taken: {made.replace('_', ' ')}")
    if session.payment_id is not None:
        await conn.execute(NOTE, {**NOTHING, "id": session.payment_id, "purchase_id": made.id})
        await _settle_refunds(conn, session.payment_id)
    return Applied("applied", owner.org_id, made.id)


NOTHING = {"id": None, "invoice_id": None, "subscription_id": None, "purchase_id": None, "since": None, "until": None}
NOTE = """
INSERT INTO stripe_payments AS p (id, invoice_id, subscription_id, purchase_id, since, until)
VALUES (%(id)s, %(invoice_id)s, %(subscription_id)s, %(purchase_id)s, %(since)s, %(until)s)
ON CONFLICT (id) DO UPDATE
SET invoice_id = coalesce(excluded.invoice_id, p.invoice_id),
    subscription_id = coalesce(excluded.subscription_id, p.subscription_id),
    purchase_id = coalesce(excluded.purchase_id, p.purchase_id),
    since = coalesce(excluded.since, p.since),
    until = coalesce(excluded.until, p.until)
"""


async def note_invoice(conn: Connection, invoice: Invoice) -> None:
    """Note what a paid invoice was for, and by which payments it was paid as far as it says."""
    if invoice.subscription_id is None:
        return
    held = {**NOTHING, "subscription_id": invoice.subscription_id, "since": invoice.since, "until": invoice.until}
    await conn.execute(NOTE, {**held, "id": invoice.id})
    for name in sorted(invoice.payment_ids):
        await conn.execute(NOTE, {**NOTHING, "id": name, "invoice_id": invoice.id})


async def note_payment(conn: Connection, invoice_id: str, payment_ids: tuple[str, ...]) -> Applied:
    """Note which payment paid an invoice."""
    for name in sorted(payment_ids):
        await conn.execute(NOTE, {**NOTHING, "id": name, "invoice_id": invoice_id})
        await _settle_refunds(conn, name)
    return Applied("applied" if payment_ids else "ignored")


TAKE_REFUND = """
INSERT INTO stripe_refunds AS r (charge_id, payment_id, paid, refunded)
VALUES (%(charge_id)s, %(payment_id)s, %(paid)s, %(refunded)s)
ON CONFLICT (charge_id) DO UPDATE
SET refunded = greatest(r.refunded, excluded.refunded)
RETURNING refunded > %(refunded)s, settled = %(refunded)s
"""


async def take_refund(conn: Connection, refund: Refund) -> Applied:
    """Take back the credits of what was paid back of a charge."""
    row = None
    for name in refund.payment_ids:
        row = await (await conn.execute(FIND, {"id": name})).fetchone()
        if row is not None:
            break
    payment_id = name if row is not None else refund.payment_ids[0]
    arguments = {
        "charge_id": refund.charge_id,
        "payment_id": payment_id,
        "paid": refund.paid,
        "refunded": refund.refunded,
    }
    taken = await (await conn.execute(TAKE_REFUND, arguments)).fetchone()
    assert taken is not None, "an upsert has one row"
    is_old, is_settled = taken
    if is_old:
        return Applied("stale", why="a later refund of this charge is known")
    if is_settled:
        return Applied("ignored", why="credits were taken back for this before")
    purchase_id = await _settle_refunds(conn, payment_id)
    if purchase_id is None:
        return Applied("ignored", why="no purchase of ours was paid by this charge, as far as is known")
    purchase = await get_purchase(conn, purchase_id)
    return Applied("applied", purchase.org_id if purchase else None, purchase_id)


WAITING = """
SELECT DISTINCT r.payment_id
FROM stripe_refunds AS r
JOIN stripe_payments AS p ON p.id = r.payment_id
LEFT JOIN stripe_payments AS i ON i.id = p.invoice_id
WHERE r.refunded > r.settled
  AND coalesce(p.subscription_id, i.subscription_id) = %(subscription_id)s
ORDER BY r.payment_id
"""


async def settle_subscription(conn: Connection, subscription_id: str) -> None:
    """Take back what was refunded before it was known what the subscription gives."""
    for (payment_id,) in await (await conn.execute(WAITING, {"subscription_id": subscription_id})).fetchall():
        await _settle_refunds(conn, payment_id)


# A payment of an invoice stands for what the invoice was for.
FIND = """
SELECT coalesce(p.purchase_id, s.purchase_id), coalesce(p.since, i.since), coalesce(p.until, i.until)
FROM stripe_payments AS p
LEFT JOIN stripe_payments AS i ON i.id = p.invoice_id
LEFT JOIN stripe_subscriptions AS s ON s.id = coalesce(p.subscription_id, i.subscription_id)
WHERE p.id = %(id)s
"""

OPEN_REFUNDS = """
SELECT charge_id, paid, refunded, settled
FROM stripe_refunds
WHERE payment_id = %(payment_id)s
  AND refunded > settled
ORDER BY charge_id
FOR UPDATE
"""

# Of what a payment gave, what has something left: a pack's batch, or those of the months it paid for, upgrades too.
# When all is paid back (is_all), also what is spent, so that it does not live on when the spend is refunded, and what
# already came back from such a spend.
BATCHES = """
SELECT b.id, b.granted
FROM purchases AS p
JOIN credit_batches AS b ON b.account_id = p.account_id
WHERE p.id = %(purchase_id)s
  AND b.purchase_id = p.id
  AND (b.is_open OR %(is_all)s)
  AND (b.source IN ('purchase', 'subscription') OR (%(is_all)s AND b.source = 'refund'))
  AND CASE p.status
          WHEN 'paid' THEN true
          ELSE b.period_start >= %(since)s::timestamptz - interval '24 hours'
               AND b.period_start < %(until)s::timestamptz - interval '24 hours'
      END
ORDER BY b.id
"""

SETTLED = """
UPDATE stripe_refunds
SET settled = refunded
WHERE charge_id = %(charge_id)s
"""


async def _settle_refunds(conn: Connection, payment_id: str) -> UUID | None:
    """Take back credits for what was refunded of a payment and not settled; return the purchase, None when unknown."""
    row = await (await conn.execute(FIND, {"id": payment_id})).fetchone()
    if row is None or row[0] is None:
        return None
    purchase_id: UUID = row[0]
    purchase = await get_purchase(conn, purchase_id)
    assert purchase is not None, "purchases are not deleted"
    for charge_id, paid, refunded, settled in await (
        await conn.execute(OPEN_REFUNDS, {"payment_id": payment_id})
    ).fetchall():
        await _take_back(conn, purchase, row[1], row[2], f"{charge_id}:{refunded}", (paid, refunded, settled))
        await conn.execute(SETTLED, {"charge_id": charge_id})
    return purchase_id


async def _take_back(
    conn: Connection,
    purchase: PurchaseView,
    since: datetime | None,
    until: datetime | None,
    name: str,
    share: tuple[int, int, int],
) -> None:
    paid, refunded, settled = share
    is_all = refunded == paid
    arguments = {"purchase_id": purchase.id, "since": since, "until": until, "is_all": is_all}
    for batch_id, granted in await (await conn.execute(BATCHES, arguments)).fetchall():
        amount = granted * refunded // paid - granted * settled // paid
        if is_all or amount > 0:
            await claw_back(
                conn,
                purchase.wallet,
                reference=f"stripe:{name}:{batch_id}",
                batch_id=batch_id,
                reason="refunded by Stripe",
                amount=None if is_all else amount,
            )
