"""credit_batches coming in: grants by hand, refunds, clawbacks, and the grants of subscriptions in sets.

A chunk grants one period each of up to `limit` purchases, in the order of the days on which the periods begin, and of
the accounts. A subscription that missed several has its next one somewhere after or before the chunk's end: a run goes
through all that is due again and again until nothing is. Locks: purchases → accounts → batches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any, Literal, NamedTuple
from uuid import UUID

from nightmail.rules.credits import REFUND_DAYS, fingerprint
from nightmail.store.credits import DoesNotFit, Done, NotFound, OtherBody, TooMuch, Wallet
from nightmail.store.database import Connection
from nightmail.store.fan_out import Fact, fan_out

Source = Literal["subscription", "purchase", "bonus", "refund"]


@dataclass(frozen=True, slots=True)
class NewGrant:
    """Credits to be given; `expires_at` None means that they do not end.

    `counter` is the ledger account they come from. `purchase_id` and `period_start` say for which month of a
    subscription they are.
    """

    amount: int
    reference: str
    source: Source = "bonus"
    priority: int = 100
    expires_at: datetime | None = None
    counter: str = "system:grant"
    reason: str | None = None
    purchase_id: UUID | None = None
    period_start: datetime | None = None


GRANT = """
SELECT outcome, answer, transaction_id
FROM nm_credit_grant(
    'grant', %(org_id)s, %(env)s, %(user_id)s, %(reference)s, %(fingerprint)s, %(amount)s, %(source)s,
    %(priority)s::smallint, NULL, %(expires_at)s, %(counter)s, %(reason)s, NULL, %(purchase_id)s, %(period_start)s
)
"""


async def grant(conn: Connection, wallet: Wallet, new: NewGrant) -> Done | OtherBody | DoesNotFit:
    """Give credits as a batch of their own; makes the account when there is none."""
    arguments = {
        "org_id": wallet.org_id,
        "env": wallet.env,
        "user_id": wallet.user_id,
        "reference": new.reference,
        "fingerprint": fingerprint(new.amount, new.source, new.priority, new.expires_at, new.counter, new.reason),
        "amount": new.amount,
        "source": new.source,
        "priority": new.priority,
        "expires_at": new.expires_at,
        "counter": new.counter,
        "reason": new.reason,
        "purchase_id": new.purchase_id,
        "period_start": new.period_start,
    }
    async with conn.transaction():
        outcome, answer, _ = await _one(conn, GRANT, arguments)
        if outcome == "done":
            await fan_out(conn, [_granted_fact(wallet, answer)])
    return _result(outcome, answer)


REFUND = """
SELECT outcome, answer
FROM nm_credit_refund(
    %(org_id)s, %(env)s, %(user_id)s, %(reference)s, %(fingerprint)s, %(of)s, %(amount)s, %(reason)s, %(least_days)s
)
"""


async def refund(
    conn: Connection, wallet: Wallet, *, reference: str, of: str, amount: int | None = None, reason: str | None = None
) -> Done | TooMuch | OtherBody | NotFound | DoesNotFit:
    """Give back what the spend with the reference `of` took, or `amount` of it; several may add up to all of it."""
    async with conn.transaction():
        outcome, answer = await _one(
            conn,
            REFUND,
            {
                "org_id": wallet.org_id,
                "env": wallet.env,
                "user_id": wallet.user_id,
                "reference": reference,
                "fingerprint": fingerprint(of, amount, reason),
                "of": of,
                "amount": amount,
                "reason": reason,
                "least_days": REFUND_DAYS,
            },
        )
        if outcome == "done":
            await fan_out(conn, [_granted_fact(wallet, answer)])
    if outcome == "too_much" and answer is not None:
        return TooMuch(answer["refundable"])
    if outcome == "not_found":
        return "not_found"
    return _result(outcome, answer)


CLAW_BACK = """
SELECT outcome, answer
FROM nm_credit_claw_back(
    %(org_id)s, %(env)s, %(user_id)s, %(reference)s, %(fingerprint)s, %(batch_id)s, %(amount)s, %(reason)s
)
"""


async def claw_back(
    conn: Connection, wallet: Wallet, *, reference: str, batch_id: UUID, reason: str, amount: int | None = None
) -> Done | OtherBody | NotFound:
    """Take back what is left of a batch, or at most `amount` of that; without an amount the batch ends now."""
    outcome, answer = await _one(
        conn,
        CLAW_BACK,
        {
            "org_id": wallet.org_id,
            "env": wallet.env,
            "user_id": wallet.user_id,
            "reference": reference,
            "fingerprint": fingerprint(batch_id, amount, reason),
            "batch_id": batch_id,
            "amount": amount,
            "reason": reason,
        },
    )
    if outcome in ("other_body", "not_found"):
        return "other_body" if outcome == "other_body" else "not_found"
    return Done(answer, outcome == "replayed")


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a run has come: the day (UTC) on which something begins or ends, whose it is, and the id of the row."""

    day: date | Literal["-infinity"] = "-infinity"
    account_id: int = 0
    id: UUID = field(default=UUID(int=0))


