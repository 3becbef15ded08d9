"""job_slots: what became of a slot, so that it fires once among any number of tickers.

A ticker claims what is due in one statement and holds it for a lease; a crashed one's slots are claimable again when
that ends. Every later write of the ticker names its claim_id. A direct call's success closes the slot whoever holds
it: it is a fact, and the holder's own end then changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from nightmail.store.database import Connection


@dataclass(frozen=True, slots=True)
class DueSlot:
    """A job's newest slot, and the jobs it comes after; it is claimed only if `is_wanted`."""

    job: str
    slot: datetime
    after: tuple[str, ...] = ()
    is_wanted: bool = True


@dataclass(frozen=True, slots=True)
class ClaimedSlot:
    """A slot that is ours for the lease; `attempts` counts this one."""

    job: str
    slot: datetime
    attempts: int


# `closed` filters without locking, so that a ticker with nothing to do writes nothing; DO UPDATE's WHERE decides again
# on the row as it is then, so that of several tickers one gets it. In job order: two tickers meet at the first row.
# A job waits while one it comes after is due or held: it is found by the next claim.
CLAIM = """
WITH newest AS MATERIALIZED (
    SELECT job, slot, is_wanted
    FROM unnest(%(jobs)s::text[], %(slots)s::timestamptz[], %(wanted)s::boolean[]) AS n (job, slot, is_wanted)
), closed AS MATERIALIZED (
    SELECT n.job, s.state = 'running' AS is_held
    FROM newest AS n
    JOIN job_slots AS s ON s.job = n.job AND s.slot = n.slot
    WHERE s.state IN ('succeeded', 'not_configured')
       OR (s.state IN ('failed', 'unfinished')
           AND s.retry_at > nm_now() AND s.retry_at < nm_now() + interval '2 hours')
       OR (s.state = 'running'
           AND s.lease_until > nm_now() AND s.lease_until < nm_now() + interval '2 hours')
), due AS MATERIALIZED (
    SELECT n.job, n.slot
    FROM newest AS n
    WHERE n.is_wanted
      AND NOT EXISTS (SELECT FROM closed AS c WHERE c.job = n.job)
      AND NOT EXISTS (
          SELECT
          FROM unnest(%(later)s::text[], %(earlier)s::text[]) AS o (later, earlier)
          JOIN newest AS e ON e.job = o.earlier
          WHERE o.later = n.job
            AND NOT EXISTS (SELECT FROM closed AS c WHERE c.job = e.job AND NOT c.is_held)
      )
)
INSERT INTO job_slots AS s (job, slot, state, attempts, claim_id, lease_until)
SELECT job, slot, 'running', 1, %(claim_id)s, nm_now() + make_interval(secs => %(lease_s)s)
FROM due
ORDER BY job, slot
ON CONFLICT (job, slot) DO UPDATE
SET state = 'running',
    attempts = s.attempts + 1,
    claim_id = excluded.claim_id,
    lease_until = excluded.lease_until,
    retry_at = NULL
WHERE (s.state IN ('failed', 'unfinished')
       AND (s.retry_at <= nm_now() OR s.retry_at >= nm_now() + interval '2 hours'))
   OR (s.state = 'running'
       AND (s.lease_until <= nm_now() OR s.lease_until >= nm_now() + interval '2 hours'))
RETURNING s.job, s.slot, s.attempts
"""


async def claim_due(
    conn: Connection, newest: Sequence[DueSlot], *, claim_id: UUID, lease_s: float
) -> list[ClaimedSlot]:
    """Take those of the newest slots that are due and free, all in one statement."""
    order = [(slot.job, earlier) for slot in newest for earlier in slot.after]
    cursor = await conn.execute(
        CLAIM,
        {
            "jobs": [slot.job for slot in newest],
            "slots": [slot.slot for slot in newest],
            "wanted": [slot.is_wanted for slot in newest],
            "later": [later for later, _ in order],
            "earlier": [earlier for _, earlier in order],
            "claim_id": claim_id,
            "lease_s": lease_s,
        },
    )
    return [ClaimedSlot(*row) for row in await cursor.fetchall()]


# Backoff of a failed slot: 1 minute, doubled, at most an hour.
FINISH = """
UPDATE job_slots
SET state = %(state)s,
    claim_id = NULL,
    lease_until = NULL,
    attempts = CASE WHEN %(state)s = 'failed' THEN attempts ELSE 0 END,
    retry_at = CASE %(state)s
        WHEN 'failed' THEN nm_now() + least(interval '1 hour', interval '1 minute' * 2 ^ least(attempts - 1, 6))
        WHEN 'unfinished' THEN greatest(slot, nm_now() + make_interval(secs => %(again_s)s))
    END
WHERE job = %(job)s
  AND slot = %(slot)s
  AND claim_id = %(claim_id)s
"""


