"""What may be done to a message of either channel: reschedule, cancel, release, and its events."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from nightmail.store.audit_logs import insert_audit_log
from nightmail.store.credits import Insufficient
from nightmail.store.database import Connection
from nightmail.store.messages import (
    cancel_message,
    get_events,
    get_message,
    release_message,
    reschedule_message,
)
from nightmail.store.rating import QuotaExceeded
from nightmail.web.api.fields import EventItem, Release, Reschedule, read_schedule
from nightmail.web.limits import refused_by_rating
from nightmail.web.operation import Call
from nightmail.web.problems import Problem, not_found

Channel = Literal["email", "sms"]
NOUNS = {"email": "Email", "sms": "SMS"}


async def reschedule(call: Call[Reschedule], channel: Channel) -> datetime:
    """Move a message and return its new time. Raises Problem: 404, 409, 422; 402 and 429 in another month."""
    when = read_schedule(call.body.scheduled_at)
    assert when is not None, "the field is required"
    result = await call.services.database.run(
        lambda conn: reschedule_message(conn, **_named(call, channel), scheduled_at=when)
    )
    if isinstance(result, (QuotaExceeded, Insufficient)):
        raise refused_by_rating(result)
    _refuse(result, channel)
    return when


async def cancel(call: Call[None], channel: Channel) -> None:
    """Cancel a message; once more is harmless. Raises Problem: 404, 409."""
    result = await call.services.database.run(lambda conn: cancel_message(conn, **_named(call, channel)))
    _refuse(result, channel)


async def release(call: Call[Release], channel: Channel) -> None:
    """Decide an ambiguous message, and write down who did. Raises Problem: 404, 409."""

    async def step(conn: Connection) -> str:
        async with conn.transaction():
            result = await release_message(conn, **_named(call, channel), action=call.body.action)
            if result == "released":
                await insert_audit_log(
                    conn,
                    actor=call.actor,
                    action="message.released",
                    org_id=call.key.org_id,
                    target=str(call.ids["id"]),
                    detail={"action": call.body.action},
                )
            return result

    result = await call.services.database.run(step)
    if result == "not_found":
        raise not_found(NOUNS[channel])
    if result == "not_ambiguous":
        raise Problem(409, "not_ambiguous", f"Only an ambiguous {NOUNS[channel]} can be released.")


async def list_events(call: Call[None], channel: Channel) -> list[EventItem]:
    """Return a message's events, oldest first. Raises Problem (404)."""
    async with call.services.database.connection() as conn:
        # The events have no env of their own: the message must be one that this key may see.
        if await get_message(conn, **_named(call, channel)) is None:
            raise not_found(NOUNS[channel])
        events = await get_events(conn, org_id=call.key.org_id, message_id=call.ids["id"])
    return [
        EventItem(type=e.kind, recipient=e.recipient, created_at=e.occurred_at.astimezone(UTC), data=e.data)
        for e in events
    ]


def _named(call: Call[Any], channel: Channel) -> dict[str, Any]:
    return {
        "org_id": call.key.org_id,
        "env": call.key.env,
        "channel": channel,
        "message_id": call.ids["id"],
    }


def _refuse(result: str, channel: Channel) -> None:
    noun = NOUNS[channel]
    if result == "not_found":
        raise not_found(noun)
    if result == "already_sending":
        raise Problem(409, "already_sending", f"This {noun} is already sending.")
    if result == "finished":
        raise Problem(409, "already_finished", f"This {noun} is finished already: it can no longer be changed.")