START = Cursor()


class Lane(NamedTuple):
    """One of the `of` parts in which a run works side by side; blocks of 1,024 accounts are dealt out to them in turn.

    Each account is in one lane, so that no lane waits for another's lock; and blocks, so that neither writes to the
    other's pages.
    """

    number: int = 0
    of: int = 1


WHOLE = Lane()


@dataclass(frozen=True, slots=True)
class GrantChunk:
    """What one chunk did: periods looked at, granted, and not granted because they have been before or give nothing."""

    processed: int
    successful: int
    skipped: int
    cursor: Cursor


# The rows are locked before anything is decided, and each of them is decided on as it is then: a second runner that
# has waited here finds next_grant_at moved on, so that a look into credit_grants is enough (ON CONFLICT costs twice
# that). Batches and grants are new rows; the accounts are locked in order of id. A purchase that an earlier run could
# not grant is tried when all others are done (%(again)s). Grace is in hours: a day of timestamptz may have 23 or 25 in
# the session's zone. Facts are made only for orgs that listen. No CTE is joined with another, and IS TRUE keeps the
# planner from making a join of IN: when statistics change in the middle of a run it takes such sets for one row, and
# nested loops over them for the cheapest.
GRANT_CHUNK = """
WITH base AS MATERIALIZED (
    SELECT nm_uuid7()::text AS id
), due AS MATERIALIZED (
    SELECT p.id AS purchase_id, p.account_id, p.plan_id, p.quantity, p.anchor, p.next_period,
           p.next_grant_at AS period_start
    FROM purchases AS p
    WHERE (p.next_grant_at AT TIME ZONE 'UTC')::date <= (nm_now() AT TIME ZONE 'UTC')::date
      AND p.next_grant_at <= nm_now()
      AND (p.holds_from IS NULL OR p.next_grant_at < p.holds_from)
      AND ((p.next_grant_at AT TIME ZONE 'UTC')::date, p.account_id, p.id)
          > (%(after_day)s::date, %(after_account)s, %(after_id)s)
      AND (p.failed_run IS NOT NULL) = %(again)s
      AND p.failed_run IS DISTINCT FROM %(job_id)s
      AND (p.account_id >> 10) %% %(lanes)s = %(lane)s
    ORDER BY (p.next_grant_at AT TIME ZONE 'UTC')::date, p.account_id, p.id
    LIMIT %(limit)s
    FOR UPDATE
), locked AS MATERIALIZED (
    SELECT d.*, a.org_id, a.env, a.user_id, a.balance, a.seq
    FROM due AS d
    JOIN credit_accounts AS a ON a.id = d.account_id
    ORDER BY a.id
    FOR NO KEY UPDATE OF a
), period AS MATERIALIZED (
    SELECT d.*, d.quantity * n.credits AS credits, n.priority, n.rollover_cap > 0 AS rolls_over,
           CASE WHEN n.expires THEN
               nm_period_start(d.anchor, d.next_period + 1) + make_interval(hours => 24 * n.grace_days)
           END AS expires_at,
           nm_nth_id((SELECT id FROM base), row_number() OVER (ORDER BY d.account_id, d.purchase_id)) AS id
    FROM locked AS d
    JOIN plans AS n ON n.id = d.plan_id
), line AS MATERIALIZED (
    SELECT p.*, row_number() OVER earlier AS nth, (sum(p.credits) OVER earlier)::bigint AS so_far
    FROM period AS p
    WHERE p.credits > 0
      AND NOT EXISTS (
          SELECT FROM credit_grants AS g WHERE g.purchase_id = p.purchase_id AND g.period_start = p.period_start
      )
    WINDOW earlier AS (PARTITION BY p.account_id ORDER BY p.id ROWS UNBOUNDED PRECEDING)
), given AS (
    INSERT INTO credit_grants (purchase_id, period_start, transaction_id, amount)
    SELECT purchase_id, period_start, id, credits
    FROM line
), batch AS (
    INSERT INTO credit_batches (
        id, account_id, granted, remaining, rolls_over, priority, source, issued_at, expires_at, purchase_id,
        period_start
    )
    SELECT id, account_id, credits, credits, rolls_over, priority, 'subscription', period_start, expires_at,
           purchase_id, period_start
    FROM line
), header AS (
    INSERT INTO credit_transactions (id, account_id, kind, amount)
    SELECT id, account_id, 'grant', credits
    FROM line
), entry AS (
    INSERT INTO credit_entries (transaction_id, line, account_id, account, seq, balance_after, batch_id, amount)
    SELECT l.id, side.line, l.account_id, side.account, CASE side.line WHEN 1 THEN l.seq + l.nth END,
           CASE side.line WHEN 1 THEN l.balance + l.so_far END, CASE side.line WHEN 1 THEN l.id END,
           side.sign * l.credits
    FROM line AS l
    CROSS JOIN (VALUES (1, 'wallet', 1), (2, 'system:grant', -1)) AS side (line, account, sign)
), booked AS (
    UPDATE credit_accounts AS a
    SET balance = a.balance + t.credits, seq = a.seq + t.entries
    FROM (SELECT account_id, sum(credits)::bigint AS credits, count(*) AS entries FROM line GROUP BY account_id) AS t
    WHERE a.id = t.account_id
), moved AS (
    UPDATE purchases AS p
    SET next_period = d.next_period + 1,
        next_grant_at = nm_period_start(d.anchor, d.next_period + 1),
        failed_run = NULL,
        grant_error = NULL
    FROM due AS d
    WHERE p.id = d.purchase_id
)
SELECT (SELECT count(*) FROM due), (SELECT count(*) FROM line),
       last.day, last.account_id, last.purchase_id,
       (SELECT array_agg(id) FROM line WHERE rolls_over),
       (
           SELECT jsonb_agg(jsonb_build_object(
               'org_id', l.org_id, 'env', l.env, 'user_id', l.user_id, 'batch_id', l.id, 'amount', l.credits,
               'source', 'subscription', 'purchase_id', l.purchase_id, 'period_start', l.period_start,
               'expires_at', l.expires_at
           ) ORDER BY l.id)
           FROM line AS l
           WHERE ((l.org_id, l.env) IN (
               SELECT e.org_id, e.env FROM webhook_endpoints AS e
               WHERE e.status <> 'disabled' AND 'credits.granted' = ANY (e.topics)
           )) IS TRUE
       )
FROM (VALUES (1)) AS one
LEFT JOIN (
    SELECT (period_start AT TIME ZONE 'UTC')::date AS day, account_id, purchase_id
    FROM due
    ORDER BY 1 DESC, 2 DESC, 3 DESC
    LIMIT 1
) AS last ON true
"""

