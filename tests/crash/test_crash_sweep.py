"""Every crash point of send-scheduled × {kill -9, frozen past the lease and woken, exception}, on real processes.

After each a second runner finishes the work, and the three books must agree: nothing lost, at most one call more than
takeovers, no more doubles than calls of unknown end at the moment of the interruption, usage and events once.
"""

from __future__ import annotations

import asyncio
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from nightmail.jobs import send_scheduled
from tests.crash.processes import Nurse
from tests.crash.runner import INSIDE
from tests.crash.world import FakeProviderProcess, World

pytestmark = [pytest.mark.anyio, pytest.mark.crash]

POINTS = (
    "claimed", "before_gate", "gate_uncommitted", "gated", "calling", "called", "before_record", "record_uncommitted",
    "recorded", "test_set_recorded",
)  # fmt: skip
ACTIONS = ("exit", "stop", "raise")
SHORT: dict[str, Any] = {"send_lease_s": 1.0, "send_concurrency": 4, "provider_timeout_s": 10.0}
MESSAGES = 12
# When these are first reached no call has begun: no double is possible.
BEFORE_CALLS = {"claimed", "before_gate", "gate_uncommitted", "gated", "test_set_recorded"}


def test_every_point_of_the_job_is_swept() -> None:
    source = Path(send_scheduled.__file__).read_text()
    assert set(re.findall(r'reach\("(\w+)"\)', source)) | set(INSIDE) == set(POINTS)


async def past_the_lease(world: World) -> None:
    """Wait until every lease there is has ended, by the database's clock."""
    left = world.ask("SELECT extract(epoch FROM max(lease_until) - nm_now())::float8 FROM claims")[0]
    if left is not None:
        await asyncio.sleep(max(0.0, left) + 0.01)


async def finish_what_can_be(world: World) -> None:
    """Run a second runner until all that is left, if anything, is locked by a frozen transaction."""
    for _ in range(3):
        await world.run(**SHORT)
        await past_the_lease(world)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("point", POINTS)
async def test_crash(database_url: str, provider: FakeProviderProcess, nurse: Nurse, point: str, action: str) -> None:
    world = await World.make(database_url, provider, is_mixed=True)
    is_test_lane = point == "test_set_recorded"
    await world.accept(MESSAGES, env="test" if is_test_lane else "live")
    lanes = ("test",) if is_test_lane else ("live:email",)
    options = {**SHORT, "send_batch": 5}

    victim = nurse.start(world, settings=options, lanes=lanes, crash=f"send-scheduled:{point}:{action}")
    assert await asyncio.to_thread(victim.wait) == {"exit": -signal.SIGKILL, "stop": None, "raise": 1}[action]
    is_frozen = action == "stop"
    in_flight = world.intents()
    called, finished = world.taken(), world.ask("SELECT id::text FROM messages WHERE state = 'sent'")

    await past_the_lease(world)
    if is_frozen:
        await finish_what_can_be(world)
        victim.send(signal.SIGCONT)
        assert await asyncio.to_thread(victim.wait) == 0
    await world.drain(**SHORT)
    await world.close()

    account = world.account()
    assert not account.violations
    assert not await world.broken()
    assert world.ratings() == ({"included": MESSAGES} if is_test_lane else {"included": 4, "credits": 5, "metered": 3})
    assert account.states == {"sent": MESSAGES}
    assert (account.queue_left, account.claims_left) == (0, 0)
    # A frozen runner's call may have been on the wire before its acceptance was in the log: count its intents too.
    assert account.doubles <= in_flight
    assert account.takeovers <= in_flight + (4 if is_frozen else 0)
    taken = world.taken()
    assert all(taken[message_id] <= 1 for message_id in finished)
    if point in BEFORE_CALLS:
        assert account.doubles == 0
    if point in ("recorded", "test_set_recorded"):
        assert finished
    if point == "called" and action == "exit":
        assert account.doubles >= 1
        assert sum(called.values()) >= 1
    if is_frozen and point in ("called", "before_record"):
        counts = victim.report().counts
        assert counts["lost"] >= account.late_results >= 1
        assert account.doubles >= account.late_results
    if is_frozen and point in ("claimed", "before_gate", "gated", "calling"):
        assert victim.report().counts["lost"] >= 1


