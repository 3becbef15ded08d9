"""Accept: rating, messages, queue rows, usage reservation and the idempotency record, in one transaction.

Without attachments, schedule and anything to tell that is one statement and one round trip. The idempotency key is
taken with a try-lock, so a request that still runs is seen at once; the lock ends with the transaction. What is refused
for want of quota or credits leaves nothing behind, not even its idempotency key: the same request may succeed later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import msgspec
import psycopg
from psycopg.errors import UniqueViolation

from nightmail.ids import sha256
from nightmail.ports import Attachment
from nightmail.store.database import Connection, Database
from nightmail.store.fan_out import Fact, fan_out
from nightmail.store.rating import Refusal, rating_facts, read_refusal
from nightmail.store.usage_records import SHARDS

KEY_LIFE_HOURS = 24


@dataclass(frozen=True, slots=True)
class NewMessage:
    """A checked message. `addresses` are normalised and distinct; the other lists hold canonical mailbox texts.

    `scheduled_at` None means due now. `units` are recipients (email) or segments (SMS).
    """

    id: UUID
    channel: Literal["email", "sms"]
    sender: str
    subject: str | None
    addresses: list[str]
    to: list[str]
    cc: list[str]
    bcc: list[str]
    reply_to: list[str]
    html: str | None
    text: str | None
    headers: list[tuple[str, str]]
    tags: list[dict[str, str]]
    attachments: Sequence[Attachment]
    units: int
    scheduled_at: datetime | None
    send_policy: str | None = None


@dataclass(frozen=True, slots=True)
class Idempotency:
    """The key of a request, the digest of what it asked, and the answer to keep."""

    key: str
    request_sha256: bytes
    status: int
    response: str


@dataclass(frozen=True, slots=True)
class Replay:
    """The answer the same request got before."""

    status: int
    response: str


AcceptResult = Literal["accepted", "in_progress", "other_body"] | Replay | Refusal

# `asked` is evaluated once; everything hangs on `input`, which is empty when the key is taken or known, and on
# `admitted`, which is empty when the rating refuses. A request that committed between our snapshot and our lock is
# caught by the primary key of idempotency_keys (23505). Test messages are not rated: nm_rate is not called for them.
# Shared rows are those of nm_rate, the usage and the turns, locked in this order as everywhere: `turn` reads `usage`
# for no other reason.
ACCEPT = """
WITH asked AS MATERIALIZED (
    SELECT %(key)s::text IS NULL OR pg_try_advisory_xact_lock(%(lock)s) AS is_free
), known AS MATERIALIZED (
    SELECT k.request_sha256, k.status, k.response
    FROM idempotency_keys AS k
    WHERE k.org_id = %(org_id)s
      AND k.env = %(env)s
      AND k.key = %(key)s
      AND k.expires_at > nm_now()
), input AS MATERIALIZED (
    SELECT i.*, coalesce(i.scheduled_at, nm_now()) AS due_at,
           to_char(coalesce(i.scheduled_at, nm_now()) AT TIME ZONE 'UTC', 'YYYY-MM') AS period,
           CASE WHEN %(env)s = 'test' THEN 'test' ELSE 'live:' || i.channel END AS lane,
           row_number() OVER () AS nth
    FROM json_to_recordset(%(messages)s::json) AS i (
        id uuid, channel text, sender text, subject text, addresses text[], units bigint, scheduled_at timestamptz,
        send_policy text, "to" text[], cc text[], bcc text[], reply_to text[], html text, text text,
        headers jsonb, tags jsonb, attachment_count smallint, file_bytes integer
    )
    WHERE (SELECT is_free FROM asked)
      AND NOT EXISTS (SELECT FROM known)
), rated AS MATERIALIZED (
    SELECT r.*
    FROM (
        SELECT array_agg('message:' || id ORDER BY nth) AS references, array_agg(channel ORDER BY nth) AS channels,
               array_agg(period ORDER BY nth) AS periods, array_agg(units ORDER BY nth) AS units
        FROM input
        HAVING count(*) > 0
    ) AS i
    CROSS JOIN LATERAL nm_rate(%(org_id)s, i.references, i.channels, i.periods, i.units, %(may_tell)s) AS r
    WHERE %(env)s = 'live'
), admitted AS MATERIALIZED (
    SELECT i.*, r.account_id, coalesce(r.credit_units[i.nth], 0) AS credit_units,
           coalesce(r.metered_units[i.nth], 0) AS metered_units, coalesce(r.credits[i.nth], 0) AS credits
    FROM input AS i
    LEFT JOIN rated AS r ON true
    WHERE r.outcome IS NULL
       OR r.outcome = 'rated'
), key AS (
    INSERT INTO idempotency_keys (org_id, env, key, request_sha256, status, response, created_at, expires_at)
    SELECT %(org_id)s, %(env)s, %(key)s, %(request_sha256)s, %(status)s, %(response)s, nm_now(),
           nm_now() + make_interval(hours => %(life_hours)s)
    WHERE %(key)s::text IS NOT NULL
      AND EXISTS (SELECT FROM admitted)
), message AS (
    INSERT INTO messages (
        id, org_id, env, channel, sender, subject, addresses, units, period, send_policy, scheduled_at, created_at,
        rating, credit_units, metered_units, credits, credit_account_id
    )
    SELECT id, %(org_id)s, %(env)s, channel, sender, subject, addresses, units, period, send_policy, scheduled_at,
           nm_now(),
           CASE WHEN metered_units > 0 THEN 'metered' WHEN credit_units > 0 THEN 'credits' ELSE 'included' END,
           credit_units, metered_units, credits, CASE WHEN credits > 0 THEN account_id END
    FROM admitted
), body AS (
    INSERT INTO message_bodies (
        message_id, to_addresses, cc_addresses, bcc_addresses, reply_to, html, text, headers, tags, attachment_count
    )
    SELECT id, "to", cc, bcc, reply_to, html, text, headers, tags, attachment_count
    FROM admitted
), queued AS (
    INSERT INTO message_queue (message_id, org_id, lane, due_at, file_bytes)
    SELECT id, %(org_id)s, lane, due_at, file_bytes
    FROM admitted
), event AS (
    INSERT INTO message_events (message_id, org_id, kind, occurred_at)
    SELECT id, %(org_id)s, 'scheduled', nm_now()
    FROM admitted
    WHERE scheduled_at IS NOT NULL
), usage AS (
    INSERT INTO usage_records AS u (org_id, channel, env, period, rating, shard, reserved)
    SELECT %(org_id)s, a.channel, %(env)s, a.period, part.rating, %(shard)s, sum(part.units)
    FROM admitted AS a
    CROSS JOIN LATERAL (
        VALUES ('included', a.units - a.credit_units - a.metered_units), ('credits', a.credit_units),
               ('metered', a.metered_units)
    ) AS part (rating, units)
    WHERE part.units > 0
    GROUP BY a.channel, a.period, part.rating
    ORDER BY a.channel, a.period, part.rating
    ON CONFLICT (org_id, channel, env, period, rating, shard)
    DO UPDATE SET reserved = u.reserved + excluded.reserved
    RETURNING 1
), turn AS (
    INSERT INTO queue_turns (lane, due_minute, org_id)
    SELECT DISTINCT lane, date_trunc('minute', greatest(due_at, nm_now())), %(org_id)s::uuid
    FROM admitted
    WHERE (SELECT count(*) FROM usage) >= 0
    ORDER BY 1, 2
    ON CONFLICT DO NOTHING
)
SELECT asked.is_free, known.request_sha256, known.status, known.response, rated.outcome, rated.answer, rated.facts
FROM asked
LEFT JOIN known ON true
LEFT JOIN rated ON true
"""

ADD_ATTACHMENTS = """
INSERT INTO message_attachments (message_id, position, filename, content_type, content_id, content)
VALUES (%(message_id)s, %(position)s, %(filename)s, %(content_type)s, %(content_id)s, %(content)s)
"""

FORGET_EXPIRED_KEY = """
DELETE FROM idempotency_keys
WHERE org_id = %(org_id)s
  AND env = %(env)s
  AND key = %(key)s
  AND expires_at <= nm_now()
