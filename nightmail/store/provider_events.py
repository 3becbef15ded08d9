"""Provider events: what a report changes, in the one transaction that also remembers its notification.

Locks, always in this order: queue row → message → recipient outcomes → suppressions → quota, wallet and usage →
deliveries. A report is a fact however late it comes, and may come before our own `sent`: then the row in the queue is
settled by the gate, which takes these events as evidence that the call was accepted. Nothing here depends on the order
of reports: events are unique by what they tell of, outcomes and state only rise (rules.messages.SUMMARY).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal
from uuid import UUID

import msgspec

from nightmail.rules.messages import SUMMARY, predecessors, summarise
from nightmail.rules.provider_events import STATES, ProviderEvent, Report, match_recipient
from nightmail.store.database import Connection
from nightmail.store.fan_out import Fact, fan_out
from nightmail.store.rating import Ended, Rated, settle_messages
from nightmail.store.recipient_wishes import Wish, suppress_recipients
from nightmail.store.sns_notifications import remember_notification

ACTOR = "provider"
# The longest address of RFC 5321, with room; it is part of an index entry.
MAX_RECIPIENT = 320


@dataclass(frozen=True, slots=True)
class Applied:
    """What came of a report; `repeated` and `unknown` (no message of ours) changed nothing. `events` are new ones."""

    outcome: Literal["applied", "repeated", "unknown", "ignored"]
    events: int = 0
    suppressed: int = 0


@dataclass(frozen=True, slots=True)
class _Message:
    """What never changes of a message."""

    id: UUID
    org_id: UUID
    env: str
    channel: str
    addresses: list[str]


async def apply_report(conn: Connection, report: Report, *, notification_id: str, topic_arn: str) -> Applied:
    """Write what a notification reports, once. Raises nothing of its own."""
    async with conn.transaction():
        if not await remember_notification(conn, message_id=notification_id, topic_arn=topic_arn):
            return Applied("repeated")
        if not report.events:
            return Applied("ignored")
        message = await _find(conn, report)
        if message is None:
            return Applied("unknown")
        events = [_addressed(event, message.addresses) for event in report.events]
        await conn.execute(HASTEN, {"message_id": message.id})
        before, new = await _write(conn, message, events, report.provider_message_id)
        suppressed = await _suppress(conn, message, new)
        is_settled = before == "ambiguous" and await _settle_doubt(conn, message, report.provider_message_id)
        await fan_out(conn, _facts(message, new, is_settled=is_settled))
    return Applied("applied", len(new), suppressed)


# Only live messages have ever been at a provider.
FIND = """
SELECT id, org_id, env, channel, addresses
FROM messages
WHERE id = %(message_id)s
  AND env = 'live'
  AND channel = %(channel)s
