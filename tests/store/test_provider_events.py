"""Provider events: written once, in any order, never lost, and told to whom they concern."""

from __future__ import annotations

import asyncio
import random
from functools import partial
from typing import Any
from uuid import UUID

import pytest

from nightmail.ids import new_id
from nightmail.store import gate, queue, record
from nightmail.store.audit import audit
from nightmail.store.database import Connection
from nightmail.store.record import Outcome
from nightmail.store.suppressions import add_suppressions
from nightmail.store.unsubscribes import unsubscribe
from tests import provider_reports as said
from tests.crash.world import World
from tests.store.inbound_world import add_endpoint, apply, findings, mark_sent, told

pytestmark = pytest.mark.anyio

A, B, C = (f"{name}@recipient.test" for name in "abc")
NUMBER = "+15005550006"


async def accept(world: World, *addresses: str, **options: Any) -> UUID:
    (message_id,) = await world.accept(to=lambda _: list(addresses), **options)
    return message_id


def suppressions(world: World) -> list[Any]:
    return world.ask("SELECT env, channel, address, origin FROM suppressions ORDER BY address")


async def begin(conn: Connection) -> gate.Passed:
    """Claim the one due email and pass the gate."""
    (row,) = await queue.claim_due(conn, "live:email", runner="test", limit=1, lease_s=60)
    (passed,) = (await gate.pass_gate(conn, row.claim_id, [row.message_id], call_s=5, shard=0)).passed
    return passed


@pytest.mark.parametrize(
    ("payload", "kind", "state", "suppressed", "data"),
    [
        (lambda m: said.ses("Send", m, {}), "accepted", "sent", [], None),
        (lambda m: said.delivery(m, A), "delivered", "delivered", [], {"delivery": {"response": "250 ok"}}),
        (lambda m: said.bounce(m, A), "bounced", "bounced", [("live", "email", A, "bounce")], "bounce"),
        (lambda m: said.bounce(m, A, kind="Transient", action="failed"), "bounced", "bounced", [], "bounce"),
        (lambda m: said.bounce(m, A, kind="Transient", note=1), "delayed", "sent", [], "delay"),
        (lambda m: said.complaint(m, A), "complained", "complained", [("live", "email", A, "complaint")], "complaint"),
        (lambda m: said.delay(m, A), "delayed", "sent", [], "delay"),
        (lambda m: said.opened(m), "opened", "sent", [], "open"),
        (lambda m: said.clicked(m), "clicked", "sent", [], "click"),
        (
            lambda m: said.ses("Reject", m, {"reason": "virus"}),
            "failed",
            "failed",
            [],
            {"reason": "refused by SES: virus"},
        ),
    ],
)
async def test_each_kind_is_written_and_told_once(
    world: World, payload: Any, kind: str, state: str, suppressed: Any, data: Any
) -> None:
    message = await accept(world, A)
    mark_sent(world, message)
    other_org = await world.add_org()
    mine, theirs, test = add_endpoint(world), add_endpoint(world, other_org), add_endpoint(world, env="test")
    async with world.database() as database, database.connection() as conn:
        first = await apply(conn, payload(message))
        again = await apply(conn, payload(message))  # the same fact by another notification
        assert (first.outcome, first.events, first.suppressed) == ("applied", 1, len(suppressed))
        assert (again.outcome, again.events, again.suppressed) == ("applied", 0, 0)
        assert await findings(conn) == []
    assert world.state(message)[0] == state
    assert suppressions(world) == suppressed
    assert world.ask("SELECT kind FROM message_events WHERE kind <> 'sent'") == [kind]
    assert world.ask("SELECT data ->> 'provider_message_id' FROM message_events WHERE kind <> 'sent'") == [said.SES_ID]
    assert told(world, theirs) == told(world, test) == []
    if kind == "accepted":
        assert told(world, mine) == []
        return
    ((topic, recipient, given),) = told(world, mine)
    assert (topic, recipient) == (f"email.{kind}", "" if kind == "failed" else A)
    assert given == data if isinstance(data, dict) else list(given) == [data]
    outcomes = [(A, kind)] if kind in ("delivered", "bounced", "complained") else []
    assert world.ask("SELECT address, state FROM recipient_outcomes") == outcomes


async def test_a_notification_has_its_effects_once(world: World) -> None:
    message = await accept(world, A)
    mark_sent(world, message)
    async with world.database() as database, database.connection() as conn:
        assert (await apply(conn, said.opened(message, 1), "n-1")).outcome == "applied"
        assert (await apply(conn, said.opened(message, 2), "n-1")).outcome == "repeated"
    assert world.ask("SELECT count(*) FROM message_events WHERE kind = 'opened'") == [1]


