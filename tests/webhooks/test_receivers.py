"""Whatever a receiver does, an attempt ends as the specification says, and what was told arrives when it is back."""

from __future__ import annotations

import asyncio
import socket
import tracemalloc
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
import standardwebhooks

from nightmail import clock
from nightmail.fakes.webhook_receiver import Received
from nightmail.store.webhook_endpoints import rotate_secret
from nightmail.store.webhook_events import replay_event
from nightmail.webhooks import deliver
from nightmail.webhooks.signature import new_secret
from tests.webhooks.desk import Desk

pytestmark = pytest.mark.anyio

TIMEOUT_S = 0.6
MEMORY_BYTES = 4_000_000  # of a receiver's 10 MB, or without end


@dataclass(frozen=True)
class Ending:
    """How an attempt must end: the delivery's state, the attempt's status and error, the wait and the endpoint."""

    http_status: int | None = None
    error: str | None = None
    state: str = "pending"
    wait_s: tuple[float, float] = (4, 6.5)
    block_s: tuple[float, float] | None = None
    status: str = "enabled"


TIMED_OUT = Ending(error="timeout: no answer in time")
RESET = Ending(error="reset: the connection was closed before an answer")
UNREADABLE = Ending(error="bad_reply: ")
DELIVERED = Ending(200, state="delivered")

# A body that hangs, breaks off or never ends is no failure: the endpoint has answered before it.
ENDINGS = {
    "/down": Ending(error="refused: Connection refused"),
    "/hang": TIMED_OUT,
    "/delay/20": TIMED_OUT,
    "/drip": TIMED_OUT,
    "/interim": TIMED_OUT,
    "/drip-body": DELIVERED,
    "/endless": DELIVERED,
    "/cut": DELIVERED,
    "/bomb": DELIVERED,
    "/status/204": Ending(204, state="delivered"),
    "/redirect?to=/ok/elsewhere": Ending(302),
    "/redirect/permanent?status=308&to=/ok/elsewhere": Ending(308),
    "/status/404": Ending(404),
    "/status/500": Ending(500),
    "/long": Ending(500),
    "/gone": Ending(410, state="failed", status="disabled"),
    "/status/429?retry_after=120": Ending(429, wait_s=(119, 121), block_s=(119, 121)),
    "/status/503?retry_after=7200": Ending(503, wait_s=(3599, 3601), block_s=(3599, 3601)),
    "/status/503?retry_after=soon": Ending(503),
    "/status/500?retry_after=7200": Ending(500),
    "/reset": RESET,
    "/close": RESET,
    "/garbage": UNREADABLE,
    "/huge-headers": UNREADABLE,
    "/upgrade": UNREADABLE,
}
FOUND = """
SELECT d.state, a.http_status, a.error, coalesce(length(a.response), 0), d.attempts, d.claim_id, e.status,
       extract(epoch FROM d.due_at - now())::float8, extract(epoch FROM e.blocked_until - now())::float8,
       e.failures, e.first_failing_at IS NOT NULL, octet_length(d.reason)
FROM webhook_deliveries AS d
JOIN webhook_endpoints AS e ON e.id = d.endpoint_id
JOIN webhook_attempts AS a USING (endpoint_id, event_id)
WHERE d.endpoint_id = %s
"""


