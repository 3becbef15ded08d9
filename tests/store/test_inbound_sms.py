"""SMS from people: told to whom they concern, obeyed, and answered once."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import pytest

from nightmail.ids import new_id
from nightmail.rules.sms_keywords import REPLIES, read_inbound_sms
from nightmail.store.inbound_sms import NEWEST_OF_ORG, RELATED, Received, receive_sms
from nightmail.store.suppressions import Origin, add_suppressions
from tests.crash.world import World
from tests.provider_reports import inbound
from tests.store.inbound_world import TOPIC, add_endpoint, findings, mark_sent, told

pytestmark = pytest.mark.anyio

PERSON, NUMBER, OTHER = "+15005550006", "+15005550001", "+15005550002"


async def receive(
    world: World, body: str, *, offset: str = "", inbound_id: str | None = None, **options: Any
) -> Received:
    """Receive an SMS as the endpoint does."""
    arguments = {"notification_id": str(new_id()), "topic_arn": TOPIC, "default_sender": None, "with_replies": True}
    sms = read_inbound_sms(
        inbound(body, inbound_id=inbound_id or str(new_id()), sender=options.pop("sender", PERSON), to=NUMBER)
    )
    async with world.database(offset) as database:
        return await database.run(lambda conn: receive_sms(conn, sms, **{**arguments, **options}))


async def write_to(world: World, *, org_id: UUID | None = None, sender: str = NUMBER, person: str = PERSON) -> UUID:
    """Let an org have sent an SMS to the person."""
    (message,) = await world.accept(channel="sms", to=lambda _: [person], org_id=org_id)
    mark_sent(world, message, sender=sender)
    return message


async def suppress(world: World, origin: Origin, *, org_id: UUID | None = None, reason: str | None = None) -> None:
    """Suppress the person for an org."""
    async with world.database() as database, database.connection() as conn:
        await add_suppressions(
            conn,
            org_id=org_id or world.org_id,
            env="live",
            channel="sms",
            addresses=[PERSON],
            origin=origin,
            actor="test",
            reason=reason,
        )


def suppressed(world: World) -> list[Any]:
    return world.ask("SELECT org_id, env, channel, address, origin FROM suppressions ORDER BY org_id")


def replies(world: World) -> list[Any]:
    return world.ask(
        "SELECT b.text, m.sender, m.addresses[1] FROM messages AS m JOIN message_bodies AS b ON b.message_id = m.id"
        " WHERE m.purpose = 'keyword_reply' ORDER BY m.id"
    )


async def test_an_sms_is_told_to_the_org_that_wrote_from_that_number(world: World) -> None:
    theirs_id = await world.add_org()
    await write_to(world)
    await write_to(world, org_id=theirs_id, sender=OTHER)
    mine, theirs, test = add_endpoint(world), add_endpoint(world, theirs_id), add_endpoint(world, env="test")
    received = await receive(world, "hello", inbound_id="i-1")
    assert (received.outcome, received.org_id, received.reply_id) == ("received", world.org_id, None)
    assert told(world, mine) == [
        (
            "inbound.sms",
            "",
            {"from": PERSON, "to": NUMBER, "body": "hello", "keyword": "KEYWORD_123456789012", "inbound_id": "i-1"},
        )
    ]
    assert told(world, theirs) == told(world, test) == []
    assert world.ask("SELECT id, from_number, to_number, body, action, org_ids FROM inbound_sms") == [
        ("i-1", PERSON, NUMBER, "hello", None, [world.org_id])
    ]
    assert (await receive(world, "hello", inbound_id="i-1")).outcome == "repeated"
    assert len(told(world, mine)) == 1


async def test_stop_suppresses_for_every_org_that_may_have_written_from_there(world: World) -> None:
    pool_id, elsewhere_id = await world.add_org(), await world.add_org()
    await write_to(world)
    latest = await write_to(world)
    pooled = await write_to(world, org_id=pool_id, sender="pool-1")
    await write_to(world, org_id=elsewhere_id, sender=OTHER)
    mine, theirs = add_endpoint(world), add_endpoint(world, pool_id)
    received = await receive(world, " stop. ")
    expected = sorted([(org_id, "live", "sms", PERSON, "stop") for org_id in (world.org_id, pool_id)])
    assert suppressed(world) == expected
    assert [topic for topic, _, _ in told(world, mine)] == ["inbound.sms", "sms.unsubscribed"]
    assert [topic for topic, _, _ in told(world, theirs)] == ["sms.unsubscribed"], "its text is not theirs to read"
    events = world.ask("SELECT message_id, recipient FROM message_events WHERE kind = 'unsubscribed'")
    assert sorted(events) == sorted([(latest, PERSON), (pooled, PERSON)])
    assert replies(world) == [(REPLIES["stop"], NUMBER, PERSON)]
    assert world.ask("SELECT reply_message_id FROM inbound_sms") == [received.reply_id]
    async with world.database() as database, database.connection() as conn:
        assert await findings(conn) == []


async def test_a_reply_is_an_ordinary_message_to_queue_and_usage_and_no_quota_keeps_it(world: World) -> None:
    await write_to(world)
    world.tell("DELETE FROM usage_records")
    world.tell("DELETE FROM usage_quotas")
    world.tell("UPDATE orgs SET plan = 'free', billing = 'quota'")
    world.tell("INSERT INTO usage_quotas SELECT id, 'sms', to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM'), 100 FROM orgs")
    reply_id = (await receive(world, "HELP")).reply_id
    assert reply_id is not None
    assert world.ask("SELECT org_id, env, channel, state, units FROM messages WHERE id = %s", reply_id) == [
        (world.org_id, "live", "sms", "scheduled", 1)
    ]
    assert world.ask("SELECT lane FROM message_queue WHERE message_id = %s", reply_id) == ["live:sms"]
    assert world.ask("SELECT channel, env, rating, reserved, used FROM usage_records") == [
        ("sms", "live", "included", 1, 0)
    ]
    assert world.ask("SELECT taken::int FROM usage_quotas") == [101]
    counts = await world.run(lanes=["live:sms"])
    assert counts["sent"] == 1
    assert world.state(reply_id)[0] == "sent"


async def test_start_lifts_a_stop_and_nothing_else(world: World) -> None:
    bounced_id, elsewhere_id = await world.add_org(), await world.add_org()
    for org_id, sender in ((None, NUMBER), (bounced_id, NUMBER), (elsewhere_id, OTHER)):
        await write_to(world, org_id=org_id, sender=sender)
    await suppress(world, "manual", org_id=bounced_id)
    await suppress(world, "stop", org_id=elsewhere_id)
    await write_to(world)
    await receive(world, "STOP")
    assert len(suppressed(world)) == 3
    received = await receive(world, "Start")
    left = sorted([(bounced_id, "live", "sms", PERSON, "manual"), (elsewhere_id, "live", "sms", PERSON, "stop")])
    assert suppressed(world) == left
    assert received.reply_id is not None
    logged = world.ask("SELECT action, org_id FROM audit_logs WHERE actor = 'inbound:sms' ORDER BY at")
    assert sorted(logged) == sorted(
        [
            ("suppression.added", world.org_id),
            ("suppression.noted", bounced_id),
            ("suppression.removed", world.org_id),
            ("suppression.noted", bounced_id),
        ]
    )


async def test_a_yes_is_answered_only_after_a_stop(world: World) -> None:
    await write_to(world)
    assert (await receive(world, "Yes!")).reply_id is None
    await receive(world, "STOP")
    assert (await receive(world, "Yes!")).reply_id is not None
    assert suppressed(world) == []


async def test_a_yes_to_one_org_is_no_start_to_another(world: World) -> None:
    elsewhere_id = await world.add_org()
    await write_to(world)
    await write_to(world, org_id=elsewhere_id, sender=OTHER)
    await suppress(world, "stop", org_id=elsewhere_id)
    assert (await receive(world, "Yes")).reply_id is None
    assert suppressed(world) == [(elsewhere_id, "live", "sms", PERSON, "stop")]


async def test_only_the_last_that_wrote_from_the_number_hears_the_answer(world: World) -> None:
    later_id, pool_id = await world.add_org(), await world.add_org()
    await write_to(world)
    await write_to(world, org_id=later_id)
    mine, theirs, pooled = add_endpoint(world), add_endpoint(world, later_id), add_endpoint(world, pool_id)
    await write_to(world, org_id=pool_id, sender="pool-1")
    assert (await receive(world, "my code is 1234", inbound_id="i-1")).org_id == later_id
    assert [len(told(world, endpoint)) for endpoint in (mine, theirs, pooled)] == [0, 1, 0]
    await write_to(world)
    assert (await receive(world, "my code is 5678", inbound_id="i-2")).org_id == world.org_id
    assert [len(told(world, endpoint)) for endpoint in (mine, theirs, pooled)] == [1, 1, 0]
    assert world.ask("SELECT org_ids FROM inbound_sms ORDER BY id") == [[later_id], [world.org_id]]
    await receive(world, "STOP")
    assert {row[0] for row in suppressed(world)} == {world.org_id, later_id, pool_id}


async def test_an_operators_suppression_notes_a_stop_and_gets_no_answer(world: World) -> None:
    await write_to(world)
    await suppress(world, "manual", reason="asked by phone")
    for body in ("STOP", "quit", "HELP"):
        assert (await receive(world, body)).reply_id is None
    assert replies(world) == []
    reasons = "SELECT origin || ': ' || reason FROM suppressions"
    assert world.ask(reasons) == ["manual: asked by phone [stop: wrote STOP]"]
    assert (await receive(world, "START")).reply_id is None
    assert world.ask(reasons) == ["manual: asked by phone"]
    logged = world.ask("SELECT action, detail ->> 'origin' FROM audit_logs WHERE actor = 'inbound:sms' ORDER BY at")
    assert logged == [("suppression.noted", "stop"), ("suppression.noted", "start")]


async def test_one_reply_an_hour_for_each_keyword(world: World) -> None:
    await write_to(world)
    for body in ("STOP", "Quit", "HELP", "info", "stop"):
        await receive(world, body)
    assert [text for text, _, _ in replies(world)] == [REPLIES["stop"], REPLIES["help"]]
    assert (await receive(world, "STOP", offset="59 minutes")).reply_id is None
    assert (await receive(world, "STOP", offset="61 minutes")).reply_id is not None


async def test_keywords_at_the_same_time_get_one_reply(world: World) -> None:
    await write_to(world)
    await asyncio.gather(*(receive(world, "STOP", inbound_id=f"i-{number % 3}") for number in range(6)))
    assert len(replies(world)) == 1
    assert world.ask("SELECT count(*) FROM inbound_sms") == [3]
    assert len(suppressed(world)) == 1


@pytest.mark.parametrize("case", ["off", "no org", "our own number", "the default sender"])
async def test_when_there_is_no_reply(world: World, case: str) -> None:
    person = {"our own number": NUMBER, "the default sender": OTHER}.get(case, PERSON)
    if case != "no org":
        await write_to(world, person=person)
    default = OTHER if case == "the default sender" else None
    received = await receive(world, "STOP", with_replies=case != "off", sender=person, default_sender=default)
    assert received.reply_id is None
    assert replies(world) == []
    assert len(suppressed(world)) == (0 if case == "no org" else 1)
    assert world.ask("SELECT count(*) FROM inbound_sms") == [1]


@pytest.mark.parametrize(
    ("change", "concerned"),
    [
        ("UPDATE messages SET state = 'scheduled'", False),
        ("UPDATE messages SET state = 'canceled'", False),
        ("UPDATE messages SET state = 'ambiguous'", True),
        ("UPDATE messages SET state = 'failed', reason = 'invalid_number'", False),
        ("UPDATE messages SET state = 'failed', reason = 'attempts exhausted'", True),
        ("UPDATE messages SET env = 'test'", False),
        ("UPDATE messages SET purpose = 'keyword_reply'", False),
    ],
)
async def test_only_what_has_reached_the_person_counts(world: World, change: str, concerned: bool) -> None:
    await write_to(world)
    world.tell(change)
    assert (await receive(world, "hello")).org_id == (world.org_id if concerned else None)


@pytest.mark.parametrize("doubt", ["intent_at = now()", "takeovers = 1, attempts = 1"])
async def test_a_message_in_flight_may_have_reached_the_person(world: World, doubt: str) -> None:
    await world.accept(channel="sms", to=lambda _: [PERSON])
    assert (await receive(world, "STOP")).org_id is None
    world.tell(f"UPDATE message_queue SET {doubt}")
    assert (await receive(world, "STOP", default_sender=NUMBER)).org_id == world.org_id
    assert suppressed(world) == [(world.org_id, "live", "sms", PERSON, "stop")]


async def test_the_look_up_of_orgs_reads_few_rows_of_its_index(world: World) -> None:
    other_id = await world.add_org()
    await write_to(world)
    old = await write_to(world, org_id=other_id)
    for org_id in (world.org_id, other_id):
        newer = await world.accept(NEWEST_OF_ORG + 50, channel="sms", to=lambda _: [PERSON], org_id=org_id)
        mark_sent(world, newer[-1], sender=OTHER)
    world.tell("UPDATE messages SET state = 'sent', sender = 'pool-1' WHERE sender = ''")
    await world.accept(400, channel="sms", to=lambda number: [f"+1500556{number:04}"])
    world.tell("ANALYZE messages")
    async with world.database() as database, database.connection() as conn:
        arguments = {"sender": PERSON, "newest": NEWEST_OF_ORG}
        found = await (await conn.execute(RELATED, arguments)).fetchall()
        cursor = await conn.execute("EXPLAIN (ANALYZE, COSTS off, TIMING off) " + RELATED, arguments)
        plan = "\n".join(line for (line,) in await cursor.fetchall())
    assert {(org_id, sender) for org_id, sender, _ in found} == {
        (org_id, sender) for org_id in (world.org_id, other_id) for sender in ("pool-1", OTHER)
    }
    assert old not in {message_id for _, _, message_id in found}
    assert [row[2] for row in found] == sorted((row[2] for row in found), reverse=True)
    scans = [line for line in plan.splitlines() if " on messages " in line]
    assert scans, plan
    assert all("messages_sms_recipient" in line for line in scans), plan
    assert f"rows={NEWEST_OF_ORG}.00 loops=2" in next(line for line in scans if " n " in f"{line} "), plan
