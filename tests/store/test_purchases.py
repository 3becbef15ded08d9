"""purchases in their course: bought at once by two, canceled and resumed, billed otherwise, unpaid, refused."""

from __future__ import annotations

from collections.abc import Awaitable
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from nightmail.clock import now
from nightmail.store.plans import Plan, put_plan
from nightmail.store.purchases import NewPurchase, PurchaseView, change_plan, create_purchase, set_status
from tests.credits.office import Office, office

pytestmark = pytest.mark.anyio

MONTHS = "SELECT array_agg(period_start ORDER BY period_start) FROM credit_grants"


async def done(step: Awaitable[PurchaseView | str]) -> PurchaseView:
    """Return the purchase; the step must not be refused."""
    view = await step
    assert isinstance(view, PurchaseView), view
    return view


async def buy(desk: Office, plan: Plan | str, **options: Any) -> PurchaseView:
    """Buy a plan, which is made when it is given as a whole."""
    async with desk.place.database.connection() as conn:
        if isinstance(plan, Plan):
            await put_plan(conn, plan, actor="test")
        plan_id = plan if isinstance(plan, str) else plan.id
        return await done(create_purchase(conn, desk.wallet(), NewPurchase(plan_id, **options), actor="test"))


async def test_two_purchases_of_one_user_at_once_do_not_wait_for_each_others_key(database_url: str) -> None:
    """Both hold the account's key by the foreign key; a lock on the account that needed it would be a deadlock."""
    async with office(database_url, wallets=1) as desk:
        wallet = desk.wallet()
        later = now() + timedelta(days=5)
        async with (
            desk.place.database.connection() as one,
            desk.place.database.connection() as other,
            one.transaction(),
        ):
            await create_purchase(one, wallet, NewPurchase("monthly", anchor=later), actor="test")
            await other.execute("SET lock_timeout = '1s'")
            await done(create_purchase(other, wallet, NewPurchase("monthly"), actor="test"))
            await done(create_purchase(one, wallet, NewPurchase("monthly"), actor="test"))
        assert desk.rows("SELECT balance FROM credit_accounts") == [(2000,)]
        assert await desk.violations() == {}


async def test_what_ended_and_is_resumed_goes_on_with_the_month_that_runs(database_url: str) -> None:
    async with office(database_url, wallets=1) as desk:
        made = await buy(desk, Plan("kept", "K", "subscription", 100, expires=False))
        async with desk.place.database.connection() as conn:
            await done(set_status(conn, made.id, "canceled", actor="test"))
        async with office(database_url, org_id=desk.org_id, clock_offset="160 days") as later:
            async with later.place.database.connection() as conn:
                resumed = await done(set_status(conn, made.id, "active", actor="test"))
            assert (resumed.ends_at, resumed.holds_from) == (None, None)
            [(months,)] = later.rows(MONTHS)
            assert months[0] == made.anchor
            assert len(months) == 2, "nobody has paid for the months between"
            at = now() + timedelta(days=160)
            assert at - timedelta(days=31) < months[1] <= at
            assert (await later.run("credits-grant")).counts["processed"] == 0
            assert await later.violations() == {}


async def test_a_month_that_the_job_owes_is_given_also_to_who_resumes_in_time(database_url: str) -> None:
    async with office(database_url, wallets=1) as desk:
        made = await buy(desk, "monthly")
        async with office(database_url, org_id=desk.org_id, clock_offset="64 days") as later:
            async with later.place.database.connection() as conn:
                await done(set_status(conn, made.id, "canceled", actor="test"))
                await done(set_status(conn, made.id, "active", actor="test"))
            assert len(later.rows(MONTHS)[0][0]) == 3


async def test_another_interval_begins_when_it_is_changed_and_the_months_stay(database_url: str) -> None:
    """A year that is paid on the twentieth day ends a year later, and no change of interval gives a month twice."""
    async with office(database_url, wallets=1) as desk:
        made = await buy(desk, "monthly", anchor=now() - timedelta(days=20))
        async with desk.place.database.connection() as conn:
            for plan in ("yearly", "monthly", "yearly"):
                changed = await done(change_plan(conn, made.id, plan, actor="test"))
            assert changed.anchor == made.anchor
            ended = await done(set_status(conn, made.id, "canceled", actor="test"))
        assert ended.ends_at is not None
        assert changed.billed_from is not None
        assert timedelta(days=365) <= ended.ends_at - changed.billed_from <= timedelta(days=366)
        assert desk.rows("SELECT balance FROM credit_accounts") == [(1000,)]
        async with office(database_url, org_id=desk.org_id, clock_offset="500 days") as later:
            await later.run("credits-grant")
            assert len(later.rows(MONTHS)[0][0]) == 13, "months began on twelve more days of the paid year"
            assert await later.violations() == {}


async def test_what_has_ended_is_given_nothing_by_a_larger_plan(database_url: str) -> None:
    async with office(database_url, wallets=1) as desk:
        made = await buy(desk, "monthly")
        async with desk.place.database.connection() as conn:
            await put_plan(conn, Plan("large", "L", "subscription", 5000), actor="test")
            await done(set_status(conn, made.id, "canceled", actor="test", at_period_end=False))
            await done(change_plan(conn, made.id, "large", actor="test"))
        assert desk.rows("SELECT balance FROM credit_accounts") == [(1000,)]


