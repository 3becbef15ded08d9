"""The ledger's invariants (L1 to L5, L7, L11), wallet by wallet.

Everything is found from the wallet's entries: they have an index by wallet, and every batch and every transaction that
moved something has an entry. What a wallet does not lead to is looked for in whole tables (store.audit.tables).
Arrays keep the look-ups index probes whatever the planner thinks of the sizes.
"""

from __future__ import annotations

from typing import LiteralString

from nightmail.store.audit.invariant import Invariant

# The wallets' entries by batch, and their batches: those with entries, and open ones that should have some.
BATCHES: LiteralString = """
WITH moved AS MATERIALIZED (
    SELECT account_id, batch_id, count(*) AS entries, sum(amount) AS amount, max(seq) AS last,
           sum(amount) FILTER (WHERE amount > 0) AS granted, -sum(amount) FILTER (WHERE amount < 0) AS gone
    FROM credit_entries
    WHERE account_id = ANY (%(keys)s::bigint[])
      AND seq IS NOT NULL
    GROUP BY account_id, batch_id
), batch AS MATERIALIZED (
    SELECT b.*
    FROM credit_batches AS b
    WHERE b.id = ANY (ARRAY(SELECT DISTINCT batch_id FROM moved))
    UNION
    SELECT b.*
    FROM credit_batches AS b
    WHERE b.account_id = ANY (%(keys)s::bigint[])
      AND b.is_open
)
"""

# The wallets' transactions that moved something, with all their lines.
LINES: LiteralString = """
WITH line AS MATERIALIZED (
    SELECT e.*
    FROM credit_entries AS e
    WHERE e.transaction_id = ANY (ARRAY(
        SELECT DISTINCT transaction_id
        FROM credit_entries
        WHERE account_id = ANY (%(keys)s::bigint[])
          AND seq IS NOT NULL
    ))
)
"""

BALANCE: LiteralString = """
SELECT a.id AS key, a.id::text AS id, 1 AS things,
       a.balance <> coalesce(b.held, 0)
       OR a.balance <> coalesce(m.amount, 0)
       OR a.balance <> coalesce(newest.balance_after, 0)
       OR a.seq <> coalesce(m.entries, 0)
       OR a.seq <> coalesce(m.last, 0) AS is_wrong
FROM credit_accounts AS a
LEFT JOIN (SELECT account_id, sum(remaining + reserved) AS held FROM batch GROUP BY account_id) AS b
       ON b.account_id = a.id
LEFT JOIN (
    SELECT account_id, sum(amount) AS amount, sum(entries) AS entries, max(last) AS last FROM moved GROUP BY account_id
) AS m ON m.account_id = a.id
LEFT JOIN credit_entries AS newest ON newest.account_id = a.id AND newest.seq = a.seq
WHERE a.id = ANY (%(keys)s::bigint[])
"""

RUNNING_BALANCE: LiteralString = """
SELECT account_id AS key, account_id::text AS id, count(*) AS things,
       bool_or(balance_after <> before + amount OR balance_after < 0 OR seq <> previous + 1) AS is_wrong
FROM (
    SELECT account_id, seq, amount, balance_after,
           lag(balance_after, 1, 0::bigint) OVER (PARTITION BY account_id ORDER BY seq) AS before,
           lag(seq, 1, 0::bigint) OVER (PARTITION BY account_id ORDER BY seq) AS previous
    FROM credit_entries
    WHERE account_id = ANY (%(keys)s::bigint[])
      AND seq IS NOT NULL
) AS e
GROUP BY account_id
"""

CONSERVED: LiteralString = """
SELECT b.account_id AS key, b.id::text AS id, 1 AS things,
       b.granted <> coalesce(m.granted, 0)
       OR b.consumed + b.expired <> coalesce(m.gone, 0)
       OR b.granted <> b.remaining + b.reserved + b.consumed + b.expired
       OR least(b.remaining, b.reserved, b.consumed, b.expired) < 0
       OR m.accounts <> 1
       OR b.account_id <> m.account_id AS is_wrong
FROM batch AS b
LEFT JOIN (
    SELECT batch_id, sum(granted) AS granted, sum(gone) AS gone, count(*) AS accounts, min(account_id) AS account_id
    FROM moved
    GROUP BY batch_id
) AS m ON m.batch_id = b.id
"""

