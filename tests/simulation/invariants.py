"""What must hold: after every step, and at the end, when everybody healthy has finished."""

from __future__ import annotations

from collections import Counter
from uuid import UUID

from tests.simulation.world import Row, World

# A fact and what is told of it are written in one transaction: neither is ever without the other, whoever wrote them
# (gate, record step, customer) and whoever crashed thereafter.
UNTOLD = """
WITH fact AS (
    SELECT e.message_id, m.channel || '.' || e.kind AS topic, count(*) AS facts
    FROM message_events AS e
    JOIN messages AS m ON m.id = e.message_id
    WHERE e.kind = ANY (%(kinds)s)
    GROUP BY 1, 2
), told AS (
    SELECT d.message_id, d.topic, count(*) AS deliveries
    FROM webhook_deliveries AS d
    GROUP BY 1, 2
)
SELECT message_id, topic, coalesce(facts, 0), coalesce(deliveries, 0)
FROM fact
FULL JOIN told USING (message_id, topic)
WHERE (facts, deliveries) IS DISTINCT FROM (1, 1)
ORDER BY 1, 2
"""
TOLD_KINDS = ["sent", "failed", "suppressed", "canceled", "ambiguous"]


class Violation(AssertionError):
    """Something that must never be."""


def check(world: World, name: str, before: dict[UUID, Row]) -> None:
    """Check what must hold after every step."""
    calls = Counter(message_id for message_id, _ in world.taken)
    for row in world.rows.values():
        old = before[row.id]
        if name.endswith("rescue") and old.claim_id is not None and row.claim_id is None:
            world.takeovers[row.id] += world.begun_under.get(row.id) == old.claim_id
            owner = world.owners.get(old.claim_id)
            if owner is not None:
                runner = world.runners[owner[0]]
                if runner.life == owner[1] and old.claim_id not in runner.was_frozen:
                    raise Violation(f"{world.names[row.id]} was taken from a runner that lived and beat")
        if calls[row.id] > 1 + world.takeovers[row.id]:
            raise Violation(
                f"{world.names[row.id]} was taken {calls[row.id]} times with {world.takeovers[row.id]} takeovers"
            )
        if row.state == "sent" and (row.id, row.provider_id) not in world.taken:
            raise Violation(f"{world.names[row.id]} is sent as {row.provider_id}, which no call was answered with")
        if row.state == "canceled" and calls[row.id] > world.takeovers[row.id]:
            raise Violation(f"{world.names[row.id]} is canceled and was sent")
    if world.mutant.checks_each_step:
        check_books(world)


def check_books(world: World) -> None:
    """Check that events and usage say what the states say."""
    for row in world.rows.values():
        if row.sent_events != (row.state == "sent"):
            raise Violation(f"{world.names[row.id]} is {row.state} with {row.sent_events} sent events")
        if row.queued != (row.state == "scheduled"):
            raise Violation(f"{world.names[row.id]} is {row.state} and {'' if row.queued else 'not '}queued")
    used = sum(row.units_called for row in world.rows.values() if row.state == "sent")
    reserved = sum(row.units for row in world.rows.values() if row.state in ("scheduled", "ambiguous"))
    if world.usage != (used, reserved):
        raise Violation(f"usage and reservation are {world.usage}, should be {(used, reserved)}")


async def check_end(world: World) -> None:
    """Check what must hold when all is done."""
    check_books(world)
    calls = Counter(message_id for message_id, _ in world.taken)
    for row in world.rows.values():
        if row.queued or row.state == "scheduled":
            raise Violation(f"{world.names[row.id]} was lost: still {row.state}")
        if row.state == "sent" and not calls[row.id]:
            raise Violation(f"{world.names[row.id]} is sent without a call")
    await check_deliveries(world)


async def check_deliveries(world: World) -> None:
    """Check that each event of a message is one delivery to the endpoint, and each delivery one event."""
    cursor = await world.admin.execute(UNTOLD, {"kinds": TOLD_KINDS})
    for message_id, topic, facts, deliveries in await cursor.fetchall():
        raise Violation(f"{world.names[message_id]} has {facts} events and {deliveries} deliveries of {topic}")
