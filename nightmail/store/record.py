"""The record step: what became of calls, written with everything that follows from it in one transaction.

Order within the transaction, always: queue rows (by id) → messages and their events → quota rows, wallets and usage
shards (store.rating) → hints of the queue → webhook deliveries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import UUID

import msgspec

from nightmail.store.database import Connection
from nightmail.store.fan_out import Fact, fan_out
from nightmail.store.rating import Ended, Rated, settle_messages

Kind = Literal["sent", "failed", "retry", "throttled", "in_doubt"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one call ended.

    `wait_s` is the time until the next attempt (retry, throttled, in_doubt); `units` what is charged when sent;
    `refused` maps addresses that an accepting provider turned down to its code; `suppressed` were dropped at the gate.
    """

    message_id: UUID
    claim_id: UUID
    kind: Kind
    units: int = 0
    provider: str = ""
    provider_message_id: str | None = None
    code: str | None = None
    detail: str | None = None
    wait_s: float = 0.0
    refused: dict[str, str] = field(default_factory=dict)
    suppressed: Sequence[str] = ()


# Rows that are no longer ours drop out in `mine`; the final SELECT names what was written, the rest is lost.
# A throttled call was not accepted and burns no attempt. An in-doubt call keeps its intent: whoever claims the row
# next must settle the doubt at the gate. A provider event may have come before us: its state stays. `IS TRUE` keeps the
# planner off the index of claims, as in the gate.
RECORD = """
WITH result AS MATERIALIZED (
    SELECT *
    FROM unnest(
        %(message_ids)s::uuid[], %(claim_ids)s::uuid[], %(kinds)s::text[], %(units)s::bigint[], %(providers)s::text[],
        %(provider_ids)s::text[], %(codes)s::text[], %(details)s::text[], %(waits_s)s::float8[], %(refused)s::jsonb[]
    ) AS r (message_id, claim_id, kind, units, provider, provider_message_id, code, detail, wait_s, refused)
), mine AS MATERIALIZED (
    SELECT q.message_id
    FROM message_queue AS q
    JOIN result AS r ON r.message_id = q.message_id
    WHERE (q.claim_id = r.claim_id) IS TRUE
    ORDER BY q.message_id
    FOR UPDATE OF q
), held AS MATERIALIZED (
    SELECT r.*
    FROM result AS r
    JOIN mine ON mine.message_id = r.message_id
), finished AS (
    DELETE FROM message_queue AS q
    USING held AS h
    WHERE q.message_id = h.message_id
      AND (q.claim_id = h.claim_id) IS TRUE
      AND h.kind IN ('sent', 'failed')
), again AS (
    UPDATE message_queue AS q
    SET claim_id = NULL,
        due_at = nm_now() + make_interval(secs => h.wait_s),
        intent_at = CASE WHEN h.kind = 'in_doubt' THEN q.intent_at END,
        attempts = q.attempts - (h.kind = 'throttled')::int,
        takeovers = q.takeovers + (h.kind = 'in_doubt')::int
    FROM held AS h
    WHERE q.message_id = h.message_id
      AND (q.claim_id = h.claim_id) IS TRUE
      AND h.kind NOT IN ('sent', 'failed')
), recorded AS (
    UPDATE messages AS m
    SET state = CASE WHEN m.state = 'scheduled' AND h.kind IN ('sent', 'failed') THEN h.kind ELSE m.state END,
        reason = CASE h.kind WHEN 'failed' THEN h.code ELSE m.reason END,
        sent_at = CASE h.kind WHEN 'sent' THEN nm_now() END,
        provider_message_id = coalesce(h.provider_message_id, m.provider_message_id),
        last_error = CASE WHEN h.kind = 'sent' THEN m.last_error ELSE concat_ws(': ', h.code, h.detail) END
    FROM held AS h
    WHERE m.id = h.message_id
    RETURNING m.id, m.org_id, m.env, m.channel, m.period, m.units AS reserved, m.credit_units, m.metered_units,
              m.credits, m.credit_account_id, m.rerated, h.kind, h.units, h.provider, h.provider_message_id, h.code,
              h.detail, h.refused
), outcomes AS (
    INSERT INTO recipient_outcomes (message_id, address, state, detail)
    SELECT h.message_id, refused.key, 'refused', refused.value
    FROM held AS h
    CROSS JOIN LATERAL jsonb_each_text(h.refused) AS refused
    WHERE h.kind = 'sent'
    ORDER BY 1, 2
    ON CONFLICT (message_id, address) DO NOTHING
), facts AS (
    INSERT INTO message_events (message_id, org_id, kind, occurred_at, data)
    SELECT h.id, h.org_id, h.kind, nm_now(),
           jsonb_strip_nulls(jsonb_build_object(
               'provider', h.provider, 'provider_message_id', h.provider_message_id,
               'code', h.code, 'detail', h.detail, 'refused', nullif(h.refused, '{}'::jsonb),
               'units', CASE h.kind WHEN 'sent' THEN nullif(h.units, h.reserved) END
           ))
    FROM recorded AS h
    WHERE h.kind IN ('sent', 'failed')
    ON CONFLICT DO NOTHING
    RETURNING message_id
), late AS (
    INSERT INTO message_events (message_id, org_id, kind, provider_ref, occurred_at, data)
    SELECT r.message_id, m.org_id, 'late_result', r.provider_message_id, nm_now(),
           jsonb_build_object('provider', r.provider, 'claim_id', r.claim_id)
    FROM result AS r
    JOIN messages AS m ON m.id = r.message_id
    WHERE r.kind = 'sent'
      AND NOT EXISTS (SELECT FROM mine WHERE mine.message_id = r.message_id)
    ON CONFLICT DO NOTHING
)
SELECT id, org_id, channel, env, period, reserved, credit_units, metered_units, credits, credit_account_id, rerated,
       kind, units, EXISTS (SELECT FROM facts WHERE facts.message_id = recorded.id)
FROM recorded
ORDER BY id
"""

