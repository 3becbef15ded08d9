"""inbound_sms: what people write to our numbers, and what follows from STOP, START and HELP.

One transaction per SMS. Locks: the pair of numbers → inbound_sms → suppressions → the reply's queue, turn and usage
rows → deliveries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from uuid import UUID

from nightmail.ids import new_id
from nightmail.rules.sms import measure_sms
from nightmail.rules.sms_keywords import REPLIES, InboundSms, choose_orgs
from nightmail.store.database import Connection
from nightmail.store.fan_out import Fact, fan_out
from nightmail.store.recipient_wishes import Wish, lift_stop, suppress_recipients
from nightmail.store.sns_notifications import remember_notification
from nightmail.store.usage_records import SHARDS

ACTOR = "inbound:sms"
# The class of the advisory locks taken here; those of accept have no class, so they cannot meet.
LOCK_CLASS = 1_853_451_635


@dataclass(frozen=True, slots=True)
class Received:
    """What came of an SMS: how many orgs were told, and the id of the reply."""

    outcome: Literal["received", "repeated"]
    orgs: int = 0
    reply_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class _Related:
    """The newest message of an org to the person from one origination identity."""

    org_id: UUID
    sender: str
    message_id: UUID


async def receive_sms(
    conn: Connection,
    sms: InboundSms,
    *,
    notification_id: str,
    topic_arn: str,
    default_sender: str | None,
    with_replies: bool,
) -> Received:
    """Store an SMS once, tell the orgs it concerns, do what its keyword asks, and answer a keyword."""
    async with conn.transaction():
        if not await remember_notification(conn, message_id=notification_id, topic_arn=topic_arn):
            return Received("repeated")
        is_answered, is_stopped = await _lock_pair(conn, sms)
        related = await _list_related(conn, sms)
        senders = [(row.org_id, row.sender) for row in related]
        told, meant = choose_orgs(senders, sms.recipient, default_sender)
        latest = {row.org_id: row.message_id for row in sorted(related, key=lambda row: row.message_id)}
        is_own = sms.sender in (sms.recipient, default_sender)
        may_reply = with_replies and bool(told) and not is_answered and not is_own
        reply_id = new_id() if may_reply and sms.action and (is_stopped or not sms.is_yes) else None
        if not await _insert(conn, sms, sorted(told), reply_id):
            return Received("repeated")
        facts = [
            Fact(
                org_id,
                "live",
                "inbound.sms",
                data={
                    "from": sms.sender,
                    "to": sms.recipient,
                    "body": sms.body,
                    "keyword": sms.keyword,
                    "inbound_id": sms.inbound_id,
                },
            )
            for org_id in sorted(told)
        ]
        if sms.action == "stop":
            facts += await _stop(conn, sms, {org_id: latest[org_id] for org_id in sorted(meant)})
        elif sms.action == "start":
            await lift_stop(conn, org_ids=sorted(meant), number=sms.sender, actor=ACTOR)
        if reply_id is not None:
            await _reply(conn, sms, reply_id, org_id=max(told, key=lambda org_id: latest[org_id]))
        await fan_out(conn, facts)
    return Received("received", len(told), reply_id)


# Two keywords of one person at once take turns, so that they get one reply and not two. A statement of its own: the
# next one must see what the lock waited for.
LOCK_PAIR = """
SELECT pg_advisory_xact_lock(%(class)s, hashtext(%(sender)s::text || '/' || %(recipient)s::text))
"""

# One reply an hour per person, number and keyword: two machines that answer each other stop after one round.
HISTORY = """
SELECT EXISTS (
           SELECT
           FROM inbound_sms
           WHERE from_number = %(sender)s
             AND to_number = %(recipient)s
             AND action = %(action)s
             AND reply_message_id IS NOT NULL
             AND received_at > nm_now() - interval '1 hour'
       ),
       EXISTS (
           SELECT
           FROM suppressions
           WHERE env = 'live'
             AND channel = 'sms'
             AND address = %(sender)s
             AND origin = 'stop'
             AND org_id IN (
                 SELECT org_id
                 FROM messages
                 WHERE channel = 'sms'
                   AND addresses[1] = %(sender)s
             )
       )
"""


async def _lock_pair(conn: Connection, sms: InboundSms) -> tuple[bool, bool]:
    """Return whether this keyword was answered within the hour, and whether the person has stopped somebody."""
    arguments = {"class": LOCK_CLASS, "sender": sms.sender, "recipient": sms.recipient, "action": sms.action}
    await conn.execute(LOCK_PAIR, arguments)
    cursor = await conn.execute(HISTORY, arguments)
    is_answered, is_stopped = await cursor.fetchone() or (False, False)
    return is_answered, is_stopped


# Through messages_sms_recipient. What is only scheduled has not reached the person; what is in flight may have.
RELATED = """
SELECT DISTINCT ON (m.org_id, m.sender) m.org_id, m.sender, m.id
FROM messages AS m
WHERE m.channel = 'sms'
  AND m.addresses[1] = %(sender)s
  AND m.env = 'live'
  AND m.purpose = 'message'
  AND (
      m.state NOT IN ('scheduled', 'canceled', 'failed')
      OR EXISTS (SELECT FROM message_queue AS q WHERE q.message_id = m.id AND q.intent_at IS NOT NULL)
  )