"""


async def accept_messages(
    database: Database,
    *,
    org_id: UUID,
    env: str,
    messages: Sequence[NewMessage],
    idempotency: Idempotency | None,
) -> AcceptResult:
    """Store the messages and reserve what pays for them, or say why not; one transaction.

    Returns `in_progress` while another request with the key runs, `other_body` when the key stands for something
    else, a Replay when this very request was answered before, and a Refusal when quota or credits do not suffice for
    all of them. Raises DatabaseAway.
    """
    key = idempotency.key if idempotency else None
    arguments: dict[str, Any] = {
        "org_id": org_id,
        "env": env,
        "key": key,
        "lock": _lock_number(org_id, env, key) if key else 0,
        "request_sha256": idempotency.request_sha256 if idempotency else None,
        "status": idempotency.status if idempotency else None,
        "response": idempotency.response if idempotency else None,
        "life_hours": KEY_LIFE_HOURS,
        "shard": messages[0].id.int % SHARDS,
        "messages": msgspec.json.encode([_row(message) for message in messages]).decode(),
    }

    facts = [
        Fact(org_id, env, f"{message.channel}.scheduled", message_id=message.id)
        for message in messages
        if message.scheduled_at is not None
    ]

    async def step(conn: Connection) -> tuple[Any, ...]:
        if not facts and not any(message.attachments for message in messages):
            row = await _accept(conn, {**arguments, "may_tell": False})
            if row[4] != "crosses":
                return row
        async with conn.transaction():
            # First what is large and ours alone, last what others wait for.
            await _add_attachments(conn, messages)
            row = await _accept(conn, {**arguments, "may_tell": True})
            if not row[0] or row[1] is not None or row[4] not in (None, "rated"):
                raise psycopg.Rollback
            await fan_out(conn, [*facts, *rating_facts(org_id, row[6] or ())])
        return row

    try:
        row = await database.run(step)
    except UniqueViolation:
        # The key is there after all: expired and not yet cleaned, or committed a moment ago. Look again.
        await database.run(lambda conn: conn.execute(FORGET_EXPIRED_KEY, arguments))
        row = await database.run(step)
    is_free, request_sha256, status, response, outcome, answer, _ = row
    if request_sha256 is not None:
        if idempotency is not None and bytes(request_sha256) != idempotency.request_sha256:
            return "other_body"
        return Replay(status, response)
    if outcome not in (None, "rated"):
        return read_refusal(outcome, answer)
    return "accepted" if is_free else "in_progress"


async def _accept(conn: Connection, arguments: dict[str, Any]) -> tuple[Any, ...]:
    cursor = await conn.execute(ACCEPT, arguments)
    row = await cursor.fetchone()
    assert row is not None, "asked has one row"
    return row  # type: ignore[no-any-return]


async def _add_attachments(conn: Connection, messages: Sequence[NewMessage]) -> None:
    rows = [
        {
            "message_id": message.id,
            "position": position,
            "filename": file.filename,
            "content_type": file.content_type,
            "content_id": file.content_id,
            "content": file.content,
        }
        for message in messages
        for position, file in enumerate(message.attachments)
    ]
    if not rows:
        return
    async with conn.cursor() as cursor:
        await cursor.executemany(ADD_ATTACHMENTS, rows)


def _lock_number(org_id: UUID, env: str, key: str) -> int:
    """Return the advisory lock of a key: 64 bits of a hash; a collision costs a needless 409, nothing else."""
    digest = sha256(f"{org_id}/{env}/{key}")
    return int.from_bytes(digest[:8], "big", signed=True)


def _row(message: NewMessage) -> dict[str, Any]:
    return {
        "id": message.id,
        "channel": message.channel,
        "sender": message.sender,
        "subject": message.subject,
        "addresses": message.addresses,
        "units": message.units,
        "scheduled_at": message.scheduled_at,
        "send_policy": message.send_policy,
        "to": message.to,
        "cc": message.cc,
        "bcc": message.bcc,
        "reply_to": message.reply_to,
        "html": message.html,
        "text": message.text,
        "headers": message.headers,
        "tags": message.tags,
        "attachment_count": len(message.attachments),
        "file_bytes": sum(len(file.content) for file in message.attachments),
    }
