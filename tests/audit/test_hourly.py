"""The hourly pass: what is new, once, by one of many; what it finds is told until it is right."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest

from nightmail.engine import audit as hourly
from nightmail.engine.audit import Auditor, Pass, Work
from nightmail.engine.scheduler import Scheduler
from nightmail.engine.tick import Ticker
from nightmail.ids import new_claim_id
from nightmail.store import credits
from nightmail.store.audit import INVARIANTS, audit
from nightmail.store.audit.invariant import Chunk, Offender
from nightmail.store.audit.marks import (
    end_turn,
    list_changed_accounts,
    list_changed_messages,
    record_chunk,
    take_turn,
)
from nightmail.store.audit.walk import check_chunk
from nightmail.store.credits import Wallet
from nightmail.store.database import Connection, Database
from tests.audit.books import Books, make_books
from tests.credits.seeds import seed_batches, seed_wallets
from tests.engine.place import place

pytestmark = pytest.mark.anyio

HOURLY = {invariant.name for invariant in INVARIANTS if invariant.scope not in ("orgs", "tables")}


@asynccontextmanager
async def auditor(url: str, offset: str = "") -> AsyncIterator[Auditor]:
    database = Database(url, pool_max=3, clock_offset=offset)
    await database.open()
    try:
        yield Auditor(database, asyncio.Event())
    finally:
        await database.close()


async def run_pass(url: str, offset: str = "", **options: Any) -> Pass:
    """Do a pass, whether it is due or not."""
    async with auditor(url, offset) as one:
        done = await one.audit_if_due(margin_s=0, is_early=True, **options)
    assert done is not None
    return done


def open_findings(books: Books) -> set[tuple[str, str]]:
    return set(books.ask("SELECT invariant, offender FROM audit_findings WHERE cleared_at IS NULL"))


async def full(url: str) -> set[tuple[str, str]]:
    async with await psycopg.AsyncConnection[Any].connect(url, autocommit=True) as conn:
        return {(f.name, id) for f in await audit(conn) for id in f.first if f.name in HOURLY}


def spoil(books: Books, statement: str, **named: Any) -> None:
    books.tell("SET session_replication_role = replica")
    with psycopg.connect(books.url, autocommit=True) as conn:
        conn.execute("SET session_replication_role = replica")
        assert conn.execute(statement, named).rowcount > 0


async def test_a_first_pass_finds_what_a_full_audit_finds(database_url: str) -> None:
    books = await make_books(database_url)
    assert (await run_pass(database_url)).violations == 0
    spoil(books, "DELETE FROM audit_marks")
    spoil(books, "UPDATE credit_accounts SET balance = balance + 1 WHERE id = %(id)s", id=books.account_id)
    spoil(books, "UPDATE messages SET provider_message_id = NULL WHERE id = %(id)s", id=books.ids["sent"])
    spoil(books, "DELETE FROM webhook_deliveries WHERE topic = 'email.sent'")
    spoil(books, "UPDATE webhook_deliveries SET recipient = 'nobody' WHERE message_id IS NOT NULL")
    spoil(books, "UPDATE webhook_endpoints SET next_seq = 1")
    spoil(books, "DELETE FROM overage_reports WHERE revision = 2")
    spoil(
        books,
        "UPDATE message_queue SET claim_id = gen_random_uuid() WHERE message_id = %(id)s",
        id=books.ids["waiting"],
    )
    done = await run_pass(database_url)
    assert done.is_done
    found = open_findings(books)
    assert found == await full(database_url)
    assert {name for name, _ in found} == {
        "credit_balance", "provider_id", "telling", "told", "overage_complete", "held",
    }  # fmt: skip


async def test_what_was_written_at_once_is_taken_in_small_spans(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    books = await make_books(database_url)
    spoil(books, "UPDATE credit_accounts SET balance = balance + 1")
    spans: list[Any] = []
    changed = Work._changed

    async def noted(work: Work, scope: Any, start: Any, end: Any) -> Any:
        keys = await changed(work, scope, start, end)
        spans.append((end - start, len(keys)))
        return keys

    monkeypatch.setattr(Work, "_changed", noted)
    monkeypatch.setattr(hourly, "WANTED", 1)
    done = await run_pass(database_url)
    assert (done.is_done, done.accounts, done.messages) == (True, 2, 8)
    assert all(count <= 1 or span > hourly.SHORTEST_SPAN / 2 for span, count in spans)
    assert any(count > 1 for _, count in spans), "nothing had to be halved"
    assert len(open_findings(books)) == 2


async def test_new_drift_is_found_without_reading_what_is_old(database_url: str) -> None:
    books = await make_books(database_url)
    first = await run_pass(database_url)
    assert (first.accounts, first.messages) == (2, 8)
    second = await run_pass(database_url)
    assert (second.accounts, second.messages) == (0, 0)
    # An old wallet that is spoilt behind the ledger's back is for the full audit to find.
    spoil(books, "UPDATE credit_accounts SET balance = balance + 1 WHERE id = %(id)s", id=books.account_id)
    ada = Wallet(books.org_id, "live", "ada")
    async with await psycopg.AsyncConnection[Any].connect(database_url, autocommit=True) as conn:
        await conn.execute("SELECT set_config('nightmail.clock_offset', '4 days', false)")
        await credits.consume(conn, ada, amount=1, reference="new")
    spoil(
        books,
        "UPDATE credit_entries SET amount = 2 WHERE account LIKE 'service:%%' AND transaction_id ="
        " (SELECT id FROM credit_transactions WHERE reference = %(new)s)",
        new="new",
    )
    third = await run_pass(database_url)
    assert (third.accounts, third.messages) == (1, 0)
    assert {name for name, _ in open_findings(books)} == {"credit_zero"}
    assert {name for name, _ in await full(database_url)} == {"credit_zero", "credit_balance"}


async def test_a_transaction_that_commits_late_is_not_missed(database_url: str) -> None:
    """The mark stays behind whoever is still writing, however much is written after."""
    books = await make_books(database_url)
    await run_pass(database_url)
    async with (
        await psycopg.AsyncConnection[Any].connect(database_url, autocommit=True) as slow,
        await psycopg.AsyncConnection[Any].connect(database_url, autocommit=True) as quick,
    ):
        async with slow.transaction():
            await credits.consume(slow, books.wallet, amount=1, reference="slow")
            await credits.consume(quick, Wallet(books.org_id, "live", "ada"), amount=1, reference="quick")
            assert (await run_pass(database_url)).accounts == 0
    assert (await run_pass(database_url)).accounts == 2


async def test_two_ticks_at_once_audit_once_and_an_hour_later_again(database_url: str) -> None:
    async with auditor(database_url) as one, auditor(database_url) as other:
        passes = await asyncio.gather(*(a.audit_if_due(margin_s=0) for a in (one, other, one, other)))
        assert [done is not None for done in passes].count(True) == 1
    async with auditor(database_url, "59 minutes") as early, auditor(database_url, "61 minutes") as later:
        assert await early.audit_if_due(margin_s=0) is None
        assert await later.audit_if_due(margin_s=0) is not None


async def test_who_asks_during_a_pass_does_not_take_it_from_the_same_process(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with auditor(database_url) as one:
        do = Work.do

        async def ask_and_do(work: Work, margin_s: float) -> None:
            assert await one.audit_if_due(margin_s=0) is None
            await do(work, margin_s)

        monkeypatch.setattr(Work, "do", ask_and_do)
        assert await one.audit_if_due(margin_s=0) is not None
    async with auditor(database_url, "59 minutes") as early:
        assert await early.audit_if_due(margin_s=0) is None, "the turn was given back"


async def test_a_holder_that_was_replaced_writes_nothing(database_url: str) -> None:
    books = Books(database_url)
    dead, heir = new_claim_id(), new_claim_id()
    async with await psycopg.AsyncConnection[Any].connect(database_url, autocommit=True) as conn:
        assert await take_turn(conn, claim_id=dead, lease_s=60)
        assert not await take_turn(conn, claim_id=heir, lease_s=60)
        await conn.execute("SELECT set_config('nightmail.clock_offset', '61 seconds', false)")
        assert await take_turn(conn, claim_id=heir, lease_s=60)
        (row,) = await (await conn.execute("SELECT now()")).fetchall()
        found: dict[str, Sequence[Offender]] = {"credit_balance": [Offender("1", "1")]}
        await record_chunk(conn, claim_id=dead, found=found, scope="accounts", audited_to=row[0])
        assert not await end_turn(conn, claim_id=dead, is_done=True, every_s=3600, checked=1)
        assert books.ask("SELECT FROM audit_findings") + books.ask("SELECT FROM audit_marks") == []
        await record_chunk(conn, claim_id=heir, found=found, scope="accounts", audited_to=row[0])
        assert len(books.ask("SELECT FROM audit_findings")) == len(books.ask("SELECT FROM audit_marks")) == 1
        assert await end_turn(conn, claim_id=heir, is_done=True, every_s=3600, checked=1)


async def test_a_pass_without_time_gives_the_turn_back_and_the_next_goes_on(database_url: str) -> None:
    books = await make_books(database_url)
    done = await run_pass(database_url, pass_s=0)
    assert not done.is_done
    assert books.ask("SELECT claim_id, finished_at FROM audit_turn") == [(None, None)]
    async with auditor(database_url) as one:
        again = await one.audit_if_due(margin_s=0)
    assert again is not None
    assert (again.is_done, again.accounts) == (True, 2)


async def test_a_pass_moves_on_however_much_one_minute_has_brought(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mark moves after a whole span: what is too much for one pass would be begun anew by each."""
    monkeypatch.setattr(hourly, "WANTED", 4)
    with psycopg.connect(database_url, autocommit=True) as conn:
        seed_wallets(conn, 30)
        for number in range(1, 31):
            conn.execute(
                "SELECT nm_credit_grant('grant', org_id, env, user_id, 'g', '', 5, 'bonus', 1::smallint, NULL, NULL,"
                " 'system:grant', NULL, NULL, NULL, NULL) FROM credit_accounts ORDER BY id LIMIT 1 OFFSET %s",
                (number - 1,),
            )
    stop_after_a_span(monkeypatch)
    seen = []
    for _ in range(40):
        async with auditor(database_url) as one:
            done = await one.audit_if_due(margin_s=0, is_early=True)
        assert done is not None
        seen.append(done.accounts)
        if done.is_done:
            break
    assert (sum(seen), max(seen) <= 8, seen[0] > 0) == (30, True, True), seen


