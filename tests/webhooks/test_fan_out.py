"""Every fact about a message becomes deliveries in its own transaction, for those who asked and nobody else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

import psycopg
import pytest

from nightmail.rules.webhooks import NIGHTMAIL_TYPES
from nightmail.store import accept, record
from nightmail.store.database import Connection
from nightmail.store.fan_out import Fact, fan_out
from nightmail.store.messages import cancel_message, release_message
from nightmail.store.suppressions import add_suppressions
from nightmail.webhooks.bodies import format_time
from tests.crash.world import World
from tests.jobs.test_send_scheduled import AFTER_BACKOFF, add_evidence, to
from tests.webhooks.desk import Desk

pytestmark = pytest.mark.anyio

RESEND = ["email.sent", "email.scheduled", "email.failed", "email.suppressed"]
# What each fact adds to what a body tells of every message; a value that is a type stands for any of that type.
FACTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "later": [("scheduled", {}), ("canceled", {"reason": "requested"})],
    "plain": [("sent", {"provider": "ses"})],
    "partly": [("sent", {"provider": "ses", "suppressed": list})],
    "refused": [("failed", {"provider": "ses", "reason": "MessageRejected", "detail": str})],
    "exhausted": [("failed", {"reason": "attempts exhausted"})],
    "suppressed": [("suppressed", {"suppressed": list})],
    "careful": [("ambiguous", {"reason": "call interrupted"})],
    "found": [("ambiguous", {"reason": "call interrupted"}), ("sent", {"reason": "released by hand"})],
    "dropped": [("ambiguous", {"reason": "call interrupted"}), ("canceled", {"reason": "released by hand"})],
    "evidenced": [("sent", {"provider_message_id": "0100-evidence"})],
    "text": [("sent", {"provider": str})],
    "test": [("sent", {})],
    "test partly": [("sent", {"suppressed": list})],
    "test suppressed": [("suppressed", {"suppressed": list})],
}
MESSAGE = """
SELECT m.id::text AS id, m.channel, m.env, m.sender, m.subject, b.to_addresses, m.units, m.created_at, m.scheduled_at,
       m.provider_message_id, m.addresses
FROM messages AS m
JOIN message_bodies AS b ON b.message_id = m.id
WHERE m.id = %s
"""


async def suppress(world: World, *addresses: str, env: str = "live") -> None:
    async with world.database() as database, database.connection() as conn:
        await add_suppressions(
            conn, org_id=world.org_id, env=env, channel="email", addresses=addresses, origin="manual", actor="test"
        )


async def make_every_fact(world: World) -> dict[str, UUID]:
    """Bring about everything that becomes of messages, through the code that does it; return the messages."""
    made: dict[str, UUID] = {}

    async def add(name: str, recipients: Sequence[str], **fields: Any) -> None:
        (made[name],) = await world.accept(to=lambda _: list(recipients), **fields)

    two, other_two = [*to("ok", 1), *to("ok", 2)], [*to("ok", 3), *to("ok", 4)]
    gone, test_gone = to("ok", 5), to("ok", 6)
    await add("later", to("ok"), at=datetime.now(UTC) + timedelta(days=2))
    await add("plain", to("ok"))
    await add("partly", two)
    await add("refused", to("reject"))
    await add("exhausted", to("ok"))
    await add("suppressed", gone)
    for name in ("careful", "found", "dropped", "evidenced"):
        await add(name, to("reset-after"), policy="at_most_once")
    await add("text", ["+15550010000"], channel="sms")
    await add("test", to("ok"), env="test")
    await add("test partly", other_two, env="test")
    await add("test suppressed", test_gone, env="test")
    await suppress(world, two[1], *gone)
    await suppress(world, other_two[1], *test_gone, env="test")
    world.tell("UPDATE message_queue SET attempts = 5 WHERE message_id = %s", made["exhausted"])
    await world.run()
    add_evidence(world, made["evidenced"])
    await world.run(offset=AFTER_BACKOFF)
    where: dict[str, Any] = {"org_id": world.org_id, "env": "live", "channel": "email"}
    async with world.database() as database, database.connection() as conn:
        assert await cancel_message(conn, **where, message_id=made["later"]) == "done"
        assert await release_message(conn, **where, message_id=made["found"], action="mark_sent") == "released"
        assert await release_message(conn, **where, message_id=made["dropped"], action="cancel") == "released"
        # Asked again, it is no second fact.
        assert await cancel_message(conn, **where, message_id=made["later"]) == "done"
        assert await release_message(conn, **where, message_id=made["found"], action="cancel") == "not_ambiguous"
    return made


def matches(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return whether all fields are there and no other, each with its value or of its type."""
    return found.keys() == wanted.keys() and all(
        isinstance(found[name], value) if isinstance(value, type) else found[name] == value
        for name, value in wanted.items()
    )