ORDER BY m.org_id, m.sender, m.id DESC
"""


async def _list_related(conn: Connection, sms: InboundSms) -> list[_Related]:
    cursor = await conn.execute(RELATED, {"sender": sms.sender})
    return [_Related(*row) for row in await cursor.fetchall()]


INSERT = """
INSERT INTO inbound_sms (id, from_number, to_number, body, keyword, action, org_ids, reply_message_id, received_at)
VALUES (
    %(id)s, %(sender)s, %(recipient)s, %(body)s, %(keyword)s, %(action)s, %(org_ids)s, %(reply_id)s, nm_now()
)
ON CONFLICT DO NOTHING
"""


async def _insert(conn: Connection, sms: InboundSms, org_ids: list[UUID], reply_id: UUID | None) -> bool:
    cursor = await conn.execute(
        INSERT,
        {
            "id": sms.inbound_id,
            "sender": sms.sender,
            "recipient": sms.recipient,
            "body": sms.body,
            "keyword": sms.keyword,
            "action": sms.action,
            "org_ids": org_ids,
            "reply_id": reply_id,
        },
    )
    return cursor.rowcount == 1


UNSUBSCRIBED = """
INSERT INTO message_events (message_id, org_id, recipient, kind, provider_ref, occurred_at, data)
SELECT u.message_id, u.org_id, %(sender)s, 'unsubscribed', %(inbound_id)s, nm_now(),
       jsonb_build_object('inbound_id', %(inbound_id)s::text, 'body', %(body)s::text)
FROM unnest(%(message_ids)s::uuid[], %(org_ids)s::uuid[]) AS u (message_id, org_id)
ON CONFLICT DO NOTHING
"""


async def _stop(conn: Connection, sms: InboundSms, latest: dict[UUID, UUID]) -> list[Fact]:
    """Suppress the person for these orgs; the event belongs to the newest message of each."""
    wishes = [Wish(org_id, "live", "sms", sms.sender, "stop", f"wrote {sms.body[:40]}") for org_id in latest]
    await suppress_recipients(conn, wishes, actor=ACTOR)
    await conn.execute(
        UNSUBSCRIBED,
        {
            "sender": sms.sender,
            "inbound_id": sms.inbound_id,
            "body": sms.body,
            "message_ids": list(latest.values()),
            "org_ids": list(latest),
        },
    )
    return [
        Fact(org_id, "live", "sms.unsubscribed", message_id, sms.sender, data={"inbound_id": sms.inbound_id})
        for org_id, message_id in latest.items()
    ]


# The accept of store.accept for one message of ours: no caller, hence no key, and no limit may keep a STOP unanswered.
REPLY = """
WITH message AS (
    INSERT INTO messages (
        id, org_id, env, channel, sender, addresses, units, period, created_at, purpose
    )
    SELECT %(id)s, %(org_id)s, 'live', 'sms', %(sender)s, ARRAY[%(to)s], %(units)s,
           to_char(nm_now() AT TIME ZONE 'UTC', 'YYYY-MM'), nm_now(), 'keyword_reply'
    RETURNING org_id, period, units
), body AS (
    INSERT INTO message_bodies (message_id, to_addresses, text)
    SELECT %(id)s, ARRAY[%(to)s], %(text)s
), queued AS (
    INSERT INTO message_queue (message_id, org_id, lane, due_at)
    SELECT %(id)s, %(org_id)s, 'live:sms', nm_now()
), turn AS (
    INSERT INTO queue_turns (lane, due_minute, org_id)
    SELECT 'live:sms', date_trunc('minute', nm_now()), %(org_id)s
    ON CONFLICT DO NOTHING
    RETURNING 1
)
INSERT INTO usage_records AS u (org_id, channel, env, period, rating, shard, reserved)
SELECT org_id, 'sms', 'live', period, 'included', %(shard)s, units
FROM message
WHERE (SELECT count(*) FROM turn) >= 0
ON CONFLICT (org_id, channel, env, period, rating, shard)
DO UPDATE SET reserved = u.reserved + excluded.reserved
"""


async def _reply(conn: Connection, sms: InboundSms, reply_id: UUID, *, org_id: UUID) -> None:
    """Queue the answer to a keyword, from the number that was written to."""
    assert sms.action is not None, "only keywords are answered"
    text = REPLIES[sms.action]
    await conn.execute(
        REPLY,
        {
            "id": reply_id,
            "org_id": org_id,
            "sender": sms.recipient,
            "to": sms.sender,
            "text": text,
            "units": measure_sms(text).segments,
            "shard": reply_id.int % SHARDS,
        },
    )