async def test_one_notification_on_two_connections_has_its_effects_once(world: World) -> None:
    message = await accept(world, A)
    mark_sent(world, message)
    endpoint = add_endpoint(world)

    async with world.database() as database:

        async def deliver(number: int) -> str:
            async with database.connection() as conn:
                return (await apply(conn, said.opened(message, number), "n-1")).outcome

        outcomes = await asyncio.gather(*(deliver(number) for number in range(6)))
    assert sorted(outcomes) == ["applied", *["repeated"] * 5]
    assert len(told(world, endpoint)) == 1


async def test_reports_about_a_message_take_turns(world: World) -> None:
    """Two reports of one message at once: neither deadlock nor a lost outcome."""
    addresses = [f"r{number}@recipient.test" for number in range(12)]
    message = await accept(world, *addresses)
    mark_sent(world, message)
    async with world.database() as database:
        reports = [said.delivery(message, *addresses), said.bounce(message, *reversed(addresses[:6]), feedback="x")]
        reports += [said.complaint(message, addresses[3], addresses[1])] * 3
        await asyncio.gather(*(database.run(partial(apply, payload=report)) for report in reports * 2))
    assert world.state(message)[0] == "complained"
    assert world.ask("SELECT state, count(*) FROM recipient_outcomes GROUP BY state ORDER BY state") == [
        ("bounced", 4), ("complained", 2), ("delivered", 6),
    ]  # fmt: skip
    assert len(suppressions(world)) == 6


async def test_a_report_that_waited_for_another_does_not_undo_it(world: World) -> None:
    """The second report reads the state when the first has committed, not when it came."""
    message = await accept(world, A)
    mark_sent(world, message)
    async with world.database() as database, database.connection() as first, database.connection() as second:
        async with first.transaction():
            await apply(first, said.complaint(message, A))
            waiting = asyncio.create_task(apply(second, said.delivery(message, A)))
            while not await asyncio.to_thread(world.ask, "SELECT 1 FROM pg_locks WHERE NOT granted"):
                await asyncio.sleep(0.01)
        await waiting
    assert world.state(message)[0] == "complained"
    assert world.ask("SELECT state FROM recipient_outcomes") == ["complained"]


async def test_any_order_and_number_of_reports_ends_in_the_same_state(world: World) -> None:
    """Our own `sent` is one of the steps: a report may come before it."""
    endpoint = add_endpoint(world)
    ends = []
    async with world.database() as database, database.connection() as conn:
        for seed in range(10):
            order = random.Random(seed)
            a, b, c = addresses = [f"{name}{seed}@recipient.test" for name in "abc"]
            message = await accept(world, *addresses)
            passed = await begin(conn)
            steps = [
                said.ses("Send", message, {}),
                said.delivery(message, a, b),
                said.delivery(message, c),
                said.delay(message, b),
                said.bounce(message, b),
                said.bounce(message, c, feedback="fb-3", kind="Transient", action="failed"),
                said.complaint(message, b),
                said.opened(message),
                said.ses("Reject", message, {"reason": "virus"}),
                None,
            ]
            steps += order.sample(steps[:-1], 4)
            order.shuffle(steps)
            for step in steps:
                if step is not None:
                    await apply(conn, step)
                else:
                    outcome = Outcome(message, passed.claim_id, "sent", 3, "ses", said.SES_ID)
                    assert (await record.record_outcomes(conn, [outcome], shard=0)).written == {message: "sent"}
            ends.append(str(await end_of(world, message, endpoint)).replace(f"{seed}@", "@"))
        assert [finding.name for finding in await audit(conn) if finding.violations] == []
    assert len(set(ends)) == 1
    assert "'complained'" in ends[0]


async def end_of(world: World, message: UUID, endpoint: UUID) -> dict[str, Any]:
    one = "SELECT {} WHERE message_id = %s ORDER BY 1, 2, 3"
    return {
        "message": world.ask("SELECT state, reason, sent_at IS NOT NULL FROM messages WHERE id = %s", message),
        "outcomes": world.ask(one.format("address, state, 1 FROM recipient_outcomes"), message),
        "events": world.ask(one.format("kind, recipient, provider_ref <> '' FROM message_events"), message),
        "told": world.ask(one.format("topic, recipient, 1 FROM webhook_deliveries"), message),
        "suppressed": [row for row in suppressions(world) if row[2] in world.ask(
            "SELECT unnest(addresses) FROM messages WHERE id = %s", message)],
    }  # fmt: skip


async def test_a_bounce_before_our_own_sent_is_not_lost(world: World) -> None:
    message = await accept(world, A)
    async with world.database() as database, database.connection() as conn:
        passed = await begin(conn)
        await apply(conn, said.bounce(message, A))
        assert world.queued(message)["claim_id"] == passed.claim_id, "the runner still holds it"
        await record.record_outcomes(conn, [Outcome(message, passed.claim_id, "sent", 1, "ses", "id")], shard=0)
        assert [finding.name for finding in await audit(conn) if finding.violations] == []
    assert world.state(message)[0] == "bounced"
    assert world.ask("SELECT sent_at IS NOT NULL, provider_message_id FROM messages") == [(True, "id")]
    assert suppressions(world) == [("live", "email", A, "bounce")]