def nightmail_data(message: Any, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `data` that an event of Nightmail's dialect must have."""
    data: dict[str, Any] = {
        "id": message.id,
        "channel": message.channel,
        "env": message.env,
        "from": message.sender,
        "to": message.to_addresses,
        "tags": {},
        "units": message.units,
        "created_at": format_time(message.created_at),
    }
    if message.channel == "email":
        data |= {"cc": [], "subject": "Night mail"}
    if message.scheduled_at is not None:
        data["scheduled_at"] = format_time(message.scheduled_at)
    if message.provider_message_id is not None:
        data["provider_message_id"] = message.provider_message_id
    return data | dict(extra)


def resend_data(message: Any, kind: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `data` of the same event as Resend writes it."""
    data: dict[str, Any] = {
        "email_id": message.id,
        "message_id": f"<{message.id}@sender.test>",
        "created_at": format_time(message.created_at),
        "from": message.sender,
        "to": message.to_addresses,
        "subject": "Night mail",
        "tags": {},
    }
    if kind == "failed":
        data["failed"] = {"reason": extra["reason"]}
    if kind == "suppressed":
        data["suppressed"] = {
            "message": "Every recipient is on the suppression list.",
            "type": "OnSuppressionList",
        }
    return data


async def test_every_fact_is_told_in_both_dialects_and_to_nobody_else(desk: Desk, world: World) -> None:
    """Field by field, from accept to the receiver; once each."""
    desk.org_id = world.org_id
    stranger = await world.add_org()
    listeners = {
        (env, dialect): desk.add_endpoint(f"/ok/{env}/{dialect}", env=env, types=types)
        for env in ("live", "test")
        for dialect, types in {"nightmail": tuple(NIGHTMAIL_TYPES), "resend": RESEND}.items()
    }
    deaf = [
        desk.add_endpoint("/ok/deaf/org", org_id=stranger),
        desk.add_endpoint("/ok/deaf/test", org_id=stranger, env="test"),
        desk.add_endpoint("/ok/deaf/types", types=["domain.verified", "message.bounced"]),
        desk.add_endpoint("/ok/deaf/disabled", status="disabled"),
    ]
    made = await make_every_fact(world)
    await desk.deliver()
    assert desk.states() == {"delivered": len(desk.ask("SELECT 1 FROM webhook_deliveries"))}
    assert desk.ask("SELECT count(*) FROM webhook_deliveries WHERE endpoint_id = ANY (%s)", deaf) == [0]

    told: dict[tuple[str, str], list[dict[str, Any]]] = {
        listener: [request.json() for request in desk.receiver.received("/ok/" + "/".join(listener))]
        for listener in listeners
    }
    names = {str(message): name for name, message in made.items()}
    for (env, dialect), bodies in told.items():
        wanted = [
            (name, kind)
            for name, facts in FACTS.items()
            for kind, _ in facts
            if (env == "test") == name.startswith("test")
            and (dialect == "nightmail" or (f"email.{kind}" in RESEND and name != "text"))
        ]
        key, prefix = ("id", "message.") if dialect == "nightmail" else ("email_id", "email.")
        assert Counter((names[body["data"][key]], body["type"].removeprefix(prefix)) for body in bodies) == Counter(
            wanted
        )
        with psycopg.connect(desk.database_url, row_factory=psycopg.rows.namedtuple_row) as conn:
            for body in bodies:
                check_body(conn, names[body["data"][key]], body, dialect)
    # One event, one id, whoever is told: and no two events share one.
    rows = desk.ask(
        "SELECT event_id, count(DISTINCT (topic, message_id)), array_agg(endpoint_id)"
        " FROM webhook_deliveries GROUP BY 1"
    )
    assert all(events == 1 and len(endpoints) == len(set(endpoints)) for _, events, endpoints in rows)
    assert len(rows) == sum(map(len, FACTS.values()))
    for listener in listeners.values():
        numbers = desk.numbers(listener)
        assert numbers == list(range(1, len(numbers) + 1))


def check_body(conn: psycopg.Connection[Any], name: str, body: dict[str, Any], dialect: str) -> None:
    """Compare one body with the message's row and what its fact adds."""
    message: Any = conn.execute(MESSAGE, [body["data"].get("id") or body["data"]["email_id"]]).fetchone()
    kind = body["type"].partition(".")[2]
    extra = dict(FACTS[name])[kind]
    moment = body.pop("timestamp" if dialect == "nightmail" else "created_at")
    assert abs((datetime.fromisoformat(moment) - message.created_at).total_seconds()) < 3600
    assert body.keys() == {"type", "data"}
    wanted = nightmail_data(message, extra) if dialect == "nightmail" else resend_data(message, kind, extra)
    assert matches(body["data"], wanted), (name, kind, body["data"], wanted)
    if name == "suppressed" and dialect == "nightmail":
        assert body["data"]["suppressed"] == message.addresses


class Refused(Exception):
    """The transaction is given up."""


@pytest.mark.parametrize("scheduled", [False, True])
async def test_what_is_rolled_back_was_never_told(
    desk: Desk, world: World, monkeypatch: pytest.MonkeyPatch, scheduled: bool
) -> None:
    """The deliveries go with the transaction that inserted them, the fact with its deliveries."""
    desk.org_id = world.org_id
    endpoint = desk.add_endpoint()

    async def told_and_given_up(conn: Connection, facts: Sequence[Fact]) -> int:
        assert await fan_out(conn, facts) == len(facts) == 3
        raise Refused

    with monkeypatch.context() as patched:
        patched.setattr(accept if scheduled else record, "fan_out", told_and_given_up)
        if scheduled:
            with pytest.raises(Refused):
                await world.accept(3, at=datetime.now(UTC) + timedelta(hours=1))
            assert desk.ask("SELECT count(*) FROM messages") == [0]
        else:
            await world.accept(3)
            with pytest.raises(Refused):
                await world.run(send_concurrency=3)
            assert desk.ask("SELECT count(*) FROM messages WHERE state = 'sent'") == [0]
    assert desk.states() == {}
    if not scheduled:
        await world.run(offset="10 minutes")
        assert desk.states(endpoint) == {"pending": 3}
        assert desk.ask("SELECT count(*) FROM messages WHERE state = 'sent'") == [3]


# Invariant 2 of DESIGN section 3: what is missing or too much, for the endpoints and messages named.
BROKEN = """
WITH listener AS (
    SELECT e.id, e.env
    FROM webhook_endpoints AS e
    WHERE e.id = ANY (%(endpoints)s)
), fact AS (
    SELECT m.id, m.env, e.kind, m.state = 'sent' AS is_sent
    FROM messages AS m
    LEFT JOIN message_events AS e ON e.message_id = m.id AND e.kind = 'sent'
    WHERE m.id = ANY (%(messages)s)
)
SELECT f.id, f.is_sent, f.kind, count(d.event_id)
FROM fact AS f
JOIN listener AS l ON l.env = f.env
LEFT JOIN webhook_deliveries AS d ON d.endpoint_id = l.id AND d.message_id = f.id AND d.topic = 'email.sent'
GROUP BY f.id, l.id, f.is_sent, f.kind
HAVING NOT (
    (f.is_sent AND f.kind IS NOT NULL AND count(d.event_id) = 1)
    OR (NOT f.is_sent AND f.kind IS NULL AND count(d.event_id) = 0)
)
"""


def broken(desk: Desk, endpoints: Sequence[UUID], messages: Sequence[UUID]) -> list[Any]:
    with psycopg.connect(desk.database_url) as conn:
        return conn.execute(BROKEN, {"endpoints": list(endpoints), "messages": list(messages)}).fetchall()


async def test_sent_one_event_and_one_delivery_each_are_the_same(desk: Desk, world: World) -> None:
    """After hundreds of messages with every failure, and for exactly the endpoints that listened at that moment."""
    desk.org_id = world.org_id
    kinds = ["ok", "ok", "ok", "reject", "tempfail-once", "reset-after", "fail5xx-after-accept-once"]

    async def work(env: str) -> list[UUID]:
        messages = await world.accept(
            120, to=lambda number: to(kinds[number % len(kinds)], number), env=env, policy="at_most_once"
        )
        for offset in ("", "1 minute", "10 minutes"):
            await world.run(offset=offset)
        return messages

    always = [desk.add_endpoint(env=env) for env in ("live", "test")] + [
        desk.add_endpoint(types=["email.sent"], env=env) for env in ("live", "test")
    ]
    leaves = desk.add_endpoint()
    first = [*await work("live"), *await work("test")]
    desk.execute("UPDATE webhook_endpoints SET status = 'disabled', disabled_reason = 'x' WHERE id = %s", [leaves])
    comes = desk.add_endpoint(status="paused")
    second = await work("live")

    states = Counter(world.ask("SELECT state FROM messages WHERE env = 'live'"))
    assert states["sent"] >= 100
    assert states["failed"] >= 30
    assert states["ambiguous"] >= 30
    assert not broken(desk, always, [*first, *second])
    assert not broken(desk, [leaves], first)
    assert not broken(desk, [comes], second)
    told = partial(desk.ask, "SELECT count(*) FROM webhook_deliveries WHERE endpoint_id = %s AND message_id = ANY (%s)")
    assert (told(leaves, second), told(comes, first)) == ([0], [0])
    # The same of every other end: one event, one delivery.
    for listener in always[:2]:
        assert not desk.ask(
            "SELECT e.message_id, e.kind FROM message_events AS e JOIN messages AS m ON m.id = e.message_id"
            " JOIN webhook_endpoints AS w ON w.env = m.env AND w.id = %s"
            " LEFT JOIN webhook_deliveries AS d"
            "   ON d.endpoint_id = w.id AND d.message_id = m.id AND d.topic = 'email.' || e.kind"
            " WHERE e.provider_ref = '' GROUP BY 1, 2 HAVING count(d.event_id) <> 1",
            listener,
        )
    # Nothing is broken by mistake of this test: what is taken away is missed.
    desk.execute(
        "DELETE FROM webhook_deliveries WHERE (endpoint_id, event_id) IN ("
        "SELECT endpoint_id, event_id FROM webhook_deliveries WHERE topic = 'email.sent' AND endpoint_id = %s LIMIT 1)",
        [always[0]],
    )
    assert len(broken(desk, always, [*first, *second])) == 1
