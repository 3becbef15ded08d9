"""What is recorded of a message from accept to invoice. Reading only, one row of each table after the other."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from psycopg.rows import dict_row

from nightmail.rules.explain import (
    BatchPart,
    EntryLine,
    EventLine,
    MessageStory,
    OverageLine,
    QuotaLine,
    Reservation,
    UsageLine,
)
from nightmail.store.database import Connection

MESSAGE = """
SELECT m.id, m.org_id, m.env, m.channel, m.purpose,
       CASE WHEN q.intent_at IS NOT NULL THEN 'sending' ELSE m.state END AS state,
       m.reason, m.created_at AS accepted_at, m.scheduled_at, m.sent_at, m.provider_message_id, m.period, m.units,
       m.units - m.credit_units - m.metered_units AS included_units, m.credit_units, m.metered_units, m.credits,
       m.rerated, o.plan, o.billing,
       CASE m.channel WHEN 'email' THEN p.included_emails ELSE p.included_sms END AS included,
       t.taken, m.credit_account_id
FROM messages AS m
JOIN orgs AS o ON o.id = m.org_id
JOIN message_plans AS p ON p.id = o.plan
LEFT JOIN message_queue AS q ON q.message_id = m.id
LEFT JOIN usage_quotas AS t ON t.org_id = m.org_id AND t.channel = m.channel AND t.period = m.period
WHERE m.id = %(message_id)s
  AND (%(org_id)s::uuid IS NULL OR m.org_id = %(org_id)s)
  AND (%(env)s::text IS NULL OR m.env = %(env)s)
"""


async def explain_message(
    conn: Connection, message_id: UUID, *, org_id: UUID | None = None, env: str | None = None
) -> MessageStory | None:
    """Return a message's story, None when there is none of this id, or not of this org and env."""
    async with conn.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(MESSAGE, {"message_id": message_id, "org_id": org_id, "env": env})
        row: dict[str, Any] | None = await cursor.fetchone()
    if row is None:
        return None
    included, taken = row.pop("included"), row.pop("taken")
    about = {**row, "message_id": message_id, "account_id": row.pop("credit_account_id")}
    for name in ("accepted_at", "scheduled_at", "sent_at"):
        row[name] = utc(row[name])
    channel, period = row["channel"], row["period"]
    is_live = row["env"] == "live"
    return MessageStory(
        **row,
        quota=QuotaLine(channel, period, included, taken) if is_live else None,
        events=await _events(conn, about),
        reservations=await _reservations(conn, about),
        usage=await _usage(conn, about),
        overage=await list_overage(conn, row["org_id"], channel=channel, period=period) if row["metered_units"] else (),
    )


EVENTS = """
SELECT kind, recipient, occurred_at, (data ->> 'units')::bigint
FROM message_events
WHERE message_id = %(message_id)s
ORDER BY occurred_at, recorded_at
LIMIT 1000
"""


async def _events(conn: Connection, about: dict[str, Any]) -> list[EventLine]:
    rows = await (await conn.execute(EVENTS, about)).fetchall()
    return [EventLine(kind, recipient, _utc(at), units) for kind, recipient, at, units in rows]


# A reschedule into another month gives the first reservation back and makes message:<id>/1, and so on. An account is
# found by the message; a message that no longer has credits had them of its org's wallet. '0' is what follows '/'.
RESERVATIONS = """
SELECT r.reference, a.user_id, r.id, r.created_at, r.amount, r.answer -> 'batches', s.kind, s.created_at,
       coalesce((s.answer ->> 'captured')::bigint, 0), coalesce((s.answer ->> 'released')::bigint, 0),
       coalesce((s.answer ->> 'expired')::bigint, 0), s.id
FROM credit_accounts AS a
JOIN credit_transactions AS r ON r.account_id = a.id
LEFT JOIN credit_transactions AS s ON s.corrects = r.id AND s.kind IN ('capture', 'release')
WHERE a.org_id = %(org_id)s
  AND a.env = %(env)s
  AND (a.id = %(account_id)s OR a.user_id = (SELECT o.billing_user FROM orgs AS o WHERE o.id = %(org_id)s))
  AND r.kind = 'reserve'
  AND r.reference >= 'message:' || %(message_id)s::uuid
  AND r.reference < 'message:' || %(message_id)s::uuid || '0'
ORDER BY r.created_at, r.id
LIMIT 100
"""

BATCHES = """
SELECT id, priority, source, expires_at
FROM credit_batches
WHERE id = ANY (%(ids)s)
"""

ENTRIES = """
SELECT seq, amount, balance_after, batch_id
FROM credit_entries
WHERE transaction_id = %(transaction_id)s
  AND seq IS NOT NULL
ORDER BY seq
LIMIT 1000
"""


async def _reservations(conn: Connection, about: dict[str, Any]) -> list[Reservation]:
    reservations = []
    for row in await (await conn.execute(RESERVATIONS, about)).fetchall():
        reference, user_id, id, at, amount, parts, settled, settled_at, captured, released, expired, settlement = row
        ids = [UUID(part["id"]) for part in parts or ()]
        batches = {batch[0]: batch[1:] for batch in await (await conn.execute(BATCHES, {"ids": ids})).fetchall()}
        taken = []
        for part in parts or ():
            priority, source, expires_at = batches.get(UUID(part["id"]), (None, None, None))
            taken.append(BatchPart(UUID(part["id"]), part["amount"], priority, source, utc(expires_at)))
        rows = await (await conn.execute(ENTRIES, {"transaction_id": settlement})).fetchall() if settlement else []
        reservations.append(
            Reservation(
                reference,
                user_id,
                id,
                _utc(at),
                amount,
                taken,
                settled,
                utc(settled_at),
                captured,
                released,
                expired,
                [EntryLine(*entry) for entry in rows],
            )
        )
    return reservations


USAGE = """
SELECT channel, env, period, rating, sum(reserved)::bigint, sum(used)::bigint
FROM usage_records
WHERE org_id = %(org_id)s
  AND channel = %(channel)s
  AND env = %(env)s
  AND period = %(period)s
GROUP BY channel, env, period, rating
ORDER BY rating
"""


async def _usage(conn: Connection, about: dict[str, Any]) -> list[UsageLine]:
    return [UsageLine(*row) for row in await (await conn.execute(USAGE, about)).fetchall()]


OVERAGE = """
SELECT channel, period, revision, units, total, identifier, event_at, state, reported_at, answer, error
FROM overage_reports
WHERE org_id = %(org_id)s
  AND (%(channel)s::text IS NULL OR channel = %(channel)s)
  AND (%(period)s::text IS NULL OR period = %(period)s)
ORDER BY period DESC, channel, revision
LIMIT 200
"""


async def list_overage(
    conn: Connection, org_id: UUID, *, channel: str | None = None, period: str | None = None
) -> list[OverageLine]:
    """Return the org's meter events, newest month first."""
    cursor = await conn.execute(OVERAGE, {"org_id": org_id, "channel": channel, "period": period})
    lines = []
    for *first, event_at, state, reported_at, answer, error in await cursor.fetchall():
        channel_of, period_of, revision, units, total, identifier = first
        lines.append(
            OverageLine(
                channel_of, period_of, revision, units, total, identifier, _utc(event_at), state, utc(reported_at),
                answer, error,
            )
        )  # fmt: skip
    return lines


def utc(at: datetime | None) -> datetime | None:
    """Return the time in UTC."""
    return None if at is None else at.astimezone(UTC)


def _utc(at: datetime) -> datetime:
    return at.astimezone(UTC)
