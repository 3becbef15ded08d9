"""What counts against an endpoint and what does not, and that nobody's trouble is another's."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from nightmail.ports import Accepted, OutgoingEmail
from nightmail.store import webhook_attempts, webhook_deliveries
from nightmail.store.fan_out import Fact, fan_out
from nightmail.store.webhook_attempts import Kind, Outcome
from nightmail.store.webhook_deliveries import Claimed
from tests.ports import make_ports
from tests.webhooks.desk import Desk

pytestmark = pytest.mark.anyio


async def claim(desk: Desk, limit: int = 100) -> list[Claimed]:
    async with desk.database.connection() as conn, conn.transaction():
        return await webhook_deliveries.claim_deliveries(conn, limit=limit, per_endpoint=limit, lease_s=60, busy={})


def end(one: Claimed, kind: Kind, **fields: Any) -> Outcome:
    return Outcome(
        one.endpoint_id, one.event_id, one.claim_id, kind, datetime.now(UTC), 10, one.is_healthy, url=one.url, **fields
    )


async def record(desk: Desk, *outcomes: Outcome) -> webhook_attempts.Recorded:
    return await desk.database.run(lambda conn: webhook_attempts.record_attempts(conn, outcomes))


def health(desk: Desk, endpoint: UUID) -> Any:
    (row,) = desk.ask(
        "SELECT status, failures, first_failing_at IS NOT NULL, blocked_until > now() FROM webhook_endpoints"
        " WHERE id = %s",
        endpoint,
    )
    return row


async def test_only_failures_in_a_row_open_the_breaker(desk: Desk) -> None:
    """Successes of posts that were claimed in good health count too."""
    endpoint = desk.add_endpoint("/flaky", schedule="24h")
    desk.receiver.behave("/flaky", *["ok", "status 500"] * 15, "ok")
    await desk.tell(25)
    counts = await desk.deliver()
    assert counts["delivered"] + counts["retried"] == 25
    status, failures, _, is_blocked = health(desk, endpoint)
    assert (status, is_blocked) == ("enabled", None)
    assert failures < 10


async def test_a_result_whose_claim_is_gone_says_nothing_of_the_endpoint(desk: Desk) -> None:
    """A runner slept with a 410; meanwhile the endpoint was repaired and another runner delivered."""
    endpoint = desk.add_endpoint()
    await desk.tell()
    (stale,) = await claim(desk)
    assert (await desk.deliver(offset="2 min"))["delivered"] == 1
    result = await record(desk, end(stale, "failed", http_status=410, is_gone=True))
    assert (result.lost, result.disabled) == ({0}, [])
    assert health(desk, endpoint)[0] == "enabled"


async def test_what_the_old_address_answers_says_nothing_of_the_new_one(desk: Desk) -> None:
    endpoint = desk.add_endpoint("/old")
    await desk.tell()
    (one,) = await claim(desk)
    desk.execute("UPDATE webhook_endpoints SET url = %s WHERE id = %s", [desk.receiver.url("/new"), endpoint])
    assert (await record(desk, end(one, "failed", http_status=410, is_gone=True))).disabled == []
    assert health(desk, endpoint) == ("enabled", 0, False, None)


async def test_posts_that_we_broke_off_are_one_failure_together(desk: Desk) -> None:
    endpoint = desk.add_endpoint()
    await desk.tell(20)
    await record(desk, *(end(one, "cut") for one in await claim(desk)))
    assert health(desk, endpoint) == ("enabled", 1, False, None)
    assert {*desk.ask("SELECT attempts FROM webhook_deliveries")} == {0}


async def test_a_commit_whose_answer_was_lost_is_written_once(desk: Desk) -> None:
    endpoint = desk.add_endpoint()
    await desk.tell()
    outcome = end((await claim(desk))[0], "retry", http_status=500, wait_s=5.0)
    assert (await record(desk, outcome)).lost == set()
    assert (await record(desk, outcome)).lost == {0}
    assert desk.ask("SELECT count(*) FROM webhook_attempts") == [1]
    assert health(desk, endpoint)[1] == 1


async def test_dead_runners_use_up_no_attempt(desk: Desk) -> None:
    """Four die with it; the schedule still has all its attempts. The hundredth and first is its own fault."""
    desk.add_endpoint("/status/500", schedule="5s 5s")
    await desk.tell(2)
    for _ in range(4):
        assert len(await claim(desk)) == 2
        desk.execute("UPDATE webhook_deliveries SET due_at = now()")
    assert (await desk.deliver())["retried"] == 2
    assert desk.ask("SELECT DISTINCT attempts, takeovers FROM webhook_deliveries") == [(1, 4)]
    desk.execute("UPDATE webhook_deliveries SET due_at = now(), takeovers = 100, claim_id = gen_random_uuid()")
    posts = len(desk.receiver.requests)
    assert (await desk.deliver())["failed"] == 2
    assert len(desk.receiver.requests) == posts
    assert desk.ask("SELECT count(*) FROM webhook_attempts") == [2]
    assert {*desk.ask("SELECT reason FROM webhook_deliveries")} == {
        "attempts exhausted: 101 runners died while they held it"
    }


async def test_runs_shorter_than_the_timeout_try_failing_endpoints_too(desk: Desk) -> None:
    desk.add_endpoint("/again", schedule="1s")
    desk.receiver.behave("/again", "status 500", "ok")
    await desk.tell()
    assert (await desk.run_job(deadline_s=8)).counts["retried"] == 1
    await asyncio.sleep(1.3)
    assert (await desk.run_job(deadline_s=8)).counts["delivered"] == 1


async def test_a_failure_during_a_claim_holds_back_what_the_claim_brings(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim began before the answer came, and ends after it was recorded: it knows nothing of it."""
    desk.add_endpoint("/busy", schedule="5s")
    real = webhook_deliveries.claim_deliveries

    async def slow_claim(conn: Any, **arguments: Any) -> list[Claimed]:
        claimed = await real(conn, **arguments)
        if desk.receiver.requests:
            await asyncio.sleep(0.6)
        return claimed

    monkeypatch.setattr(webhook_deliveries, "claim_deliveries", slow_claim)
    desk.receiver.behave("/busy", "status 429 retry_after=600", "ok")
    await desk.tell()
    run = asyncio.create_task(desk.deliver(webhook_concurrency=8))
    await desk.receiver.wait_for(1)
    await desk.tell(10)
    await run
    assert len(desk.receiver.received("/busy")) == 1
    assert desk.states() == {"pending": 11}


