"""credit_batches ending: book as expired what has been unspendable since its expiry.

A chunk takes whole accounts: every batch of theirs that has ended, so that a run counts each user once and locks each
account once. Locks: accounts in order of id → batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from nightmail.store.credit_grants import TUNE, WHOLE, Cursor, Lane
from nightmail.store.credits import Wallet, expired_fact
from nightmail.store.database import Connection
from nightmail.store.fan_out import fan_out


@dataclass(frozen=True, slots=True)
class ExpiryChunk:
    """What one chunk booked."""

    batches: int
    users: int
    amount: int
    cursor: Cursor


# `past` locks each account and then its batches, account by account, and reads them as they are then: the lock returns
# the newest version of a row that was spent from meanwhile, and drops it when nothing is left. A batch from which a
# grant will still carry credits over is left to that grant, also while it waits for a payment: what is carried must
# not depend on when this job runs. The ids of one set end after 65,535 (nm_nth_id), hence the second LIMIT; what it
# leaves is taken by the same chunk again. No CTE is joined with another, and IS TRUE keeps the planner from making a
# join of IN: when statistics change in the middle of a run it takes such sets for one row, and nested loops over them
# for the cheapest.
EXPIRE_CHUNK = """
WITH base AS MATERIALIZED (
    SELECT nm_uuid7()::text AS id
), due AS MATERIALIZED (
    SELECT b.account_id, (b.expires_at AT TIME ZONE 'UTC')::date AS day, b.id
    FROM credit_batches AS b
    WHERE b.is_open
      AND (b.expires_at AT TIME ZONE 'UTC')::date <= (%(until)s AT TIME ZONE 'UTC')::date
      AND b.expires_at <= %(until)s
      AND ((b.expires_at AT TIME ZONE 'UTC')::date, b.account_id, b.id)
          > (%(after_day)s::date, %(after_account)s, %(after_id)s)
      AND (b.account_id >> 10) %% %(lanes)s = %(lane)s
    ORDER BY (b.expires_at AT TIME ZONE 'UTC')::date, b.account_id, b.id
    LIMIT %(limit)s
), past AS MATERIALIZED (
    SELECT a.id AS account_id, a.org_id, a.env, a.user_id, a.balance, a.seq, b.id AS batch_id, b.remaining
    FROM credit_accounts AS a
    JOIN credit_batches AS b ON b.account_id = a.id
    WHERE a.id = ANY (ARRAY(SELECT account_id FROM due))
      AND b.is_open
      AND b.expires_at <= %(until)s
      AND CASE WHEN b.rolls_over THEN NOT EXISTS (
              SELECT FROM purchases AS p
              WHERE p.id = b.purchase_id
                AND p.next_grant_at <= nm_now()
                AND (p.ends_at IS NULL OR p.next_grant_at < p.ends_at)
          ) ELSE true END
    ORDER BY a.id, b.id
    LIMIT %(most)s
    FOR NO KEY UPDATE
), line AS MATERIALIZED (
    SELECT p.*, nm_nth_id((SELECT id FROM base), row_number() OVER (ORDER BY p.account_id, p.batch_id)) AS id,
           row_number() OVER earlier AS nth, (sum(p.remaining) OVER earlier)::bigint AS so_far
    FROM past AS p
    WINDOW earlier AS (PARTITION BY p.account_id ORDER BY p.batch_id ROWS UNBOUNDED PRECEDING)
), ended AS (
    UPDATE credit_batches AS b
    SET remaining = b.remaining - l.remaining, expired = b.expired + l.remaining
    FROM line AS l
    WHERE b.id = l.batch_id
), header AS (
    INSERT INTO credit_transactions (id, account_id, kind, amount)
    SELECT id, account_id, 'expire', remaining
    FROM line
), entry AS (
    INSERT INTO credit_entries (transaction_id, line, account_id, account, seq, balance_after, batch_id, amount)
    SELECT l.id, side.line, l.account_id, side.account, CASE side.line WHEN 1 THEN l.seq + l.nth END,
           CASE side.line WHEN 1 THEN l.balance - l.so_far END, CASE side.line WHEN 1 THEN l.batch_id END,
           side.sign * l.remaining
    FROM line AS l
    CROSS JOIN (VALUES (1, 'wallet', -1), (2, 'system:expiry', 1)) AS side (line, account, sign)
), total AS MATERIALIZED (
    SELECT account_id, org_id, env, user_id, sum(remaining)::bigint AS amount, count(*) AS entries
    FROM line
    GROUP BY account_id, org_id, env, user_id
), booked AS (
    UPDATE credit_accounts AS a
    SET balance = a.balance - t.amount, seq = a.seq + t.entries
    FROM total AS t
    WHERE a.id = t.account_id
)
SELECT (SELECT count(*) FROM due), (SELECT coalesce(sum(entries), 0)::bigint FROM total),
       (SELECT count(*) FROM total), (SELECT coalesce(sum(amount), 0)::bigint FROM total),
       last.day, last.account_id, last.id,
       (
           SELECT jsonb_agg(jsonb_build_object(
               'org_id', t.org_id, 'env', t.env, 'user_id', t.user_id, 'amount', t.amount
           ) ORDER BY t.account_id)
           FROM total AS t
           WHERE ((t.org_id, t.env) IN (
               SELECT e.org_id, e.env FROM webhook_endpoints AS e
               WHERE e.status <> 'disabled' AND 'credits.expired' = ANY (e.topics)
           )) IS TRUE
       )
