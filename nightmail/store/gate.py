"""The gate: the last look before a provider call, committed before the call begins.

It lets a row pass only while the claim is ours and its lease outlasts the call, drops suppressed recipients, counts
the attempt and writes the intent. A row that does not come back is not ours any more: no call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from nightmail.ports import Attachment, OutgoingEmail, OutgoingSms
from nightmail.rules.addresses import bare_address
from nightmail.rules.messages import MAX_ATTEMPTS
from nightmail.store.database import Connection
from nightmail.store.fan_out import Fact, fan_out
from nightmail.store.rating import Ended, Rated, settle_messages

# Ends of a message that the gate itself decides: `state`, `reason` and event kind of each decision.
#   suppressed   no recipient is left
#   evidenced    a call whose end we never learned was accepted after all: a provider event carries our id, or the
#                runner that lost the row came back with its result (also when a later call was refused meanwhile)
#   ambiguous    such a call, no evidence, and the policy forbids a second one
#   exhausted    out of attempts
# A recipient dropped at an earlier attempt stays dropped: it was told as suppressed. The answer to STOP goes to a
# number that this very STOP suppresses.
# Locks: queue rows in id order, then their messages. `(… = claim_id) IS TRUE` instead of `=`: the planner would reach
# the rows through the claim's index and look at all that the claim holds for each (20 ms a gate, now 1.2 ms).
GATE = """
WITH mine AS MATERIALIZED (
    SELECT q.message_id, q.org_id, q.attempts, q.takeovers, q.intent_at
    FROM message_queue AS q
    JOIN claims AS c ON c.claim_id = %(claim_id)s
    WHERE q.message_id = ANY (%(message_ids)s)
      AND (q.claim_id = %(claim_id)s) IS TRUE
      AND c.lease_until >= nm_now() + make_interval(secs => %(call_s)s)
    ORDER BY q.message_id
    FOR UPDATE OF q
), checked AS MATERIALIZED (
    SELECT m.id, m.org_id, m.channel, m.env, m.period, m.units, m.credit_units, m.metered_units, m.credits,
           m.credit_account_id, m.rerated, m.sender, m.subject, m.addresses, mine.attempts,
           hit.addresses AS suppressed, evidence.provider_ref AS evidence, evidence.used,
           CASE
               WHEN evidence.provider_ref IS NOT NULL THEN 'evidenced'
               WHEN mine.intent_at IS NOT NULL
                    AND coalesce(m.send_policy, o.send_policy) = 'at_most_once' THEN 'ambiguous'
               WHEN mine.attempts >= %(max_attempts)s THEN 'exhausted'
               WHEN cardinality(hit.addresses) >= cardinality(m.addresses) THEN 'suppressed'
               ELSE 'go'
           END AS decision
    FROM mine
    JOIN messages AS m ON m.id = mine.message_id
    LEFT JOIN orgs AS o ON o.id = m.org_id
    CROSS JOIN LATERAL (
        SELECT coalesce(array_agg(s.address), '{}') AS addresses
        FROM (
            SELECT s.address
            FROM suppressions AS s
            WHERE s.org_id = m.org_id
              AND s.env = m.env
              AND s.channel = m.channel
              AND s.address = ANY (m.addresses)
              AND NOT (m.purpose = 'keyword_reply' AND s.origin = 'stop')
            UNION
            SELECT r.address
            FROM recipient_outcomes AS r
            WHERE r.message_id = m.id
              AND r.state = 'suppressed'
            LIMIT 50
        ) AS s
    ) AS hit
    LEFT JOIN LATERAL (
        SELECT coalesce(e.data ->> 'provider_message_id', e.provider_ref) AS provider_ref,
               m.units - (
                   SELECT count(*)
                   FROM recipient_outcomes AS r
                   WHERE r.message_id = m.id
                     AND r.state = 'suppressed'
               ) AS used
        FROM message_events AS e
        WHERE e.message_id = m.id
          AND e.provider_ref <> ''
          AND e.kind IN (
              'accepted', 'delivered', 'delayed', 'bounced', 'complained', 'failed', 'opened', 'clicked', 'late_result'
          )
          AND (mine.intent_at IS NOT NULL OR mine.takeovers > 0)
        LIMIT 1
    ) AS evidence ON true
), started AS (
    UPDATE message_queue AS q
    SET intent_at = nm_now(),
        attempts = q.attempts + 1
    FROM checked
    WHERE q.message_id = checked.id
      AND (q.claim_id = %(claim_id)s) IS TRUE
      AND checked.decision = 'go'
), ended AS (
    DELETE FROM message_queue AS q
    USING checked
    WHERE q.message_id = checked.id
      AND (q.claim_id = %(claim_id)s) IS TRUE
      AND checked.decision <> 'go'
), recorded AS (
    UPDATE messages AS m
    SET state = CASE
            WHEN m.state <> 'scheduled' THEN m.state
            WHEN c.decision = 'suppressed' THEN 'canceled'
            WHEN c.decision = 'evidenced' THEN 'sent'
            WHEN c.decision = 'ambiguous' THEN 'ambiguous'
            ELSE 'failed'
        END,
        reason = CASE c.decision
            WHEN 'suppressed' THEN 'suppressed'
            WHEN 'ambiguous' THEN 'call interrupted'
            WHEN 'exhausted' THEN 'attempts exhausted'
            ELSE m.reason
        END,
        sent_at = CASE c.decision WHEN 'evidenced' THEN nm_now() END,
        provider_message_id = coalesce(c.evidence, m.provider_message_id)
    FROM checked AS c
    WHERE m.id = c.id
      AND c.decision <> 'go'
), outcomes AS (
    INSERT INTO recipient_outcomes (message_id, address, state)
    SELECT c.id, dropped.address, 'suppressed'
    FROM checked AS c
    CROSS JOIN LATERAL unnest(c.suppressed) AS dropped (address)
    WHERE c.decision IN ('go', 'suppressed')
    ON CONFLICT DO NOTHING
), events AS (
    INSERT INTO message_events (message_id, org_id, kind, occurred_at, data)
    SELECT c.id, c.org_id,
           CASE c.decision
               WHEN 'suppressed' THEN 'suppressed'
               WHEN 'evidenced' THEN 'sent'
               WHEN 'ambiguous' THEN 'ambiguous'
               ELSE 'failed'
           END,
           nm_now(),
           CASE c.decision
               WHEN 'suppressed' THEN jsonb_build_object('suppressed', c.suppressed)
               WHEN 'evidenced' THEN jsonb_build_object('evidence', c.evidence, 'units', c.used)
               WHEN 'exhausted' THEN jsonb_build_object('reason', 'attempts exhausted')
               ELSE '{}'::jsonb
           END
    FROM checked AS c
    WHERE c.decision <> 'go'
    ON CONFLICT DO NOTHING
    RETURNING message_id
)
SELECT c.id, c.org_id, c.channel, c.env, c.period, c.units, c.credit_units, c.metered_units, c.credits,
       c.credit_account_id, c.rerated,
       c.decision, c.used, c.evidence, EXISTS (SELECT FROM events AS e WHERE e.message_id = c.id),
       c.attempts + 1, c.sender, coalesce(c.subject, ''), c.suppressed,
       b.to_addresses, b.cc_addresses, b.bcc_addresses, b.reply_to, b.html, b.text, b.headers, b.tags,
       b.attachment_count
