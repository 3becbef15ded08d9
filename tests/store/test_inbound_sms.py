"""SMS from people: told to whom they concern, obeyed, and answered once."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import pytest

from nightmail.ids import new_id
from nightmail.rules.sms_keywords import REPLIES, read_inbound_sms
from nightmail.store.inbound_sms import RELATED, Received, receive_sms
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
    assert (received.outcome, received.orgs, received.reply_id) == ("received", 1, None)
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


async def test_a_reply_is_an_ordinary_message_to_queue_and_usage(world: World) -> None:
    await write_to(world)
    world.tell("DELETE FROM usage_records")
    reply_id = (await receive(world, "HELP")).reply_id
    assert reply_id is not None
    assert world.ask("SELECT org_id, env, channel, state, units FROM messages WHERE id = %s", reply_id) == [
        (world.org_id, "live", "sms", "scheduled", 1)
    ]
    assert world.ask("SELECT lane FROM message_queue WHERE message_id = %s", reply_id) == ["live:sms"]
    assert world.ask("SELECT channel, env, rating, reserved, used FROM usage_records") == [
        ("sms", "live", "included", 1, 0)
    ]
    counts = await world.run(lanes=["live:sms"])
    assert counts["sent"] == 1
    assert world.state(reply_id)[0] == "sent"


async def test_start_lifts_a_stop_and_nothing_else(world: World) -> None:
    bounced_id, elsewhere_id = await world.add_org(), await world.add_org()
    for org_id, sender in ((None, NUMBER), (bounced_id, NUMBER), (elsewhere_id, OTHER)):
        await write_to(world, org_id=org_id, sender=sender)
    async with world.database() as database, database.connection() as conn:
        kept: list[tuple[UUID, Origin]] = [(bounced_id, "manual"), (elsewhere_id, "stop")]
        for org_id, origin in kept:
            await add_suppressions(
                conn, org_id=org_id, env="live", channel="sms", addresses=[PERSON], origin=origin, actor="test"
            )
    await receive(world, "STOP")
    assert len(suppressed(world)) == 3
    received = await receive(world, "Start")
    left = sorted([(bounced_id, "live", "sms", PERSON, "manual"), (elsewhere_id, "live", "sms", PERSON, "stop")])
    assert suppressed(world) == left
    assert received.reply_id is not None
    logged = world.ask("SELECT action, org_id FROM audit_logs WHERE actor = 'inbound:sms' ORDER BY at")
    assert logged == [("suppression.added", world.org_id), ("suppression.removed", world.org_id)]


async def test_a_yes_is_answered_only_after_a_stop(world: World) -> None:
    await write_to(world)
    assert (await receive(world, "Yes!")).reply_id is None
    await receive(world, "STOP")
    assert (await receive(world, "Yes!")).reply_id is not None
    assert suppressed(world) == []


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
        ("UPDATE messages SET env = 'test'", False),
        ("UPDATE messages SET purpose = 'keyword_reply'", False),
    ],
)
async def test_only_what_has_reached_the_person_counts(world: World, change: str, concerned: bool) -> None:
    await write_to(world)
    world.tell(change)
    assert (await receive(world, "hello")).orgs == int(concerned)


async def test_a_message_in_flight_may_have_reached_the_person(world: World) -> None:
    await world.accept(channel="sms", to=lambda _: [PERSON])
    assert (await receive(world, "STOP")).orgs == 0
    world.tell("UPDATE message_queue SET intent_at = now()")
    assert (await receive(world, "STOP", default_sender=NUMBER)).orgs == 1


async def test_the_look_up_of_orgs_uses_its_index(world: World) -> None:
    await world.accept(400, channel="sms", to=lambda number: [f"+1500555{number:04}"])
    world.tell("ANALYZE messages")
    async with world.database() as database, database.connection() as conn:
        plan = await (await conn.execute("EXPLAIN " + RELATED, {"sender": PERSON})).fetchall()
    assert "messages_sms_recipient" in str(plan)
