"""credits-grant: every month that has begun, once, however late, however often, whoever asks."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nightmail.jobs import credits_grant
from nightmail.store import credit_grants, credits
from nightmail.store.credit_grants import Lane
from nightmail.store.plans import Plan, put_plan
from nightmail.store.purchases import change_plan, set_status
from tests.credits.office import Office, listen, office
from tests.engine.place import content_of

pytestmark = pytest.mark.anyio

COUNTS = "SELECT count(*), count(DISTINCT purchase_id), sum(amount)::bigint FROM credit_grants"
BALANCES = "SELECT DISTINCT balance FROM credit_accounts"


def results(**counts: int) -> dict[str, int]:
    """Return all keys of the job."""
    return {**dict.fromkeys(credits_grant.KEYS, 0), **counts}


async def test_each_month_is_granted_once_with_its_expiry_and_the_next_run_finds_nothing(database_url: str) -> None:
    async with office(database_url, wallets=12, ago="1 day") as desk:
        first = await desk.run("credits-grant")
        assert first.counts == results(processed=12, successful=12)
        assert (await desk.run("credits-grant")).counts == results()
        assert desk.rows(COUNTS) == [(12, 12, 12_000)]
        assert desk.rows(BALANCES) == [(1000,)]
        month = "period_start = anchor AND expires_at = nm_period_start(anchor, 1) AND issued_at = anchor"
        query = f"SELECT count(*) FROM credit_batches AS b JOIN purchases AS p ON p.id = b.purchase_id WHERE {month}"
        assert desk.rows(query) == [(12,)]
        assert await desk.violations() == {}


async def test_a_month_that_was_granted_is_skipped_whatever_the_purchase_says(database_url: str) -> None:
    async with office(database_url, wallets=3, ago="40 days") as desk:
        await desk.run("credits-grant")
        desk.place.execute("UPDATE purchases SET next_period = 0, next_grant_at = anchor")
        assert (await desk.run("credits-grant", dry=True)).counts == results(processed=6, skipped=6)
        assert (await desk.run("credits-grant")).counts == results(processed=6, skipped=6)
        assert desk.rows(COUNTS) == [(6, 3, 6000)]
        assert await desk.violations() == {}


async def test_missed_months_are_caught_up_in_chunks(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credits_grant, "CHUNK", 4)
    async with office(database_url, wallets=10, ago="95 days") as desk:
        months = desk.rows("SELECT count(*) FROM generate_series(0, 4) AS n, purchases "
                           "WHERE nm_period_start(anchor, n) <= nm_now()")[0][0]  # fmt: skip
        dry = await desk.run("credits-grant", dry=True)
        assert dry.counts == results(processed=months, successful=months)
        outcome = await desk.run("credits-grant")
        assert outcome.counts == results(processed=months, successful=months)
        assert desk.rows(COUNTS) == [(months, 10, months * 1000)]
        await desk.run("credits-expire")
        assert desk.rows(BALANCES) == [(1000,)], "only the month that runs can be spent"
        assert await desk.violations() == {}


async def test_a_dry_run_changes_nothing(database_url: str) -> None:
    async with office(database_url, wallets=3, ago="95 days") as desk:
        before = content_of(database_url)
        await desk.run("credits-grant", dry=True)
        await desk.run("credits-expire", dry=True)
        assert content_of(database_url) == before


async def test_64_callers_at_once_grant_each_month_once(database_url: str) -> None:
    async with (
        office(database_url, wallets=20, ago="40 days") as desk,
        office(database_url, org_id=desk.org_id) as twin,
    ):
        calls = [(desk, twin)[number % 2].place.engine.run("credits-grant", trigger=f"platform-{number % 5}")
                 for number in range(64)]  # fmt: skip
        outcomes = await asyncio.gather(*calls)
        assert {outcome.state for outcome in outcomes} <= {"succeeded", "deduplicated"}
        assert sum(outcome.counts["successful"] for outcome in outcomes) == 40
        assert desk.rows(COUNTS) == [(40, 20, 40_000)]
        assert await desk.violations() == {}


async def test_without_the_lease_64_runs_at_once_still_grant_each_month_once(database_url: str) -> None:
    """The lease saves work; what keeps a month from being granted twice is the row."""
    async with office(database_url, wallets=20, ago="40 days") as desk:
        context = desk.place.engine.context
        spec = desk.place.engine.jobs["credits-grant"]
        done = await asyncio.gather(*(credits_grant.run(context(_call(desk, spec))) for _ in range(64)))
        assert sum(result.counts["successful"] for result in done) == 40
        assert desk.rows(COUNTS) == [(40, 20, 40_000)]
        assert await desk.violations() == {}


async def test_a_failing_row_is_found_left_and_counted_and_tried_last_by_the_next_run(database_url: str) -> None:
    refuse = """
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.account_id IN (SELECT id FROM credit_accounts WHERE user_id IN ('user-0000003', 'user-0000017')) THEN
            RAISE EXCEPTION 'poison' USING ERRCODE = 'check_violation';
        END IF;
        RETURN NEW;
    END $$;
    CREATE TRIGGER refuse BEFORE INSERT ON credit_batches FOR EACH ROW EXECUTE FUNCTION refuse()
    """
    async with office(database_url, wallets=30, ago="40 days") as desk:
        desk.place.execute(refuse)
        first = await desk.run("credits-grant")
        assert first.counts == results(processed=58, successful=56, failed=2)
        noted = desk.rows("SELECT user_id, grant_error FROM purchases AS p JOIN credit_accounts AS a ON a.id = "
                          "p.account_id WHERE failed_run IS NOT NULL ORDER BY 1")  # fmt: skip
        assert noted == [(user, "CheckViolation: poison") for user in ("user-0000003", "user-0000017")]
        assert (await desk.run("credits-grant")).counts == results(processed=2, failed=2)
        desk.place.execute("DROP TRIGGER refuse ON credit_batches")
        assert (await desk.run("credits-grant")).counts == results(processed=4, successful=4)
        assert desk.rows("SELECT count(*) FROM purchases WHERE failed_run IS NOT NULL") == [(0,)]
        assert desk.rows(COUNTS) == [(60, 30, 60_000)]
        assert await desk.violations() == {}


async def test_a_crash_between_chunks_loses_nothing_and_grants_nothing_twice(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credits_grant, "CHUNK", 3)
    monkeypatch.setattr(credits_grant, "LANES", 1)
    async with office(database_url, wallets=10, ago="1 day", crash="credits-grant:chunk_granted:raise:2") as desk:
        broken = await desk.place.engine.run("credits-grant", trigger="test")
        assert broken.state == "failed"
        assert desk.rows(COUNTS)[0][0] == 6
        assert (await desk.run("credits-grant")).counts == results(processed=4, successful=4)
        assert desk.rows(COUNTS) == [(10, 10, 10_000)]
        assert await desk.violations() == {}


async def test_what_is_left_at_the_deadline_is_said_and_done_by_the_next_run(database_url: str) -> None:
    async with office(database_url, wallets=3, ago="1 day") as desk:
        desk.place.stopping.set()
        outcome = await desk.run("credits-grant")
        assert (outcome.more, outcome.counts) == (True, results())
        desk.place.stopping.clear()
        assert (await desk.run("credits-grant")).counts["successful"] == 3


async def test_held_months_wait_and_ended_subscriptions_get_no_more(database_url: str) -> None:
    async with office(database_url, wallets=3, ago="1 day") as desk:
        ids = [row[0] for row in desk.rows("SELECT id FROM purchases ORDER BY account_id")]
        await desk.run("credits-grant")
        async with desk.place.database.connection() as conn:
            await set_status(conn, ids[0], "past_due", actor="test")
            await set_status(conn, ids[1], "canceled", actor="test")
        async with office(database_url, org_id=desk.org_id, clock_offset="70 days") as later:
            # past due for longer than the plan's 3 days: both months wait; canceled at the end of its month: none
            assert (await later.run("credits-grant")).counts == results(processed=2, successful=2)
            async with later.place.database.connection() as conn:
                paid = await set_status(conn, ids[0], "active", actor="test")
                assert not isinstance(paid, str)
            assert await granted(later) == [3, 1, 3]
            assert (await later.run("credits-grant")).counts == results()
            assert await later.violations() == {}


async def test_a_larger_plan_gives_the_difference_once_and_a_smaller_one_begins_with_the_next_month(
    database_url: str,
) -> None:
    async with office(database_url, wallets=1, ago="1 day") as desk:
        [(purchase,)] = desk.rows("SELECT id FROM purchases")
        await desk.run("credits-grant")
        async with desk.place.database.connection() as conn:
            await put_plan(conn, Plan("large", "Large", "subscription", 5000), actor="test")
            for plan in ("large", "monthly", "large", "monthly"):
                await change_plan(conn, purchase, plan, actor="test")
        assert desk.rows(BALANCES) == [(5000,)]
        ends = desk.rows("SELECT count(DISTINCT expires_at), count(*) FROM credit_batches")
        assert ends == [(1, 2)], "the difference ends with the month it is for"
        async with office(database_url, org_id=desk.org_id, clock_offset="31 days") as later:
            await later.run("credits-grant")
            await later.run("credits-expire")
            assert later.rows(BALANCES) == [(1000,)]
            assert await later.violations() == {}


async def test_leftovers_roll_over_up_to_the_cap_also_when_the_run_is_late(database_url: str) -> None:
    async with office(database_url, wallets=2) as desk:
        async with desk.place.database.connection() as conn:
            await put_plan(conn, Plan("rolling", "Rolling", "subscription", 100, rollover_cap=30), actor="test")
        desk.place.execute("INSERT INTO purchases (id, org_id, env, account_id, plan_id, status, anchor, grants_from,"
                           " next_grant_at) SELECT nm_uuid7(), org_id, env, id, 'rolling', 'active', nm_now(),"
                           " nm_now(), nm_now() FROM credit_accounts")  # fmt: skip
        desk.place.execute("UPDATE purchases SET grants_from = anchor, next_grant_at = anchor")
        await desk.run("credits-grant")
        async with desk.place.database.connection() as conn:
            spent = await credits.consume(conn, desk.wallet(2), amount=90, reference="r")
            assert isinstance(spent, credits.Done)
        async with office(database_url, org_id=desk.org_id, clock_offset="35 days") as later:
            # The expiry runs first: what the grant will carry over is left to it.
            assert (await later.run("credits-expire")).counts["processed_batches"] == 0
            await later.run("credits-grant")
            assert (await later.run("credits-expire")).counts["total_expired_amount"] == 70
            assert later.rows("SELECT balance FROM credit_accounts ORDER BY id") == [(130,), (110,)]
            assert await later.violations() == {}


async def test_those_who_listen_are_told_of_each_grant(database_url: str) -> None:
    async with office(database_url, wallets=2, ago="1 day") as desk:
        listen(database_url, desk.org_id, "credits.granted")
        await desk.run("credits-grant")
        told: list[Any] = desk.rows("SELECT topic, data ->> 'user_id', (data ->> 'amount')::int, data ? 'expires_at' "
                                    "FROM webhook_deliveries ORDER BY 2")  # fmt: skip
        assert told == [("credits.granted", f"user-000000{n}", 1000, True) for n in (1, 2)]


async def granted(desk: Office) -> list[int]:
    """Return how many months each subscription was granted, in the order of its account."""
    rows = desk.rows("SELECT count(g.purchase_id) FROM purchases AS p LEFT JOIN credit_grants AS g ON g.purchase_id = "
                     "p.id GROUP BY p.account_id ORDER BY p.account_id")  # fmt: skip
    return [row[0] for row in rows]


def _call(desk: Office, spec: Any) -> Any:
    """Return a call of the engine that holds no lease."""
    from nightmail.engine.runner import Call, job_deadline
    from nightmail.ids import new_claim_id, new_id

    engine = desk.place.engine
    return Call(spec, new_id(), "test", 25.0, job_deadline(25.0), None, [], engine.log, new_claim_id())


async def test_lanes_take_every_account_once(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More accounts than a block of a lane has: both lanes work, for the grant and for the expiry."""
    lanes: set[int] = set()
    whole = credit_grants.grant_chunk

    async def watched(*arguments: Any, lane: Lane, **named: Any) -> Any:
        chunk = await whole(*arguments, lane=lane, **named)
        if chunk is not None:
            lanes.add(lane.number)
        return chunk

    monkeypatch.setattr(credit_grants, "grant_chunk", watched)
    async with office(database_url, wallets=2100, ago="1 day") as desk:
        assert (await desk.run("credits-grant")).counts == results(processed=2100, successful=2100)
        assert lanes == {0, 1}
        async with office(database_url, org_id=desk.org_id, clock_offset="40 days") as later:
            counts = (await later.run("credits-expire")).counts
            assert (counts["processed_batches"], counts["processed_users"]) == (2100, 2100)
            assert (await later.run("credits-expire")).counts["processed_batches"] == 0
            assert await later.violations() == {}