ZERO: LiteralString = """
SELECT min(l.account_id) AS key, l.transaction_id::text AS id, 1 AS things,
       sum(l.amount) <> 0 OR min(t.id::text) IS NULL OR bool_or(t.account_id <> l.account_id) AS is_wrong
FROM line AS l
LEFT JOIN credit_transactions AS t ON t.id = l.transaction_id
GROUP BY l.transaction_id
"""

EXPIRED: LiteralString = """
, ended AS MATERIALIZED (
    SELECT b.account_id, sum(b.expired) AS expired FROM batch AS b GROUP BY b.account_id
), booked AS MATERIALIZED (
    SELECT e.account_id, sum(e.amount) AS amount
    FROM credit_entries AS e
    WHERE e.transaction_id = ANY (ARRAY(
        SELECT DISTINCT transaction_id
        FROM credit_entries
        WHERE account_id = ANY (%(keys)s::bigint[])
          AND seq IS NOT NULL
          AND amount < 0
    ))
      AND e.account = 'system:expiry'
    GROUP BY e.account_id
)
SELECT a.id AS key, a.id::text AS id, 1 AS things, coalesce(e.expired, 0) <> coalesce(b.amount, 0) AS is_wrong
FROM credit_accounts AS a
LEFT JOIN ended AS e ON e.account_id = a.id
LEFT JOIN booked AS b ON b.account_id = a.id
WHERE a.id = ANY (%(keys)s::bigint[])
"""

EXPIRED_ONCE: LiteralString = """
SELECT l.account_id AS key, l.batch_id::text AS id, 1 AS things, count(*) > 1 AS is_wrong
FROM line AS l
JOIN credit_transactions AS t ON t.id = l.transaction_id
WHERE t.kind = 'expire'
  AND l.batch_id IS NOT NULL
GROUP BY l.account_id, l.batch_id
"""

RESERVED: LiteralString = """
, open AS MATERIALIZED (
    SELECT account_id, batch_id, sum(amount) AS amount
    FROM credit_reservations
    WHERE account_id = ANY (%(keys)s::bigint[])
    GROUP BY account_id, batch_id
)
SELECT coalesce(b.account_id, o.account_id) AS key, coalesce(b.id, o.batch_id)::text AS id, 1 AS things,
       coalesce(b.reserved, 0) <> coalesce(o.amount, 0) OR b.account_id <> o.account_id AS is_wrong
FROM batch AS b
FULL JOIN open AS o ON o.batch_id = b.id
"""

REFERENCES: LiteralString = """
SELECT account_id AS key, min(id::text) AS id, 1 AS things, count(*) > 1 AS is_wrong
FROM credit_transactions
WHERE account_id = ANY (%(keys)s::bigint[])
  AND reference IS NOT NULL
  AND kind IN ('consume', 'reserve', 'capture', 'release')
GROUP BY account_id, reference, kind IN ('consume', 'reserve')
"""

# A settlement is told from its answer: what was captured, released and found expired.
SETTLED: LiteralString = """
SELECT r.account_id AS key, r.id::text AS id, 1 AS things,
       CASE WHEN s.ids = 1 THEN s.amount <> r.amount OR o.amount IS NOT NULL
            ELSE coalesce(o.amount, 0) <> r.amount OR s.ids > 1 END AS is_wrong
FROM credit_transactions AS r
LEFT JOIN LATERAL (
    SELECT count(*) AS ids,
           sum(coalesce((s.answer ->> 'captured')::bigint + (s.answer ->> 'released')::bigint
                        + (s.answer ->> 'expired')::bigint, 0)) AS amount
    FROM credit_transactions AS s
    WHERE s.corrects = r.id
      AND s.kind IN ('capture', 'release')
) AS s ON true
LEFT JOIN LATERAL (
    SELECT sum(o.amount) AS amount
    FROM credit_reservations AS o
    WHERE o.account_id = r.account_id
      AND o.reference = r.reference
) AS o ON true
WHERE r.account_id = ANY (%(keys)s::bigint[])
  AND r.kind = 'reserve'
  AND r.reference IS NOT NULL
"""

