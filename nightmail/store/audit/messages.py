"""Messages, their queue rows and their events (DESIGN 3.1, 3.2), and who paid for them (L9)."""

from __future__ import annotations

from typing import LiteralString

from nightmail.store.audit.invariant import Invariant

# A provider's refusal may come before our own `sent`: then the message is failed and still waits for the gate.
QUEUED: LiteralString = """
SELECT m.id AS key, m.id::text AS id, 1 AS things,
       CASE WHEN q.message_id IS NULL THEN m.state = 'scheduled'
            ELSE m.state IN ('sent', 'canceled', 'ambiguous')
                 OR (m.state = 'failed' AND NOT EXISTS (
                     SELECT FROM message_events AS e
                     WHERE e.message_id = m.id AND e.kind = 'failed' AND e.provider_ref <> ''
                 ))
       END AS is_wrong
FROM messages AS m
LEFT JOIN message_queue AS q ON q.message_id = m.id
WHERE m.id = ANY (%(keys)s::uuid[])
"""

SENT_EVENT: LiteralString = """
SELECT m.id AS key, m.id::text AS id, 1 AS things,
       CASE WHEN m.sent_at IS NULL THEN e.events > 0
            ELSE e.own = 0 AND m.state IN ('sent', 'delivered', 'bounced', 'complained') END AS is_wrong
FROM messages AS m
CROSS JOIN LATERAL (
    SELECT count(*) AS events, count(*) FILTER (WHERE e.recipient = '' AND e.provider_ref = '') AS own
    FROM message_events AS e
    WHERE e.message_id = m.id AND e.kind = 'sent'
) AS e
WHERE m.id = ANY (%(keys)s::uuid[])
"""

PROVIDER_ID: LiteralString = """
SELECT m.id AS key, m.id::text AS id, 1 AS things,
       m.provider_message_id IS NULL AND NOT EXISTS (
           SELECT FROM message_events AS e
           WHERE e.message_id = m.id AND e.kind = 'sent' AND e.data ? 'released'
       ) AS is_wrong
FROM messages AS m
WHERE m.id = ANY (%(keys)s::uuid[])
  AND m.state = 'sent'
"""

OWNED: LiteralString = """
SELECT m.id AS key, m.id::text AS id, 1 AS things,
       NOT EXISTS (SELECT FROM orgs AS o WHERE o.id = m.org_id) AS is_wrong
FROM messages AS m
WHERE m.id = ANY (%(keys)s::uuid[])
"""

# What was used fills the included units first, then those paid with credits, then the metered ones. Nothing is captured
# while a message waits; a reschedule into another month gives its first reservation back and makes another.
PAID: LiteralString = """
SELECT m.id AS key, m.id::text AS id, 1 AS things,
       CASE WHEN m.is_open THEN r.amount IS DISTINCT FROM m.credits OR t.captured > 0
            ELSE r.amount IS NOT NULL
                 OR t.captured <> m.credits / m.credit_units
                                * least(greatest(m.used - (m.units - m.credit_units - m.metered_units), 0),
                                        m.credit_units)
       END AS is_wrong
FROM (
    SELECT m.*,
           'message:' || m.id || CASE WHEN m.rerated > 0 THEN '/' || m.rerated ELSE '' END AS reference,
           m.state = 'ambiguous'
           OR EXISTS (SELECT FROM message_queue AS q WHERE q.message_id = m.id) AS is_open,
           coalesce((
               SELECT coalesce((e.data ->> 'units')::bigint, m.units)
               FROM message_events AS e
               WHERE e.message_id = m.id AND e.recipient = '' AND e.kind = 'sent' AND e.provider_ref = ''
           ), 0) AS used
    FROM messages AS m
    WHERE m.id = ANY (%(keys)s::uuid[])
      AND m.credits > 0
) AS m
CROSS JOIN LATERAL (
    SELECT sum(r.amount) AS amount
    FROM credit_reservations AS r
    WHERE r.account_id = m.credit_account_id AND r.reference = m.reference
) AS r
CROSS JOIN LATERAL (
    SELECT coalesce(sum(t.amount), 0) AS captured
    FROM credit_transactions AS t
    WHERE t.account_id = m.credit_account_id AND t.kind = 'capture' AND t.reference = m.reference
) AS t
"""

HELD: LiteralString = """
SELECT q.message_id AS key, q.message_id::text AS id, 1 AS things,
       NOT EXISTS (SELECT FROM claims AS c WHERE c.claim_id = q.claim_id) AS is_wrong
FROM message_queue AS q
WHERE q.claim_id IS NOT NULL
"""

LEASED: LiteralString = """
SELECT c.claim_id AS key, c.claim_id::text AS id, 1 AS things,
       c.lease_until < nm_now() - interval '10 minutes' AS is_wrong
FROM claims AS c
"""

# One whose call's end was never learned waits a while for evidence, and is due after that.
DOUBTFUL: LiteralString = """
SELECT q.message_id AS key, q.message_id::text AS id, 1 AS things, q.intent_at IS NOT NULL AS is_wrong
FROM message_queue AS q
WHERE q.lane IN ('live:email', 'live:sms', 'test')
  AND q.claim_id IS NULL
  AND q.due_at < nm_now() - interval '10 minutes'
"""

MESSAGES: tuple[Invariant, ...] = (
    Invariant("queued", "a message waits in the queue exactly while its state is scheduled", "messages", QUEUED),
    Invariant("sent_event", "a message was sent if and only if it has one event that says so", "messages", SENT_EVENT),
    Invariant("provider_id", "a sent message names the provider's id", "messages", PROVIDER_ID),
    Invariant("owned", "every message belongs to an org", "messages", OWNED),
    Invariant(
        "paid",
        "a message rated with credits holds its reservation until it is finished, and was then charged what it used",
        "messages",
        PAID,
    ),
    Invariant("held", "a held queue row has a claim", "now", HELD),
    Invariant("leased", "no claim ran out more than ten minutes ago", "now", LEASED),
    Invariant(
        "doubtful", "no message whose call is in doubt waits more than ten minutes past its time", "now", DOUBTFUL
    ),
)