# The same for one purchase, when it was just made or changed.
GRANT_ONE = GRANT_CHUNK.replace(
    """      AND ((p.next_grant_at AT TIME ZONE 'UTC')::date, p.account_id, p.id)
          > (%(after_day)s::date, %(after_account)s, %(after_id)s)
      AND (p.failed_run IS NOT NULL) = %(again)s
      AND p.failed_run IS DISTINCT FROM %(job_id)s
      AND (p.account_id >> 10) %% %(lanes)s = %(lane)s
""",
    "      AND p.id = %(purchase_id)s\n",
)

# Leftovers of earlier months go into one batch of the new month, newest first, up to the plan's cap; the rest ends as
# it would have. It does not matter how late this runs: what was alive when the month began is carried, and the expiry
# job leaves a batch alone while this is still to come. Within one wallet, so that the balance stays. `base` is a CTE
# because a subquery in FROM may be evaluated anew for each row: that made a batch of each leftover.
ROLL_OVER = """
WITH base AS MATERIALIZED (
    SELECT nm_uuid7()::text AS id
), fresh AS MATERIALIZED (
    SELECT b.account_id, b.purchase_id, b.period_start, b.expires_at, b.priority,
           p.quantity * n.rollover_cap AS rollover_cap
    FROM credit_batches AS b
    JOIN purchases AS p ON p.id = b.purchase_id
    JOIN plans AS n ON n.id = p.plan_id
    WHERE b.id = ANY (%(grants)s)
), old AS MATERIALIZED (
    SELECT old.*, least(old.remaining, old.rollover_cap - (old.so_far - old.remaining))::bigint AS amount,
           nm_nth_id((SELECT id FROM base), dense_rank() OVER (ORDER BY old.purchase_id)) AS id
    FROM (
        SELECT f.*, b.id AS batch_id, b.remaining,
               sum(b.remaining) OVER (PARTITION BY f.purchase_id ORDER BY b.period_start DESC, b.id DESC) AS so_far
        FROM fresh AS f
        JOIN credit_batches AS b ON b.account_id = f.account_id
        WHERE b.is_open
          AND b.rolls_over
          AND b.purchase_id = f.purchase_id
          AND b.period_start < f.period_start
          AND b.expires_at >= f.period_start
    ) AS old
    WHERE old.so_far - old.remaining < old.rollover_cap
), target AS MATERIALIZED (
    SELECT id, account_id, purchase_id, period_start, expires_at, priority, sum(amount)::bigint AS amount
    FROM old
    GROUP BY id, account_id, purchase_id, period_start, expires_at, priority
), emptied AS (
    UPDATE credit_batches AS b
    SET remaining = b.remaining - old.amount, consumed = b.consumed + old.amount
    FROM old
    WHERE b.id = old.batch_id
), batch AS (
    INSERT INTO credit_batches (
        id, account_id, granted, remaining, rolls_over, priority, source, issued_at, expires_at, purchase_id,
        period_start
    )
    SELECT id, account_id, amount, amount, true, priority, 'rollover', period_start, expires_at, purchase_id,
           period_start
    FROM target
), header AS (
    INSERT INTO credit_transactions (id, account_id, kind, amount)
    SELECT id, account_id, 'rollover', amount
    FROM target
), line AS MATERIALIZED (
    SELECT m.*, row_number() OVER earlier AS nth, row_number() OVER within AS nth_line,
           (sum(m.amount) OVER earlier)::bigint AS so_far
    FROM (
        SELECT account_id, id, batch_id, -amount AS amount
        FROM old
        UNION ALL
        SELECT account_id, id, id, amount
        FROM target
    ) AS m
    WINDOW earlier AS (PARTITION BY m.account_id ORDER BY m.id, m.batch_id ROWS UNBOUNDED PRECEDING),
           within AS (PARTITION BY m.id ORDER BY m.batch_id)
), entry AS (
    INSERT INTO credit_entries (transaction_id, line, account_id, account, seq, balance_after, batch_id, amount)
    SELECT l.id, l.nth_line, l.account_id, 'wallet', a.seq + l.nth, a.balance + l.so_far, l.batch_id, l.amount
    FROM line AS l
    JOIN credit_accounts AS a ON a.id = l.account_id
)
UPDATE credit_accounts AS a
SET seq = a.seq + t.entries
FROM (SELECT account_id, count(*) AS entries FROM line GROUP BY account_id) AS t
WHERE a.id = t.account_id
"""

