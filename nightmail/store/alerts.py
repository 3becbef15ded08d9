"""alerts: opened once, closed once, in one statement for all presets and jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from uuid import UUID

from nightmail.store.database import Connection


@dataclass(frozen=True, slots=True)
class Watched:
    """What the presets need to know of a job.

    `overdue_slot` is the newest slot that is at least a day old, None when the job is not configured. `slow_ms` None
    means the run's own deadline. `total_key` names the count of items, None when the job counts no failures.
    """

    job: str
    overdue_slot: datetime | None
    slow_ms: int | None
    total_key: str | None


@dataclass(frozen=True, slots=True)
class Change:
    """An alert that this very evaluation opened or closed; `job` is empty when it is about no single job."""

    change: Literal["opened", "closed"]
    alert_id: UUID
    preset: str
    job: str
    summary: str
    opened_at: datetime


# Presets: run_failed, run_slow, items_failing (an hour's items), no_success, old_secret, audit; those of money in
# schema/0006.
# `newest` reads the end of job_runs_by_job. Rows of the dispatcher are no runs of a slot: they only count as items.
# no_success: only slots since the first run on record, so that a fresh installation is not late for last month.
# Two evaluations at once: the unique index alerts_open lets one open an alert, the row lock lets one close it.
# BETWEEN and job in the order: as in store.overview, the planner must walk the index of the job, not of all times.
EVALUATE = """
WITH watched AS MATERIALIZED (
    SELECT job, overdue_slot, slow_ms, total_key
    FROM unnest(%(jobs)s::text[], %(overdue_slots)s::timestamptz[], %(slow_ms)s::bigint[], %(total_keys)s::text[])
         AS w (job, overdue_slot, slow_ms, total_key)
), newest AS MATERIALIZED (
    SELECT w.job, r.state, r.error, r.duration_ms, coalesce(w.slow_ms, r.deadline_s * 1000) AS limit_ms
    FROM watched AS w
    CROSS JOIN LATERAL (
        SELECT state, error, duration_ms, deadline_s
        FROM job_runs
        WHERE job BETWEEN w.job AND w.job
          AND state IN ('succeeded', 'failed', 'interrupted')
          AND trigger <> 'dispatcher'
        ORDER BY job DESC, started_at DESC
        LIMIT 1
    ) AS r
), items AS MATERIALIZED (
    SELECT w.job, sum((r.results ->> w.total_key)::bigint) AS total, sum((r.results ->> 'failed')::bigint) AS failed
    FROM watched AS w
    JOIN job_runs AS r ON r.job = w.job AND r.started_at > nm_now() - interval '1 hour'
    WHERE w.total_key IS NOT NULL
    GROUP BY w.job
), firing AS MATERIALIZED (
    SELECT 'run_failed' AS preset, job, format('%%s failed: %%s', job, coalesce(error, state)) AS summary
    FROM newest
    WHERE state <> 'succeeded'
    UNION ALL
    SELECT 'run_slow', job, format('%%s took %%s ms', job, duration_ms)
    FROM newest
    WHERE duration_ms > limit_ms
    UNION ALL
    SELECT 'items_failing', job, format('%%s: %%s of %%s items failed within an hour', job, failed, total)
    FROM items
    WHERE total >= 100
      AND failed * 100 > total
    UNION ALL
    SELECT 'no_success', w.job,
           format('%%s has not succeeded since its slot of %%s', w.job,
                  to_char(w.overdue_slot AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI "UTC"'))
    FROM watched AS w
    WHERE w.overdue_slot >= (SELECT min(started_at) FROM job_runs)
      AND NOT EXISTS (
          SELECT
          FROM job_runs AS r
          WHERE r.job = w.job
            AND r.slot >= w.overdue_slot
            AND r.state = 'succeeded'
            AND r.trigger <> 'dispatcher'
      )
    UNION ALL
    SELECT 'old_secret', '',
           format('a CRON_SECRET has been in use since %%s: rotate it',
                  to_char(min(first_seen) AT TIME ZONE 'UTC', 'YYYY-MM-DD'))
    FROM cron_secrets
    WHERE sha256 = ANY (%(secrets)s::bytea[])
    HAVING min(first_seen) < nm_now() - interval '90 days'
    UNION ALL
    SELECT 'audit', '',
           format('the audit found what must not be: %%s, among it %%s (%%s); see `nightmail audit`',
                  count(*), min(invariant), (array_agg(offender ORDER BY invariant, offender))[1])
    FROM audit_findings
    WHERE cleared_at IS NULL
    HAVING count(*) > 0
    UNION ALL
    SELECT preset, job, left(summary, 500)
    FROM nm_stripe_alerts()
), opened AS (
    INSERT INTO alerts (id, preset, job, summary, opened_at)
    SELECT gen_random_uuid(), f.preset, f.job, f.summary, nm_now()
    FROM firing AS f
    WHERE NOT EXISTS (
        SELECT FROM alerts AS a WHERE a.preset = f.preset AND a.job = f.job AND a.closed_at IS NULL
    )
    ORDER BY f.preset, f.job
    ON CONFLICT (preset, job) WHERE closed_at IS NULL DO NOTHING
    RETURNING id, preset, job, summary, opened_at
), past AS MATERIALIZED (
    SELECT a.id
    FROM alerts AS a
    WHERE a.closed_at IS NULL
      AND NOT EXISTS (SELECT FROM firing AS f WHERE f.preset = a.preset AND f.job = a.job)
    ORDER BY a.id
    FOR UPDATE
), closed AS (
    UPDATE alerts AS a
    SET closed_at = nm_now()
    FROM past
    WHERE a.id = past.id
      AND a.closed_at IS NULL
    RETURNING a.id, a.preset, a.job, a.summary, a.opened_at
)
SELECT 'opened', id, preset, job, summary, opened_at
FROM opened
UNION ALL
SELECT 'closed', id, preset, job, summary, opened_at
FROM closed
"""


async def evaluate(conn: Connection, watched: Sequence[Watched], *, secrets: Sequence[bytes]) -> list[Change]:
    """Open and close alerts as the presets say now; `secrets` are the hashes of the secrets in force.

    Return what changed, so that whoever changed it tells people.
    """
    cursor = await conn.execute(
        EVALUATE,
        {
            "jobs": [w.job for w in watched],
            "overdue_slots": [w.overdue_slot for w in watched],
            "slow_ms": [w.slow_ms for w in watched],
            "total_keys": [w.total_key for w in watched],
            "secrets": list(secrets),
        },
    )
    return [Change(*row) for row in await cursor.fetchall()]
