"""The ledger's store: what the schema refuses, sets of reservations, purchases in their course."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from nightmail.store import credits
from nightmail.store.credit_grants import (
    GRANT_CHUNK,
    GRANT_ONE,
    START,
    NewGrant,
    claw_back,
    find_batch,
    grant,
    refund,
)
from nightmail.store.credit_history import get_balance
from nightmail.store.credits import Done, Settlement, TooMuch, Wallet
from nightmail.store.plans import Plan, put_plan
from nightmail.store.purchases import NewPurchase, PurchaseView, create_purchase, set_status
from tests.credits.office import Office, listen, office
from tests.credits.seeds import seed_batches, seed_purchases, seed_wallets

pytestmark = pytest.mark.anyio

WRONG = {
    "UPDATE credit_entries SET amount = amount + 1": "append-only",
    "DELETE FROM credit_entries": "append-only",
    "TRUNCATE credit_entries": "append-only",
    "UPDATE credit_transactions SET amount = 0": "append-only",
    "DELETE FROM credit_transactions": "append-only",
    "TRUNCATE credit_transactions": "append-only",
    "UPDATE credit_batches SET remaining = remaining - 1": "credit_batches_conserved",
    "UPDATE credit_batches SET remaining = -1, consumed = granted + 1": "credit_batches_positive",
    "UPDATE credit_accounts SET balance = -1": "credit_accounts_balance",
    "INSERT INTO credit_entries SELECT nm_uuid7(), 1, account_id, 'system:grant', NULL, NULL, NULL, 5"
    " FROM credit_transactions": "sum to zero",
    "INSERT INTO credit_entries SELECT nm_uuid7(), 1, account_id, 'wallet', 1, 5, batch_id, 5"
    " FROM credit_entries WHERE seq = 1": "credit_entries_wallet",
    "INSERT INTO credit_entries SELECT nm_uuid7(), 1, account_id, 'wallet', NULL, NULL, NULL, 5"
    " FROM credit_transactions": "credit_entries_check",
    "INSERT INTO credit_transactions (id, account_id, kind, reference, amount) SELECT nm_uuid7(), account_id, kind,"
    " reference, 1 FROM credit_transactions": "credit_transactions_reference",
    "UPDATE purchases SET next_grant_at = next_grant_at + interval '1 hour'": "purchases_check",
    "INSERT INTO credit_grants SELECT purchase_id, period_start, id, 1 FROM credit_grants, purchases": "grants_pkey",
}


async def test_the_schema_refuses_what_no_path_would_write(database_url: str) -> None:
    async with office(database_url, wallets=1, ago="1 hour") as desk:
        with psycopg.connect(database_url, autocommit=True) as conn:
            seed_batches(conn, desk.org_id, reference="g", amount=100, lasts="1 day")
            await desk.run("credits-grant")
            for statement, reason in WRONG.items():
                with pytest.raises(psycopg.Error, match=reason):
                    conn.execute(statement)
        assert await desk.violations() == {}


async def test_reservations_of_many_wallets_are_settled_at_once_each_by_one_of_two(database_url: str) -> None:
    async with office(database_url, wallets=20) as desk:
        with psycopg.connect(database_url, autocommit=True) as plain:
            seed_batches(plain, desk.org_id, reference="g", amount=100, lasts="1 day")
        listen(database_url, desk.org_id, "credits.expired")
        wanted = []
        async with desk.place.database.connection() as conn:
            for number in range(1, 21):
                for message in ("m1", "m2"):
                    held = await credits.reserve(
                        conn, desk.wallet(number), amount=10, reference=message, service="email"
                    )
                    assert isinstance(held, Done)
            for (account,) in desk.rows("SELECT id FROM credit_accounts"):
                wanted += [Settlement(account, "m1", 10), Settlement(account, "m2", 4), Settlement(account, "m3", 1)]

        async def settle(turn: int) -> list[Settlement]:
            async with desk.place.database.connection() as conn, conn.transaction():
                return await credits.settle(conn, sorted(wanted, reverse=bool(turn % 2)))

        settled = await asyncio.gather(*(settle(turn) for turn in range(4)))
        assert sorted(item for part in settled for item in part) == sorted(
            item for item in wanted if item.reference != "m3"
        )
        assert desk.rows("SELECT DISTINCT remaining, reserved, consumed FROM credit_batches") == [(86, 0, 14)]
        accounts = desk.rows(
            "SELECT account, sum(amount)::int FROM credit_entries WHERE account LIKE 'service:%%' GROUP BY 1"
        )
        assert accounts == [("service:email", 280)]
        async with desk.place.database.connection() as conn:
            # what came of a message is no caller's request: a late one is told how it was settled
            late = await credits.release(conn, desk.wallet(), reference="m1")
            assert late == credits.Settled({"reference_id": "m1", "captured": 10, "released": 0, "expired": 0})
        assert await desk.violations() == {}


async def test_a_trial_gives_its_credits_and_the_months_wait_for_the_payment(database_url: str) -> None:
    async with office(database_url, wallets=1) as desk:
        ends = desk.rows("SELECT now() + interval '10 days'")[0][0]
        async with desk.place.database.connection() as conn:
            await put_plan(conn, Plan("tried", "T", "subscription", 50, trial_credits=7), actor="test")
            made = await create_purchase(conn, desk.wallet(), NewPurchase("tried", trial_ends_at=ends), actor="test")
            assert isinstance(made, PurchaseView)
            assert (made.status, made.anchor, made.holds_from) == ("trialing", ends, ends)
            assert await balance(desk) == 7
        async with office(database_url, org_id=desk.org_id, clock_offset="12 days") as later:
            await later.run("credits-grant")
            assert await balance(later) == 0
            async with later.place.database.connection() as conn:
                paid = await set_status(conn, made.id, "active", actor="test")
                assert isinstance(paid, PurchaseView)
                assert paid.next_period == 1
            assert await balance(later) == 50
            async with later.place.database.connection() as conn:
                ended = await set_status(conn, made.id, "canceled", actor="test", at_period_end=False)
                assert isinstance(ended, PurchaseView)
            assert await balance(later) == 50, "what was paid for stays until it ends"
            assert await later.violations() == {}


async def test_a_yearly_plan_gives_months_and_ends_with_its_year(database_url: str) -> None:
    async with office(database_url, wallets=1) as desk:
        async with desk.place.database.connection() as conn:
            made = await create_purchase(conn, desk.wallet(), NewPurchase("yearly"), actor="test")
            assert isinstance(made, PurchaseView)
            ended = await set_status(conn, made.id, "canceled", actor="test")
            assert isinstance(ended, PurchaseView)
        [(is_a_year,)] = desk.rows("SELECT ends_at = nm_period_start(anchor, 12) FROM purchases")
        assert is_a_year
        async with office(database_url, org_id=desk.org_id, clock_offset="800 days") as later:
            await later.run("credits-grant")
            assert later.rows("SELECT count(*) FROM credit_grants") == [(12,)]


async def test_the_same_purchase_twice_at_once_is_one(database_url: str) -> None:
    async with office(database_url, wallets=1) as desk:
        wallet = Wallet(desk.org_id, "live", "somebody new")

        async def buy() -> object:
            new = NewPurchase("pack-1000", external_ref="cs_1")
            return await desk.place.database.run(lambda conn: create_purchase(conn, wallet, new, actor="test"))

        made = await asyncio.gather(*(buy() for _ in range(8)))
        assert len({str(item) for item in made}) == 1
        assert desk.rows("SELECT count(*), sum(granted)::int FROM credit_batches") == [(1, 1000)]


async def test_looking_for_what_is_due_costs_nothing_when_nothing_is(database_url: str) -> None:
    """A run with a million active subscriptions must find nothing at once: the predicate bounds the index scan."""
    assert "p.id = %(purchase_id)s" in GRANT_ONE
    with psycopg.connect(database_url, autocommit=True) as conn:
        org_id = seed_wallets(conn, 3000)
        seed_purchases(conn, org_id, ago="-9 days")
        conn.execute("ANALYZE")
        arguments: dict[str, Any] = {
            "job_id": org_id, "after_day": START.day, "after_account": 0, "after_id": START.id, "limit": 5000,
            "again": False,
            "lane": 0, "lanes": 1,
        }  # fmt: skip
        rows = conn.execute("EXPLAIN (ANALYZE, FORMAT JSON) " + GRANT_CHUNK, arguments).fetchall()
    scans = list(walk(rows[0][0][0]["Plan"]))
    due = [scan for scan in scans if scan.get("Relation Name") == "purchases" and scan.get("Index Name")]
    [scan] = [scan for scan in due if scan["Index Name"] == "purchases_due"]
    assert "::date <=" in scan["Index Cond"]
    assert (scan["Actual Rows"], scan.get("Rows Removed by Filter", 0)) == (0, 0)


def walk(node: dict[str, Any]) -> Any:
    """Yield the nodes of a plan."""
    yield node
    for child in node.get("Plans", ()):
        yield from walk(child)


async def balance(desk: Office) -> int:
    """Return what the first wallet can spend."""
    async with desk.place.database.connection() as conn:
        view = await get_balance(conn, desk.wallet())
    assert view is not None
    return view.balance


async def test_the_audit_knows_the_order_in_which_a_batch_stood_before_it_was_taken_back(database_url: str) -> None:
    """Taking a batch back ends it, which puts it first; what was spent before went by its former end."""
    async with office(database_url, wallets=1) as desk:
        at = desk.rows("SELECT now()")[0][0]
        async with desk.place.database.connection() as conn:
            for days in (10, 30):
                new = NewGrant(100, f"g{days}", expires_at=at + timedelta(days=days))
                assert isinstance(await grant(conn, desk.wallet(), new), Done)
            await credits.consume(conn, desk.wallet(), amount=5, reference="one")
            batch_id = await find_batch(conn, desk.wallet(), "g30")
            assert batch_id is not None
            for reference in ("back", "again"):
                await claw_back(conn, desk.wallet(), reference=reference, batch_id=batch_id, reason="mistake")
            await credits.consume(conn, desk.wallet(), amount=5, reference="two")
        assert await desk.violations() == {}


async def batches(desk: Office) -> list[tuple[int, int | None]]:
    """Return what can be spent: credits, and the days until they end."""
    return desk.rows(
        "SELECT sum(remaining)::int, round(extract(epoch FROM expires_at - now()) / 86400)::int AS days"
        " FROM credit_batches WHERE is_open GROUP BY days ORDER BY days"
    )


async def test_credits_do_not_live_longer_for_having_been_spent_with_others_and_refunded(database_url: str) -> None:
    async with office(database_url, wallets=1) as desk:
        wallet, at = desk.wallet(), desk.rows("SELECT now()")[0][0]
        async with desk.place.database.connection() as conn:
            await grant(conn, wallet, NewGrant(100, "year", expires_at=at + timedelta(days=365)))
            await grant(conn, wallet, NewGrant(1, "for ever"))
            await credits.consume(conn, wallet, amount=101, reference="all")
            part = await refund(conn, wallet, reference="part", of="all", amount=2)
            assert isinstance(part, Done)
            assert await refund(conn, wallet, reference="part", of="all", amount=2) == Done(part.answer, is_replay=True)
            back = await refund(conn, wallet, reference="rest", of="all")
            assert isinstance(back, Done)
            assert back.answer["amount"] == 99
            assert await batches(desk) == [(100, 365), (1, None)]
            assert isinstance(await refund(conn, wallet, reference="more", of="all"), TooMuch)
        assert await desk.violations() == {}


async def test_a_refund_makes_up_for_an_end_once_and_not_for_what_was_taken_back(database_url: str) -> None:
    """Spent and given back again and again, a month's credits would never end; nor would those of a payment undone."""
    async with office(database_url, wallets=1) as desk:
        wallet, at = desk.wallet(), desk.rows("SELECT now()")[0][0]
        async with desk.place.database.connection() as conn:
            await grant(conn, wallet, NewGrant(10, "soon", expires_at=at + timedelta(days=1)))
            await credits.consume(conn, wallet, amount=10, reference="one")
            await refund(conn, wallet, reference="back one", of="one")
            assert await batches(desk) == [(10, 30)]
        async with office(database_url, org_id=desk.org_id, clock_offset="20 days") as later:
            async with later.place.database.connection() as conn:
                await credits.consume(conn, wallet, amount=10, reference="two")
                await refund(conn, wallet, reference="back two", of="two")
                assert await batches(desk) == [(10, 30)]
                await credits.consume(conn, wallet, amount=10, reference="three")
                await grant(conn, wallet, NewGrant(5, "paid", "purchase"))
                await credits.consume(conn, wallet, amount=5, reference="four")
                batch_id = await find_batch(conn, wallet, "paid")
                assert batch_id is not None
                await claw_back(conn, wallet, reference="unpaid", batch_id=batch_id, reason="charged back")
                await refund(conn, wallet, reference="back four", of="four")
                view = await get_balance(conn, wallet)
                assert view is not None
                assert view.balance == 0, "the payment was undone"
            assert await later.violations() == {}