# SET LOCAL as one statement. Without it the planner takes hash joins over whole tables for chunks of this size (2 times
# slower).
TUNE = "SELECT set_config('random_page_cost', '1.1', true), set_config('jit', 'off', true)"


async def grant_chunk(
    conn: Connection, *, job_id: UUID, after: Cursor, limit: int, again: bool = False, lane: Lane = WHOLE
) -> GrantChunk | None:
    """Grant the next due period of up to `limit` purchases in one transaction; None when nothing is due after `after`.

    `again` False leaves out what an earlier run could not grant, True takes only that.
    """
    arguments = {"limit": limit, **_place(job_id, after, again, lane)}
    async with conn.transaction():
        await conn.execute(TUNE)
        return await _grant(conn, GRANT_CHUNK, arguments)


def _place(job_id: UUID, after: Cursor, again: bool, lane: Lane) -> dict[str, Any]:
    """Return what says which purchases come next."""
    return {
        "job_id": job_id,
        "after_day": after.day,
        "after_account": after.account_id,
        "after_id": after.id,
        "again": again,
        "lane": lane.number,
        "lanes": lane.of,
    }


async def grant_purchase(conn: Connection, purchase_id: UUID) -> int:
    """Grant every due period of this purchase; part of the caller's transaction. Returns how many it granted."""
    granted = 0
    while (chunk := await _grant(conn, GRANT_ONE, {"purchase_id": purchase_id, "limit": 1})) is not None:
        granted += chunk.successful
    return granted