FROM checked AS c
LEFT JOIN message_bodies AS b ON b.message_id = c.id AND c.decision = 'go'
ORDER BY c.id
"""

ATTACHMENTS = """
SELECT message_id, filename, content, content_type, content_id
FROM message_attachments
WHERE message_id = ANY (%(message_ids)s)
ORDER BY message_id, position
"""


@dataclass(frozen=True, slots=True)
class Passed:
    """A message whose call may begin now; `units` are those of the recipients left, `suppressed` the dropped ones."""

    message_id: UUID
    claim_id: UUID
    channel: str
    attempts: int
    units: int
    outgoing: OutgoingEmail | OutgoingSms
    suppressed: tuple[str, ...] = ()


@dataclass(slots=True)
class GateResult:
    """What the gate decided: calls to begin, and how many messages it ended itself by decision."""

    passed: list[Passed] = field(default_factory=list)
    suppressed: int = 0
    evidenced: int = 0
    ambiguous: int = 0
    exhausted: int = 0
    lost: int = 0


async def pass_gate(
    conn: Connection, claim_id: UUID, message_ids: Sequence[UUID], *, call_s: float, shard: int
) -> GateResult:
    """Commit the intent to call for the rows that may be called now, and end those that may not.

    `call_s` is the longest a call may take: the lease must outlast it. Usage of ended messages is settled here.
    """
    async with conn.transaction():
        cursor = await conn.execute(
            GATE,
            {
                "claim_id": claim_id,
                "message_ids": sorted(message_ids),
                "call_s": call_s,
                "max_attempts": MAX_ATTEMPTS,
            },
        )
        rows = await cursor.fetchall()
        with_files = [row[0] for row in rows if row[27]]
        files = await _load_attachments(conn, with_files) if with_files else {}
        await settle_messages(conn, _ended(rows), shard=shard)
        await fan_out(conn, [_fact(row) for row in rows if row[14]])
    result = GateResult(lost=len(message_ids) - len(rows))
    for row in rows:
        decision = row[11]
        if decision == "go":
            result.passed.append(_passed(row, claim_id, files.get(row[0], ())))
        else:
            setattr(result, decision, getattr(result, decision) + 1)
    return result


async def _load_attachments(conn: Connection, message_ids: list[UUID]) -> dict[UUID, list[Attachment]]:
    files: dict[UUID, list[Attachment]] = {}
    cursor = await conn.execute(ATTACHMENTS, {"message_ids": message_ids})
    async for message_id, filename, content, content_type, content_id in cursor:
        files.setdefault(message_id, []).append(Attachment(filename, bytes(content), content_type, content_id))
    return files


def _without(entries: Sequence[str], dropped: frozenset[str]) -> list[str]:
    return [entry for entry in entries if bare_address(entry) not in dropped]


def _ended(rows: Sequence[tuple[Any, ...]]) -> list[Ended]:
    """Return the messages that ended here; an ambiguous one keeps its reservation until someone decides."""
    return [
        Ended(Rated(*row[:11]), used=row[12] if row[11] == "evidenced" else 0)
        for row in rows
        if row[11] in ("suppressed", "evidenced", "exhausted")
    ]


def _fact(row: tuple[Any, ...]) -> Fact:
    """Return the event of a message that ended here."""
    message_id, org_id, channel, env = row[:4]
    decision, evidence, suppressed = row[11], row[13], row[18]
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "suppressed": ("suppressed", {"suppressed": suppressed}),
        "evidenced": ("sent", {"provider_message_id": evidence}),
        "ambiguous": ("ambiguous", {"reason": "call interrupted"}),
        "exhausted": ("failed", {"reason": "attempts exhausted"}),
    }
    kind, data = kinds[decision]
    return Fact(org_id, env, f"{channel}.{kind}", message_id=message_id, data=data)


def _passed(row: tuple[Any, ...], claim_id: UUID, files: Sequence[Attachment]) -> Passed:
    message_id, org_id, channel, _, _, units = row[:6]
    attempts, sender, subject, suppressed = row[15:19]
    to, cc, bcc, reply_to, html, text, headers, tags = row[19:27]
    tag_pairs = [(tag["name"], tag["value"]) for tag in tags]
    if channel == "sms":
        sms = OutgoingSms(message_id, org_id, claim_id, sender or None, to[0], text or "", tag_pairs)
        return Passed(message_id, claim_id, channel, attempts, units, sms)
    dropped = frozenset(suppressed)
    email = OutgoingEmail(
        message_id=message_id,
        org_id=org_id,
        claim_id=claim_id,
        sender=sender,
        to=_without(to, dropped),
        cc=_without(cc, dropped),
        bcc=_without(bcc, dropped),
        reply_to=reply_to,
        subject=subject,
        html=html,
        text=text,
        headers=[(name, value) for name, value in headers],
        attachments=files,
        tags=tag_pairs,
    )
    return Passed(message_id, claim_id, channel, attempts, units - len(dropped), email, tuple(suppressed))