# An upgrade within the month adds a batch and raises the grant: together they give its amount.
GRANTS: LiteralString = """
, due AS MATERIALIZED (
    SELECT p.account_id, p.next_grant_at, g.*
    FROM purchases AS p
    JOIN credit_grants AS g ON g.purchase_id = p.id
    WHERE p.account_id = ANY (%(keys)s::bigint[])
), given AS MATERIALIZED (
    SELECT account_id, purchase_id, period_start, sum(granted) AS amount, array_agg(id) AS ids
    FROM batch
    WHERE source = 'subscription'
      AND period_start IS NOT NULL
    GROUP BY account_id, purchase_id, period_start
)
SELECT coalesce(d.account_id, g.account_id) AS key, coalesce(d.purchase_id, g.purchase_id)::text AS id, 1 AS things,
       d.amount IS DISTINCT FROM g.amount
       OR d.transaction_id <> ALL (g.ids)
       OR d.account_id <> g.account_id
       OR d.period_start >= d.next_grant_at AS is_wrong
FROM due AS d
FULL JOIN given AS g ON g.purchase_id = d.purchase_id AND g.period_start = d.period_start
"""

SPENT_DEAD: LiteralString = """
SELECT l.account_id AS key, l.transaction_id::text AS id, 1 AS things,
       bool_or(b.expires_at <= t.created_at) IS TRUE AS is_wrong
FROM line AS l
JOIN credit_transactions AS t ON t.id = l.transaction_id
JOIN credit_batches AS b ON b.id = l.batch_id
WHERE t.kind = 'consume'
GROUP BY l.account_id, l.transaction_id
"""

# A refund of credits from several batches is several transactions, the first of which has the reference.
REFUNDS: LiteralString = """
SELECT first.account_id AS key, first.corrects::text AS id, 1 AS things,
       sum(refund.amount) > min(spent.amount) OR min(spent.amount) IS NULL
       OR bool_or(spent.account_id <> refund.account_id) AS is_wrong
FROM (
    SELECT DISTINCT account_id, corrects
    FROM credit_transactions
    WHERE account_id = ANY (%(keys)s::bigint[])
      AND kind = 'refund'
      AND reference IS NOT NULL
) AS first
LEFT JOIN credit_transactions AS refund ON refund.corrects = first.corrects AND refund.kind = 'refund'
LEFT JOIN credit_transactions AS spent ON spent.id = first.corrects AND spent.kind IN ('consume', 'capture')
GROUP BY first.account_id, first.corrects
"""

# message:<id>, or message:<id>/<n> when a reschedule rated it anew. A text that is no id belongs to no message.
RESERVED_FOR: LiteralString = """
SELECT r.account_id AS key, r.reference AS id, 1 AS things,
       m.id IS NULL
       OR r.reference <> 'message:' || m.id || CASE WHEN m.rerated > 0 THEN '/' || m.rerated ELSE '' END
       OR m.credit_account_id IS DISTINCT FROM r.account_id
       OR m.credits <> r.amount
       OR (m.state <> 'ambiguous' AND NOT EXISTS (SELECT FROM message_queue AS q WHERE q.message_id = m.id)) AS is_wrong
FROM (
    SELECT account_id, reference, sum(amount) AS amount,
           CASE WHEN reference ~ '^message:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}(/[0-9]+)?$'
                THEN substr(reference, 9, 36)::uuid END AS message_id
    FROM credit_reservations
    WHERE account_id = ANY (%(keys)s::bigint[])
      AND reference LIKE 'message:%%'
    GROUP BY account_id, reference
) AS r
LEFT JOIN messages AS m ON m.id = r.message_id
"""

