"""messages: read them, list them, take them back from the queue.

What a caller sees as `sending` is a queue row with an intent. Cancel and reschedule work until then: they lock the
queue row first, as every writer does, and so wait for a gate that is being passed and lose against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import psycopg

from nightmail.store.database import Connection
from nightmail.store.fan_out import Fact, fan_out
from nightmail.store.rating import Ended, Rated, Refusal, read_rated, rerate_message, settle_messages

TakeBack = Literal["done", "not_found", "already_sending", "finished"]


@dataclass(frozen=True, slots=True)
class MessageView:
    """A message as its owner sees it; lists leave `html` and `text` out (None)."""

    id: UUID
    org_id: UUID
    env: str
    channel: str
    state: str
    reason: str | None
    sender: str
    subject: str | None
    to: list[str]
    cc: list[str]
    bcc: list[str]
    reply_to: list[str]
    html: str | None
    text: str | None
    tags: list[dict[str, str]]
    units: int
    rating: str
    period: str
    created_at: datetime
    scheduled_at: datetime | None
    sent_at: datetime | None
    provider_message_id: str | None
    last_error: str | None

    @property
    def last_event(self) -> str:
        """Return Resend's word for where the message stands."""
        if self.state == "canceled" and self.reason == "suppressed":
            return "suppressed"
        if self.state in ("scheduled", "sending", "ambiguous"):
            return "scheduled" if self.state == "scheduled" and self.scheduled_at is not None else "queued"
        return self.state


GET = """
SELECT m.id, m.org_id, m.env, m.channel,
       CASE WHEN q.intent_at IS NOT NULL THEN 'sending' ELSE m.state END,
       m.reason, m.sender, m.subject, b.to_addresses, b.cc_addresses, b.bcc_addresses, b.reply_to,
       b.html, b.text, b.tags, m.units, m.rating, m.period,
       m.created_at, m.scheduled_at, m.sent_at, m.provider_message_id, m.last_error
FROM messages AS m
JOIN message_bodies AS b ON b.message_id = m.id
LEFT JOIN message_queue AS q ON q.message_id = m.id
WHERE m.id = %(message_id)s
  AND m.org_id = %(org_id)s
  AND m.env = %(env)s
  AND m.channel = %(channel)s
"""


async def get_message(
    conn: Connection, *, org_id: UUID, env: str, channel: str, message_id: UUID
) -> MessageView | None:
    """Return the org's message, None when it has no such message in this env and channel."""
    cursor = await conn.execute(GET, {"message_id": message_id, "org_id": org_id, "env": env, "channel": channel})
    row = await cursor.fetchone()
    return MessageView(*row) if row else None


LIST = """
SELECT m.id, m.org_id, m.env, m.channel,
       CASE WHEN q.intent_at IS NOT NULL THEN 'sending' ELSE m.state END,
       m.reason, m.sender, m.subject, b.to_addresses, b.cc_addresses, b.bcc_addresses, b.reply_to,
       NULL, NULL, b.tags, m.units, m.rating, m.period,
       m.created_at, m.scheduled_at, m.sent_at, m.provider_message_id, m.last_error
FROM (
    SELECT *
    FROM messages
    WHERE org_id = %(org_id)s
      AND env = %(env)s
      AND channel = %(channel)s
      AND (%(after)s::uuid IS NULL OR id < %(after)s)
    ORDER BY id DESC
    LIMIT %(limit)s
) AS m
JOIN message_bodies AS b ON b.message_id = m.id
LEFT JOIN message_queue AS q ON q.message_id = m.id
ORDER BY m.id DESC
"""

# The page just before a message: read upwards, shown newest first.
LIST_BEFORE = LIST.replace("%(after)s::uuid IS NULL OR id < %(after)s", "id > %(before)s").replace(
    "ORDER BY id DESC", "ORDER BY id"
)