# Hints for rows that are due again, of the rows that the statement above has put back: they are still locked by us.
TURNS = """
INSERT INTO queue_turns (lane, due_minute, org_id)
SELECT DISTINCT lane, date_trunc('minute', due_at), org_id
FROM message_queue
WHERE message_id = ANY (%(message_ids)s)
ORDER BY 1, 2, 3
ON CONFLICT DO NOTHING
"""


# Longer than any provider's id or diagnosis; a provider_ref is part of an index entry.
MAX_TEXT = 500


def storable(text: str | None) -> str | None:
    """Return what providers said in a form PostgreSQL takes: one NUL or lone surrogate would refuse the whole set."""
    if text is None:
        return None
    return text[:MAX_TEXT].replace("\0", "").encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True, slots=True)
class Recorded:
    """What one record step wrote: message ids by kind of outcome, and those that were not ours any more."""

    written: dict[UUID, Kind]
    lost: list[UUID]


async def record_outcomes(conn: Connection, outcomes: Sequence[Outcome], *, shard: int) -> Recorded:
    """Write the outcomes in one transaction: state, event, recipients, usage. Rows of other claims are left alone."""
    encode = msgspec.json.encode
    async with conn.transaction():
        cursor = await conn.execute(
            RECORD,
            {
                "message_ids": [o.message_id for o in outcomes],
                "claim_ids": [o.claim_id for o in outcomes],
                "kinds": [o.kind for o in outcomes],
                "units": [o.units for o in outcomes],
                "providers": [o.provider for o in outcomes],
                "provider_ids": [storable(o.provider_message_id) for o in outcomes],
                "codes": [storable(o.code) for o in outcomes],
                "details": [storable(o.detail) for o in outcomes],
                "waits_s": [o.wait_s for o in outcomes],
                "refused": [
                    encode({storable(address): storable(code) for address, code in o.refused.items()}).decode()
                    for o in outcomes
                ],
            },
        )
        rows = await cursor.fetchall()
        ended = [
            Ended(Rated(*row[:11]), used=units if kind == "sent" else 0)
            for *row, kind, units, _ in rows
            if kind in ("sent", "failed")
        ]
        await settle_messages(conn, ended, shard=shard)
        again = [row[0] for row in rows if row[11] not in ("sent", "failed")]
        if again:
            await conn.execute(TURNS, {"message_ids": again})
        by_id = {o.message_id: o for o in outcomes}
        await fan_out(conn, [_fact(row, by_id[row[0]]) for row in rows if row[13]])
    written: dict[UUID, Kind] = {row[0]: row[11] for row in rows}
    return Recorded(written, [o.message_id for o in outcomes if o.message_id not in written])


def _fact(row: tuple[Any, ...], outcome: Outcome) -> Fact:
    message_id, org_id, channel, env = row[:4]
    kind = row[11]
    data: dict[str, Any] = {"provider": outcome.provider} if outcome.provider else {}
    if kind == "failed":
        data |= {"reason": storable(outcome.code), "detail": storable(outcome.detail)}
    if outcome.refused:
        data["refused"] = {storable(address): storable(code) for address, code in outcome.refused.items()}
    if kind == "sent" and outcome.suppressed:
        data["suppressed"] = list(outcome.suppressed)
    return Fact(org_id, env, f"{channel}.{kind}", message_id=message_id, data=data)