FROM (VALUES (1)) AS one
LEFT JOIN (SELECT day, account_id, id FROM due ORDER BY 1 DESC, 2 DESC, 3 DESC LIMIT 1) AS last ON true
"""


# What one transaction books at most.
MOST = 50_000


async def expire_chunk(
    conn: Connection, *, until: datetime, after: Cursor, limit: int, lane: Lane = WHOLE, most: int = MOST
) -> ExpiryChunk | None:
    """Book one chunk of what ended at or before `until`, in one transaction; None when nothing is after `after`.

    When the accounts of the chunk had more than `most` batches to book, its cursor is `after`: the rest comes next.
    """
    async with conn.transaction():
        await conn.execute(TUNE)
        arguments = {"limit": limit, "most": most, **_place(until, after, lane)}
        cursor = await conn.execute(EXPIRE_CHUNK, arguments)
        row = await cursor.fetchone()
        assert row is not None, "the statement returns one row"
        due, batches, users, amount, *last, told = row
        if due == 0:
            return None
        facts = [
            expired_fact(Wallet(UUID(item["org_id"]), item["env"], item["user_id"]), item["amount"])
            for item in told or ()
        ]
        await fan_out(conn, facts)
    return ExpiryChunk(batches, users, amount, Cursor(*last) if batches < most else after)


def _place(until: datetime, after: Cursor, lane: Lane) -> dict[str, Any]:
    """Return what says which batches come next."""
    return {
        "until": until,
        "after_day": after.day,
        "after_account": after.account_id,
        "after_id": after.id,
        "lane": lane.number,
        "lanes": lane.of,
    }


FIRST_ENDED = """
SELECT (expires_at AT TIME ZONE 'UTC')::date, account_id, id
FROM credit_batches
WHERE is_open
  AND (expires_at AT TIME ZONE 'UTC')::date <= (%(until)s AT TIME ZONE 'UTC')::date
  AND expires_at <= %(until)s
  AND ((expires_at AT TIME ZONE 'UTC')::date, account_id, id)
      > (%(after_day)s::date, %(after_account)s, %(after_id)s)
  AND (account_id >> 10) %% %(lanes)s = %(lane)s
ORDER BY (expires_at AT TIME ZONE 'UTC')::date, account_id, id
LIMIT 1
"""


async def first_ended(conn: Connection, *, until: datetime, after: Cursor, lane: Lane = WHOLE) -> Cursor | None:
    """Return where the first batch after `after` stands that is to be booked."""
    cursor = await conn.execute(FIRST_ENDED, _place(until, after, lane))
    row = await cursor.fetchone()
    return Cursor(*row) if row else None


COUNT_ENDED = """
SELECT count(*), count(DISTINCT account_id), coalesce(sum(remaining), 0)::bigint
FROM credit_batches AS b
WHERE is_open
  AND expires_at <= nm_now()
  AND CASE WHEN rolls_over THEN NOT EXISTS (
          SELECT FROM purchases AS p
          WHERE p.id = b.purchase_id
            AND p.next_grant_at <= nm_now()
            AND (p.ends_at IS NULL OR p.next_grant_at < p.ends_at)
      ) ELSE true END
"""


async def count_ended(conn: Connection) -> tuple[int, int, int]:
    """Count the batches and users that a run would book now, and their credits."""
    row = await (await conn.execute(COUNT_ENDED)).fetchone()
    assert row is not None, "an aggregate has one row"
    return row[0], row[1], row[2]