@pytest.mark.parametrize("jobs_run_in_time", [True, False])
async def test_what_rolls_over_after_a_late_payment_does_not_depend_on_when_jobs_ran(
    database_url: str, jobs_run_in_time: bool
) -> None:
    async with office(database_url, wallets=1) as desk:
        made = await buy(desk, Plan("rolling", "R", "subscription", 100, rollover_cap=30))
        async with desk.place.database.connection() as conn:
            await done(set_status(conn, made.id, "past_due", actor="test"))
        async with office(database_url, org_id=desk.org_id, clock_offset="33 days") as later:
            if jobs_run_in_time:
                await later.run("credits-grant")
                assert (await later.run("credits-expire", dry=True)).counts["processed_batches"] == 0
                assert (await later.run("credits-expire")).counts["processed_batches"] == 0
            async with later.place.database.connection() as conn:
                await done(set_status(conn, made.id, "active", actor="test"))
            await later.run("credits-expire")
            assert later.rows("SELECT balance FROM credit_accounts") == [(130,)]
            assert await later.violations() == {}


async def test_leftovers_of_several_months_become_one_batch_of_the_new_one(database_url: str) -> None:
    """Month by month as it would have been, though all are granted by one run."""
    async with office(database_url, wallets=1) as desk:
        await buy(desk, Plan("rolling", "R", "subscription", 10, rollover_cap=25))
        async with office(database_url, org_id=desk.org_id, clock_offset="95 days") as later:
            await later.run("credits-grant")
            batches = later.rows("SELECT source, granted, remaining FROM credit_batches WHERE period_start = "
                                 "(SELECT max(period_start) FROM credit_batches) ORDER BY source")  # fmt: skip
            assert batches == [("rollover", 25, 25), ("subscription", 10, 10)]
            await later.run("credits-expire")
            assert later.rows("SELECT balance FROM credit_accounts") == [(35,)]
            assert await later.violations() == {}


async def test_a_refused_purchase_leaves_no_account_behind(database_url: str) -> None:
    async with office(database_url, wallets=1) as desk:
        await buy(desk, "pack-1000", external_ref="cs_1")
        stranger = type(desk.wallet())(desk.org_id, "live", "stranger")
        long_ago = now() - timedelta(days=20 * 366)
        async with desk.place.database.connection() as conn:
            taken = await create_purchase(conn, stranger, NewPurchase("monthly", external_ref="cs_1"), actor="test")
            old = await create_purchase(
                conn, stranger, NewPurchase("monthly", anchor=long_ago, grants_from=long_ago), actor="test"
            )
        assert (taken, old) == ("other_body", "too_long_ago")
        assert desk.rows("SELECT count(*) FROM credit_accounts") == [(1,)]


async def test_a_balance_that_would_not_fit_is_one_failed_month_and_no_more(database_url: str) -> None:
    async with office(database_url, wallets=3, ago="1 hour") as desk:
        with psycopg.connect(database_url, autocommit=True) as conn:
            conn.execute("SELECT nm_credit_grant('grant', org_id, env, user_id, 'r', '', 9223372036854775000, 'bonus',"
                         " 1::smallint, NULL, NULL, 'system:grant', NULL, NULL, NULL, NULL) FROM credit_accounts"
                         " WHERE user_id = 'user-0000002'")  # fmt: skip
        counts = (await desk.run("credits-grant")).counts
        assert (counts["successful"], counts["failed"]) == (2, 1)
        assert await desk.violations() == {}


async def test_what_has_ended_stays_ended_when_it_is_canceled_again(database_url: str) -> None:
    """A late or repeated cancellation would move the end to the interval that runs, and give every month between."""
    async with office(database_url, wallets=1) as desk:
        made = await buy(desk, "monthly")
        async with desk.place.database.connection() as conn:
            ended = await done(set_status(conn, made.id, "canceled", actor="test"))
        async with office(database_url, org_id=desk.org_id, clock_offset="100 days") as later:
            async with later.place.database.connection() as conn:
                again = await done(set_status(conn, made.id, "canceled", actor="test"))
                assert (await done(set_status(conn, made.id, "canceled", actor="test", at_period_end=False))) == again
            assert again.ends_at == ended.ends_at
            await later.run("credits-grant")
            assert len(later.rows(MONTHS)[0][0]) == 1, "nobody has paid for more"


@pytest.mark.parametrize("status", ["canceled", "past_due"])
async def test_a_trial_that_nobody_paid_for_gives_no_month_however_it_ends(database_url: str, status: Any) -> None:
    async with office(database_url, wallets=1) as desk:
        made = await buy(desk, "yearly", trial_ends_at=now() + timedelta(days=7))
        async with office(database_url, org_id=desk.org_id, clock_offset="8 days") as later:
            async with later.place.database.connection() as conn:
                await done(set_status(conn, made.id, status, actor="test"))
            assert later.rows(MONTHS) == [(None,)], "the first month waits for the payment"
            async with later.place.database.connection() as conn:
                await done(change_plan(conn, made.id, "monthly", actor="test"))
                await later.run("credits-grant")
                assert later.rows(MONTHS) == [(None,)]
                await done(set_status(conn, made.id, "active", actor="test"))
            assert later.rows(MONTHS) == [([made.anchor],)]