"""


async def _find(conn: Connection, report: Report) -> _Message | None:
    if report.message_id is None:
        return None
    cursor = await conn.execute(FIND, {"message_id": report.message_id, "channel": report.channel})
    row = await cursor.fetchone()
    return _Message(*row) if row else None


def _addressed(event: ProviderEvent, addresses: Sequence[str]) -> ProviderEvent:
    """Return the event with the message's own address; one that matches none stays as reported and suppresses nobody.

    Opens and clicks name nobody: of a message to one person they are that person's.
    """
    if not event.recipient:
        is_personal = len(addresses) == 1 and event.kind in ("opened", "clicked")
        return replace(event, recipient=addresses[0]) if is_personal else event
    known = match_recipient(event.recipient, addresses)
    if known is None:
        return replace(event, recipient=event.recipient[:MAX_RECIPIENT], suppresses=None)
    return replace(event, recipient=known)


# A row in doubt need not wait any longer: the gate will find the evidence, and complete it without a call.
HASTEN = """
WITH doubtful AS (
    UPDATE message_queue
    SET due_at = nm_now()
    WHERE message_id = %(message_id)s
      AND (intent_at IS NOT NULL OR takeovers > 0)
      AND claim_id IS NULL
      AND due_at > nm_now()
    RETURNING lane, org_id
)
INSERT INTO queue_turns (lane, due_minute, org_id)
SELECT lane, date_trunc('minute', nm_now()), org_id
FROM doubtful
ON CONFLICT DO NOTHING
"""

# The lock on the message makes two reports of one message take turns. Its state is read with the lock, so it is the
# newest; outcomes are raised by ON CONFLICT, which sees the newest row too. `refused` and `suppressed` recipients got
# nothing from the call we know of: a report about them is of another call, and counts.
APPLY = """
WITH message AS MATERIALIZED (
    SELECT id, org_id, state
    FROM messages
    WHERE id = %(message_id)s
    FOR NO KEY UPDATE
), report AS MATERIALIZED (
    SELECT *
    FROM unnest(
        %(recipients)s::text[], %(kinds)s::text[], %(refs)s::text[], %(occurred_at)s::timestamptz[], %(data)s::jsonb[],
        %(outcomes)s::text[]
    ) AS r (recipient, kind, provider_ref, occurred_at, data, outcome)
), event AS (
    INSERT INTO message_events (message_id, org_id, recipient, kind, provider_ref, occurred_at, data)
    SELECT m.id, m.org_id, r.recipient, r.kind, r.provider_ref, r.occurred_at, r.data
    FROM message AS m
    CROSS JOIN report AS r
    ON CONFLICT DO NOTHING
    RETURNING recipient, kind, provider_ref
), outcome AS (
    INSERT INTO recipient_outcomes AS o (message_id, address, state, detail, at)
    SELECT DISTINCT ON (r.recipient) m.id, r.recipient, r.outcome, r.data #>> '{bounce,message}', r.occurred_at
    FROM message AS m
    CROSS JOIN report AS r
    WHERE r.outcome IS NOT NULL
    ORDER BY r.recipient, array_position(%(summary)s::text[], r.outcome) DESC
    ON CONFLICT (message_id, address) DO UPDATE
    SET state = excluded.state,
        detail = excluded.detail,
        at = excluded.at
    WHERE array_position(%(summary)s::text[], excluded.state)
        > coalesce(array_position(%(summary)s::text[], o.state), 0)
), raised AS (
    UPDATE messages AS m
    SET state = %(state)s,
        reason = %(reason)s
    FROM message
    WHERE m.id = message.id
      AND message.state = ANY (%(predecessors)s::text[])
)
SELECT message.state, event.recipient, event.kind, event.provider_ref
FROM message
LEFT JOIN event ON true
"""


async def _write(
    conn: Connection, message: _Message, events: Sequence[ProviderEvent], provider_id: str
) -> tuple[str, list[ProviderEvent]]:
    """Write events, outcomes and state; return the state before and the events that are new."""
    by_key = {(event.recipient, event.kind, event.provider_ref): event for event in events}
    distinct = list(by_key.values())
    state = summarise(STATES[event.kind] for event in distinct if event.kind in STATES)
    cursor = await conn.execute(
        APPLY,
        {
            "message_id": message.id,
            "summary": list(SUMMARY),
            "state": state,
            "reason": next((event.data["reason"] for event in distinct if state == event.kind == "failed"), None),
            "predecessors": predecessors(state) if state else [],
            "recipients": [event.recipient for event in distinct],
            "kinds": [event.kind for event in distinct],
            "refs": [event.provider_ref for event in distinct],
            "occurred_at": [event.occurred_at for event in distinct],
            "data": [_data(event, provider_id) for event in distinct],
            "outcomes": [_outcome(event, message.addresses) for event in distinct],
        },
    )
    rows = await cursor.fetchall()
    return rows[0][0], [by_key[row[1], row[2], row[3]] for row in rows if row[1] is not None]


def _data(event: ProviderEvent, provider_id: str) -> str:
    """Return the event's data with the provider's id for the call, which the gate takes over from evidence."""
    return msgspec.json.encode({**event.data, "provider_message_id": provider_id}).decode()


def _outcome(event: ProviderEvent, addresses: Sequence[str]) -> str | None:
    is_outcome = event.kind in ("delivered", "bounced", "complained") and event.recipient in addresses
    return event.kind if is_outcome else None


async def _suppress(conn: Connection, message: _Message, events: Sequence[ProviderEvent]) -> int:
    wishes = [
        Wish(message.org_id, message.env, message.channel, event.recipient, event.suppresses, _reason(event))
        for event in events
        if event.suppresses is not None
    ]
    return await suppress_recipients(conn, wishes, actor=ACTOR)


def _reason(event: ProviderEvent) -> str | None:
    part: dict[str, Any] = event.data.get("bounce") or event.data.get("complaint") or {}
    return part.get("message") or part.get("type")


# The provider took a message that nobody could tell of: it was sent after all, and its units were used.
SETTLE_DOUBT = """
WITH ended AS (
    UPDATE messages AS m
    SET state = CASE m.state WHEN 'ambiguous' THEN 'sent' ELSE m.state END,
        reason = CASE m.state WHEN 'ambiguous' THEN NULL ELSE nullif(m.reason, 'call interrupted') END,
        sent_at = nm_now(),
        provider_message_id = coalesce(m.provider_message_id, %(provider_id)s)
    WHERE m.id = %(message_id)s
    RETURNING m.id, m.org_id, m.channel, m.env, m.period, m.units, m.credit_units, m.metered_units, m.credits,
              m.credit_account_id, m.rerated, m.units - (
        SELECT count(*)
        FROM recipient_outcomes AS r
        WHERE r.message_id = m.id
          AND r.state = 'suppressed'
    ) AS used
), event AS (
    INSERT INTO message_events (message_id, org_id, kind, occurred_at, data)
    SELECT id, org_id, 'sent', nm_now(), jsonb_build_object('evidence', %(provider_id)s::text, 'units', used)
    FROM ended
    ON CONFLICT DO NOTHING
)
SELECT id, org_id, channel, env, period, units, credit_units, metered_units, credits, credit_account_id, rerated, used
FROM ended
"""


async def _settle_doubt(conn: Connection, message: _Message, provider_id: str) -> bool:
    cursor = await conn.execute(SETTLE_DOUBT, {"message_id": message.id, "provider_id": provider_id})
    rows = await cursor.fetchall()
    await settle_messages(conn, [Ended(Rated(*row[:11]), row[11]) for row in rows], shard=message.id.int)
    return bool(rows)


def _facts(message: _Message, events: Sequence[ProviderEvent], *, is_settled: bool) -> list[Fact]:
    """Return what to tell: acceptance is told as our own `sent`."""
    facts = [Fact(message.org_id, message.env, f"{message.channel}.sent", message.id)] if is_settled else []
    for event in events:
        if event.kind != "accepted":
            topic = f"{message.channel}.{event.kind}"
            facts.append(
                Fact(
                    message.org_id, message.env, topic, message.id, event.recipient, event.occurred_at, dict(event.data)
                )
            )
    return facts
