"""What no owner leads to: rows whose owner is missing. Each of these reads a whole table, so only a full audit does."""

from __future__ import annotations

from typing import LiteralString

from nightmail.store.audit.invariant import Invariant

ENTRIES: LiteralString = """
SELECT e.transaction_id AS key, concat_ws(' ', e.transaction_id, e.line) AS id, 1 AS things,
       t.id IS NULL OR a.id IS NULL AS is_wrong
FROM credit_entries AS e
LEFT JOIN credit_transactions AS t ON t.id = e.transaction_id
LEFT JOIN credit_accounts AS a ON a.id = e.account_id
"""

# A batch has the id of the transaction that granted it, and that one's entries say so.
BATCHES: LiteralString = """
SELECT b.id AS key, b.id::text AS id, 1 AS things, g.granted IS DISTINCT FROM b.granted OR a.id IS NULL AS is_wrong
FROM credit_batches AS b
LEFT JOIN (
    SELECT e.batch_id, sum(e.amount) AS granted
    FROM credit_entries AS e
    WHERE e.batch_id = e.transaction_id AND e.amount > 0
    GROUP BY e.batch_id
) AS g ON g.batch_id = b.id
LEFT JOIN credit_accounts AS a ON a.id = b.account_id
"""

RESERVATIONS: LiteralString = """
SELECT r.account_id AS key, concat_ws(' ', r.account_id, r.reference) AS id, 1 AS things,
       a.id IS NULL
       OR b.account_id IS DISTINCT FROM r.account_id
       OR t.reference IS DISTINCT FROM r.reference AS is_wrong
FROM credit_reservations AS r
LEFT JOIN credit_accounts AS a ON a.id = r.account_id
LEFT JOIN credit_batches AS b ON b.id = r.batch_id
LEFT JOIN credit_transactions AS t ON t.id = r.transaction_id AND t.kind = 'reserve' AND t.account_id = r.account_id
"""

QUEUE: LiteralString = """
SELECT q.message_id AS key, q.message_id::text AS id, 1 AS things, m.org_id IS DISTINCT FROM q.org_id AS is_wrong
FROM message_queue AS q
LEFT JOIN messages AS m ON m.id = q.message_id
"""

EVENTS: LiteralString = """
SELECT e.message_id AS key, concat_ws(' ', e.message_id, e.kind) AS id, 1 AS things,
       m.org_id IS DISTINCT FROM e.org_id AS is_wrong
FROM message_events AS e
LEFT JOIN messages AS m ON m.id = e.message_id
"""

USAGE: LiteralString = """
SELECT u.org_id AS key, concat_ws(' ', u.org_id, u.channel, u.env, u.period) AS id, count(*) AS things,
       bool_or(o.id IS NULL) OR sum(u.reserved) < 0 OR sum(u.used) < 0 AS is_wrong
FROM usage_records AS u
LEFT JOIN orgs AS o ON o.id = u.org_id
GROUP BY u.org_id, u.channel, u.env, u.period, u.rating
"""

TABLES: tuple[Invariant, ...] = (
    Invariant("credit_entries_owned", "every credit entry has its transaction and its wallet", "tables", ENTRIES),
    Invariant(
        "credit_batches_owned", "every batch was granted by the transaction it is named after", "tables", BATCHES
    ),
    Invariant(
        "credit_reservations_owned", "every open reservation has its wallet, batch and transaction", "tables",
        RESERVATIONS,
    ),
    Invariant("queue_owned", "every queue row has its message", "tables", QUEUE),
    Invariant("events_owned", "every event has its message", "tables", EVENTS),
    Invariant("usage_owned", "every usage record has its org, and no sum of them is negative", "tables", USAGE),
)  # fmt: skip
