"""A call whose end nobody knows, and what the provider reports of it meanwhile: send-scheduled and provider events."""

from __future__ import annotations

from functools import partial
from typing import Any
from uuid import UUID

import pytest

from nightmail.store import gate, queue
from nightmail.store.database import Connection
from nightmail.store.messages import release_message
from tests import provider_reports as said
from tests.crash.world import World
from tests.jobs.test_send_scheduled import to
from tests.store.inbound_world import apply

pytestmark = pytest.mark.anyio

EVIDENCE: dict[str, Any] = {
    "sns_topic_arns": "arn:aws:sns:eu-west-1:123456789012:nightmail",
    "ses_configuration_set": "events",
    "evidence_wait_s": 120,
}
POLICIES = ("at_least_once", "at_most_once")


async def report(world: World, message: UUID, kind: str) -> None:
    """Let SES report on the message, now."""
    (address,) = world.ask("SELECT addresses[1] FROM messages WHERE id = %s", message)
    payload = {
        "Send": lambda: said.ses("Send", message, {}),
        "Delivery": lambda: said.delivery(message, address),
        "Bounce": lambda: said.bounce(message, address),
        "Reject": lambda: said.ses("Reject", message, {"reason": "virus"}),
    }[kind]()
    async with world.database() as database, database.connection() as conn:
        assert (await apply(conn, payload)).outcome == "applied"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("kind", "state"), [("Send", "sent"), ("Delivery", "delivered"), ("Bounce", "bounced"), ("Reject", "failed")]
)
async def test_evidence_within_the_wait_completes_the_message_at_once(
    world: World, policy: str, kind: str, state: str
) -> None:
    (message,) = await world.accept(to=partial(to, "reset-after"), policy=policy)
    assert (await world.run(**EVIDENCE))["retried"] == 1
    assert world.queued(message)["wait_s"] > 100
    assert (await world.run(**EVIDENCE))["claimed"] == 0
    await report(world, message, kind)
    assert (await world.run(**EVIDENCE))["sent"] == 1, "without waiting for the rest of the time"
    assert world.state(message)[0] == state
    assert world.queued(message) == {}
    assert world.taken()[str(message)] == 1
    assert world.ask("SELECT sum(used)::int, sum(reserved)::int FROM usage_records") == [(1, 0)]


@pytest.mark.parametrize(("policy", "state", "calls"), [("at_least_once", "sent", 2), ("at_most_once", "ambiguous", 1)])
async def test_without_evidence_the_policy_decides_when_the_wait_is_over(
    world: World, policy: str, state: str, calls: int
) -> None:
    (message,) = await world.accept(to=partial(to, "reset-after-once"), policy=policy)
    await world.run(**EVIDENCE)
    assert (await world.run(offset="110 seconds", **EVIDENCE))["claimed"] == 0
    await world.run(offset="130 seconds", **EVIDENCE)
    assert world.state(message)[0] == state
    assert world.taken()[str(message)] == calls


async def test_evidence_settles_what_a_dead_runner_left(world: World) -> None:
    (message,) = await world.accept()
    async with world.database() as database, database.connection() as conn:
        await die_after_the_gate(conn)
    assert (await world.run(offset="70 seconds", **EVIDENCE))["claimed"] == 0, "taken over, and waiting for evidence"
    await report(world, message, "Delivery")
    assert (await world.run(offset="71 seconds", **EVIDENCE))["sent"] == 1
    assert world.state(message)[0] == "delivered"
    assert world.taken()[str(message)] == 0, "the second call was never made"


async def die_after_the_gate(conn: Connection) -> None:
    (row,) = await queue.claim_due(conn, "live:email", runner="dead", limit=1, lease_s=60)
    assert (await gate.pass_gate(conn, row.claim_id, [row.message_id], call_s=5, shard=0)).passed


async def test_late_evidence_settles_what_was_called_ambiguous(world: World) -> None:
    (message,) = await world.accept(to=partial(to, "reset-after"), policy="at_most_once")
    await world.run(**EVIDENCE)
    await world.run(offset="130 seconds", **EVIDENCE)
    assert world.state(message)[0] == "ambiguous"
    await report(world, message, "Delivery")
    assert world.state(message) == ("delivered", None)
    assert world.taken()[str(message)] == 1
    assert world.ask("SELECT sum(used)::int, sum(reserved)::int FROM usage_records") == [(1, 0)]


async def test_a_message_released_to_be_sent_again_is_not_when_the_report_comes_first(world: World) -> None:
    """By hand it was to be sent again; before that happened the provider told of the first call."""
    (message,) = await world.accept(to=partial(to, "reset-after"), policy="at_most_once")
    await world.run()
    await world.run(offset="10 minutes")
    assert world.state(message)[0] == "ambiguous"
    async with world.database() as database, database.connection() as conn:
        released = await release_message(
            conn, org_id=world.org_id, env="live", channel="email", message_id=message, action="resend"
        )
    assert released == "released"
    await report(world, message, "Delivery")
    assert (await world.run())["sent"] == 1
    assert world.state(message)[0] == "delivered"
    assert world.taken()[str(message)] == 1


async def test_a_refusal_reported_of_an_ambiguous_message_keeps_its_reason(world: World) -> None:
    (message,) = await world.accept(to=partial(to, "reset-after"), policy="at_most_once")
    await world.run()
    await world.run(offset="10 minutes")
    await report(world, message, "Reject")
    state, reason = world.state(message)
    assert state == "failed"
    assert reason is not None
    assert "virus" in reason
