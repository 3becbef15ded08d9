"""Runs at once: nobody posts what another one is posting, no number is given twice, nobody waits behind the dead."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any
from uuid import UUID

import psycopg
import pytest

from nightmail.store.database import Connection, Database
from nightmail.store.fan_out import Fact, fan_out
from nightmail.store.webhook_deliveries import claim_deliveries
from nightmail.store.webhook_events import ReplayFilter, pull_events, replay_event, replay_events
from nightmail.webhooks.closed import fail_closed
from nightmail.webhooks.stamp import stamp_fresh
from tests.webhooks.desk import Desk

pytestmark = pytest.mark.anyio

LOCK_ENDPOINT = "SELECT FROM webhook_endpoints WHERE id = %s FOR NO KEY UPDATE"


async def drain(desk: Desk, runs: int, **options: Any) -> list[Counter[str]]:
    """Let so many runners deliver, one run after the other, until nothing is pending; return what each did."""

    async def work() -> Counter[str]:
        done: Counter[str] = Counter()
        while True:
            counts = await desk.deliver(**options)
            done += counts
            if not counts["claimed"]:
                if not await asyncio.to_thread(
                    desk.ask, "SELECT 1 FROM webhook_deliveries WHERE state = 'pending' LIMIT 1"
                ):
                    return done
                await asyncio.sleep(0.01)

    async with asyncio.timeout(60):
        return await asyncio.gather(*(work() for _ in range(runs)))


def deadlocks(desk: Desk) -> int:
    """Return how often PostgreSQL broke a deadlock here: the code repeats such a transaction and says nothing."""
    desk.ask("SELECT pg_stat_force_next_flush()")
    return int(desk.ask("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")[0])


# ── one post at a time ──


@pytest.mark.parametrize(("runs", "endpoints"), [(2, 1), (4, 1), (2, 6), (4, 6)])
async def test_runs_at_once_post_each_delivery_once(desk: Desk, runs: int, endpoints: int) -> None:
    """The receiver never sees two posts of one delivery, nor more at once than the runs may make together."""
    paths = [f"/delay/0.02/{number}" for number in range(endpoints)]
    ids = [desk.add_endpoint(path) for path in paths]
    facts = 1200 // endpoints  # a run claims 80: enough for all to take part
    for _ in range(4):
        await desk.tell(facts // 4)
    done = await drain(desk, runs, webhook_endpoint_concurrency=5, webhook_concurrency=20)
    assert sum(one["delivered"] for one in done) == sum(one["claimed"] for one in done) == facts * endpoints
    assert sum(one["delivered"] > 0 for one in done) == runs
    requests = [request for path in paths for request in desk.receiver.received(path)]
    assert len(requests) == facts * endpoints
    assert len({(request.path, request.webhook_id) for request in requests}) == len(requests)
    # An event has the same id at every endpoint, so the receiver counts one for each.
    assert max(request.open_at_once for request in requests) <= endpoints
    for path, endpoint in zip(paths, ids, strict=True):
        assert 1 < desk.receiver.most_open[path] <= 5 * runs
        assert desk.numbers(endpoint) == list(range(1, facts + 1))
    assert deadlocks(desk) == 0


async def test_one_run_keeps_to_the_limit_of_each_endpoint(desk: Desk) -> None:
    """Also while answers come and go, and also for repeats."""
    desk.receiver.behave("/narrow", *["status 500"] * 6, "delay 0.15")
    desk.add_endpoint("/narrow", schedule="5s 5s")
    desk.add_endpoint("/delay/0.15/wide")
    await desk.tell(20)
    options: dict[str, Any] = {"webhook_endpoint_concurrency": 3, "webhook_concurrency": 8}
    await desk.deliver(**options)
    await desk.deliver(offset="10 s", **options)
    assert desk.states() == {"delivered": 40}
    assert desk.receiver.most_open["/narrow"] == 3
    assert desk.receiver.most_open["/delay/0.15/wide"] == 3
    assert len(desk.receiver.received("/narrow")) == 26


async def test_a_retry_posts_once_though_runs_race_for_it(desk: Desk) -> None:
    """Four runs at once on deliveries that fail twice: three posts each, one after the other."""
    endpoint = desk.add_endpoint("/weak", schedule="1s 1s 1s 1s")
    await desk.tell(4)  # twice as many failures do not open the breaker
    for offset in ("", "2 s"):
        desk.receiver.behave("/weak", "status 503")
        await asyncio.gather(*(desk.deliver(offset=offset) for _ in range(4)))
        assert desk.ask("SELECT DISTINCT state, claim_id FROM webhook_deliveries") == [("pending", None)]
    desk.receiver.behave("/weak", "delay 0.05")
    await asyncio.gather(*(desk.deliver(offset="4 s") for _ in range(4)))
    assert desk.states() == {"delivered": 4}
    posts = Counter(request.webhook_id for request in desk.receiver.received("/weak"))
    assert set(posts.values()) == {3}
    assert max(request.open_at_once for request in desk.receiver.received("/weak")) == 1
    assert desk.ask("SELECT DISTINCT attempts FROM webhook_deliveries") == [3]
    assert desk.numbers(endpoint) == list(range(1, 5))


# ── nobody waits behind the dead ──

OVERDUE = """
WITH numbered AS (
    UPDATE webhook_endpoints SET next_seq = next_seq + %(count)s WHERE id = %(endpoint)s RETURNING id, org_id
)
INSERT INTO webhook_deliveries (
    endpoint_id, event_id, org_id, topic, occurred_at, seq, body, due_at, attempts
)
SELECT e.id, nm_uuid7(), e.org_id, 'domain.verified', now(), n, '{}', now() - make_interval(secs => n), 1
FROM numbered AS e, generate_series(1, %(count)s) AS n
"""


async def test_5000_due_of_a_dead_endpoint_cost_another_one_nothing(desk: Desk) -> None:
    """Within the one run that has to wait for the dead endpoint's timeouts, the other's 100 are all delivered."""
    dead = desk.add_endpoint("/hang", types=["domain.failed"])
    desk.execute(OVERDUE, {"endpoint": dead, "count": 5000})
    quick = desk.add_endpoint("/ok/quick")
    await desk.tell(100)
    run = asyncio.create_task(
        desk.deliver(webhook_timeout_s=1.5, webhook_concurrency=40, webhook_endpoint_concurrency=10)
    )
    await desk.receiver.wait_for(110)
    # All of them were there before the first of the dead one's timed out.
    assert len(desk.receiver.received("/hang")) == desk.receiver.most_open["/hang"] == 10
    counts = await run
    assert desk.states(quick) == {"delivered": 100}
    # The breaker opens at the tenth failure; those recorded before it may have been followed by others.
    assert counts["delivered"] == 100
    assert 10 <= counts["retried"] < 20
    # The breaker is open: the next run leaves it alone.
    assert (await desk.deliver())["claimed"] == 0


# ── pause ──


async def test_pausing_holds_what_is_left_and_enabling_lets_it_go(desk: Desk) -> None:
    """In the middle of a run: what has begun ends, nothing more begins, nothing is lost or posted twice."""
    endpoint = desk.add_endpoint("/delay/0.05")
    await desk.tell(60)
    run = asyncio.create_task(desk.deliver(webhook_endpoint_concurrency=4))
    await desk.receiver.wait_for(8)
    await asyncio.to_thread(desk.execute, "UPDATE webhook_endpoints SET status = 'paused' WHERE id = %s", [endpoint])
    counts = await run
    assert 8 <= counts["delivered"] <= 20
    assert desk.states() == {"delivered": counts["delivered"], "pending": 60 - counts["delivered"]}
    await desk.tell(5)
    assert (await desk.run_job()).counts["claimed"] == 0
    desk.execute("UPDATE webhook_endpoints SET status = 'enabled' WHERE id = %s", [endpoint])
    assert (await desk.deliver())["delivered"] == 65 - counts["delivered"]
    posts = Counter(request.webhook_id for request in desk.receiver.requests)
    assert (len(posts), set(posts.values())) == (65, {1})
    assert desk.numbers(endpoint) == list(range(1, 66))


# ── numbers ──


async def pull_without_gap(desk: Desk, endpoint: UUID, is_over: Callable[[], bool]) -> list[UUID]:
    """Pull as a receiver does until all is over, and check that what comes is always the very next."""
    seen: list[UUID] = []
    while True:
        last = is_over()
        async with desk.database.connection() as conn:
            async with conn.transaction():
                await stamp_fresh(conn, endpoint, limit=7)
            events = await pull_events(conn, endpoint, after_seq=len(seen), limit=50)
        assert [event.seq for event in events] == list(range(len(seen) + 1, len(seen) + 1 + len(events)))
        assert all(event.body for event in events)
        seen += [event.event_id for event in events]
        if last and not events:
            return seen
        await asyncio.sleep(0.005)


async def test_numbers_have_no_gap_and_no_twin_while_everyone_stamps(desk: Desk) -> None:
    """Facts are committed and taken back, three runs claim, two receivers pull: all see 1, 2, 3 … and nothing later."""
    endpoint = desk.add_endpoint("/delay/0.002")
    told = 0
    is_told = False

    async def tell() -> None:
        nonlocal told, is_told
        for number in range(40):
            if number % 4:
                told += await desk.tell(5)
            else:
                async with desk.database.connection() as conn, conn.transaction():
                    assert await fan_out(conn, [Fact(desk.org_id, "live", "domain.verified")] * 5) == 5
                    raise psycopg.Rollback
            await asyncio.sleep(0.002)
        is_told = True

    async def run() -> None:
        while not is_told or (await desk.deliver(webhook_endpoint_concurrency=6))["claimed"]:
            await asyncio.sleep(0)

    pulled = [pull_without_gap(desk, endpoint, lambda: is_told) for _ in range(2)]
    working = asyncio.gather(tell(), run(), run(), run())
    first, second = await asyncio.gather(*pulled)
    await working
    await drain(desk, 1)
    assert first == second
    assert len(first) == told
    assert desk.numbers(endpoint) == list(range(1, told + 1))
    assert desk.ask("SELECT next_seq FROM webhook_endpoints") == [told + 1]
    posts = Counter(request.webhook_id for request in desk.receiver.requests)
    assert (len(posts), set(posts.values())) == (told, {1})
    assert deadlocks(desk) == 0


# While the setting is on, nm_now() waits for the gate: a statement stands still between its snapshot and its locks.
WAITING_CLOCK = """
CREATE OR REPLACE FUNCTION nm_now() RETURNS timestamptz LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF current_setting('nightmail.waits', true) = 'on' THEN
        PERFORM pg_advisory_lock_shared(1936);
        PERFORM pg_advisory_unlock_shared(1936);
    END IF;
    RETURN statement_timestamp();