def closed_port() -> int:
    """Return a port on loopback that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def is_within(value: float | None, bounds: tuple[float, float] | None) -> bool:
    """Return whether a number lies where it should, or is missing where it should be."""
    return value is None if bounds is None else value is not None and bounds[0] <= value <= bounds[1]


def add_all(desk: Desk) -> dict[str, UUID]:
    """Add an endpoint for each way to answer."""
    desk.receiver.behave("/long", "status 500 body=" + "x" * 5000)
    down = f"http://127.0.0.1:{closed_port()}/down"
    return {
        path: desk.add_endpoint(path, types=["domain.verified"], url=down if path == "/down" else None)
        for path in ENDINGS
    }


async def test_every_kind_of_answer_ends_as_specified(desk: Desk) -> None:
    """All of them in one run, which ends by itself: nothing that hangs or drips lasts until its deadline."""
    endpoints = add_all(desk)
    assert await desk.tell() == len(ENDINGS)
    counts = await desk.deliver(webhook_timeout_s=TIMEOUT_S)
    states = Counter(ending.state for ending in ENDINGS.values())
    assert (counts["delivered"], counts["retried"], counts["failed"], counts["disabled"]) == (
        states["delivered"],
        states["pending"],
        states["failed"],
        1,
    )
    for path, ending in ENDINGS.items():
        (found,) = desk.ask(FOUND, endpoints[path])
        state, http_status, error, kept, attempts, claim, status, wait_s, block_s, failures, is_failing, reason = found
        assert (state, http_status, attempts, claim, status) == (
            ending.state,
            ending.http_status,
            1,
            None,
            ending.status,
        ), path
        assert (error or "").startswith(ending.error or ""), path
        assert (error is None) == (ending.error is None), path
        assert kept <= 1024, path
        assert (reason or 0) <= 1024, path
        is_delivered = ending.state == "delivered"
        assert (failures, is_failing) == ((0, False) if is_delivered else (1, True)), path
        assert is_within(block_s, ending.block_s), (path, block_s)
        if ending.state == "pending":
            assert is_within(wait_s, ending.wait_s), (path, wait_s)
    assert desk.ask(
        "SELECT octet_length(response) FROM webhook_attempts WHERE endpoint_id = %s", endpoints["/long"]
    ) == [1024]
    assert not desk.receiver.received("/ok/elsewhere")
    # Once each: no adapter tries again by itself.
    assert desk.receiver.total == len(ENDINGS) - 1


async def test_no_answer_costs_memory(desk: Desk) -> None:
    """An endless body, a bomb and a header of 1 MB are not taken in, though they are offered."""
    paths = ["/endless", "/bomb", "/huge-headers", "/drip-body"]
    for path in paths:
        for _ in range(3):
            desk.add_endpoint(path)
    await desk.tell()
    await desk.deliver(webhook_timeout_s=TIMEOUT_S)  # what the receiver itself prepares, and the first of everything
    await desk.tell(5)
    tracemalloc.start()
    try:
        await desk.deliver(offset="10 s", webhook_timeout_s=TIMEOUT_S)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(desk.receiver.received("/endless")) == 18
    assert peak < MEMORY_BYTES


async def test_when_the_receivers_are_back_everything_arrives(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many distinct ids as facts, the same bytes at every attempt, a new timestamp, numbers without a gap."""
    endpoints = add_all(desk)
    seconds = iter(range(0, 240, 2))
    passed: dict[str, int] = {"s": 0}
    monkeypatch.setattr(deliver, "now", lambda: clock.now() + timedelta(seconds=passed["s"]))
    facts = 0
    for offset in ("", "7 s", "10 min"):
        await desk.tell(3)
        facts += 3
        await desk.deliver(offset=offset, webhook_timeout_s=0.2)
        passed["s"] = next(seconds) + 2
    gone = endpoints["/gone"]
    (event_ids,) = [desk.ask("SELECT event_id FROM webhook_deliveries WHERE endpoint_id = %s", gone)]
    for path in ENDINGS:
        desk.receiver.behave(path.partition("?")[0], "ok")
    desk.execute(
        "UPDATE webhook_endpoints SET url = %s WHERE id = %s", [desk.receiver.url("/down"), endpoints["/down"]]
    )
    await desk.run_job()  # fails what the disabled one had left
    desk.execute("UPDATE webhook_endpoints SET status = 'enabled', disabled_reason = NULL WHERE id = %s", [gone])
    async with desk.database.connection() as conn:
        for event_id in event_ids:
            assert await replay_event(conn, gone, event_id, org_id=desk.org_id, actor="test")
    for offset in ("2 hours", "5 hours", "12 hours", "24 hours"):
        passed["s"] = next(seconds) + 60
        await desk.deliver(offset=offset)
    told_to_gone = len(event_ids)
    assert told_to_gone < facts  # it was disabled at the first attempt: what came later was not for it
    for path, endpoint in endpoints.items():
        expected = told_to_gone if endpoint == gone else facts
        assert desk.states(endpoint) == {"delivered": expected}, path
        assert desk.numbers(endpoint) == list(range(1, expected + 1)), path
        received = desk.receiver.received(path.partition("?")[0])
        if path.startswith(("/status/503", "/status/500")):  # share their path
            continue
        assert len({request.webhook_id for request in received}) == expected, path
        check_attempts(received)
    # Every POST that reached the receiver has its row, and the only rows without a POST are of the one that was down.
    of_down = desk.ask("SELECT count(*) FROM webhook_attempts WHERE error LIKE 'refused%%'")[0]
    assert desk.ask("SELECT count(*) FROM webhook_attempts") == [desk.receiver.total + of_down]
    assert of_down >= 3


def check_attempts(received: list[Received]) -> None:
    """Attempts of one delivery have its id and body, and a timestamp each."""
    attempts: dict[str, list[Received]] = defaultdict(list)
    for request in received:
        attempts[request.webhook_id].append(request)
    for of_one in attempts.values():
        assert len({request.body for request in of_one}) == 1
        stamps = [request.headers["webhook-timestamp"] for request in of_one]
        assert len(set(stamps)) == len(stamps)
        assert len({request.headers["webhook-signature"] for request in of_one}) == len(of_one)


