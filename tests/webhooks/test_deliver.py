"""From the fact to the receiver: what is posted, how often, and what is written about it."""

from __future__ import annotations

import asyncio

import pytest
import standardwebhooks
import svix.webhooks

from nightmail.webhooks.signature import new_secret
from tests.webhooks.desk import Desk

pytestmark = pytest.mark.anyio


async def test_a_fact_arrives_signed_and_once(desk: Desk) -> None:
    """The body is the event, the id is the event's, and the official verifiers accept it."""
    secret = new_secret()
    endpoint = desk.add_endpoint(secret=secret)
    assert await desk.tell(data={"name": "mail.example.org"}) == 1
    counts = await desk.deliver()
    assert (counts["claimed"], counts["delivered"]) == (1, 1)
    (request,) = desk.receiver.received("/ok")
    (event_id,) = desk.ask("SELECT event_id FROM webhook_deliveries")
    assert request.webhook_id == str(event_id)
    body = request.json()
    assert body["type"] == "domain.verified"
    assert body["data"] == {"name": "mail.example.org"}
    assert body["timestamp"].endswith("Z")
    standardwebhooks.Webhook(secret).verify(request.body.decode(), dict(request.headers))
    svix.webhooks.Webhook(secret).verify(request.body, dict(request.headers))
    assert desk.numbers(endpoint) == [1]
    assert desk.ask("SELECT http_status FROM webhook_attempts") == [200]
    assert (await desk.deliver())["claimed"] == 0


async def test_each_endpoint_gets_what_it_asked_for(desk: Desk) -> None:
    """Types, env, org and status decide; the event's id is the same everywhere."""
    wanted = [desk.add_endpoint("/ok/a"), desk.add_endpoint("/ok/b", types=["domain.verified"])]
    desk.add_endpoint("/ok/other-type", types=["domain.failed"])
    desk.add_endpoint("/ok/other-env", env="test")
    desk.add_endpoint("/ok/disabled", status="disabled")
    resend = desk.add_endpoint("/ok/resend", types=["domain.updated"])
    paused = desk.add_endpoint("/ok/paused", status="paused")
    assert await desk.tell() == 4
    assert (await desk.deliver())["delivered"] == 3
    assert {*desk.ask("SELECT endpoint_id FROM webhook_deliveries WHERE state = 'delivered'")} == {*wanted, resend}
    assert desk.states(paused) == {"pending": 1}
    assert (
        len({request.webhook_id for path in ("a", "b", "resend") for request in desk.receiver.received(f"/ok/{path}")})
        == 1
    )
    (request,) = desk.receiver.received("/ok/resend")
    assert request.json()["type"] == "domain.updated"
    assert request.json()["created_at"].endswith("Z")
    desk.execute("UPDATE webhook_endpoints SET status = 'enabled' WHERE id = %s", [paused])
    assert (await desk.deliver())["delivered"] == 1


async def test_a_thousand_arrive_numbered_without_gap(desk: Desk) -> None:
    """Two runs at once share the work; each number is given once."""
    endpoints = [desk.add_endpoint(f"/ok/{name}") for name in "abc"]
    for _ in range(10):
        await desk.tell(100)
    counts = [*await asyncio.gather(desk.deliver(), desk.deliver())]
    while (again := await desk.deliver())["claimed"]:  # a run ends when the other one holds all endpoints
        counts.append(again)
    assert sum(one["delivered"] for one in counts) == 3000
    for name, endpoint in zip("abc", endpoints, strict=True):
        assert desk.numbers(endpoint) == list(range(1, 1001))
        received = desk.receiver.received(f"/ok/{name}")
        assert len(received) == len({request.webhook_id for request in received}) == 1000
    assert desk.ask("SELECT count(*) FROM webhook_attempts") == [3000]


