"""inbound_sms: what people write to our numbers, and what follows from STOP, START and HELP.

One transaction per SMS. Locks: the pair of numbers → inbound_sms → suppressions → the reply's quota, usage and turn
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
    """What came of an SMS: the org that was told, and the id of the reply."""

    outcome: Literal["received", "repeated"]
    org_id: UUID | None = None
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
    """Store an SMS once, tell the org it answers, do what its keyword asks, and answer a keyword."""
    async with conn.transaction():
        if not await remember_notification(conn, message_id=notification_id, topic_arn=topic_arn):
            return Received("repeated")
        is_answered = await _lock_pair(conn, sms)
        related = await _list_related(conn, sms)
        told, meant = choose_orgs([(row.org_id, row.sender) for row in related], sms.recipient, default_sender)
        latest = {row.org_id: row.message_id for row in reversed(related)}
        reply_id = None
        if with_replies and told is not None and sms.action is not None and not is_answered:
            is_own = sms.sender in (sms.recipient, default_sender)
            reply_id = new_id() if not is_own and await _may_reply(conn, sms, told, meant) else None
        if not await _insert(conn, sms, [] if told is None else [told], reply_id):
            return Received("repeated")
        facts = [] if told is None else [_received(sms, told)]
        if sms.action == "stop":
            facts += await _stop(conn, sms, {org_id: latest[org_id] for org_id in sorted(meant)})
        elif sms.action == "start":
            await lift_stop(conn, org_ids=sorted(meant), number=sms.sender, actor=ACTOR)
        if reply_id is not None and told is not None:
            await _reply(conn, sms, reply_id, org_id=told)
        await fan_out(conn, facts)
    return Received("received", told, reply_id)


def _received(sms: InboundSms, org_id: UUID) -> Fact:
    data = {
        "from": sms.sender,
        "to": sms.recipient,
        "body": sms.body,
        "keyword": sms.keyword,
        "inbound_id": sms.inbound_id,
    }
    return Fact(org_id, "live", "inbound.sms", data=data)


# Two keywords of one person at once take turns, so that they get one reply and not two. A statement of its own: the
# next one must see what the lock waited for.
LOCK_PAIR = """
SELECT pg_advisory_xact_lock(%(class)s, hashtext(%(sender)s::text || '/' || %(recipient)s::text))
"""

# One reply an hour per person, number and keyword: two machines that answer each other stop after one round.
IS_ANSWERED = """
SELECT EXISTS (
    SELECT
    FROM inbound_sms
    WHERE from_number = %(sender)s
      AND to_number = %(recipient)s
      AND action = %(action)s
      AND reply_message_id IS NOT NULL
      AND received_at > nm_now() - interval '1 hour'
)
"""


async def _lock_pair(conn: Connection, sms: InboundSms) -> bool:
    """Return whether this keyword was answered within the hour."""
    arguments = {"class": LOCK_CLASS, "sender": sms.sender, "recipient": sms.recipient, "action": sms.action}
    await conn.execute(LOCK_PAIR, arguments)
    cursor = await conn.execute(IS_ANSWERED, arguments)
    row = await cursor.fetchone()
    return bool(row and row[0])


# What an operator suppressed gets no answer either: the gate would cancel it.
MAY_REPLY = """
SELECT coalesce(bool_or(origin = 'stop'), false) OR NOT %(is_yes)s,
       coalesce(bool_or(org_id = %(told)s AND origin <> 'stop'), false)
FROM suppressions
WHERE org_id = ANY (%(meant)s)
  AND env = 'live'
  AND channel = 'sms'
  AND address = %(sender)s
"""


async def _may_reply(conn: Connection, sms: InboundSms, told: UUID, meant: frozenset[UUID]) -> bool:
    """Return whether the org may answer the keyword; a mere yes is one only of who has stopped an org meant by it."""
    cursor = await conn.execute(
        MAY_REPLY, {"told": told, "meant": sorted(meant), "sender": sms.sender, "is_yes": sms.is_yes}
    )
    is_keyword, is_suppressed = await cursor.fetchone() or (False, False)
    return is_keyword and not is_suppressed


# Of each org the newest messages to a person: who answers, answers one of these. An org that has since written this
# many from other numbers is not found, and no history is too long to look at.
NEWEST_OF_ORG = 300

# From org to org through messages_sms_recipient, and in each from the newest message back; what cannot be in the index
# is left out after the LIMIT, so that it bounds what is read. What is only scheduled has not reached the person; what
# is in flight, or was given up after a call in doubt, may have.
RELATED = """
WITH RECURSIVE org AS (
    (
        SELECT m.org_id
        FROM messages AS m
        WHERE m.channel = 'sms'
          AND m.env = 'live'
          AND m.addresses[1] = %(sender)s
        ORDER BY m.org_id
        LIMIT 1
    )
    UNION ALL
    SELECT following.org_id
    FROM org
    CROSS JOIN LATERAL (
        SELECT m.org_id
        FROM messages AS m
        WHERE m.channel = 'sms'
          AND m.env = 'live'
          AND m.addresses[1] = %(sender)s
          AND m.org_id > org.org_id
        ORDER BY m.org_id
        LIMIT 1
    ) AS following
), latest AS (
    SELECT DISTINCT ON (m.org_id, m.sender) m.org_id, m.sender, m.id
    FROM org
    CROSS JOIN LATERAL (
        SELECT n.id, n.org_id, n.sender, n.state, n.reason, n.purpose
        FROM messages AS n
        WHERE n.channel = 'sms'
          AND n.env = 'live'
          AND n.addresses[1] = %(sender)s
          AND n.org_id = org.org_id
        ORDER BY n.id DESC
        LIMIT %(newest)s
    ) AS m
    WHERE m.purpose = 'message'
      AND (
          m.state NOT IN ('scheduled', 'canceled', 'failed')
          OR m.reason = 'attempts exhausted'
          OR EXISTS (
              SELECT
              FROM message_queue AS q
              WHERE q.message_id = m.id
                AND (q.intent_at IS NOT NULL OR q.takeovers > 0)
          )
      )
    ORDER BY m.org_id, m.sender, m.id DESC
)
SELECT org_id, sender, id
FROM latest
ORDER BY id DESC
"""


async def _list_related(conn: Connection, sms: InboundSms) -> list[_Related]:
    """Return the newest message of each org and identity to the person, newest first."""
    cursor = await conn.execute(RELATED, {"sender": sms.sender, "newest": NEWEST_OF_ORG})
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
# It is included whatever the quota, and counts.
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
), taken AS MATERIALIZED (
    SELECT m.period, m.units, nm_quota_move(ARRAY[m.org_id], '{sms}', ARRAY[m.period], ARRAY[m.units])
    FROM message AS m
), usage AS (
    INSERT INTO usage_records AS u (org_id, channel, env, period, rating, shard, reserved)
    SELECT %(org_id)s, 'sms', 'live', period, 'included', %(shard)s, units
    FROM taken
    ON CONFLICT (org_id, channel, env, period, rating, shard)
    DO UPDATE SET reserved = u.reserved + excluded.reserved
    RETURNING 1
)
INSERT INTO queue_turns (lane, due_minute, org_id)
SELECT 'live:sms', date_trunc('minute', nm_now()), %(org_id)s
WHERE (SELECT count(*) FROM usage) >= 0
ON CONFLICT DO NOTHING
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
