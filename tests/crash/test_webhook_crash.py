"""Every crash point of retry-webhooks × {kill -9, frozen past the lease and woken, exception}, on real processes.

After each a second runner finishes the work. The receiver is a process too, and its log is the truth: every delivery
came at least once, only those under way came again, with the same id and the same bytes; the numbers have no gap; and
who wakes after its lease changes no delivery.
"""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nightmail.ids import new_id
from nightmail.webhooks import deliver
from tests.crash.webhook_kill_loop import WebhookKillLoop, print_account
from tests.crash.webhook_runner import INSIDE
from tests.crash.webhook_world import ReceiverProcess, WebhookAccount, WebhookNurse
from tests.webhooks.desk import Desk

pytestmark = [pytest.mark.anyio, pytest.mark.crash]

POINTS = ("claimed", "claim_uncommitted", "posting", "posted", "before_record", "record_uncommitted", "recorded")
ACTIONS = ("exit", "stop", "raise")
SHORT: dict[str, Any] = {
    "webhook_lease_s": 1.0,
    "webhook_timeout_s": 0.25,
    "webhook_concurrency": 4,
    "webhook_endpoint_concurrency": 4,
}
FACTS = 12
# When these are first reached nothing has been posted.
BEFORE_POSTS = {"claimed", "claim_uncommitted", "posting"}


@pytest.fixture(scope="session")
def receiver_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReceiverProcess]:
    """One receiver for all tests; deliveries are told apart by their paths."""
    with ReceiverProcess.start(tmp_path_factory.mktemp("receiver")) as receiver:
        yield receiver


@pytest.fixture(scope="session")
def webhook_nurse() -> Iterator[WebhookNurse]:
    """The process that forks runners of retry-webhooks."""
    nurse = WebhookNurse()
    yield nurse
    nurse.close()


@pytest.fixture
async def desk(database_url: str, receiver_process: ReceiverProcess) -> AsyncIterator[Desk]:
    """An org in a fresh database, at the receiver's process."""
    async with Desk.open(database_url, receiver_process.address()) as desk:
        yield desk


def test_every_point_of_the_delivery_is_swept() -> None:
    source = Path(deliver.__file__).read_text()
    assert set(re.findall(r'reach\("(\w+)"\)', source)) | set(INSIDE) == set(POINTS)


def held(desk: Desk) -> list[str]:
    """Return the ids of what is claimed, by anybody."""
    return desk.ask("SELECT event_id::text FROM webhook_deliveries WHERE claim_id IS NOT NULL")


def delivered(desk: Desk) -> list[Any]:
    """Return what has been decided of each delivery."""
    return desk.ask("SELECT * FROM webhook_deliveries WHERE state <> 'pending' ORDER BY event_id")


async def past_the_lease(desk: Desk) -> None:
    """Wait until every lease there is has ended, by the database's clock."""
    left = desk.ask(
        "SELECT extract(epoch FROM max(due_at) - nm_now())::float8 FROM webhook_deliveries WHERE claim_id IS NOT NULL"
    )
    await asyncio.sleep(max(0.0, left[0] or 0.0) + 0.01)


async def drain(desk: Desk) -> None:
    """Run until nothing is pending."""
    async with asyncio.timeout(30):
        while desk.states()["pending"]:
            await desk.run_job(**SHORT)
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("point", POINTS)
async def test_crash(
    desk: Desk, receiver_process: ReceiverProcess, webhook_nurse: WebhookNurse, point: str, action: str
) -> None:
    path = f"/delay/0.02/{new_id()}"
    endpoint = desk.add_endpoint(path)
    if point == "record_uncommitted":  # results of an endpoint in good health are one statement
        desk.execute("UPDATE webhook_endpoints SET failures = 1, first_failing_at = now()")
    await desk.tell(FACTS)

    crash = f"retry-webhooks:{point}:{action}"
    victim = webhook_nurse.begin(desk.database_url, SHORT, crash=crash)
    assert await asyncio.to_thread(victim.wait) == {"exit": -signal.SIGKILL, "stop": None, "raise": 1}[action]
    is_frozen = action == "stop"
    under_way, finished = (
        set(held(desk)),
        desk.ask("SELECT event_id::text FROM webhook_deliveries WHERE state = 'delivered'"),
    )
    before = {post.webhook_id for post in receiver_process.posts(path)}

    await past_the_lease(desk)
    if is_frozen:
        # The second runner does what it can, until its deadline when a frozen transaction has rows locked.
        await desk.run_job(**SHORT, deadline_s=3.0 if point in INSIDE else 25.0)
        decided = delivered(desk)
        if point not in INSIDE:
            assert len(decided) == FACTS
        victim.send(signal.SIGCONT)
        assert await asyncio.to_thread(victim.wait) == 0
        after = delivered(desk)
        assert [row for row in after if row in decided] == decided
    await drain(desk)

    account = WebhookAccount.read(desk, receiver_process, path, [endpoint], FACTS)
    assert not account.violations
    assert account.overlaps == 0
    again = {name for name, posts in account.by_id.items() if len(posts) > 1}
    assert again <= under_way
    assert all(len(posts) <= 2 for posts in account.by_id.values())
    assert not again & set(finished)
    if is_frozen:
        # Whoever lives to tell writes down each post it made, and no other.
        assert account.unrecorded <= 0
    else:
        assert account.unrecorded <= len(under_way)
    check_point(point, action, again=again, before=before, finished=finished)
    if not is_frozen:  # for one that slept, an answer that waited for it came too late
        assert desk.ask("SELECT failures, first_failing_at FROM webhook_endpoints") == [(0, None)]
    assert desk.ask("SELECT max(attempts) FROM webhook_deliveries")[0] <= 2