async def test_a_wallet_too_long_for_a_pass_is_left_to_the_full_audit(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would keep every pass from all else; what was found wrong in it stays open."""
    monkeypatch.setattr(hourly, "MOST_ENTRIES", 5)
    books = await make_books(database_url)
    [(entries, ada)] = books.ask("SELECT seq, id FROM credit_accounts WHERE user_id = 'ada'")
    assert entries > 5
    books.tell("INSERT INTO audit_findings VALUES ('credit_balance', %(id)s::text, %(id)s::text, now(), now())", id=ada)
    spoil(books, "UPDATE credit_accounts SET balance = balance + 1, seq = 5 WHERE id = %(id)s", id=books.account_id)
    done = await run_pass(database_url)
    assert (done.accounts, done.is_done) == (1, True)
    assert ("credit_balance", str(ada)) in open_findings(books)
    assert ("credit_balance", str(books.account_id)) in open_findings(books)


def stop_after_a_span(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pass's time be over as soon as it has checked wallets."""
    check = Work._check

    async def check_and_stop(work: Work, chunk: Chunk) -> Any:
        if chunk.scope == "accounts":
            work._until = 0.0
        return await check(work, chunk)

    monkeypatch.setattr(Work, "_check", check_and_stop)


async def test_an_alert_is_open_while_a_finding_is(database_url: str) -> None:
    books = await make_books(database_url)
    spoil(books, "UPDATE credit_accounts SET balance = balance + 1 WHERE id = %(id)s", id=books.account_id)
    async with place(database_url, [], alert_email="ops@example.com") as here:
        alerts = here.engine.alerts
        assert alerts is not None

        async def evaluate() -> list[Any]:
            await run_pass(database_url)
            alerts.evaluate_soon()
            await here.settled()
            return here.rows("SELECT preset, job, closed_at IS NULL FROM alerts")

        for _ in range(2):
            assert await evaluate() == [("audit", "", True)]
        assert here.rows("SELECT invariant, first_seen < last_seen FROM audit_findings") == [("credit_balance", True)]
        spoil(books, "UPDATE credit_accounts SET balance = balance - 1 WHERE id = %(id)s", id=books.account_id)
        for _ in range(2):
            assert await evaluate() == [("audit", "", False)]
        assert [email.subject.split(":")[0] for email in here.outbox.emails] == [
            "[Nightmail] ALERT",
            "[Nightmail] resolved",
        ]
        assert "credit_balance" in here.outbox.emails[0].subject


@pytest.mark.parametrize("key", ["written", "messages"])
async def test_a_finding_about_a_message_is_cleared_when_it_is_right(database_url: str, key: str) -> None:
    books = await make_books(database_url)
    sent = books.ids["sent"]
    if key == "written":
        spoil(
            books,
            "UPDATE webhook_deliveries SET topic = 'email.x' WHERE message_id = %(id)s AND topic = 'email.sent'",
            id=sent,
        )
    else:
        spoil(books, "UPDATE messages SET provider_message_id = NULL WHERE id = %(id)s", id=sent)
    await run_pass(database_url)
    await run_pass(database_url)
    assert {name for name, _ in open_findings(books)} == ({"told", "telling"} if key == "written" else {"provider_id"})
    spoil(
        books, "UPDATE webhook_deliveries SET topic = 'email.sent' WHERE topic = 'email.x'"
    ) if key == "written" else spoil(books, "UPDATE messages SET provider_message_id = 'p' WHERE id = %(id)s", id=sent)
    await run_pass(database_url)
    assert open_findings(books) == set()


async def test_a_tick_and_a_scheduler_audit(database_url: str) -> None:
    async with place(database_url, []) as here:
        await Ticker(here.engine).tick(trigger="test")
        (first,) = here.rows("SELECT finished_at FROM audit_turn WHERE finished_at IS NOT NULL AND claim_id IS NULL")
    async with place(database_url, [], clock_offset="2 hours") as here:
        await Scheduler(here.engine, here.stopping).fire()
        await here.settled()
        (second,) = here.rows("SELECT finished_at FROM audit_turn")
    assert second > first


@pytest.fixture
async def conn(database_url: str) -> AsyncIterator[Connection]:
    async with await psycopg.AsyncConnection[Any].connect(database_url, autocommit=True) as conn:
        yield conn


SCANS = """
SELECT relname, seq_scan, seq_tup_read
FROM pg_stat_xact_user_tables
WHERE seq_tup_read > 1000  -- a table of some rows is read faster than its index
"""
EVENTS = """
WITH message AS (
    INSERT INTO messages (id, org_id, env, channel, state, sender, addresses, units, period, created_at)
    SELECT nm_uuid7(), %(org)s, 'live', 'email', 'failed', 's', '{a}', 1, '2026-01', now()
    FROM generate_series(1, 20000)
    RETURNING id
)
INSERT INTO message_events (message_id, org_id, kind, occurred_at, recorded_at)
SELECT id, %(org)s, 'failed', now(), now() - interval '40 days' + interval '1 minute' * row_number() OVER ()
FROM message
"""


async def test_a_chunk_reads_no_table_from_end_to_end(database_url: str, conn: Connection) -> None:
    """Among 1,500 wallets and 20,000 messages; also with the statistics of empty tables."""
    books = await make_books(database_url)
    await conn.execute("ANALYZE")
    with psycopg.connect(database_url, autocommit=True) as plain:
        org_id = seed_wallets(plain, 1500)
        for reference in ("one", "two"):
            seed_batches(plain, org_id, reference=reference, amount=100, lasts="9 days")
        plain.execute(EVENTS, {"org": books.org_id})
    rows = await (await conn.execute("SELECT id FROM credit_accounts LIMIT 100")).fetchall()
    accounts = [row[0] for row in rows]
    (start, end) = (await (await conn.execute("SELECT now() - interval '5 milliseconds', now()")).fetchall())[0]
    for statistics in ("stale", "fresh"):
        if statistics == "fresh":
            books.tell("VACUUM ANALYZE")
        async with conn.transaction(force_rollback=True):
            await conn.execute("SELECT set_config('max_parallel_workers_per_gather', '0', true)")
            if statistics == "fresh":  # a few rows out of many: only who knows the sizes can tell
                await list_changed_accounts(conn, start=start, end=end)
                await list_changed_messages(conn, start=start, end=end)
            await check_chunk(conn, Chunk("accounts", accounts))
            await check_chunk(conn, Chunk("messages", list(books.ids.values())))
            assert await (await conn.execute(SCANS)).fetchall() == [], statistics
