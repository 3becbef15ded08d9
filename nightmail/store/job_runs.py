"""job_runs: one row per call of a job, so that late, duplicate and missed slots can be seen. A record, not a lock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from psycopg.types.json import Jsonb

from nightmail.store.database import Connection


@dataclass(frozen=True, slots=True)
class Finish:
    """How a run ended. `counts` in snake_case; `error` is short and holds neither secret nor stack."""

    job_id: UUID
    state: str
    counts: Mapping[str, int]
    more: bool
    duration_ms: int
    error: str | None


INSERT_RUN = """
INSERT INTO job_runs (job_id, job, slot, trigger, host, started_at, deadline_s)
VALUES (%(job_id)s, %(job)s, %(slot)s, %(trigger)s, %(host)s, nm_now(), %(deadline_s)s)
"""


async def insert_run(
    conn: Connection, *, job_id: UUID, job: str, slot: datetime, trigger: str, host: str, deadline_s: float
) -> None:
    """Note that a run begins now."""
    await conn.execute(
        INSERT_RUN,
        {
            "job_id": job_id,
            "job": job,
            "slot": slot,
            "trigger": trigger,
            "host": host,
            "deadline_s": deadline_s,
        },
    )


# A database and a host further apart than this do not agree on what day it is, near midnight.
CLOCKS_APART_S = 300

# The clock of the server itself, without the offset of tests; but the time of the last run as it was written, which has
# that offset as nm_now() has it. The newest slot may be of a run that was asked for early, by a minute at most.
CLOCKS = """
SELECT extract(epoch FROM clock_timestamp() - %(host_now)s)::float8,
       (
           SELECT extract(epoch FROM r.started_at - nm_now())::float8
           FROM job_runs AS r
           WHERE r.job = %(job)s
             AND r.state = 'succeeded'
           ORDER BY r.slot DESC
           LIMIT 1
       )
"""


async def find_clock_fault(conn: Connection, *, job: str, host_now: datetime) -> str | None:
    """Say why the clock is in doubt: the server's and the host's differ, or it has gone back since the last run."""
    row = await (await conn.execute(CLOCKS, {"job": job, "host_now": host_now})).fetchone()
    assert row is not None, "SELECT without FROM has one row"
    apart, back = row
    if abs(apart) > CLOCKS_APART_S:
        return f"PostgreSQL's is {apart:+.0f} s from this host's; set both by NTP, then run the job again"
    if back is not None and back > CLOCKS_APART_S:
        return f"PostgreSQL's has gone back: the last run began {back:.0f} s from now; set it, or wait so long"
    return None


# The job_id is new with every call, so it is the fencing token here. A run that was marked 'interrupted' because its
# process slept has ended after all.
FINISH_RUN = """
UPDATE job_runs
SET state = %(state)s,
    finished_at = nm_now(),
    results = %(results)s,
    more = %(more)s,
    duration_ms = %(duration_ms)s,
    error = %(error)s
WHERE job_id = %(job_id)s
  AND state IN ('running', 'interrupted')
"""


async def finish_run(conn: Connection, finish: Finish) -> bool:
    """Write how a run ended; return whether it was still open."""
    cursor = await conn.execute(
        FINISH_RUN,
        {
            "job_id": finish.job_id,
            "state": finish.state,
            "results": Jsonb(dict(finish.counts)),
            "more": finish.more,
            "duration_ms": finish.duration_ms,
            "error": finish.error,
        },
    )
    return cursor.rowcount == 1


INSERT_FINISHED = """
INSERT INTO job_runs (job_id, job, slot, trigger, host, started_at, deadline_s, finished_at, state, results, more,
                      duration_ms)
VALUES (%(job_id)s, %(job)s, %(slot)s, %(trigger)s, %(host)s,
        nm_now() - make_interval(secs => %(duration_ms)s / 1000.0), %(deadline_s)s, nm_now(), 'succeeded',
        %(results)s, %(more)s, %(duration_ms)s)
"""


async def insert_finished_run(
    conn: Connection,
    finish: Finish,
    *,
    job: str,
    slot: datetime,
    trigger: str,
    host: str,
    deadline_s: float,
) -> None:
    """Note in one row what was done over the last `finish.duration_ms`, all of it well."""
    await conn.execute(
        INSERT_FINISHED,
        {
            "job_id": finish.job_id,
            "job": job,
            "slot": slot,
            "trigger": trigger,
            "host": host,
            "deadline_s": deadline_s,
            "results": Jsonb(dict(finish.counts)),
            "more": finish.more,
            "duration_ms": finish.duration_ms,
        },
    )


# A live run answers before its deadline, so a minute past it the process is gone (or sleeps: see FINISH_RUN).
# The partial index job_runs_running holds only what runs now.
MARK_INTERRUPTED = """
WITH dead AS MATERIALIZED (
    SELECT job_id
    FROM job_runs
    WHERE state = 'running'
      AND started_at + make_interval(secs => deadline_s + 60) < nm_now()
    ORDER BY job_id
    LIMIT 1000
    FOR UPDATE SKIP LOCKED
)
UPDATE job_runs AS r
SET state = 'interrupted',
    finished_at = nm_now(),
    error = 'the process ended or slept before the run did'
FROM dead
WHERE r.job_id = dead.job_id
"""


async def mark_interrupted(conn: Connection) -> int:
    """Close the rows of runs whose process is gone; return how many."""
    cursor = await conn.execute(MARK_INTERRUPTED)
    return cursor.rowcount