async def list_messages(
    conn: Connection,
    *,
    org_id: UUID,
    env: str,
    channel: str,
    limit: int,
    after: UUID | None = None,
    before: UUID | None = None,
) -> tuple[list[MessageView], bool]:
    """Return up to `limit` messages, newest first, and whether there are more in the direction asked.

    `after` continues with older ones, `before` with newer ones; at most one of them is given.
    """
    arguments: dict[str, Any] = {"org_id": org_id, "env": env, "channel": channel, "limit": limit + 1}
    if before is not None:
        cursor = await conn.execute(LIST_BEFORE, {**arguments, "before": before})
        views = [MessageView(*row) for row in await cursor.fetchall()]
        return (views[1:], True) if len(views) > limit else (views, False)
    cursor = await conn.execute(LIST, {**arguments, "after": after})
    views = [MessageView(*row) for row in await cursor.fetchall()]
    return views[:limit], len(views) > limit


@dataclass(frozen=True, slots=True)
class EventView:
    """A fact in a message's life; `recipient` is '' when it concerns the whole message."""

    kind: str
    recipient: str
    occurred_at: datetime
    data: dict[str, Any]


EVENTS = """
SELECT kind, recipient, occurred_at, data
FROM message_events
WHERE message_id = %(message_id)s
  AND org_id = %(org_id)s
ORDER BY occurred_at, recorded_at
LIMIT 1000
"""


async def get_events(conn: Connection, *, org_id: UUID, message_id: UUID) -> list[EventView]:
    """Return the message's facts, oldest first."""
    cursor = await conn.execute(EVENTS, {"message_id": message_id, "org_id": org_id})
    return [EventView(*row) for row in await cursor.fetchall()]


@dataclass(frozen=True, slots=True)
class AttachmentView:
    """An attachment without its content; `size` in bytes."""

    position: int
    filename: str
    content_type: str
    content_id: str | None
    size: int


ATTACHMENTS = """
SELECT a.position, a.filename, a.content_type, a.content_id, length(a.content)
FROM message_attachments AS a
JOIN messages AS m ON m.id = a.message_id
WHERE a.message_id = %(message_id)s
  AND m.org_id = %(org_id)s
  AND m.env = %(env)s
ORDER BY a.position
"""


async def list_attachments(conn: Connection, *, org_id: UUID, env: str, message_id: UUID) -> list[AttachmentView]:
    """Return the message's attachments in the order they were given."""
    cursor = await conn.execute(ATTACHMENTS, {"message_id": message_id, "org_id": org_id, "env": env})
    return [AttachmentView(*row) for row in await cursor.fetchall()]


ATTACHMENT_CONTENT = """
SELECT a.content
FROM message_attachments AS a
JOIN messages AS m ON m.id = a.message_id
WHERE a.message_id = %(message_id)s
  AND a.position = %(position)s
  AND m.org_id = %(org_id)s
  AND m.env = %(env)s
"""


async def get_attachment(conn: Connection, *, org_id: UUID, env: str, message_id: UUID, position: int) -> bytes | None:
    """Return an attachment's bytes, None when there is none at this position."""
    cursor = await conn.execute(
        ATTACHMENT_CONTENT, {"message_id": message_id, "position": position, "org_id": org_id, "env": env}
    )
    row = await cursor.fetchone()
    return bytes(row[0]) if row else None


# Queue row first, message second and in a statement of its own: it must see what the lock waited for.
LOCK = """
SELECT intent_at IS NOT NULL
FROM message_queue
WHERE message_id = %(message_id)s
  AND org_id = %(org_id)s
FOR UPDATE
"""

TAKE = """
DELETE FROM message_queue
WHERE message_id = %(message_id)s
  AND intent_at IS NULL
"""

# A call before the last one may have ended in doubt: what the provider is known to have taken is sent, and paid for, as
# soon as the gate looks (the same evidence as there).
IS_TAKEN = """
SELECT EXISTS (
    SELECT
    FROM message_queue AS q
    JOIN message_events AS e ON e.message_id = q.message_id
    WHERE q.message_id = %(message_id)s
      AND q.takeovers > 0
      AND e.provider_ref <> ''
      AND e.kind IN (
          'accepted', 'delivered', 'delayed', 'bounced', 'complained', 'failed', 'opened', 'clicked', 'late_result'
      )
)
"""


