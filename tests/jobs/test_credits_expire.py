"""credits-expire: it books what is true already; nothing depends on when it runs."""

from __future__ import annotations

import asyncio
from functools import partial

import psycopg
import pytest

from nightmail.jobs import credits_expire
from nightmail.store import credit_expiry, credits
from nightmail.store.credit_history import get_balance
from nightmail.store.credits import Done, Insufficient
from tests.credits.office import listen, office
from tests.credits.seeds import seed_batches

pytestmark = pytest.mark.anyio


async def test_with_the_job_off_for_a_week_nothing_that_ended_can_be_spent(database_url: str) -> None:
    async with office(database_url, wallets=1) as desk:
        with psycopg.connect(database_url, autocommit=True) as conn:
            seed_batches(conn, desk.org_id, reference="short", amount=100, lasts="1 day")
            seed_batches(conn, desk.org_id, reference="long", amount=30, lasts="60 days")
        async with office(database_url, org_id=desk.org_id, clock_offset="8 days") as later:
            async with later.place.database.connection() as conn:
                shown = await get_balance(conn, later.wallet())
                assert shown is not None
                assert (shown.balance, [batch.remaining for batch in shown.batches]) == (30, [30])
                refused = await credits.consume(conn, later.wallet(), amount=31, reference="r")
                assert refused == Insufficient(31, 30, 1)
                spent = await credits.consume(conn, later.wallet(), amount=30, reference="r")
                assert isinstance(spent, Done)
                assert spent.answer["balance"] == 0
            outcome = await later.run("credits-expire")
            assert outcome.counts == {"processed_batches": 1, "processed_users": 1, "total_expired_amount": 100}
            assert later.rows("SELECT balance FROM credit_accounts") == [(0,)]
            assert await later.violations() == {}


async def test_each_user_is_counted_once_and_the_second_run_finds_nothing(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credits_expire, "CHUNK", 2)
    async with office(database_url, wallets=5) as desk:
        with psycopg.connect(database_url, autocommit=True) as conn:
            for number in range(3):
                seed_batches(conn, desk.org_id, reference=f"r{number}", amount=10, lasts=f"{number} days")
            seed_batches(conn, desk.org_id, reference="never", amount=1, lasts="9 days")
        listen(database_url, desk.org_id, "credits.expired")
        async with office(database_url, org_id=desk.org_id, clock_offset="3 days") as later:
            expected = {"processed_batches": 15, "processed_users": 5, "total_expired_amount": 150}
            assert (await later.run("credits-expire", dry=True)).counts == expected
            assert (await later.run("credits-expire")).counts == expected
            assert (await later.run("credits-expire")).counts == dict.fromkeys(expected, 0)
            assert later.rows("SELECT DISTINCT balance, seq FROM credit_accounts") == [(1, 7)]
            told = later.rows("SELECT data ->> 'amount', count(*) FROM webhook_deliveries GROUP BY 1")
            assert told == [("30", 5)]
            assert await later.violations() == {}


async def test_what_is_reserved_keeps_its_right_and_a_late_release_goes_to_expiry(database_url: str) -> None:
    async with office(database_url, wallets=2) as desk:
        with psycopg.connect(database_url, autocommit=True) as conn:
            seed_batches(conn, desk.org_id, reference="short", amount=100, lasts="1 day")
        async with desk.place.database.connection() as conn:
            for number in (1, 2):
                held = await credits.reserve(conn, desk.wallet(number), amount=40, reference="message")
                assert isinstance(held, Done)
        async with office(database_url, org_id=desk.org_id, clock_offset="2 days") as later:
            async with later.place.database.connection() as conn:
                # one before the booking, one after it
                kept = await credits.capture(conn, later.wallet(1), reference="message", amount=25)
                assert isinstance(kept, Done)
                assert (kept.answer["captured"], kept.answer["expired"], kept.answer["released"]) == (25, 15, 0)
                await later.run("credits-expire")
                late = await credits.release(conn, later.wallet(2), reference="message")
                assert isinstance(late, Done)
                assert (late.answer["captured"], late.answer["expired"], late.answer["released"]) == (0, 40, 0)
            columns = "SELECT remaining, reserved, consumed, expired FROM credit_batches ORDER BY account_id"
            assert later.rows(columns) == [(0, 0, 25, 75), (0, 0, 0, 100)]
            assert later.rows("SELECT balance FROM credit_accounts") == [(0,), (0,)]
            assert await later.violations() == {}


async def test_runs_at_once_and_spends_between_them_book_each_batch_once(database_url: str) -> None:
    async with office(database_url, wallets=40) as desk:
        with psycopg.connect(database_url, autocommit=True) as conn:
            seed_batches(conn, desk.org_id, reference="short", amount=10, lasts="1 second")
            seed_batches(conn, desk.org_id, reference="long", amount=10, lasts="9 days")
        async with office(database_url, org_id=desk.org_id, clock_offset="1 minute") as later:

            async def spend(number: int) -> None:
                async with later.place.database.connection() as conn:
                    await credits.consume(conn, later.wallet(number), amount=3, reference="r")

            runs = [asyncio.create_task(later.place.engine.run("credits-expire", trigger="test")) for _ in range(4)]
            await asyncio.gather(*(spend(number) for number in range(1, 41)))
            done = [await run for run in runs]
            assert sum(outcome.counts["processed_batches"] for outcome in done) == 40
            assert later.rows("SELECT DISTINCT balance FROM credit_accounts") == [(7,)]
            assert await later.violations() == {}


async def test_more_batches_than_a_transaction_takes_are_all_booked_by_one_run(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credits_expire, "CHUNK", 4)
    whole = credit_expiry.expire_chunk
    monkeypatch.setattr(credit_expiry, "expire_chunk", partial(whole, most=5))
    async with office(database_url, wallets=3) as desk:
        with psycopg.connect(database_url, autocommit=True) as conn:
            for number in range(7):
                seed_batches(conn, desk.org_id, reference=f"r{number}", amount=10, lasts="1 day")
        async with office(database_url, org_id=desk.org_id, clock_offset="3 days") as later:
            counts = (await later.run("credits-expire")).counts
            assert (counts["processed_batches"], counts["total_expired_amount"]) == (21, 210)
            assert await later.violations() == {}