@pytest.mark.parametrize(
    ("path", "error"),
    [("/status/500", "status 500"), ("/status/404", "status 404"), ("/redirect?to=/ok/elsewhere", "status 302"),
     ("/reset", "reset"), ("/close", "reset"), ("/garbage", "bad_reply")],
)  # fmt: skip
async def test_a_failure_is_tried_again_by_the_schedule(desk: Desk, path: str, error: str) -> None:
    """Same id, same body, at 5 s, 5 min …; after the last attempt it has failed."""
    endpoint = desk.add_endpoint(path, schedule="5s 5m")
    await desk.tell()
    assert (await desk.deliver())["retried"] == 1
    ((state, attempts, reason, wait_s),) = desk.ask(
        "SELECT state, attempts, reason, extract(epoch FROM due_at - now())::float8 FROM webhook_deliveries"
    )
    assert (state, attempts) == ("pending", 1)
    assert reason.startswith(error)
    assert 4 < wait_s <= 6
    assert (await desk.deliver())["claimed"] == 0
    assert (await desk.deliver(offset="7 s"))["retried"] == 1
    assert (await desk.deliver(offset="7 s"))["claimed"] == 0
    counts = await desk.deliver(offset="10 min")
    assert (counts["claimed"], counts["failed"]) == (1, 1)
    assert desk.states() == {"failed": 1}
    assert desk.ask("SELECT count(*) FROM webhook_attempts") == [3]
    assert desk.ask("SELECT failures FROM webhook_endpoints WHERE id = %s", endpoint) == [3]
    assert not desk.receiver.received("/ok/elsewhere")


async def test_410_ends_the_endpoint_and_tells_the_others(desk: Desk) -> None:
    """The endpoint is disabled with its reason, what waits for it fails and can be pulled, another endpoint hears."""
    gone = desk.add_endpoint("/gone")
    watcher = desk.add_endpoint("/ok", types=["webhook.disabled"])
    await desk.tell(30)
    counts = (await desk.run_job(webhook_endpoint_concurrency=1, webhook_concurrency=1)).counts
    assert counts["disabled"] == 1
    assert desk.ask("SELECT status, disabled_reason FROM webhook_endpoints WHERE id = %s", gone) == [
        ("disabled", "the endpoint answered 410 Gone")
    ]
    await desk.run_job()
    assert desk.states(gone) == {"failed": 30}
    assert desk.numbers(gone) == list(range(1, 31))
    assert desk.ask("SELECT count(*) FROM webhook_deliveries WHERE body IS NULL") == [0]
    assert desk.states(watcher) == {"delivered": 1}
    (request,) = desk.receiver.received("/ok")
    assert request.json()["data"]["id"] == str(gone)
    assert len(desk.receiver.received("/gone")) == 1


async def test_a_removed_endpoint_fails_what_was_for_it(desk: Desk) -> None:
    """As the specification says: reason `endpoint disabled or removed`."""
    endpoint = desk.add_endpoint()
    await desk.tell(3)
    desk.execute("DELETE FROM webhook_endpoints WHERE id = %s", [endpoint])
    counts = (await desk.run_job()).counts
    assert (counts["claimed"], counts["failed"]) == (0, 3)
    assert {*desk.ask("SELECT reason FROM webhook_deliveries")} == {"endpoint disabled or removed"}


async def test_retry_after_is_honoured_for_the_whole_endpoint(desk: Desk) -> None:
    """429 with a wish: nothing is posted there before; a wish of a day counts as an hour."""
    desk.add_endpoint("/status/429?retry_after=600", schedule="5s 5s 5s")
    desk.receiver.behave("/busy", "status 503 retry_after=86400", "ok")
    desk.add_endpoint("/busy", schedule="5s 5s 5s")
    await desk.tell()
    assert (await desk.deliver())["retried"] == 2
    await desk.tell()
    assert (await desk.deliver(offset="9 min"))["claimed"] == 0
    assert (await desk.deliver(offset="11 min"))["claimed"] >= 1
    assert not desk.ask("SELECT 1 FROM webhook_deliveries WHERE state = 'delivered'")
    assert (await desk.deliver(offset="61 min"))["delivered"] == 2