def check_point(point: str, action: str, *, again: set[str], before: set[str], finished: list[str]) -> None:
    """Check what is true of one point: that the crash was where it should be, and what it may have cost."""
    lives_on = action == "raise"  # the other posts under way end in peace
    if point in BEFORE_POSTS:
        assert lives_on or not before
        assert len(again) <= (1 if (point, action) == ("posting", "stop") else 0)
    if point in ("posted", "before_record", "record_uncommitted"):
        assert before
        assert lives_on or not finished
    if (point, action) in (("posted", "exit"), ("before_record", "exit"), ("before_record", "stop")):
        assert again
    if point == "recorded":
        assert finished


async def test_a_zombie_cannot_write_over_the_runner_that_holds_its_rows(
    desk: Desk, receiver_process: ReceiverProcess, webhook_nurse: WebhookNurse
) -> None:
    path = f"/delay/0.02/{new_id()}"
    endpoint = desk.add_endpoint(path)
    await desk.tell(4)
    crash = "retry-webhooks:before_record:stop"
    zombie = webhook_nurse.begin(desk.database_url, SHORT, crash=crash)
    assert await asyncio.to_thread(zombie.wait) is None
    await past_the_lease(desk)
    # The second runner posts all of it again, and is frozen too, within a lease that lasts.
    holder = webhook_nurse.begin(desk.database_url, {**SHORT, "webhook_lease_s": 60}, crash=crash)
    assert await asyncio.to_thread(holder.wait) is None
    rows = desk.ask("SELECT * FROM webhook_deliveries ORDER BY event_id")
    assert len(held(desk)) == 4
    zombie.send(signal.SIGCONT)
    assert await asyncio.to_thread(zombie.wait) == 0
    assert zombie.report().counts["delivered"] == 0
    assert desk.ask("SELECT * FROM webhook_deliveries ORDER BY event_id") == rows
    assert desk.ask("SELECT count(*) FROM webhook_attempts")[0] >= 1  # the posts it made are told all the same
    holder.send(signal.SIGCONT)
    assert await asyncio.to_thread(holder.wait) == 0
    await drain(desk)
    account = WebhookAccount.read(desk, receiver_process, path, [endpoint], 4)
    assert not account.violations
    assert account.unrecorded == 0


async def test_sigterm_ends_what_has_begun_and_gives_back_the_rest(
    desk: Desk, receiver_process: ReceiverProcess, webhook_nurse: WebhookNurse
) -> None:
    path = f"/delay/0.2/{new_id()}"
    endpoint = desk.add_endpoint(path)
    await desk.tell(100)
    settings = {**SHORT, "webhook_lease_s": 60, "webhook_timeout_s": 10}
    runner = webhook_nurse.begin(desk.database_url, settings, loop=True)
    while len(held(desk)) < 4:
        await asyncio.sleep(0.01)
    runner.send(signal.SIGTERM)
    assert await asyncio.to_thread(runner.wait) == 0
    assert not held(desk)
    states = desk.states()
    assert 1 <= states["delivered"] == len(receiver_process.posts(path)) < 100
    assert desk.ask("SELECT count(*) FROM webhook_deliveries WHERE state = 'pending' AND attempts > 0") == [0]
    await desk.deliver(webhook_endpoint_concurrency=100)
    assert not WebhookAccount.read(desk, receiver_process, path, [endpoint], 100).violations


@pytest.mark.slow
async def test_runners_killed_again_and_again_lose_nothing(
    desk: Desk, receiver_process: ReceiverProcess, webhook_nurse: WebhookNurse
) -> None:
    loop = WebhookKillLoop(desk, receiver_process, webhook_nurse, seconds=5, seed=1936)
    await loop.run()
    print_account(Console(width=110), loop)
    assert not loop.violations
    assert loop.facts >= 100
    assert loop.kills >= 4  # on a busy machine
    assert loop.account.posts