# The other way round is `paid`: this finds what was charged for a message that was not sent, twice, or as another one.
CAPTURED_FOR: LiteralString = """
SELECT t.account_id AS key, t.reference AS id, 1 AS things,
       m.id IS NULL
       OR m.credits = 0
       OR t.reference <> 'message:' || m.id || CASE WHEN m.rerated > 0 THEN '/' || m.rerated ELSE '' END
       OR m.credit_account_id IS DISTINCT FROM t.account_id
       OR t.amount <> m.credits / m.credit_units
                    * least(greatest(m.used - (m.units - m.credit_units - m.metered_units), 0), m.credit_units)
       AS is_wrong
FROM (
    SELECT account_id, reference, amount,
           CASE WHEN reference ~ '^message:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}(/[0-9]+)?$'
                THEN substr(reference, 9, 36)::uuid END AS message_id
    FROM credit_transactions
    WHERE account_id = ANY (%(keys)s::bigint[])
      AND kind = 'capture'
      AND reference >= 'message:'
      AND reference < 'message;'
) AS t
LEFT JOIN LATERAL (
    SELECT m.*, coalesce((
               SELECT coalesce((e.data ->> 'units')::bigint, m.units)
               FROM message_events AS e
               WHERE e.message_id = m.id AND e.recipient = '' AND e.kind = 'sent' AND e.provider_ref = ''
           ), 0) AS used
    FROM messages AS m
    WHERE m.id = t.message_id
) AS m ON true
"""

CREDITS: tuple[Invariant, ...] = (
    Invariant(
        "credit_balance",
        "a wallet's balance is what its batches hold, the sum of its entries and the balance after the last of them",
        "accounts",
        BATCHES + BALANCE,
    ),
    Invariant(
        "credit_running_balance",
        "the entries of a wallet are numbered without holes, and each continues the balance of the one before",
        "accounts",
        RUNNING_BALANCE,
    ),
    Invariant(
        "credit_batches",
        "what a batch was granted, consumed and expired is what the entries say, and nothing of it is negative",
        "accounts",
        BATCHES + CONSERVED,
    ),
    Invariant(
        "credit_zero",
        "the entries of a credit transaction sum to zero, and each belongs to one of its wallet",
        "accounts",
        LINES + ZERO,
    ),
    Invariant("credit_expired", "what has expired is what was booked to system:expiry", "accounts", BATCHES + EXPIRED),
    Invariant("credit_expired_once", "a batch is expired by the job once", "accounts", LINES + EXPIRED_ONCE),
    Invariant(
        "credit_reserved", "what a batch has reserved is what open reservations hold of it", "accounts",
        BATCHES + RESERVED,
    ),
    Invariant(
        "credit_references", "a reference stands for one spend, and a reservation is settled at most once", "accounts",
        REFERENCES,
    ),
    Invariant(
        "credit_settled",
        "a reservation is open with all it took, or was settled: captured, released and expired are all it took",
        "accounts",
        SETTLED,
    ),
    Invariant(
        "credit_grants",
        "each month of a subscription that was granted has the batches that give it, and none has others",
        "accounts",
        BATCHES + GRANTS,
    ),
    Invariant(
        "credit_never_spent_dead", "nothing was spent at once from a batch that had ended", "accounts",
        LINES + SPENT_DEAD,
    ),
    Invariant("credit_refunds", "no more was refunded than was spent", "accounts", REFUNDS),
    Invariant(
        "credit_reserved_for",
        "credits reserved for a message are those it was rated at, and the message is not finished",
        "accounts",
        RESERVED_FOR,
    ),
    Invariant(
        "credit_captured_for",
        "what a wallet was charged for a message is what was sent of it beyond the included units",
        "accounts",
        CAPTURED_FOR,
    ),
    Invariant(
        "credit_burn_order",
        "every spend took from batches alive then, in order: priority, earliest end, earliest issue, id",
        "accounts",
        None,
    ),
    Invariant(
        "credit_replay",
        "done again from the first entry, each batch has what it has: remaining, reserved, consumed, expired",
        "accounts",
        None,
    ),
)  # fmt: skip