@pytest.mark.parametrize("policy", ["at_least_once", "at_most_once"])
@pytest.mark.parametrize(
    ("payload", "state"),
    [
        (lambda m: said.ses("Send", m, {}), "sent"),
        (lambda m: said.delivery(m, A), "delivered"),
        (lambda m: said.bounce(m, A), "bounced"),
    ],
)
async def test_evidence_makes_the_gate_settle_a_row_in_doubt_without_a_call(
    world: World, payload: Any, state: str, policy: str
) -> None:
    message = await accept(world, A, policy=policy)
    endpoint = add_endpoint(world)
    async with world.database() as database, database.connection() as conn:
        passed = await begin(conn)
        await record.record_outcomes(conn, [Outcome(message, passed.claim_id, "in_doubt", wait_s=120)], shard=0)
        assert await queue.claim_due(conn, "live:email", runner="test", limit=1, lease_s=60) == []
        await apply(conn, payload(message))
        assert world.queued(message)["wait_s"] <= 0, "due at once"
        (row,) = await queue.claim_due(conn, "live:email", runner="test", limit=1, lease_s=60)
        result = await gate.pass_gate(conn, row.claim_id, [message], call_s=5, shard=0)
        assert (result.evidenced, result.passed) == (1, [])
        await queue.release_claims(conn, [row.claim_id])
        assert [finding.name for finding in await audit(conn) if finding.violations] == []
    assert world.state(message)[0] == state
    assert world.ask("SELECT provider_message_id FROM messages") == [said.SES_ID]
    assert world.ask("SELECT sum(used)::int, sum(reserved)::int FROM usage_records") == [(1, 0)]
    topics = [topic for topic, _, _ in told(world, endpoint)]
    assert topics == sorted({"email.sent", f"email.{state}"})


async def test_a_row_that_is_not_in_doubt_keeps_its_time(world: World) -> None:
    message = await accept(world, A)
    world.tell("UPDATE message_queue SET due_at = now() + interval '1 hour'")
    async with world.database() as database, database.connection() as conn:
        await apply(conn, said.opened(message))
    assert world.queued(message)["wait_s"] > 3500


@pytest.mark.parametrize(
    ("payload", "state"), [(lambda m: said.opened(m), "sent"), (lambda m: said.complaint(m, A), "complained")]
)
async def test_evidence_settles_an_ambiguous_message(world: World, payload: Any, state: str) -> None:
    message = await accept(world, A)
    endpoint = add_endpoint(world)
    world.tell("DELETE FROM message_queue")
    world.tell("UPDATE messages SET state = 'ambiguous', reason = 'call interrupted'")
    async with world.database() as database, database.connection() as conn:
        await apply(conn, payload(message))
        await apply(conn, payload(message))
        assert [finding.name for finding in await audit(conn) if finding.violations] == []
    assert world.state(message) == (state, None)
    assert world.ask("SELECT sum(used)::int, sum(reserved)::int FROM usage_records") == [(1, 0)]
    assert [topic for topic, _, _ in told(world, endpoint)].count("email.sent") == 1


@pytest.mark.parametrize("state", ["canceled", "complained"])
async def test_what_is_final_stays(world: World, state: str) -> None:
    message = await accept(world, A)
    mark_sent(world, message)
    world.tell("UPDATE messages SET state = %s", state)
    async with world.database() as database, database.connection() as conn:
        assert (await apply(conn, said.delivery(message, A))).events == 1
    assert world.state(message)[0] == state


async def test_what_failed_and_arrived_has_arrived(world: World) -> None:
    message = await accept(world, A)
    world.tell("DELETE FROM message_queue")
    world.tell("UPDATE messages SET state = 'failed', reason = 'attempts exhausted'")
    async with world.database() as database, database.connection() as conn:
        await apply(conn, said.delivery(message, A))
    assert world.state(message) == ("delivered", None)


@pytest.mark.parametrize("case", ["unknown id", "no id", "test env", "other channel"])
async def test_a_report_about_nothing_of_ours_changes_nothing(world: World, case: str) -> None:
    message = await accept(world, A, env="test" if case == "test env" else "live")
    number = {"unknown id": new_id(), "no id": None}.get(case, message)
    payload = said.text_event("DELIVERED", number) if case == "other channel" else said.ses("Bounce", number, {
        "bounceType": "Permanent", "bouncedRecipients": [{"emailAddress": A}]})  # fmt: skip
    async with world.database() as database, database.connection() as conn:
        assert (await apply(conn, payload)).outcome == "unknown"
    assert world.state(message)[0] == "scheduled"
    assert world.ask("SELECT count(*) FROM message_events") == [0]
    assert suppressions(world) == []