async def _is_taken(conn: Connection, message_id: UUID) -> bool:
    """Return whether the provider has a message whose queue row is locked."""
    row = await (await conn.execute(IS_TAKEN, {"message_id": message_id})).fetchone()
    return bool(row and row[0])


CANCEL = """
WITH canceled AS (
    UPDATE messages
    SET state = 'canceled',
        reason = 'requested'
    WHERE id = %(message_id)s
    RETURNING id, org_id
)
INSERT INTO message_events (message_id, org_id, kind, occurred_at)
SELECT id, org_id, 'canceled', nm_now()
FROM canceled
ON CONFLICT DO NOTHING
"""


async def cancel_message(conn: Connection, *, org_id: UUID, env: str, channel: str, message_id: UUID) -> TakeBack:
    """Cancel a message whose call has not begun and give its units and credits back; twice is `done` twice."""
    arguments: dict[str, Any] = {"message_id": message_id, "org_id": org_id, "env": env, "channel": channel}
    async with conn.transaction():
        await conn.execute(LOCK, arguments)
        found = await get_message(conn, **arguments)
        if found is None or found.state != "scheduled":
            return _why_not(found)
        if await _is_taken(conn, message_id) or (await conn.execute(TAKE, arguments)).rowcount == 0:
            return "already_sending"
        is_fact = (await conn.execute(CANCEL, arguments)).rowcount == 1
        await settle_messages(conn, [Ended(await read_rated(conn, message_id), 0)], shard=message_id.int)
        if is_fact:
            data = {"reason": "requested"}
            await fan_out(conn, [Fact(org_id, env, f"{channel}.canceled", message_id=message_id, data=data)])
        return "done"


RESCHEDULE = """
WITH moved AS (
    UPDATE message_queue
    SET due_at = %(scheduled_at)s,
        claim_id = NULL
    WHERE message_id = %(message_id)s
      AND intent_at IS NULL
    RETURNING message_id
)
UPDATE messages AS m
SET scheduled_at = %(scheduled_at)s,
    period = to_char(%(scheduled_at)s AT TIME ZONE 'UTC', 'YYYY-MM')
FROM moved
WHERE m.id = moved.message_id
RETURNING m.period
"""

TURN = """
INSERT INTO queue_turns (lane, due_minute, org_id)
SELECT lane, date_trunc('minute', greatest(due_at, nm_now())), org_id
FROM message_queue
WHERE message_id = %(message_id)s
ON CONFLICT DO NOTHING
"""


async def reschedule_message(
    conn: Connection, *, org_id: UUID, env: str, channel: str, message_id: UUID, scheduled_at: datetime
) -> TakeBack | Refusal:
    """Move a message whose call has not begun; in another month it is rated anew, which may be refused."""
    arguments = {
        "message_id": message_id,
        "org_id": org_id,
        "env": env,
        "channel": channel,
        "scheduled_at": scheduled_at,
    }
    async with conn.transaction() as transaction:
        await conn.execute(LOCK, arguments)
        found = await get_message(conn, org_id=org_id, env=env, channel=channel, message_id=message_id)
        if found is None or found.state != "scheduled":
            answer = _why_not(found)
            return "finished" if answer == "done" else answer
        if await _is_taken(conn, message_id):
            return "already_sending"
        rated = await read_rated(conn, message_id)
        cursor = await conn.execute(RESCHEDULE, arguments)
        row = await cursor.fetchone()
        if row is None:
            return "already_sending"
        facts: list[Fact] | Refusal = []
        if row[0] != rated.period:
            facts = await rerate_message(conn, rated, row[0], shard=message_id.int)
        if isinstance(facts, list):
            await conn.execute(TURN, arguments)
            await fan_out(conn, facts)
            return "done"
        raise psycopg.Rollback(transaction)
    return facts