async def test_the_breaker_lets_one_through(desk: Desk) -> None:
    """After ten failures in a row the endpoint rests, then gets one at a time; one success opens the way."""
    endpoint = desk.add_endpoint("/down")
    desk.receiver.behave("/down", *["status 500"] * 11, "ok")
    await desk.tell(10)
    assert (await desk.deliver())["retried"] == 10
    assert (await desk.deliver(offset="10 s"))["claimed"] == 0
    assert (await desk.deliver(offset="20 s"))["claimed"] == 1
    assert desk.ask("SELECT failures FROM webhook_endpoints WHERE id = %s", endpoint) == [11]
    assert (await desk.deliver(offset="1 min"))["delivered"] == 9
    assert (await desk.deliver(offset="10 min"))["delivered"] == 1
    assert desk.ask("SELECT failures, first_failing_at FROM webhook_endpoints WHERE id = %s", endpoint) == [(0, None)]


async def test_five_days_of_failures_disable(desk: Desk) -> None:
    """Not a day before, and not when anything succeeded in between."""
    endpoint = desk.add_endpoint("/status/500", schedule="1h 24h 24h 24h 24h 24h 24h")
    await desk.tell()
    await desk.deliver()
    assert (await desk.deliver(offset="4 days 23 hours"))["disabled"] == 0
    assert (await desk.deliver(offset="8 days"))["disabled"] == 1
    assert desk.ask("SELECT status FROM webhook_endpoints WHERE id = %s", endpoint) == ["disabled"]


async def test_a_slow_endpoint_does_not_hold_up_the_others(desk: Desk) -> None:
    """A hanging endpoint holds its own slots; 200 of another one's leave meanwhile, then the run gives up on it."""
    hanging = desk.add_endpoint("/hang")
    quick = desk.add_endpoint("/ok", types=["domain.failed"])
    await desk.tell(200)
    await desk.tell(200, topic="domain.failed")
    run = asyncio.create_task(
        desk.deliver(webhook_timeout_s=1.0, webhook_concurrency=50, webhook_endpoint_concurrency=10)
    )
    await desk.receiver.wait_for(210)
    assert desk.states(quick)["delivered"] >= 100
    counts = await run
    assert desk.states(quick) == {"delivered": 200}
    assert desk.states(hanging) == {"pending": 400}
    assert counts["retried"] == len(desk.receiver.received("/hang"))
    assert {*desk.ask("SELECT error FROM webhook_attempts WHERE endpoint_id = %s", hanging)} == {
        "timeout: no answer in time"
    }


async def test_a_run_that_ends_breaks_off_and_posts_again(desk: Desk) -> None:
    """What is under way at the deadline counts as no attempt; the next run begins with it, in the time it has."""
    endpoint = desk.add_endpoint("/delay/1")
    await desk.tell()
    counts = await desk.deliver(deadline_s=2.2, webhook_timeout_s=3)
    assert (counts["claimed"], counts["retried"]) == (1, 1)
    assert desk.ask("SELECT state, attempts, claim_id FROM webhook_deliveries") == [("pending", 0, None)]
    assert desk.ask("SELECT failures FROM webhook_endpoints WHERE id = %s", endpoint) == [1]
    assert desk.ask("SELECT first_failing_at FROM webhook_endpoints WHERE id = %s", endpoint) == [None]
    assert (await desk.run_job(deadline_s=3.5, webhook_timeout_s=3)).counts["delivered"] == 1
    assert len(desk.receiver.requests) == 2


async def test_a_lease_that_ran_out_is_claimed_again_and_the_late_writer_is_fenced(desk: Desk) -> None:
    """A runner that slept past its lease writes nothing; the attempt it made is kept."""
    desk.add_endpoint("/delay/1")
    await desk.tell()
    slow = asyncio.create_task(desk.deliver())
    await desk.receiver.wait_for(1)
    second = await desk.deliver(offset="5 min")
    assert second["delivered"] == 1
    first = await slow
    assert first["delivered"] == 0
    assert desk.states() == {"delivered": 1}
    assert desk.ask("SELECT count(*) FROM webhook_attempts") == [2]
    assert len({request.webhook_id for request in desk.receiver.received("/delay/1")}) == 1
