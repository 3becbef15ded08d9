"""The queue of unfinished messages: claim, renew, rescue, release.

A row is free (claim_id NULL) or held. Who holds it is a row of `claims` with a lease; the holder renews that one row.
Rescue ends leases that ran out: it locks the claim, frees its rows and deletes it, so "taken over" is one
transaction, and the claim statement only ever looks at free rows. Every later write names the claim_id; a runner that
slept past its lease finds its rows gone and changes nothing.

Fair share: a claim first gives each org with something due an equal part of the batch (queue_turns says which orgs
these may be), then fills up with the oldest rows of all. Both parts read an index in order and stop at the limit, so
a claim costs the same with ten thousand rows waiting as with ten million.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from nightmail.ids import new_claim_id
from nightmail.store.database import Connection

# A batch is shared by at most this many orgs; the next batch serves others.
TURNS_READ = 1000
DEAD_CLAIMS_PER_RESCUE = 100
TURNS_DELETED_PER_RUN = 20_000


@dataclass(frozen=True, slots=True)
class Claimed:
    """A queue row we hold until the claim's lease ends."""

    message_id: UUID
    org_id: UUID
    claim_id: UUID
    attempts: int
    takeovers: int
    in_doubt: bool
    file_bytes: int


# Both selects lock as they read and skip what others hold. MATERIALIZED: the planner must not run a limited,
# locking select once per outer row (it did: LIMIT 1 updated 2,000 rows). `<> ALL`: SKIP LOCKED does not skip our own
# locks, so without it a row could come twice. Arrays instead of joins: the planner cannot know how many rows a
# computed LIMIT yields, guesses a tenth of the table, and would hash all of it (4 times slower at 20,000 rows) or
# sort the backlog; an array is always looked up through the index.
CLAIM = """
WITH turn AS MATERIALIZED (
    SELECT org_id
    FROM (
        SELECT org_id
        FROM queue_turns
        WHERE lane = %(lane)s
          AND due_minute <= nm_now()
        ORDER BY due_minute
        LIMIT %(turns)s
    ) AS hint
    GROUP BY org_id
    ORDER BY random()
    LIMIT %(limit)s
), fair AS MATERIALIZED (
    SELECT share.message_id
    FROM turn
    CROSS JOIN LATERAL (
        SELECT q.message_id
        FROM message_queue AS q
        WHERE q.lane = %(lane)s
          AND q.org_id = turn.org_id
          AND q.claim_id IS NULL
          AND q.due_at <= nm_now()
        ORDER BY q.due_at
        LIMIT greatest(1, %(limit)s / (SELECT count(*) FROM turn))
        FOR UPDATE SKIP LOCKED
    ) AS share
), rest AS MATERIALIZED (
    SELECT q.message_id
    FROM message_queue AS q
    WHERE q.lane = %(lane)s
      AND q.claim_id IS NULL
      AND q.due_at <= nm_now()
      AND q.message_id <> ALL (ARRAY(SELECT message_id FROM fair))
    ORDER BY q.due_at
    LIMIT greatest(0, %(limit)s - (SELECT count(*) FROM fair))
    FOR UPDATE SKIP LOCKED
), lease AS (
    INSERT INTO claims (claim_id, runner, lease_until)
    SELECT %(claim_id)s, %(runner)s, nm_now() + make_interval(secs => %(lease_s)s)
    WHERE EXISTS (SELECT FROM fair)
       OR EXISTS (SELECT FROM rest)
)
UPDATE message_queue AS q
SET claim_id = %(claim_id)s
WHERE q.message_id = ANY (ARRAY(SELECT message_id FROM fair UNION ALL SELECT message_id FROM rest))
RETURNING q.message_id, q.org_id, q.claim_id, q.attempts, q.takeovers, q.intent_at IS NOT NULL,
          q.file_bytes
"""


async def claim_due(conn: Connection, lane: str, *, runner: str, limit: int, lease_s: float) -> list[Claimed]:
    """Take up to `limit` due messages of a lane under a fresh claim_id, each org's oldest first."""
    cursor = await conn.execute(
        CLAIM,
        {
            "lane": lane,
            "claim_id": new_claim_id(),
            "runner": runner,
            "limit": limit,
            "lease_s": lease_s,
            "turns": TURNS_READ,
        },
    )
    return [Claimed(*row) for row in await cursor.fetchall()]