def _why_not(found: MessageView | None) -> TakeBack:
    """Say why a message cannot be taken back; one that is canceled already needs nothing more."""
    if found is None:
        return "not_found"
    if found.state == "sending":
        return "already_sending"
    return "done" if found.state == "canceled" else "finished"


RELEASE = """
WITH released AS (
    UPDATE messages
    SET state = CASE %(action)s WHEN 'resend' THEN 'scheduled' WHEN 'mark_sent' THEN 'sent' ELSE 'canceled' END,
        reason = CASE %(action)s WHEN 'cancel' THEN 'requested' END,
        sent_at = CASE %(action)s WHEN 'mark_sent' THEN nm_now() END
    WHERE id = %(message_id)s
      AND org_id = %(org_id)s
      AND env = %(env)s
      AND channel = %(channel)s
      AND state = 'ambiguous'
    RETURNING id, org_id, channel, env, period, units, credit_units, metered_units, credits, credit_account_id, rerated,
              CASE channel
                  WHEN 'email' THEN (
                      SELECT count(*) FROM recipient_outcomes AS o WHERE o.message_id = id AND o.state = 'suppressed'
                  )
                  ELSE 0
              END AS dropped
), queued AS (
    INSERT INTO message_queue (message_id, org_id, lane, due_at, takeovers, file_bytes)
    SELECT id, org_id, CASE env WHEN 'test' THEN 'test' ELSE 'live:' || channel END, nm_now(),
           1,  -- of the call that is in doubt a provider may still report: the gate asks
           (SELECT coalesce(sum(length(a.content)), 0) FROM message_attachments AS a WHERE a.message_id = released.id)
    FROM released
    WHERE %(action)s = 'resend'
), turn AS (
    INSERT INTO queue_turns (lane, due_minute, org_id)
    SELECT CASE env WHEN 'test' THEN 'test' ELSE 'live:' || channel END, date_trunc('minute', nm_now()), org_id
    FROM released
    WHERE %(action)s = 'resend'
    ON CONFLICT DO NOTHING
), event AS (
    INSERT INTO message_events (message_id, org_id, kind, occurred_at, data)
    SELECT r.id, r.org_id, CASE %(action)s WHEN 'mark_sent' THEN 'sent' ELSE 'canceled' END, nm_now(),
           jsonb_build_object('released', true, 'units', r.units - r.dropped)
    FROM released AS r
    WHERE %(action)s <> 'resend'
    ON CONFLICT DO NOTHING
    RETURNING kind
)
SELECT id, org_id, channel, env, period, units, credit_units, metered_units, credits, credit_account_id, rerated,
       units - dropped, (SELECT kind FROM event)
FROM released
"""


async def release_message(
    conn: Connection,
    *,
    org_id: UUID,
    env: str,
    channel: str,
    message_id: UUID,
    action: Literal["resend", "mark_sent", "cancel"],
) -> Literal["released", "not_found", "not_ambiguous"]:
    """Decide an ambiguous message: send it again, call it sent, or cancel it; its units follow."""
    arguments = {"message_id": message_id, "org_id": org_id, "env": env, "channel": channel, "action": action}
    async with conn.transaction():
        cursor = await conn.execute(RELEASE, arguments)
        row = await cursor.fetchone()
        if row is None:
            found = await get_message(conn, org_id=org_id, env=env, channel=channel, message_id=message_id)
            return "not_ambiguous" if found else "not_found"
        if action != "resend":
            *columns, left, kind = row
            ended = Ended(Rated(*columns), used=left if action == "mark_sent" else 0)
            await settle_messages(conn, [ended], shard=message_id.int)
            if kind is not None:
                fact = Fact(
                    org_id, env, f"{channel}.{kind}", message_id=message_id, data={"reason": "released by hand"}
                )
                await fan_out(conn, [fact])
        return "released"