async def test_a_stranger_among_several_recipients_suppresses_nobody(world: World) -> None:
    message = await accept(world, A, B)
    mark_sent(world, message)
    async with world.database() as database, database.connection() as conn:
        await apply(conn, said.bounce(message, "forwarded@elsewhere.test", "B@RECIPIENT.test"))
    assert suppressions(world) == [("live", "email", B, "bounce")]
    assert world.ask("SELECT address FROM recipient_outcomes") == [B]
    assert set(world.ask("SELECT recipient FROM message_events WHERE kind = 'bounced'")) == {
        B, "forwarded@elsewhere.test",
    }  # fmt: skip


async def test_a_stronger_wish_replaces_a_weaker_one_and_no_wish_an_operators(world: World) -> None:
    message = await accept(world, A, B)
    mark_sent(world, message)
    async with world.database() as database, database.connection() as conn:
        await add_suppressions(
            conn, org_id=world.org_id, env="live", channel="email", addresses=[B], origin="manual", actor="test"
        )
        for report in (
            said.bounce(message, A, B),
            said.complaint(message, A, B),
            said.bounce(message, A, feedback="2"),
        ):
            await apply(conn, report)
    assert suppressions(world) == [("live", "email", A, "complaint"), ("live", "email", B, "manual")]
    logged = world.ask(
        "SELECT action, detail #>> '{addresses,0}', detail ->> 'origin' FROM audit_logs WHERE actor = 'provider'"
        " ORDER BY at, 2"
    )
    assert logged == [
        ("suppression.added", A, "bounce"),
        ("suppression.noted", B, "bounce"),
        ("suppression.added", A, "complaint"),
        ("suppression.noted", B, "complaint"),
    ]


async def test_a_wish_leaves_one_trace_under_an_operators_suppression(world: World) -> None:
    message = await accept(world, A)
    mark_sent(world, message)
    hostile = "[complaint: none] " + "x" * 900
    async with world.database() as database, database.connection() as conn:
        await add_suppressions(
            conn,
            org_id=world.org_id,
            env="live",
            channel="email",
            addresses=[A],
            origin="manual",
            actor="test",
            reason="asked by phone",
        )
        for feedback in ("1", "2"):
            await apply(conn, said.bounce(message, A, feedback=feedback, action="failed", diagnosticCode=hostile))
        for _ in range(2):
            await apply(conn, said.complaint(message, A))
            await unsubscribe(conn, message)
    [(origin, reason)] = world.ask("SELECT origin, reason FROM suppressions")
    assert origin == "manual"
    bounce = ("Permanent/General: (complaint: none) " + "x" * 900)[:200]
    assert reason == f"asked by phone [bounce: {bounce}] [complaint: abuse] [unsubscribe: unsubscribed by link]"
    assert world.ask("SELECT count(*) FROM audit_logs WHERE action = 'suppression.noted'") == [3]


@pytest.mark.parametrize(
    ("statuses", "state"),
    [
        (["SENT", "QUEUED"], "sent"),
        (["SUCCESSFUL", "DELIVERED"], "delivered"),
        (["DELIVERED", "CARRIER_BLOCKED", "SUCCESSFUL"], "bounced"),
        (["UNKNOWN"], "sent"),
    ],
)
async def test_sms_events(world: World, statuses: list[str], state: str) -> None:
    message = await accept(world, NUMBER, channel="sms")
    mark_sent(world, message)
    endpoint = add_endpoint(world)
    async with world.database() as database, database.connection() as conn:
        for status in statuses:
            assert (await apply(conn, said.text_event(status, message))).outcome == "applied"
    assert world.state(message)[0] == state
    topics = [topic for topic, _, _ in told(world, endpoint)]
    kinds = {"sent": [], "delivered": ["sms.delivered"], "bounced": ["sms.bounced", "sms.delivered"]}
    assert topics == (["sms.delayed"] if statuses == ["UNKNOWN"] else kinds[state])
    assert suppressions(world) == []


async def test_notifications_are_forgotten_after_two_days(world: World) -> None:
    message = await accept(world, A)
    world.tell("INSERT INTO sns_notifications SELECT 'old-' || n, 't', now() FROM generate_series(1, 30) AS n")
    async with world.database("47 hours") as database, database.connection() as conn:
        await apply(conn, said.opened(message, 1))
    assert world.ask("SELECT count(*) FROM sns_notifications WHERE message_id LIKE 'old-%'") == [30]
    async with world.database("49 hours") as database, database.connection() as conn:
        for second in (2, 3):
            await apply(conn, said.opened(message, second))
    assert world.ask("SELECT count(*) FROM sns_notifications WHERE message_id LIKE 'old-%'") == [0]
