"""The gate and the record step: whose write counts, and that all of it counts once."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from nightmail.store import gate, queue, record
from nightmail.store.database import Connection
from nightmail.store.record import Outcome
from nightmail.store.suppressions import add_suppressions
from tests.crash.world import World

pytestmark = pytest.mark.anyio


async def begin(conn: Connection, count: int, *, lease_s: float = 60) -> list[gate.Passed]:
    """Claim and pass the gate."""
    rows = await queue.claim_due(conn, "live:email", runner="test", limit=count, lease_s=lease_s)
    if not rows:
        return []
    result = await gate.pass_gate(conn, rows[0].claim_id, [row.message_id for row in rows], call_s=5, shard=0)
    return result.passed


def sent(passed: gate.Passed, provider_id: str) -> Outcome:
    return Outcome(passed.message_id, passed.claim_id, "sent", passed.units, "ses", provider_id)


async def test_late_finisher_cannot_overwrite_a_reclaimed_message(world: World) -> None:
    (message,) = await world.accept()
    async with world.database() as database, world.database("2 minutes") as later:
        async with database.connection() as first, later.connection() as second:
            (mine,) = await begin(first, 1)
            assert await queue.rescue_expired(second, evidence_wait_s=0) == 1
            (theirs,) = await begin(second, 1)
            result = await record.record_outcomes(first, [sent(mine, "zombie")], shard=1)
            assert (result.written, result.lost) == ({}, [message])
            assert world.state(message)[0] == "scheduled"
            assert world.queued(message)["claim_id"] == theirs.claim_id
            assert world.ask("SELECT kind, provider_ref FROM message_events") == [("late_result", "zombie")]
            failed = Outcome(message, mine.claim_id, "failed", code="MessageRejected")
            again = Outcome(message, mine.claim_id, "in_doubt", wait_s=0)
            for outcome in (failed, again):
                assert (await record.record_outcomes(first, [outcome], shard=1)).lost == [message]
            assert world.queued(message)["claim_id"] == theirs.claim_id
            result = await record.record_outcomes(second, [sent(theirs, "holder")], shard=2)
            assert result.written == {message: "sent"}
    assert world.ask("SELECT state, provider_message_id FROM messages") == [("sent", "holder")]
    assert world.ask("SELECT sum(used)::int, sum(reserved)::int FROM usage_records") == [(1, 0)]


async def test_recording_the_same_outcome_twice_counts_once(world: World) -> None:
    await world.accept(3)
    async with world.database() as database, database.connection() as conn:
        outcomes = [sent(passed, f"id-{number}") for number, passed in enumerate(await begin(conn, 3))]
        first = await record.record_outcomes(conn, outcomes, shard=0)
        second = await record.record_outcomes(conn, outcomes, shard=0)
    assert (len(first.written), len(second.lost)) == (3, 3)
    assert world.ask("SELECT sum(used)::int, sum(reserved)::int FROM usage_records") == [(3, 0)]
    assert world.ask("SELECT count(*) FROM message_events WHERE kind = 'sent'") == [3]


@pytest.mark.parametrize("text", ["a\0b", "\ud800 lone", "x" * 5000, "snow \u2603"])
async def test_whatever_a_provider_says_cannot_break_the_set(world: World, text: str) -> None:
    await world.accept(4)
    async with world.database() as database, database.connection() as conn:
        one, two, three, four = await begin(conn, 4)
        result = await record.record_outcomes(
            conn,
            [
                Outcome(one.message_id, one.claim_id, "failed", code=text, detail=text),
                Outcome(
                    two.message_id,
                    two.claim_id,
                    "sent",
                    1,
                    "smtp",
                    text,
                    refused={f"{text}@x.test"[-300:]: text},
                ),
                sent(three, "fine"),
                Outcome(four.message_id, four.claim_id, "in_doubt", code=text, detail=text),
            ],
            shard=0,
        )
        assert len(result.written) == 4
        # As a late result the id becomes part of an index entry.
        late = Outcome(two.message_id, two.claim_id, "sent", 1, "smtp", text)
        again = await record.record_outcomes(conn, [late], shard=0)
    assert again.lost == [two.message_id]
    assert world.ask("SELECT count(*) FROM message_events WHERE kind = 'late_result'") == [1]


async def test_refused_recipients_are_kept_and_not_charged(world: World) -> None:
    recipients = [f"{name}@recipient.test" for name in ("a", "b", "c")]
    await world.accept(to=lambda _: recipients)
    async with world.database() as database, database.connection() as conn:
        (passed,) = await begin(conn, 1)
        outcome = Outcome(passed.message_id, passed.claim_id, "sent", 2, "smtp", "id", refused={recipients[1]: "550"})
        await record.record_outcomes(conn, [outcome], shard=0)
    assert world.ask("SELECT address, state, detail FROM recipient_outcomes") == [(recipients[1], "refused", "550")]
    account = world.account()
    assert (account.usage, account.reserved_left) == ((2, 2), 0)


async def test_a_provider_event_that_came_first_keeps_its_state(world: World) -> None:
    (message,) = await world.accept()
    async with world.database() as database, database.connection() as conn:
        (passed,) = await begin(conn, 1)
        world.tell("UPDATE messages SET state = 'delivered'")
        await record.record_outcomes(conn, [sent(passed, "id")], shard=0)
    assert world.state(message)[0] == "delivered"
    assert world.ask("SELECT kind FROM message_events") == ["sent"]


# ── the gate ──


async def test_the_gate_wants_a_lease_that_outlasts_the_call(world: World) -> None:
    await world.accept(2)
    async with world.database() as database, database.connection() as conn:
        rows = await queue.claim_due(conn, "live:email", runner="test", limit=2, lease_s=8)
        ids = [row.message_id for row in rows]
        refused = await gate.pass_gate(conn, rows[0].claim_id, ids, call_s=10, shard=0)
        assert (refused.lost, refused.passed) == (2, [])
        assert not world.intents()
        assert len((await gate.pass_gate(conn, rows[0].claim_id, ids, call_s=5, shard=0)).passed) == 2


async def test_the_gate_lets_nobody_else_pass(world: World) -> None:
    (message,) = await world.accept()
    async with world.database() as database, database.connection() as conn:
        (row,) = await queue.claim_due(conn, "live:email", runner="test", limit=1, lease_s=60)
        stranger = UUID(int=7)
        assert (await gate.pass_gate(conn, stranger, [message], call_s=5, shard=0)).lost == 1
        assert (await gate.pass_gate(conn, row.claim_id, [UUID(int=8)], call_s=5, shard=0)).lost == 1


@pytest.mark.parametrize(
    ("attempts", "intent", "policy", "decision"),
    [
        (4, False, None, "passed"),
        (5, False, None, "exhausted"),
        (5, True, None, "exhausted"),
        (4, True, None, "passed"),
        (1, True, "at_most_once", "ambiguous"),
        (5, True, "at_most_once", "ambiguous"),
        (1, False, "at_most_once", "passed"),
    ],
)
async def test_what_the_gate_decides(
    world: World, attempts: int, intent: bool, policy: str | None, decision: str
) -> None:
    (message,) = await world.accept(policy=policy)
    world.tell(
        "UPDATE message_queue SET attempts = %s, intent_at = CASE WHEN %s THEN now() - interval '1 hour' END",
        attempts,
        intent,
    )
    async with world.database() as database, database.connection() as conn:
        (row,) = await queue.claim_due(conn, "live:email", runner="test", limit=1, lease_s=60)
        result: Any = await gate.pass_gate(conn, row.claim_id, [message], call_s=5, shard=0)
    assert getattr(result, decision) == 1 if decision != "passed" else len(result.passed) == 1
    states = {"exhausted": ("failed", "attempts exhausted"), "ambiguous": ("ambiguous", "call interrupted")}
    assert world.state(message) == states.get(decision, ("scheduled", None))
    assert world.account().reserved_left == 0


async def test_a_suppression_added_after_the_claim_stops_the_call(world: World) -> None:
    recipients = ["here@recipient.test", "gone@recipient.test"]
    keep, drop = await world.accept(2, to=lambda number: [recipients[number]])
    async with world.database() as database, database.connection() as conn:
        rows = await queue.claim_due(conn, "live:email", runner="test", limit=2, lease_s=60)
        await add_suppressions(
            conn,
            org_id=world.org_id,
            env="live",
            channel="email",
            addresses=["gone@recipient.test"],
            origin="stop",
            actor="test",
        )
        result = await gate.pass_gate(conn, rows[0].claim_id, [keep, drop], call_s=5, shard=0)
    assert (len(result.passed), result.suppressed) == (1, 1)
    assert world.state(drop) == ("canceled", "suppressed")
    assert not world.queued(drop)