async def _grant(conn: Connection, statement: Any, arguments: dict[str, Any]) -> GrantChunk | None:
    processed, successful, *last, rolling, told = await _one(conn, statement, arguments)
    if processed == 0:
        return None
    if rolling:
        await conn.execute(ROLL_OVER, {"grants": rolling})
    await fan_out(conn, [_told_fact(item) for item in told or ()])
    return GrantChunk(processed, successful, processed - successful, Cursor(*last))


MARK_FAILED = """
WITH due AS MATERIALIZED (
    SELECT p.id, p.next_grant_at
    FROM purchases AS p
    WHERE (p.next_grant_at AT TIME ZONE 'UTC')::date <= (nm_now() AT TIME ZONE 'UTC')::date
      AND p.next_grant_at <= nm_now()
      AND (p.holds_from IS NULL OR p.next_grant_at < p.holds_from)
      AND ((p.next_grant_at AT TIME ZONE 'UTC')::date, p.account_id, p.id)
          > (%(after_day)s::date, %(after_account)s, %(after_id)s)
      AND (p.failed_run IS NOT NULL) = %(again)s
      AND p.failed_run IS DISTINCT FROM %(job_id)s
      AND (p.account_id >> 10) %% %(lanes)s = %(lane)s
    ORDER BY (p.next_grant_at AT TIME ZONE 'UTC')::date, p.account_id, p.id
    LIMIT 1
    FOR UPDATE
)
UPDATE purchases AS p
SET failed_run = %(job_id)s,
    grant_error = %(error)s
FROM due
WHERE p.id = due.id
RETURNING (due.next_grant_at AT TIME ZONE 'UTC')::date, p.account_id, p.id
"""


async def mark_grant_failed(
    conn: Connection, *, job_id: UUID, after: Cursor, error: str, again: bool = False, lane: Lane = WHOLE
) -> Cursor | None:
    """Note why the first due purchase after `after` could not be granted; return where it stands."""
    arguments = {"error": error[:500], **_place(job_id, after, again, lane)}
    cursor = await conn.execute(MARK_FAILED, arguments)
    row = await cursor.fetchone()
    return Cursor(*row) if row else None