async def finish_slot(
    conn: Connection, *, job: str, slot: datetime, claim_id: UUID, state: str, again_s: float
) -> bool:
    """End our claim with the slot's new state; `unfinished` is due again after `again_s` and not before the slot.

    Return whether the slot was still ours (a success has ended the claim already).
    """
    cursor = await conn.execute(
        FINISH, {"job": job, "slot": slot, "claim_id": claim_id, "state": state, "again_s": again_s}
    )
    return cursor.rowcount == 1


# A run that began before its slot (a platform's early call) cannot have done what is due only at the slot's time.
MARK_SUCCEEDED = """
INSERT INTO job_slots AS s (job, slot, state, retry_at)
SELECT r.job, r.slot,
       CASE WHEN o.is_open THEN 'unfinished' ELSE 'succeeded' END,
       CASE WHEN o.is_open THEN greatest(r.slot, nm_now() + make_interval(secs => %(again_s)s)) END
FROM job_runs AS r
CROSS JOIN LATERAL (SELECT %(more)s OR r.started_at < r.slot AS is_open) AS o
WHERE r.job_id = %(job_id)s
ON CONFLICT (job, slot) DO UPDATE
SET state = excluded.state,
    attempts = 0,
    claim_id = NULL,
    lease_until = NULL,
    retry_at = excluded.retry_at
WHERE s.state <> 'succeeded'
"""


async def mark_succeeded(conn: Connection, *, job_id: UUID, more: bool, again_s: float) -> None:
    """Close the slot of a run that succeeded; it stays open for another run when work was left."""
    await conn.execute(MARK_SUCCEEDED, {"job_id": job_id, "more": more, "again_s": again_s})


MARK_NOT_CONFIGURED = """
INSERT INTO job_slots (job, slot, state)
VALUES (%(job)s, %(slot)s, 'not_configured')
ON CONFLICT (job, slot) DO UPDATE
SET state = 'not_configured',
    claim_id = NULL,
    lease_until = NULL,
    retry_at = NULL
WHERE job_slots.state NOT IN ('succeeded', 'not_configured')
"""


async def mark_not_configured(conn: Connection, *, job: str, slot: datetime) -> None:
    """Leave the slot alone until the next one: a needed setting is absent."""
    await conn.execute(MARK_NOT_CONFIGURED, {"job": job, "slot": slot})


COUNT_WAITING = """
SELECT count(*)
FROM unnest(%(jobs)s::text[], %(slots)s::timestamptz[]) AS n (job, slot)
LEFT JOIN job_slots AS s ON s.job = n.job AND s.slot = n.slot
WHERE s.state IS NULL
   OR s.state NOT IN ('succeeded', 'not_configured')
"""


async def count_waiting(conn: Connection, newest: Sequence[DueSlot]) -> int:
    """Count the slots that have not succeeded: held by others, in backoff, or not come to."""
    cursor = await conn.execute(
        COUNT_WAITING, {"jobs": [slot.job for slot in newest], "slots": [slot.slot for slot in newest]}
    )
    row = await cursor.fetchone()
    return int(row[0]) if row else 0


LIST_WAITING = """
SELECT n.job
FROM unnest(%(jobs)s::text[], %(slots)s::timestamptz[]) AS n (job, slot)
LEFT JOIN job_slots AS s ON s.job = n.job AND s.slot = n.slot
WHERE s.state IS NULL
   OR (s.state IN ('failed', 'unfinished') AND s.retry_at <= nm_now())
   OR (s.state = 'running' AND s.lease_until <= nm_now())
"""


async def list_claimable(conn: Connection, newest: Sequence[DueSlot]) -> list[str]:
    """Return the jobs whose slot a claim made now would take, and take nothing (for dry runs)."""
    cursor = await conn.execute(
        LIST_WAITING, {"jobs": [slot.job for slot in newest], "slots": [slot.slot for slot in newest]}
    )
    return [row[0] for row in await cursor.fetchall()]


# A slot older than its job's newest is never claimed again; two days of them are kept for people.
DELETE_PAST = """
WITH past AS MATERIALIZED (
    SELECT s.job, s.slot
    FROM unnest(%(jobs)s::text[], %(slots)s::timestamptz[]) AS n (job, slot)
    JOIN job_slots AS s ON s.job = n.job AND s.slot < least(n.slot, nm_now() - interval '2 days')
    ORDER BY s.job, s.slot
    LIMIT 5000
    FOR UPDATE OF s SKIP LOCKED
)
DELETE FROM job_slots AS s
USING past
WHERE s.job = past.job
  AND s.slot = past.slot
"""


async def delete_past(conn: Connection, newest: Sequence[DueSlot]) -> int:
    """Delete slots that no ticker looks at any more, at most 5,000; return how many."""
    cursor = await conn.execute(
        DELETE_PAST, {"jobs": [slot.job for slot in newest], "slots": [slot.slot for slot in newest]}
    )
    return cursor.rowcount