END $$
"""
STANDS = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"


@pytest.mark.parametrize("between", ["replay", "stamp", "claim", "disable"])
async def test_what_happens_between_a_claims_snapshot_and_its_locks_leaves_no_gap(desk: Desk, between: str) -> None:
    """Whatever another transaction does to the rows there, the claim takes what it numbers."""
    endpoint = desk.add_endpoint()
    # With a rest that is over, the claim asks for the time before it locks anything.
    desk.execute("UPDATE webhook_endpoints SET blocked_until = now() - interval '1 hour'")
    desk.execute(WAITING_CLOCK)
    limits: dict[str, Any] = {"limit": 10, "per_endpoint": 10, "lease_s": 60, "busy": {}}

    async def claim(conn: Connection) -> int:
        async with conn.transaction():
            return len(await claim_deliveries(conn, **limits))

    slow = Database(desk.database_url, pool_max=1)
    await slow.open()
    async with slow.connection() as waiting, desk.database.connection() as other:
        # The plan is made before: planning asks for the time too, and has a snapshot of its own.
        await waiting.execute("SET plan_cache_mode = force_generic_plan")
        for _ in range(4):
            assert await claim(waiting) == 0
        await desk.tell(6)
        events = await asyncio.to_thread(desk.ask, "SELECT event_id FROM webhook_deliveries ORDER BY event_id")
        await other.execute("SELECT pg_advisory_lock(1936)")
        await waiting.execute("SET nightmail.waits = 'on'")
        claiming = asyncio.create_task(claim(waiting))
        while await asyncio.to_thread(desk.ask, STANDS) != [1]:
            await asyncio.sleep(0.005)
        async with other.transaction():
            await other.execute(LOCK_ENDPOINT, [endpoint])
            if between == "replay":
                assert await replay_event(other, endpoint, events[2], org_id=desk.org_id, actor="test")
            elif between == "stamp":
                assert await stamp_fresh(other, endpoint, limit=3) == 3
            elif between == "claim":
                assert len(await claim_deliveries(other, **{**limits, "limit": 2})) == 2
            else:
                await other.execute(
                    "UPDATE webhook_endpoints SET status = 'disabled', disabled_reason = 'x' WHERE id = %s", [endpoint]
                )
        await other.execute("SELECT pg_advisory_unlock(1936)")
        claimed = await claiming
        await waiting.execute("SET nightmail.waits = 'off'")
        later = await claim(other)
    await slow.close()
    numbers = [number for number in desk.numbers(endpoint) if number is not None]
    assert numbers == list(range(1, len(numbers) + 1))
    assert desk.ask("SELECT next_seq FROM webhook_endpoints") == [len(numbers) + 1]
    if between == "disable":
        assert (claimed, later, numbers) == (0, 0, [])
    else:
        assert len(numbers) == 6


# ── anything in any order ──


@pytest.mark.parametrize("seed", range(2))
async def test_whatever_happens_at_once_ends_told_once_and_numbered(desk: Desk, seed: int) -> None:
    """Seeded: facts, runs, pulls, replays, pauses, failures at once; then all is delivered and the books agree."""
    chance = random.Random(seed)
    paths = ["/steady", "/flaky", "/slow"]
    desk.receiver.behave("/steady", "ok")
    desk.receiver.behave(
        "/flaky", *chance.choices(["ok", "status 500", "reset", "status 404", "delay 0.02"], k=60), "ok"
    )
    desk.receiver.behave("/slow", "delay 0.03")
    endpoints = [desk.add_endpoint(path, schedule="1s 1s 1s 1s 1s 1s") for path in paths]
    told = replayed = 0

    async def act(name: str) -> None:
        nonlocal told, replayed
        endpoint = chance.choice(endpoints)
        if name == "tell":
            await desk.tell(5)
            told += 5
        elif name == "run":
            await desk.deliver(offset=chance.choice(["", "2 s", "4 s"]), webhook_endpoint_concurrency=3)
        elif name == "job":
            await fail_closed(desk.context(), seconds=10)
        else:
            async with desk.database.connection() as conn, conn.transaction():
                await conn.execute(LOCK_ENDPOINT, [endpoint])
                if name == "pull":
                    await stamp_fresh(conn, endpoint, limit=4)
                elif name == "replay":
                    again, _ = await replay_events(
                        conn, endpoint, ReplayFilter("delivered"), org_id=desk.org_id, actor="test", limit=3
                    )
                    replayed += again
                else:
                    await conn.execute("UPDATE webhook_endpoints SET status = %s WHERE id = %s", [name, endpoint])

    names = ["tell"] * 5 + ["run"] * 4 + ["pull", "pull", "replay", "paused", "enabled", "enabled", "job"]
    for _ in range(8):
        await asyncio.gather(*(act(name) for name in chance.choices(names, k=6)))
    desk.execute("UPDATE webhook_endpoints SET status = 'enabled', blocked_until = NULL")
    for path in paths:
        desk.receiver.behave(path, "ok")
    await drain(desk, 2, offset="2 hours")
    assert told
    for path, endpoint in zip(paths, endpoints, strict=True):
        assert desk.states(endpoint) == {"delivered": told}
        assert desk.numbers(endpoint) == list(range(1, told + 1))
        received = desk.receiver.received(path)
        assert len({request.webhook_id for request in received}) == told
        assert len({(request.webhook_id, request.body) for request in received}) == told
    # Beyond the first post of each there are as many as failed or were replayed: none that nobody asked for.
    assert desk.receiver.total == desk.ask("SELECT count(*) FROM webhook_attempts")[0]
    failed = desk.ask("SELECT count(*) FROM webhook_attempts WHERE http_status IS DISTINCT FROM 200")[0]
    assert desk.receiver.total == told * len(paths) + failed + replayed
    assert deadlocks(desk) == 0