COUNT_DUE = """
SELECT count(*), count(*) FILTER (WHERE n.credits > 0 AND g.purchase_id IS NULL)
FROM purchases AS p
JOIN plans AS n ON n.id = p.plan_id
CROSS JOIN LATERAL generate_series(
    p.next_period, p.next_period + (extract(epoch FROM nm_now() - p.next_grant_at) / 2419200)::int + 1
) AS period (nth)
LEFT JOIN credit_grants AS g ON g.purchase_id = p.id AND g.period_start = nm_period_start(p.anchor, period.nth)
WHERE p.next_grant_at <= nm_now()
  AND (p.holds_from IS NULL OR p.next_grant_at < p.holds_from)
  AND nm_period_start(p.anchor, period.nth) <= nm_now()
  AND (p.holds_from IS NULL OR nm_period_start(p.anchor, period.nth) < p.holds_from)
"""


async def count_due_grants(conn: Connection) -> tuple[int, int]:
    """Count the periods that a run would look at now, and those it would grant."""
    processed, successful = await _one(conn, COUNT_DUE, {})
    return processed, successful


def _result(outcome: str, answer: dict[str, Any]) -> Done | OtherBody | DoesNotFit:
    if outcome == "other_body":
        return "other_body"
    if outcome == "too_much":
        return "does_not_fit"
    return Done(answer, outcome == "replayed")


def _granted_fact(wallet: Wallet, answer: dict[str, Any]) -> Fact:
    data = {"user_id": wallet.user_id, **{k: answer[k] for k in ("batch_id", "amount", "source", "expires_at")}}
    return Fact(wallet.org_id, wallet.env, "credits.granted", data=data)


def _told_fact(item: dict[str, Any]) -> Fact:
    """Return the fact of a grant of the job; times in UTC, as the API writes them."""
    for name in ("period_start", "expires_at"):
        if item[name] is not None:
            item[name] = datetime.fromisoformat(item[name]).astimezone(UTC).isoformat().replace("+00:00", "Z")
    return Fact(UUID(item.pop("org_id")), item.pop("env"), "credits.granted", data=item)


async def _one(conn: Connection, statement: Any, arguments: dict[str, Any]) -> Any:
    row = await (await conn.execute(statement, arguments)).fetchone()
    assert row is not None, "the statement returns one row"
    return row


FIND_BATCH = """
SELECT t.id
FROM credit_transactions AS t
JOIN credit_accounts AS a ON a.id = t.account_id
WHERE a.org_id = %(org_id)s
  AND a.env = %(env)s
  AND a.user_id = %(user_id)s
  AND t.kind = 'grant'
  AND t.reference = %(reference)s
"""


async def find_batch(conn: Connection, wallet: Wallet, reference: str) -> UUID | None:
    """Return the batch that a grant with this reference made, None when there was none."""
    cursor = await conn.execute(
        FIND_BATCH,
        {"org_id": wallet.org_id, "env": wallet.env, "user_id": wallet.user_id, "reference": reference},
    )
    row = await cursor.fetchone()
    return row[0] if row else None


SERVICE_OF = """
SELECT e.account
FROM credit_transactions AS t
JOIN credit_accounts AS a ON a.id = t.account_id
JOIN credit_entries AS e ON e.transaction_id = t.id
WHERE a.org_id = %(org_id)s
  AND a.env = %(env)s
  AND a.user_id = %(user_id)s
  AND t.kind IN ('consume', 'capture')
  AND t.reference = %(reference)s
  AND e.account LIKE 'service:%%'
"""


async def service_of(conn: Connection, wallet: Wallet, reference: str) -> str | None:
    """Return what a spend was for, None when nothing was spent by this reference."""
    cursor = await conn.execute(
        SERVICE_OF,
        {"org_id": wallet.org_id, "env": wallet.env, "user_id": wallet.user_id, "reference": reference},
    )
    row = await cursor.fetchone()
    return str(row[0]).removeprefix("service:") if row else None
