"""Subscriptions of Stripe: their whole life, in any order of the telling, with the grant job running between."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

from nightmail.fakes.stripe_webhooks import event, subscription
from nightmail.jobs.table import JOBS
from nightmail.rules.stripe_objects import read_event
from nightmail.store.audit import audit
from nightmail.store.stripe_events import receive_event
from tests.engine.place import Place, place
from tests.stripe.billing import at, metered_org, offset_to

pytestmark = pytest.mark.anyio

START = at(2030, 1, 31, 12)


class Desk:
    """An engine at a moment, and Stripe telling it things that happened at that moment."""

    def __init__(self, here: Place, now: datetime) -> None:
        self.here, self.now = here, int(now.timestamp())

    async def tell(self, kind: str, thing: dict[str, Any], *, created: datetime | None = None) -> str:
        told = event(kind, thing, created=int(created.timestamp()) if created else self.now)
        received = await self.here.database.run(lambda conn: receive_event(conn, read_event(told)))
        assert received.outcome != "failed", received
        return received.outcome

    async def grant(self) -> None:
        for job in ("credits-grant", "credits-expire"):
            assert (await self.here.engine.run(job, trigger="test")).state == "succeeded"

    def balance(self) -> int:
        return sum(row[0] for row in self.here.rows("SELECT balance FROM credit_accounts"))

    def purchase(self) -> tuple[Any, ...]:
        [row] = self.here.rows("SELECT status, plan_id, quantity FROM purchases")
        return row

    async def check(self) -> None:
        async with self.here.database.connection() as conn:
            assert [f.name for f in await audit(conn) if f.violations] == []


@asynccontextmanager
async def desk(url: str, moment: datetime) -> AsyncIterator[Desk]:
    async with place(url, JOBS, clock_offset=f"{offset_to(moment).total_seconds()} seconds") as here:
        yield Desk(here, moment)


def sub(org: UUID, status: str = "active", **fields: Any) -> dict[str, Any]:
    metadata = {"nightmail_org": str(org), "nightmail_user": "ada"}
    start = int(fields.pop("start", START).timestamp())
    return subscription(
        "sub_1", start=start, status=status, **{"lookup_key": "monthly", "metadata": metadata, **fields}
    )


async def test_the_whole_life_of_a_subscription(database_url: str) -> None:
    org = metered_org(database_url)
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("INSERT INTO plans (id, name, kind, credits) VALUES ('large', 'Large', 'subscription', 5000)")
        conn.execute("INSERT INTO plan_prices (price, plan_id) VALUES ('price_large', 'large')")
    trial_end = int((START + timedelta(days=14)).timestamp())
    async with desk(database_url, START) as now:
        trial = sub(org, "trialing", trial_end=trial_end, billing_cycle_anchor=trial_end)
        assert await now.tell("customer.subscription.created", trial) == "applied"
        await now.grant()
        assert (now.balance(), now.purchase()[0]) == (100, "trialing")
    paid = {"trial_end": trial_end, "billing_cycle_anchor": trial_end, "latest_invoice": "in_2"}
    async with desk(database_url, START + timedelta(days=14, minutes=1)) as now:
        await now.grant()
        assert now.balance() == 0, "the trial is over, and nobody has said that it was paid"
        await now.tell("customer.subscription.updated", sub(org, "active", **paid))
        assert (now.balance(), now.purchase()[0]) == (1000, "active")
    async with desk(database_url, at(2030, 3, 14, 13)) as now:
        await now.tell("customer.subscription.updated", sub(org, "past_due", **paid), created=at(2030, 3, 9))
        await now.grant()
        assert (now.balance(), now.purchase()[0]) == (0, "past_due"), "three days of grace were over on the 12th"
        invoice = {"id": "in_2", "object": "invoice", "subscription": "sub_1", "lines": {"data": []}}
        assert await now.tell("invoice.paid", invoice) == "applied"
        assert (now.balance(), now.purchase()[0]) == (1000, "active")
        late = await now.tell("customer.subscription.updated", sub(org, "past_due", **paid), created=at(2030, 3, 10))
        assert (late, now.purchase()[0]) == ("stale", "active")
    async with desk(database_url, at(2030, 3, 20)) as now:
        await now.tell("customer.subscription.updated", sub(org, "active", price="price_large", quantity=2, **paid))
        assert (now.balance(), now.purchase()) == (10_000, ("active", "large", 2))
        await now.tell("customer.subscription.updated", sub(org, "active", price="price_large", quantity=2, **paid))
        assert now.balance() == 10_000
    ending = {**paid, "price": "price_large", "quantity": 2, "cancel_at_period_end": True}
    async with desk(database_url, at(2030, 3, 25)) as now:
        end = int(at(2030, 4, 14, 12).timestamp())
        await now.tell("customer.subscription.updated", sub(org, "active", period_end=end, **ending))
        assert (now.balance(), now.purchase()[0]) == (10_000, "canceled")
        assert now.here.rows("SELECT ends_at FROM purchases") == [(at(2030, 4, 14, 12),)]
    async with desk(database_url, at(2030, 4, 14, 13)) as now:
        await now.tell("customer.subscription.deleted", sub(org, "canceled", ended_at=end, canceled_at=end, **ending))
        await now.grant()
        assert (now.balance(), now.purchase()[0]) == (0, "canceled")
        assert now.here.rows("SELECT sum(amount)::int FROM credit_grants") == [(1000 + 10_000,)]
        await now.check()


async def test_any_order_of_the_telling_ends_in_the_same_state(database_url: str) -> None:
    """Created unpaid, paid and doubled, some of it within one second; whose it is, only the session knows."""
    org = metered_org(database_url)
    minute = START + timedelta(minutes=1)

    def story(number: int) -> list[tuple[str, dict[str, Any], datetime]]:
        bare: dict[str, Any] = {"metadata": {}, "lookup_key": None}
        session = {
            "id": "cs_1", "object": "checkout.session", "mode": "subscription", "payment_status": "paid",
            "subscription": f"sub_{number}", "payment_intent": None,
            "metadata": {
                "nightmail_org": str(org), "nightmail_user": f"user-{number:02}", "nightmail_plan": "monthly",
            },
        }  # fmt: skip
        states = [
            ("created", "incomplete", 1, START),
            ("updated", "active", 1, START),
            ("updated", "active", 2, minute),
        ]
        return [
            *(
                (f"customer.subscription.{kind}", {**sub(org, status, quantity=n, **bare), "id": f"sub_{number}"}, at)
                for kind, status, n, at in states
            ),
            ("checkout.session.completed", session, START),
        ]

    async with desk(database_url, START + timedelta(hours=1)) as now:
        for number, order in enumerate(itertools.permutations(range(4))):
            told = story(number)
            for nth in order:
                kind, thing, created = told[nth]
                await now.tell(kind, thing, created=created)
        balances = "SELECT count(*), min(balance), max(balance) FROM credit_accounts"
        assert now.here.rows(balances) == [(24, 2000, 2000)]
        states = "SELECT count(*) FROM purchases WHERE (status, quantity, plan_id) = ('active', 2, 'monthly')"
        assert now.here.rows(states) == [(24,)]


async def test_within_a_second_what_must_come_later_wins(database_url: str) -> None:
    org = metered_org(database_url)
    async with desk(database_url, START) as now:
        for status in ("active", "active", "incomplete"):
            outcome = await now.tell("customer.subscription.updated", sub(org, status))
            assert outcome == ("stale" if status == "incomplete" else "applied")
        assert await now.tell("customer.subscription.created", sub(org, "active", quantity=9)) == "stale"
        ended = sub(org, "canceled", ended_at=now.now)
        assert await now.tell("customer.subscription.deleted", ended) == "applied"
        assert await now.tell("customer.subscription.updated", sub(org, "active")) == "stale"
        assert (now.balance(), now.purchase()) == (1000, ("canceled", "monthly", 1))


async def test_the_refund_of_an_invoice_takes_back_the_month_it_paid_for_and_no_other(database_url: str) -> None:
    org = metered_org(database_url)
    async with desk(database_url, START) as now:
        await now.tell("customer.subscription.created", sub(org))
    async with desk(database_url, at(2030, 2, 28, 13)) as now:
        await now.grant()
        span = {"start": int(START.timestamp()), "end": int(at(2030, 2, 28, 12).timestamp())}
        next_span = {"start": span["end"], "end": int(at(2030, 3, 31, 12).timestamp())}
        charge = {"id": "ch_9", "object": "charge", "amount": 900, "amount_refunded": 300, "payment_intent": "pi_9"}
        assert await now.tell("charge.refunded", charge) == "ignored", "nobody has said what pi_9 paid for"
        payment = {"id": "inpay_1", "invoice": "in_9", "payment": {"type": "payment_intent", "payment_intent": "pi_9"}}
        await now.tell("invoice_payment.paid", {**payment, "object": "invoice_payment"})
        parent = {"subscription_details": {"subscription": "sub_1"}}
        for number, period in (("in_8", span), ("in_9", next_span)):
            lines = {"data": [{"period": period}]}
            await now.tell("invoice.paid", {"id": number, "object": "invoice", "parent": parent, "lines": lines})
        assert now.balance() == 667, "a third of 1,000, rounded down, was taken back when the invoice was known"
        assert await now.tell("charge.refunded", charge) == "ignored"
        assert now.balance() == 667
        first = {**charge, "id": "ch_8", "amount_refunded": 900, "payment_intent": None, "invoice": "in_8"}
        assert await now.tell("charge.refunded", first) == "applied"
        assert now.balance() == 667, "January's credits have ended"
        await now.check()


async def test_an_org_has_the_plan_that_is_paid_for(database_url: str) -> None:
    org = metered_org(database_url, None, plan="free")
    plan: dict[str, Any] = {"metadata": {"nightmail_org": str(org), "nightmail_org_plan": "pro"}, "customer": "cus_7"}
    query = "SELECT plan, billing, stripe_customer_id FROM orgs"
    async with desk(database_url, START) as now:
        await now.tell("customer.subscription.created", sub(org, **plan))
        assert now.here.rows(query) == [("pro", "metered", "cus_7")]
        other = {**sub(org, **plan), "id": "sub_2"}
        await now.tell("customer.subscription.created", other)
        await now.tell("customer.subscription.deleted", {**other, "status": "canceled"})
        assert now.here.rows(query) == [("pro", "metered", "cus_7")], "another subscription still pays"
        await now.tell("customer.subscription.updated", sub(org, "unpaid", **plan))
        assert now.here.rows(query) == [("free", "quota", "cus_7")], "the customer stays for what is still to be billed"
        assert now.here.rows("SELECT count(*) FROM purchases") == [(0,)]


async def test_an_org_falls_back_to_what_another_subscription_pays_for(database_url: str) -> None:
    org = metered_org(database_url, None, plan="free")
    query = "SELECT plan, billing, stripe_customer_id FROM orgs"

    def of(number: int, plan: str, **fields: Any) -> dict[str, Any]:
        # Stripe gives back the id as somebody wrote it.
        metadata = {"nightmail_org": str(org).upper(), "nightmail_org_plan": plan}
        return {**sub(org, metadata=metadata, customer=f"cus_{number}", **fields), "id": f"sub_{number}"}

    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("INSERT INTO message_plans SELECT 'big', 900000, included_sms, 1, 1 FROM message_plans LIMIT 1")
    async with desk(database_url, START) as now:
        never_paid = {**of(9, "big"), "status": "incomplete_expired"}
        with psycopg.connect(database_url, autocommit=True) as conn:
            conn.execute("UPDATE orgs SET plan = 'pro', billing = 'prepaid'")
        await now.tell("customer.subscription.updated", never_paid)
        assert now.here.rows(query) == [("pro", "prepaid", None)], "nothing was bought, so nothing ends"
        await now.tell("customer.subscription.created", of(1, "pro"))
        await now.tell("customer.subscription.created", of(2, "big"))
        assert now.here.rows(query) == [("big", "metered", "cus_2")]
        await now.tell("customer.subscription.deleted", {**of(2, "big"), "status": "canceled"})
        assert now.here.rows(query) == [("pro", "metered", "cus_1")], "the larger one is not paid for any more"
        await now.tell("customer.subscription.created", of(2, "big") | {"id": "sub_3"})
        ends = [{**of(n, "pro"), "status": "canceled"} for n in (1, 3)]
        told = [event("customer.subscription.deleted", end, created=now.now) for end in ends]
        async with now.here.database.connection() as one, now.here.database.connection() as two:
            async with one.transaction():
                await receive_event(one, read_event(told[0]))
                waits = asyncio.create_task(receive_event(two, read_event(told[1])))
                await asyncio.sleep(0.2)
            await waits
        assert now.here.rows(query) == [("free", "quota", "cus_2")], "both ended at once: nobody pays"
        changes = "SELECT count(*) FROM audit_logs WHERE action = 'org.changed' AND actor = 'stripe'"
        assert now.here.rows(changes) == [(5,)], "as PATCH /orgs would have noted it, and only what changed"


async def test_nothing_is_given_that_is_not_paid(database_url: str) -> None:
    """First told of as unpaid; made larger while a payment is due; a quantity of nothing; ended without its price."""
    org = metered_org(database_url)
    async with desk(database_url, START) as now:
        assert await now.tell("customer.subscription.updated", sub(org, "unpaid")) == "ignored"
        assert await now.tell("customer.subscription.updated", {**sub(org, quantity=0), "id": "sub_0"}) == "ignored"
        assert now.balance() == 0
    async with desk(database_url, START + timedelta(hours=1)) as now:
        await now.tell("customer.subscription.updated", sub(org))
        assert now.balance() == 1000
    async with desk(database_url, START + timedelta(hours=2)) as now:
        await now.tell("customer.subscription.updated", sub(org, "past_due", quantity=9))
        assert now.balance() == 1000, "nine times as much, and none of it paid"
    async with desk(database_url, START + timedelta(hours=3)) as now:
        await now.tell("customer.subscription.updated", sub(org, quantity=9))
        assert now.balance() == 9000, "now it is"
    async with desk(database_url, at(2030, 2, 10)) as now:
        await now.tell("customer.subscription.updated", sub(org, quantity=0))
    async with desk(database_url, at(2030, 3, 5)) as now:
        await now.tell("customer.subscription.updated", sub(org, quantity=0))
        await now.grant()
        assert now.balance() == 0, "the month of the end of February was not paid"
        await now.tell("customer.subscription.updated", sub(org, quantity=1))
        assert now.balance() == 1000
    async with desk(database_url, at(2030, 3, 6)) as now:
        gone = sub(org, "canceled", ended_at=now.now, lookup_key="no longer a plan")
        assert await now.tell("customer.subscription.deleted", gone) == "applied"
        assert now.purchase()[0] == "canceled"
        await now.check()