async def test_slow_endpoints_leave_slots_to_the_quick(desk: Desk) -> None:
    """Eight answer, but after a second each: together they get three quarters of the slots."""
    for number in range(8):
        desk.add_endpoint(f"/delay/1.2/{number}", types=["domain.failed"])
    quick = desk.add_endpoint("/ok", types=["domain.verified"])
    await desk.tell(60, topic="domain.failed")
    await desk.tell(100)
    options: dict[str, Any] = {"webhook_concurrency": 20, "webhook_endpoint_concurrency": 5}
    run = asyncio.create_task(desk.deliver(deadline_s=9, webhook_timeout_s=4, **options))
    async with asyncio.timeout(6):
        while desk.states(quick)["delivered"] < 100:
            await asyncio.sleep(0.05)
    assert desk.states()["delivered"] < 400
    await run


async def test_two_runs_of_a_process_do_not_wait_for_each_others_connections(desk: Desk) -> None:
    ports = make_ports()
    options: dict[str, Any] = {"webhook_concurrency": 8, "webhook_endpoint_concurrency": 8, "ports": ports}
    desk.add_endpoint("/hang", types=["domain.failed"])
    await desk.tell(8, topic="domain.failed")
    hanging = asyncio.create_task(desk.deliver(webhook_timeout_s=2, **options))
    await desk.receiver.wait_for(6)
    desk.add_endpoint("/ok", types=["domain.verified"])
    await desk.tell(4)
    assert (await desk.deliver(webhook_timeout_s=1, **options))["delivered"] == 4
    await hanging
    await ports.webhooks.close()


class StuckMail:
    """A provider that takes nothing until it is let."""

    name = "stuck"

    def __init__(self) -> None:
        self.asked = 0
        self.released = asyncio.Event()

    async def send_email(self, email: OutgoingEmail, *, timeout_s: float) -> Accepted:
        """Wait to be let."""
        self.asked += 1
        await self.released.wait()
        return Accepted("at last")

    async def close(self) -> None:
        """Nothing is open."""


async def test_the_mail_about_disabled_endpoints_holds_up_no_delivery(desk: Desk) -> None:
    for number in range(6):
        desk.add_endpoint(f"/gone/{number}", types=["domain.failed"])
    one_by_one = desk.add_endpoint("/delay/0.2", types=["domain.verified"])
    await desk.tell(topic="domain.failed")
    await desk.tell(5)
    mail = StuckMail()
    options: dict[str, Any] = {"ports": replace(desk.ports, email=mail), "webhook_endpoint_concurrency": 1}
    run = asyncio.create_task(desk.deliver(alert_email="ops@example.org", **options))
    async with asyncio.timeout(4):  # the mail itself is given up after five
        while desk.states(one_by_one)["delivered"] < 5 or mail.asked < 6:
            await asyncio.sleep(0.02)
    mail.released.set()
    assert (await run)["disabled"] == 6


async def test_a_disabled_endpoints_backlog_leaves_time_for_the_others(desk: Desk) -> None:
    dead = desk.add_endpoint(types=["domain.failed"])
    live = desk.add_endpoint(types=["domain.verified"])
    await desk.tell(10)
    desk.execute(
        "INSERT INTO webhook_deliveries (endpoint_id, event_id, org_id, topic, occurred_at, due_at)"
        " SELECT %s, nm_nth_id(nm_uuid7()::text, n), %s, 'domain.failed', now(), now()"
        " FROM generate_series(1, 30000) AS n",
        [dead, desk.org_id],
    )
    desk.execute("UPDATE webhook_endpoints SET status = 'disabled', disabled_reason = 'test' WHERE id = %s", [dead])
    result = await desk.run_job(deadline_s=3.5, webhook_timeout_s=1)
    assert result.more
    assert desk.states(live) == {"delivered": 10}


async def test_one_call_may_tell_of_more_than_a_statement_counts(desk: Desk) -> None:
    desk.add_endpoint()
    facts = [Fact(desk.org_id, "live", "domain.verified")] * 70_000
    async with desk.database.connection() as conn, conn.transaction():
        assert await fan_out(conn, facts) == 70_000
    assert desk.ask("SELECT count(DISTINCT event_id) FROM webhook_deliveries") == [70_000]