async def test_refunded_credits_stay_those_of_their_purchase(database_url: str) -> None:
    """Otherwise what was bought, spent, refunded to the wallet and then paid back would be had for nothing."""
    async with office(database_url, wallets=1) as desk:
        async with desk.place.database.connection() as conn:
            for plan in ("pack-1000", "monthly"):
                assert isinstance(
                    await create_purchase(conn, desk.wallet(), NewPurchase(plan), actor="test"), PurchaseView
                )
            await credits.consume(conn, desk.wallet(), amount=2000, reference="all")
            await refund(conn, desk.wallet(), reference="back", of="all")
        rows = (
            "SELECT purchase_id, period_start, sum(granted) FROM credit_batches WHERE source {} 'refund' GROUP BY 1, 2"
        )
        given, back = (set(desk.rows(rows.format(sign))) for sign in ("<>", "="))
        assert (len(given), back) == (2, given)
        assert await desk.violations() == {}


async def test_a_clock_that_is_set_back_is_no_false_alarm(database_url: str) -> None:
    async with office(database_url, wallets=1) as desk:
        async with desk.place.database.connection() as conn:
            await grant(conn, desk.wallet(), NewGrant(10, "first"))
            await credits.reserve(conn, desk.wallet(), amount=4, reference="one")
        async with office(database_url, org_id=desk.org_id, clock_offset="-2 seconds") as earlier:
            async with earlier.place.database.connection() as conn:
                await credits.consume(conn, desk.wallet(), amount=6, reference="two")
                await grant(conn, desk.wallet(), NewGrant(10, "second"))
                await credits.capture(conn, desk.wallet(), reference="one")
        assert await desk.violations() == {}