@pytest.mark.parametrize("point", ["called", "before_record"])
async def test_a_zombie_cannot_write_over_the_runner_that_holds_its_rows(
    world: World, nurse: Nurse, point: str
) -> None:
    await world.accept(MESSAGES)
    crash = f"send-scheduled:{point}:stop"
    zombie = nurse.start(world, settings=SHORT, lanes=("live:email",), crash=crash)
    assert await asyncio.to_thread(zombie.wait) is None
    await past_the_lease(world)
    # The second runner takes everything over, and is frozen too, within a lease that lasts.
    holder = nurse.start(world, settings={**SHORT, "send_lease_s": 60, "send_concurrency": 16}, crash=crash)
    assert await asyncio.to_thread(holder.wait) is None
    held = set(world.ask("SELECT message_id::text FROM message_queue WHERE intent_at IS NOT NULL"))
    zombie.send(signal.SIGCONT)
    assert await asyncio.to_thread(zombie.wait) == 0
    late = set(world.ask("SELECT message_id::text FROM message_events WHERE kind = 'late_result'"))
    assert late
    assert zombie.report().counts["lost"] >= len(late)
    assert held <= set(world.ask("SELECT message_id::text FROM message_queue WHERE claim_id IS NOT NULL"))
    holder.send(signal.SIGCONT)
    assert await asyncio.to_thread(holder.wait) == 0
    await world.drain(**SHORT)
    account = world.account()
    assert not account.violations
    assert account.states == {"sent": MESSAGES}
    ids = dict(world.ask("SELECT id::text, provider_message_id FROM messages"))
    refs = dict(world.ask("SELECT message_id::text, provider_ref FROM message_events WHERE kind = 'late_result'"))
    assert all(ids[message_id] != refs[message_id] for message_id in late & held)


async def test_sigterm_finishes_what_has_begun_and_gives_back_the_rest(world: World, nurse: Nurse) -> None:
    world.provider.follow(latency_ms=200)
    await world.accept(200)
    runner = nurse.start(world, settings={"send_concurrency": 4}, loop=True)
    while world.intents() < 4:
        await asyncio.sleep(0.01)
    runner.send(signal.SIGTERM)
    assert await asyncio.to_thread(runner.wait) == 0
    account = world.account()
    assert 4 <= account.sent == account.calls < 200
    assert account.claims_left == 0
    assert world.ask("SELECT count(*) FROM message_queue WHERE claim_id IS NOT NULL OR intent_at IS NOT NULL") == [0]


async def test_a_message_that_kills_its_runner_fails_and_takes_no_other_with_it(world: World, nurse: Nurse) -> None:
    (poison,) = await world.accept(subject="deadly")
    others = await world.accept(30)
    deaths, in_flight = 0, 0
    for _ in range(8):
        runner = nurse.start(world, settings={**SHORT, "send_concurrency": 8}, deadly="deadly")
        if await asyncio.to_thread(runner.wait) == 0:
            break
        deaths += 1
        in_flight += world.intents()
        await past_the_lease(world)
        attempts = world.ask("SELECT max(attempts) FROM message_queue WHERE message_id <> %s", poison)
        # Innocent rows were at the gate with it at the first two deaths at most; from then on it was alone.
        assert attempts[0] is None or attempts[0] <= 2
    assert deaths == 5
    await world.drain(**SHORT)
    assert world.state(poison) == ("failed", "attempts exhausted")
    assert {world.state(message)[0] for message in others} == {"sent"}
    account = world.account()
    assert not account.violations
    assert not world.taken()[str(poison)]
    assert account.doubles <= in_flight