# `lease_until > nm_now()`: a lease that ran out may already be under rescue and is never brought back.
RENEW = """
WITH alive AS MATERIALIZED (
    SELECT claim_id
    FROM claims
    WHERE claim_id = ANY (%(claim_ids)s)
      AND lease_until > nm_now()
    ORDER BY claim_id
    FOR UPDATE
)
UPDATE claims AS c
SET lease_until = nm_now() + make_interval(secs => %(lease_s)s)
FROM alive
WHERE c.claim_id = alive.claim_id
RETURNING c.claim_id
"""


async def renew_claims(conn: Connection, claim_ids: Sequence[UUID], *, lease_s: float) -> set[UUID]:
    """Extend the leases; return the claims that are still ours. The others must be dropped at once."""
    cursor = await conn.execute(RENEW, {"claim_ids": list(claim_ids), "lease_s": lease_s})
    return {row[0] for row in await cursor.fetchall()}


# The second condition heals a lease written before the database's clock was set back. A row whose call had begun
# waits for evidence before it is due again; takeovers counts only such rows. Locks: claims, then rows in id order.
# SKIP LOCKED on the rows too: a runner frozen within a transaction must not hold up everybody's rescue. Its rows, and
# with them its claim, are left for the next rescue; a claim never ends before its rows are free. Arrays instead of
# joins, as in the claim: with stale statistics a merge join walked the whole queue. OFFSET 0 for the same reason: it
# keeps NOT EXISTS one probe per claim. NOT IN, because it is hashed.
RESCUE = """
WITH dead AS MATERIALIZED (
    SELECT claim_id
    FROM claims
    WHERE lease_until <= nm_now()
       OR lease_until > nm_now() + interval '2 hours'
    ORDER BY claim_id
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
), held AS MATERIALIZED (
    SELECT q.message_id
    FROM message_queue AS q
    WHERE q.claim_id = ANY (ARRAY(SELECT claim_id FROM dead))
    ORDER BY q.message_id
    FOR UPDATE SKIP LOCKED
), freed AS (
    UPDATE message_queue AS q
    SET claim_id = NULL,
        takeovers = q.takeovers + (q.intent_at IS NOT NULL)::int,
        due_at = CASE
            WHEN q.intent_at IS NULL THEN q.due_at
            ELSE greatest(q.due_at, q.intent_at + make_interval(secs => %(evidence_wait_s)s))
        END
    WHERE q.message_id = ANY (ARRAY(SELECT message_id FROM held))
    RETURNING q.lane, q.org_id, q.due_at
), turns AS (
    INSERT INTO queue_turns (lane, due_minute, org_id)
    SELECT DISTINCT lane, date_trunc('minute', greatest(due_at, nm_now())), org_id
    FROM freed
    ORDER BY 1, 2, 3
    ON CONFLICT DO NOTHING
), ended AS (
    DELETE FROM claims AS c
    USING dead
    WHERE c.claim_id = dead.claim_id
      AND NOT EXISTS (
          SELECT
          FROM message_queue AS q
          WHERE q.claim_id = c.claim_id
            AND q.message_id NOT IN (SELECT message_id FROM held)
          OFFSET 0
      )
    RETURNING c.claim_id
)
SELECT (SELECT count(*) FROM freed), (SELECT count(*) FROM ended)
"""


async def rescue_expired(conn: Connection, *, evidence_wait_s: float) -> int:
    """Free the rows of claims whose lease ran out; return how many rows became claimable again."""
    total = 0
    while True:
        cursor = await conn.execute(RESCUE, {"limit": DEAD_CLAIMS_PER_RESCUE, "evidence_wait_s": evidence_wait_s})
        freed, ended = await cursor.fetchone() or (0, 0)
        total += freed
        if ended < DEAD_CLAIMS_PER_RESCUE:
            return total


# Rows with an intent stay held: their call may still end, and only its record or a rescue may free them. Unless the
# holder knows that it has not begun them: then the intent is an older claim's.
RELEASE = """
WITH held AS MATERIALIZED (
    SELECT message_id
    FROM message_queue
    WHERE claim_id = ANY (%(claim_ids)s)
      AND (intent_at IS NULL OR message_id = ANY (%(not_begun)s))
    ORDER BY message_id
    FOR UPDATE
), freed AS (
    UPDATE message_queue AS q
    SET claim_id = NULL
    WHERE q.message_id = ANY (ARRAY(SELECT message_id FROM held))
    RETURNING q.lane, q.org_id
), turns AS (
    INSERT INTO queue_turns (lane, due_minute, org_id)
    SELECT DISTINCT lane, date_trunc('minute', nm_now()), org_id
    FROM freed
    ORDER BY 1, 2, 3
    ON CONFLICT DO NOTHING
)
SELECT count(*) FROM freed
"""

