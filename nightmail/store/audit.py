"""The audit: invariants that the schema cannot hold by itself, each as a query for its violations.

Read-only, bounded, on the primary; it repairs nothing. An empty result means that the invariant holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, LiteralString

from nightmail.store.database import Connection

SAMPLE = 20
# More violations than this are not counted: the audit must stay small when everything is wrong.
BOUND: LiteralString = " LIMIT 10000"


@dataclass(frozen=True, slots=True)
class Invariant:
    """A sentence that must be true, and the query that finds where it is not (first column: an id)."""

    name: str
    sentence: str
    violations: LiteralString


INVARIANTS: tuple[Invariant, ...] = (
    Invariant(
        "queued",
        "a message waits in the queue exactly while its state is scheduled",
        """
        SELECT m.id
        FROM messages AS m
        WHERE m.state = 'scheduled'
          AND NOT EXISTS (SELECT FROM message_queue AS q WHERE q.message_id = m.id)
        UNION ALL
        SELECT q.message_id
        FROM message_queue AS q
        LEFT JOIN messages AS m ON m.id = q.message_id
        WHERE m.id IS NULL
           OR m.state IN ('sent', 'canceled', 'ambiguous')
           OR (m.state = 'failed' AND NOT EXISTS (  -- a provider's refusal may come before our own `sent`
               SELECT FROM message_events AS e
               WHERE e.message_id = m.id AND e.kind = 'failed' AND e.provider_ref <> ''
           ))
        """,
    ),
    Invariant(
        "sent_event",
        "a message was sent if and only if it has one event that says so",
        """
        SELECT m.id
        FROM messages AS m
        WHERE m.state IN ('sent', 'delivered', 'bounced', 'complained')
          AND m.sent_at IS NOT NULL
          AND NOT EXISTS (
              SELECT FROM message_events AS e
              WHERE e.message_id = m.id AND e.recipient = '' AND e.kind = 'sent' AND e.provider_ref = ''
          )
        UNION ALL
        SELECT e.message_id
        FROM message_events AS e
        LEFT JOIN messages AS m ON m.id = e.message_id
        WHERE e.kind = 'sent'
          AND (m.id IS NULL OR m.sent_at IS NULL)
        """,
    ),
    Invariant(
        "provider_id",
        "a sent message names the provider's id",
        """
        SELECT id
        FROM messages
        WHERE state = 'sent'
          AND provider_message_id IS NULL
          AND NOT EXISTS (
              SELECT FROM message_events AS e
              WHERE e.message_id = messages.id AND e.kind = 'sent' AND e.data ? 'released'
          )
        """,
    ),
    Invariant(
        "reserved",
        "reserved units are those of messages that wait in the queue or are ambiguous",
        """
        SELECT org_id
        FROM (
            SELECT org_id, channel, env, period, rating, sum(reserved) AS reserved, 0 AS expected
            FROM usage_records
            GROUP BY org_id, channel, env, period, rating
            UNION ALL
            SELECT m.org_id, m.channel, m.env, m.period, part.rating, 0, sum(part.units)
            FROM messages AS m
            CROSS JOIN LATERAL (
                VALUES ('included', m.units - m.credit_units - m.metered_units), ('credits', m.credit_units),
                       ('metered', m.metered_units)
            ) AS part (rating, units)
            WHERE m.state = 'ambiguous'
               OR EXISTS (SELECT FROM message_queue AS q WHERE q.message_id = m.id)
            GROUP BY m.org_id, m.channel, m.env, m.period, part.rating
        ) AS both_sides
        GROUP BY org_id, channel, env, period, rating
        HAVING sum(reserved) <> sum(expected)
        """,
    ),
    Invariant(
        "used",
        "used units are those of the sent events, or fewer where one says so: included, then credits, then metered",
        """
        SELECT org_id
        FROM (
            SELECT org_id, channel, env, period, rating, sum(used) AS used, 0 AS expected
            FROM usage_records
            GROUP BY org_id, channel, env, period, rating
            UNION ALL
            SELECT m.org_id, m.channel, m.env, m.period, part.rating, 0,
                   sum(greatest(least(coalesce((e.data ->> 'units')::bigint, m.units) - part.cheaper, part.units), 0))
            FROM message_events AS e
            JOIN messages AS m ON m.id = e.message_id
            CROSS JOIN LATERAL (
                VALUES ('included', m.units - m.credit_units - m.metered_units, 0::bigint),
                       ('credits', m.credit_units, m.units - m.credit_units - m.metered_units),
                       ('metered', m.metered_units, m.units - m.metered_units)
            ) AS part (rating, units, cheaper)
            WHERE e.kind = 'sent'
            GROUP BY m.org_id, m.channel, m.env, m.period, part.rating
        ) AS both_sides
        GROUP BY org_id, channel, env, period, rating
        HAVING sum(used) <> sum(expected)
        """,
    ),
    Invariant(
        "taken",
        "a month's quota row holds the included units that are reserved or used",
        """
        SELECT q.org_id
        FROM usage_quotas AS q
        WHERE q.taken <> (
            SELECT coalesce(sum(u.reserved + u.used), 0)
            FROM usage_records AS u
            WHERE u.org_id = q.org_id
              AND u.channel = q.channel
              AND u.env = 'live'
              AND u.period = q.period
              AND u.rating = 'included'
        )
        """,
    ),
    Invariant(
        "message_reservations",
        "credits are reserved for exactly the messages that wait in the queue or are ambiguous and are paid with them",
        """
        SELECT reference
        FROM (
            SELECT account_id, reference, sum(amount) AS held, 0 AS expected
            FROM credit_reservations
            WHERE reference LIKE 'message:%'
            GROUP BY account_id, reference
            UNION ALL
            SELECT m.credit_account_id, concat_ws('/', 'message:' || m.id, nullif(m.rerated, 0)), 0, m.credits
            FROM messages AS m
            WHERE m.credits > 0
              AND (
                  m.state = 'ambiguous'
                  OR EXISTS (SELECT FROM message_queue AS q WHERE q.message_id = m.id)
              )
        ) AS both_sides
        GROUP BY account_id, reference
        HAVING sum(held) <> sum(expected)
        """,
    ),
    Invariant(
        "message_captures",
        "a message's wallet was charged once for what was sent beyond the included units, and for nothing else",
        """
        SELECT reference
        FROM (
            SELECT account_id, reference, amount AS captured, 0 AS expected
            FROM credit_transactions
            WHERE kind = 'capture'
              AND reference LIKE 'message:%'
            UNION ALL
            SELECT m.credit_account_id, concat_ws('/', 'message:' || m.id, nullif(m.rerated, 0)), 0,
                   m.credits / m.credit_units * greatest(least(sent.units - included.units, m.credit_units), 0)
            FROM message_events AS e
            JOIN messages AS m ON m.id = e.message_id
            CROSS JOIN LATERAL (SELECT m.units - m.credit_units - m.metered_units) AS included (units)
            CROSS JOIN LATERAL (SELECT coalesce((e.data ->> 'units')::bigint, m.units)) AS sent (units)
            WHERE e.kind = 'sent'
              AND m.credits > 0
        ) AS both_sides
        GROUP BY account_id, reference
        HAVING sum(captured) <> sum(expected)
        """,
    ),
    Invariant(
        "owned",
        "every message belongs to an org",
        """
        SELECT m.id
        FROM messages AS m
        WHERE NOT EXISTS (SELECT FROM orgs AS o WHERE o.id = m.org_id)
        """,
    ),
    Invariant(
        "leased",
        "a held queue row has a claim, and no claim ran out more than ten minutes ago",
        """
        SELECT q.message_id
        FROM message_queue AS q
        WHERE q.claim_id IS NOT NULL
          AND NOT EXISTS (SELECT FROM claims AS c WHERE c.claim_id = q.claim_id)
        UNION ALL
        SELECT claim_id
        FROM claims
        WHERE lease_until < nm_now() - interval '10 minutes'
        """,
    ),
    Invariant(
        "told",
        "a delivery about a message tells of an event that the message has, and belongs to the message's org",
        """
        SELECT d.event_id
        FROM webhook_deliveries AS d
        LEFT JOIN messages AS m ON m.id = d.message_id
        WHERE d.message_id IS NOT NULL
          AND (
              m.id IS NULL
              OR m.org_id <> d.org_id
              OR NOT EXISTS (
                  SELECT FROM message_events AS e
                  WHERE e.message_id = d.message_id
                    AND e.recipient = d.recipient
                    AND m.channel || '.' || e.kind = d.topic
              )
          )
        """,
    ),
    Invariant(
        "numbered",
        "an endpoint's next number follows its highest, and what has a number has a body",
        """
        SELECT e.id
        FROM webhook_endpoints AS e
        WHERE e.next_seq <= (SELECT max(d.seq) FROM webhook_deliveries AS d WHERE d.endpoint_id = e.id)
        UNION ALL
        SELECT d.event_id
        FROM webhook_deliveries AS d
        WHERE d.seq IS NOT NULL
          AND d.body IS NULL
        """,
    ),
    Invariant(
        "credit_balance",
        "a wallet's balance is what its batches hold, the sum of its entries and the balance after the last of them",
        """
        SELECT a.id
        FROM credit_accounts AS a
        LEFT JOIN (
            SELECT account_id, sum(remaining + reserved) AS held FROM credit_batches GROUP BY account_id
        ) AS b ON b.account_id = a.id
        LEFT JOIN (
            SELECT account_id, sum(amount) AS moved, count(*) AS entries, max(seq) AS last
            FROM credit_entries
            WHERE account = 'wallet'
            GROUP BY account_id
        ) AS e ON e.account_id = a.id
        LEFT JOIN credit_entries AS newest ON newest.account_id = a.id AND newest.seq = a.seq
        WHERE a.balance <> coalesce(b.held, 0)
           OR a.balance <> coalesce(e.moved, 0)
           OR a.balance <> coalesce(newest.balance_after, 0)
           OR a.seq <> coalesce(e.entries, 0)
           OR a.seq <> coalesce(e.last, 0)
        """,
    ),
    Invariant(
        "credit_running_balance",
        "each entry of a wallet continues the balance of the one before",
        """
        SELECT account_id
        FROM (
            SELECT account_id, amount, balance_after,
                   lag(balance_after, 1, 0::bigint) OVER (PARTITION BY account_id ORDER BY seq) AS before
            FROM credit_entries
            WHERE seq IS NOT NULL
        ) AS e
        WHERE balance_after <> before + amount
           OR balance_after < 0
        """,
    ),
    Invariant(
        "credit_batches",
        "what a batch was granted, consumed and expired is what the entries say, and nothing of it is negative",
        """
        SELECT b.id
        FROM credit_batches AS b
        LEFT JOIN (
            SELECT e.batch_id,
                   sum(e.amount) FILTER (WHERE e.amount > 0) AS granted,
                   -sum(e.amount) FILTER (WHERE e.amount < 0) AS gone
            FROM credit_entries AS e
            WHERE e.batch_id IS NOT NULL
            GROUP BY e.batch_id
        ) AS e ON e.batch_id = b.id
        WHERE b.granted <> coalesce(e.granted, 0)
           OR b.consumed + b.expired <> coalesce(e.gone, 0)
           OR b.granted <> b.remaining + b.reserved + b.consumed + b.expired
           OR least(b.remaining, b.reserved, b.consumed, b.expired) < 0
        """,
    ),
    Invariant(
        "credit_zero",
        "the entries of a credit transaction sum to zero, and each belongs to one",
        """
        SELECT e.transaction_id
        FROM credit_entries AS e
        LEFT JOIN credit_transactions AS t ON t.id = e.transaction_id
        GROUP BY e.transaction_id
        HAVING sum(e.amount) <> 0
            OR count(t.id) <> count(*)
        """,
    ),
    Invariant(
        "credit_expired",
        "what has expired is what was booked to system:expiry",
        """
        SELECT account_id
        FROM (
            SELECT account_id, sum(expired) AS expired, 0 AS booked FROM credit_batches GROUP BY account_id
            UNION ALL
            SELECT account_id, 0, sum(amount) FROM credit_entries WHERE account = 'system:expiry' GROUP BY account_id
        ) AS both_sides
        GROUP BY account_id
        HAVING sum(expired) <> sum(booked)
        """,
    ),
    Invariant(
        "credit_reserved",
        "what a batch has reserved is what open reservations hold of it",
        """
        SELECT batch_id
        FROM (
            SELECT id AS batch_id, reserved, 0 AS held FROM credit_batches WHERE reserved <> 0
            UNION ALL
            SELECT batch_id, 0, sum(amount) FROM credit_reservations GROUP BY batch_id
        ) AS both_sides
        GROUP BY batch_id
        HAVING sum(reserved) <> sum(held)
        """,
    ),
    Invariant(
        "credit_references",
        "a reference stands for one spend, and a reservation is settled at most once",
        """
        SELECT min(id::text)
        FROM credit_transactions
        WHERE reference IS NOT NULL
          AND kind IN ('consume', 'reserve', 'capture', 'release')
        GROUP BY account_id, reference, kind IN ('consume', 'reserve')
        HAVING count(*) > 1
        """,
    ),
    Invariant(
        "credit_grants",
        "a subscription's month was granted once, by a batch of its own",
        """
        SELECT g.purchase_id
        FROM credit_grants AS g
        LEFT JOIN credit_batches AS b ON b.id = g.transaction_id
        WHERE b.id IS NULL
           OR b.purchase_id <> g.purchase_id
           OR b.period_start <> g.period_start
           OR b.granted > g.amount
        UNION ALL
        SELECT b.purchase_id
        FROM credit_batches AS b
        JOIN credit_transactions AS t ON t.id = b.id
        WHERE b.source = 'subscription'
          AND b.period_start IS NOT NULL
          AND t.reference IS NULL
        GROUP BY b.purchase_id, b.period_start
        HAVING count(*) > 1
        """,
    ),
    Invariant(
        "credit_never_spent_dead",
        "nothing was spent at once from a batch that had ended",
        """
        SELECT t.id
        FROM credit_transactions AS t
        JOIN credit_entries AS e ON e.transaction_id = t.id
        JOIN credit_batches AS b ON b.id = e.batch_id
        WHERE t.kind = 'consume'
          AND b.expires_at <= t.created_at
        """,
    ),
    Invariant(
        "credit_refunds",
        "no more was refunded than was spent",
        """
        SELECT spent.id
        FROM credit_transactions AS refund
        JOIN credit_transactions AS spent ON spent.id = refund.corrects
        WHERE refund.kind = 'refund'
        GROUP BY spent.id, spent.amount
        HAVING sum(refund.amount) > spent.amount
        """,
    ),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """How an invariant fared: number of violations and the first ids."""

    name: str
    sentence: str
    violations: int
    first: list[str]


async def audit(conn: Connection) -> list[Finding]:
    """Check every invariant, each in a read-only transaction of its own: a long snapshot would slow every claim."""
    findings = []
    for invariant in INVARIANTS:
        async with conn.transaction():
            await conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            await conn.execute("SET LOCAL statement_timeout = 0")
            rows: list[Any] = await (await conn.execute(invariant.violations + BOUND)).fetchall()
        first = [str(row[0]) for row in rows[:SAMPLE]]
        findings.append(Finding(invariant.name, invariant.sentence, len(rows), first))
    return findings