async def test_a_secret_is_rotated_between_attempts(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a day both secrets verify an attempt, of old deliveries too; then only the new one does."""
    old, new = new_secret(), new_secret()
    desk.receiver.behave("/rotating", "status 500")
    endpoint = desk.add_endpoint("/rotating", secret=old, schedule="5s 5s 24h 24h")
    await desk.tell(data={"town": "Crewe"})
    await desk.deliver()
    async with desk.database.connection() as conn:
        until = await rotate_secret(
            conn, org_id=desk.org_id, env="live", endpoint_id=endpoint, secret=new, actor="test"
        )
    assert isinstance(until, datetime)
    monkeypatch.setattr(deliver, "now", lambda: clock.now() + timedelta(seconds=30))
    await desk.deliver(offset="10 s")
    desk.receiver.behave("/rotating", "ok")
    await desk.deliver(offset="25 hours")
    requests = desk.receiver.received("/rotating")
    assert [verifies(request, old, new) for request in requests] == [(True, False), (True, True), (False, True)]
    assert len({(request.webhook_id, request.body) for request in requests}) == 1
    assert desk.states() == {"delivered": 1}


def verifies(request: Received, *secrets: str) -> tuple[bool, ...]:
    """Return for each secret whether the official verifier accepts the request with it."""

    def accepts(secret: str) -> bool:
        try:
            standardwebhooks.Webhook(secret).verify(request.body.decode(), dict(request.headers))
        except standardwebhooks.WebhookVerificationError:
            return False
        return True

    return tuple(map(accepts, secrets))


async def test_a_wish_to_be_left_alone_outlasts_the_failures_that_follow_it(desk: Desk) -> None:
    """Posts under way when an endpoint asks for ten minutes may fail after it: the ten minutes hold."""
    desk.receiver.behave("/busy", "status 429 retry_after=600", "hang")
    endpoint = desk.add_endpoint("/busy", schedule="5s 5s")
    await desk.tell(2)
    await desk.deliver(webhook_timeout_s=0.5)
    query = "SELECT failures, extract(epoch FROM blocked_until - now())::float8 FROM webhook_endpoints WHERE id = %s"
    ((failures, block_s),) = desk.ask(query, endpoint)
    assert failures == 2
    assert is_within(block_s, (590, 600))
    await desk.tell()
    assert (await desk.deliver(offset="9 min"))["claimed"] == 0
    desk.receiver.behave("/busy", "ok")
    assert (await desk.deliver(offset="11 min"))["delivered"] == 3
    assert desk.ask("SELECT failures, blocked_until FROM webhook_endpoints WHERE id = %s", endpoint) == [(0, None)]


async def test_the_run_that_finds_an_endpoint_up_again_delivers_the_rest(desk: Desk) -> None:
    """After ten failures one is let through; its success, however slow, opens the way for the others in this run."""
    desk.receiver.behave("/up", *["status 500"] * 10, "delay 0.3", "ok")
    endpoint = desk.add_endpoint("/up")
    await desk.tell(10)
    assert (await desk.deliver())["retried"] == 10
    assert (await desk.deliver(offset="1 min"))["delivered"] == 10
    assert desk.ask("SELECT failures, blocked_until FROM webhook_endpoints WHERE id = %s", endpoint) == [(0, None)]


async def test_one_broken_delivery_stops_no_other(desk: Desk) -> None:
    """An event about a message whose content is gone is told with what is known."""
    desk.add_endpoint()
    (message,) = desk.ask(
        "INSERT INTO messages (id, org_id, env, channel, sender, subject, addresses, units, period, created_at)"
        " VALUES (nm_uuid7(), %s, 'live', 'email', 'post@sender.test', 'Night mail', '{a@b.test}', 1, '2026-11', now())"
        " RETURNING id",
        desk.org_id,
    )
    desk.execute(
        "INSERT INTO webhook_deliveries (endpoint_id, event_id, org_id, topic, message_id, occurred_at, due_at)"
        " SELECT id, nm_uuid7(), org_id, 'email.sent', %s, now(), now() FROM webhook_endpoints",
        [message],
    )
    await desk.tell(2)
    assert (await desk.deliver())["delivered"] == 3
    bodies: list[Any] = [request.json() for request in desk.receiver.received("/ok")]
    (about,) = [body["data"] for body in bodies if body["type"] == "message.sent"]
    assert (about["id"], about["to"], about["tags"]) == (str(message), [], {})


async def test_an_interrupted_run_leaves_nothing_claimed(desk: Desk) -> None:
    """Cancelled in the middle of posts, it breaks them off and gives the deliveries back at once."""
    desk.add_endpoint("/hang")
    await desk.tell(5)
    run = asyncio.create_task(desk.deliver())
    await desk.receiver.wait_for(5)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert desk.ask("SELECT DISTINCT state, attempts, claim_id, due_at <= now() FROM webhook_deliveries") == [
        ("pending", 0, None, True)
    ]
    assert desk.ask("SELECT count(*) FROM webhook_attempts WHERE error LIKE 'broken off%%'") == [5]