# A claim that holds nothing is a lease for nothing. A separate statement, so that it sees what RELEASE freed.
END_CLAIMS = """
DELETE FROM claims AS c
WHERE c.claim_id = ANY (%(claim_ids)s)
  AND NOT EXISTS (SELECT FROM message_queue AS q WHERE q.claim_id = c.claim_id OFFSET 0)
RETURNING c.claim_id
"""


async def end_claims(conn: Connection, claim_ids: Sequence[UUID]) -> set[UUID]:
    """Delete those of the claims that hold no row; return them."""
    cursor = await conn.execute(END_CLAIMS, {"claim_ids": list(claim_ids)})
    return {row[0] for row in await cursor.fetchall()}


async def release_claims(conn: Connection, claim_ids: Sequence[UUID], not_begun: Sequence[UUID] = ()) -> int:
    """Give back rows that were claimed and not begun, and end claims that hold nothing; return rows given back.

    `not_begun` are messages the holder has surely not brought to the gate, whatever an earlier claim did.
    """
    if not claim_ids:
        return 0
    async with conn.transaction():
        cursor = await conn.execute(RELEASE, {"claim_ids": list(claim_ids), "not_begun": list(not_begun)})
        (freed,) = await cursor.fetchone() or (0,)
        await end_claims(conn, claim_ids)
    return int(freed)


# One probe of an index head per lane.
HAS_DUE = """
SELECT lane
FROM unnest(ARRAY['live:email', 'live:sms', 'test']) AS lane
WHERE EXISTS (
    SELECT FROM message_queue AS q WHERE q.lane = lane.lane AND q.claim_id IS NULL AND q.due_at <= nm_now()
)
"""


async def list_due_lanes(conn: Connection) -> list[str]:
    """Return the lanes in which a claim made now would find a row."""
    cursor = await conn.execute(HAS_DUE)
    return [row[0] for row in await cursor.fetchall()]


COUNT_DUE = """
SELECT count(*) FILTER (WHERE due_at <= nm_now() AND claim_id IS NULL),
       count(*) FILTER (WHERE claim_id IS NOT NULL),
       count(*) FILTER (WHERE due_at > nm_now() AND claim_id IS NULL)
FROM message_queue
"""


@dataclass(frozen=True, slots=True)
class Backlog:
    """Unfinished messages: due and free, held by a runner, due later."""

    due: int
    held: int
    later: int


async def count_backlog(conn: Connection) -> Backlog:
    """Count the whole queue (reads all of it: for people and dry runs, not for the hot path)."""
    cursor = await conn.execute(COUNT_DUE)
    row = await cursor.fetchone() or (0, 0, 0)
    return Backlog(*row)


# A hint of a past minute goes when the org has an older one or nothing due. Two minutes of grace: an accept
# transaction that saw the hint and did not write its own has long committed (statements end after 30 s).
PRUNE_TURNS = """
WITH past AS MATERIALIZED (
    SELECT lane, due_minute, org_id
    FROM queue_turns
    WHERE due_minute < nm_now() - interval '2 minutes'
    ORDER BY lane, due_minute, org_id
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
), ranked AS (
    SELECT lane, due_minute, org_id, row_number() OVER (PARTITION BY lane, org_id ORDER BY due_minute) AS place
    FROM past
)
DELETE FROM queue_turns AS t
USING ranked
WHERE (t.lane, t.due_minute, t.org_id) = (ranked.lane, ranked.due_minute, ranked.org_id)
  AND (
      ranked.place > 1
      OR NOT EXISTS (
          SELECT
          FROM message_queue AS q
          WHERE q.lane = ranked.lane
            AND q.org_id = ranked.org_id
            AND q.claim_id IS NULL
            AND q.due_at <= nm_now()
      )
  )
"""


async def prune_turns(conn: Connection) -> int:
    """Delete hints that help nobody any more, at most TURNS_DELETED_PER_RUN; return how many went."""
    cursor = await conn.execute(PRUNE_TURNS, {"limit": TURNS_DELETED_PER_RUN})
    return cursor.rowcount


CLOCK = "SELECT nm_now()"


async def read_clock(conn: Connection) -> datetime:
    """Return the database's time, which decides dueness and leases."""
    cursor = await conn.execute(CLOCK)
    row = await cursor.fetchone()
    if row is None:
        raise AssertionError("SELECT without FROM returns one row")
    return row[0]  # type: ignore[no-any-return]
