"""What happens around the runners: time passes, customers change their minds, a standby loses a claim."""

from __future__ import annotations

from uuid import UUID

from nightmail.store.messages import cancel_message, reschedule_message
from nightmail.store.record import Outcome
from tests.simulation.runners import beat
from tests.simulation.world import MESSAGES, ORG, World

SUPPRESS = """
INSERT INTO suppressions (id, org_id, env, channel, address, origin)
VALUES (gen_random_uuid(), %s, 'live', 'email', %s, 'stop')
ON CONFLICT DO NOTHING
"""
FORGET_CLAIM = """
WITH freed AS (UPDATE message_queue SET claim_id = NULL WHERE claim_id = %(id)s)
DELETE FROM claims WHERE claim_id = %(id)s
"""


async def move_clock(world: World) -> str:
    """Let seconds pass; live runners beat and time out on the way."""
    seconds = (1.0, 4.0, 11.0, 31.0)[world.choose(4) or 0]
    await pass_time(world, seconds)
    return f"+{seconds:.0f}"


async def pass_time(world: World, seconds: float) -> None:
    """Move the clock, stopping at every timer of a live runner."""
    target = world.now + seconds
    while True:
        live = [runner for runner in world.runners if not runner.frozen]
        timers = [(runner.beat_at, runner.number) for runner in live if runner.claims]
        timers += [(call.timeout_at, runner.number) for runner in live for call in runner.calls]
        due = [(at, number) for at, number in timers if at <= target]
        if not due:
            break
        at, number = min(due)
        world.now = max(world.now, at)
        runner = world.runners[number]
        for call in [call for call in runner.calls if call.timeout_at <= world.now]:
            runner.calls.remove(call)
            runner.results.append(
                Outcome(call.passed.message_id, call.passed.claim_id, "in_doubt", code="timeout", wait_s=7.0)
            )
        if runner.claims and runner.beat_at <= world.now:
            await beat(world, runner)
        world.rows = await world.look()
    world.now = target


def some_message(world: World) -> UUID:
    """Return a message the scheduler picks."""
    return list(world.names)[world.choose(MESSAGES) or 0]


async def cancel(world: World) -> str:
    """Cancel a message through the API."""
    message_id = some_message(world)
    await world.at_now(world.admin)
    answer = await cancel_message(world.admin, org_id=ORG, env="live", channel="email", message_id=message_id)
    if answer == "done":
        world.canceled.add(message_id)
    return f"{world.names[message_id]} {answer}"


async def reschedule(world: World) -> str:
    """Reschedule a message by a minute, or into the next month."""
    message_id = some_message(world)
    await world.at_now(world.admin)
    cursor = await world.admin.execute(
        "SELECT nm_now() + make_interval(secs => %s)", [60 if (world.choose(2) or 0) else 3600]
    )
    row = await cursor.fetchone()
    assert row is not None
    answer = await reschedule_message(
        world.admin, org_id=ORG, env="live", channel="email", message_id=message_id, scheduled_at=row[0]
    )
    return f"{world.names[message_id]} {answer}"


async def suppress(world: World) -> str:
    """Suppress one of a message's two recipients."""
    number = list(world.names).index(some_message(world)) + 1
    address = f"{'ab'[world.choose(2) or 0]}{number}@x.test"
    await world.admin.execute(SUPPRESS, [ORG, address])
    world.suppressed.setdefault(address, world.steps)
    return address


async def failover(world: World) -> str:
    """Lose the newest claim's transaction, as an asynchronous standby may; its runner does not know."""
    claim_id = world.newest_claim
    assert claim_id is not None
    await world.admin.execute(FORGET_CLAIM, {"id": claim_id})
    world.newest_claim = None
    world.claim_numbers -= 1
    world.owners.pop(claim_id, None)
    return ""
