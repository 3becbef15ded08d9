"""job_locks: the lease on a whole-table job."""

from __future__ import annotations

from uuid import UUID

from nightmail.store.database import Connection

# The last condition heals a lease written before the database's clock was set back: a lease is an hour at most.
TAKE = """
INSERT INTO job_locks AS l (job, claim_id, job_id, lease_until)
VALUES (%(job)s, %(claim_id)s, %(job_id)s, nm_now() + make_interval(secs => %(lease_s)s))
ON CONFLICT (job) DO UPDATE
SET claim_id = excluded.claim_id,
    job_id = excluded.job_id,
    lease_until = excluded.lease_until
WHERE l.lease_until <= nm_now()
   OR l.lease_until > nm_now() + interval '2 hours'
RETURNING l.claim_id
"""

HOLDER = "SELECT job_id FROM job_locks WHERE job = %(job)s"

TRIES = 3


async def take_lock(conn: Connection, *, job: str, claim_id: UUID, job_id: UUID, lease_s: float) -> UUID | None:
    """Take the lease, replacing a holder whose lease is over; return None, or the job_id of who holds it now."""
    for _ in range(TRIES):
        cursor = await conn.execute(TAKE, {"job": job, "claim_id": claim_id, "job_id": job_id, "lease_s": lease_s})
        if await cursor.fetchone() is not None:
            return None
        cursor = await conn.execute(HOLDER, {"job": job})
        holder = await cursor.fetchone()
        if holder is not None:  # None: released between the two statements, so try again
            return UUID(str(holder[0]))
    raise AssertionError("a lock changed hands between two statements again and again")


RELEASE = "DELETE FROM job_locks WHERE job = %(job)s AND claim_id = %(claim_id)s"


async def release_lock(conn: Connection, *, job: str, claim_id: UUID) -> bool:
    """Give the lease back; return whether it was still ours."""
    cursor = await conn.execute(RELEASE, {"job": job, "claim_id": claim_id})
    return cursor.rowcount == 1
