"""Overage reports (L10): what Stripe was told of a month adds up, and is what the month owes.

A month owes what was metered, at most what was used beyond the plan's included units. What Stripe refused (`failed`)
was not told: its units are in the next revision. A month is judged by the plan that it ended with, unless the plan was
changed within it.
"""

from __future__ import annotations

from typing import LiteralString

from nightmail.store.audit.invariant import Invariant

# A revision that was refused after the next one was written is part of that one's total, and otherwise is not.
REVISIONS: LiteralString = """
SELECT r.org_id AS key, concat_ws(' ', r.org_id, r.channel, r.period, r.revision) AS id, 1 AS things,
       r.revision <> r.nth
       OR r.total - r.units NOT BETWEEN coalesce(r.told, 0) AND coalesce(r.tried, 0)
       OR to_char(r.event_at AT TIME ZONE 'UTC', 'YYYY-MM') <> r.period AS is_wrong
FROM (
    SELECT o.*, row_number() OVER month AS nth,
           sum(o.units) FILTER (WHERE o.state <> 'failed') OVER earlier AS told, sum(o.units) OVER earlier AS tried
    FROM overage_reports AS o
    WHERE o.org_id = ANY (%(keys)s::uuid[])
    WINDOW month AS (PARTITION BY o.org_id, o.channel, o.period ORDER BY o.revision),
           earlier AS (month ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
) AS r
"""

OWED: LiteralString = """
WITH told AS MATERIALIZED (
    SELECT o.org_id, o.channel, o.period, sum(o.units) AS units
    FROM overage_reports AS o
    WHERE o.org_id = ANY (%(keys)s::uuid[])
      AND o.state <> 'failed'
    GROUP BY o.org_id, o.channel, o.period
), month AS MATERIALIZED (
    SELECT u.org_id, u.channel, u.period, sum(u.used) FILTER (WHERE u.rating = 'metered') AS metered,
           sum(u.used) AS used, ((u.period || '-01')::timestamp) AT TIME ZONE 'UTC' AS begins_at,
           ((u.period || '-01')::timestamp + interval '1 month') AT TIME ZONE 'UTC' AS ends_at
    FROM usage_records AS u
    WHERE u.org_id = ANY (%(keys)s::uuid[])
      AND u.env = 'live'
      AND u.rating IN ('included', 'metered')
    GROUP BY u.org_id, u.channel, u.period
), owed AS MATERIALIZED (
    SELECT m.*, o.stripe_customer_id, least(m.metered, greatest(0, m.used - n.included)) AS units,
           NOT EXISTS (
               SELECT
               FROM org_plan_changes AS c
               WHERE c.org_id = m.org_id AND c.changed_at >= m.begins_at AND c.changed_at < m.ends_at
           ) AS is_sure
    FROM month AS m
    JOIN orgs AS o ON o.id = m.org_id
    CROSS JOIN LATERAL (
        SELECT CASE m.channel WHEN 'email' THEN p.included_emails ELSE p.included_sms END AS included
        FROM message_plans AS p
        WHERE p.id = coalesce(
            (
                SELECT c.plan
                FROM org_plan_changes AS c
                WHERE c.org_id = m.org_id AND c.changed_at >= m.ends_at
                ORDER BY c.changed_at
                LIMIT 1
            ), o.plan)
    ) AS n
    WHERE m.metered > 0
)
"""

TOO_MUCH: LiteralString = """
SELECT t.org_id AS key, concat_ws(' ', t.org_id, t.channel, t.period) AS id, 1 AS things,
       t.units > coalesce(m.metered, 0) OR (m.is_sure AND t.units > m.units) AS is_wrong
FROM told AS t
LEFT JOIN owed AS m ON m.org_id = t.org_id AND m.channel = t.channel AND m.period = t.period
"""

# The report runs on the first of a month, and tells what came later on the first of the next one.
TOO_LITTLE: LiteralString = """
SELECT m.org_id AS key, concat_ws(' ', m.org_id, m.channel, m.period) AS id, 1 AS things,
       coalesce(t.units, 0) < m.units AND (t.units IS NULL OR m.ends_at < nm_now() - interval '792 hours') AS is_wrong
FROM owed AS m
LEFT JOIN told AS t ON t.org_id = m.org_id AND t.channel = m.channel AND t.period = m.period
WHERE m.is_sure
  AND m.stripe_customer_id IS NOT NULL
  AND m.ends_at < nm_now() - interval '48 hours'
"""

CALLED: LiteralString = """
SELECT o.org_id AS key, o.identifier AS id, 1 AS things,
       CASE o.state WHEN 'reported' THEN o.reported_at IS NULL OR o.first_called_at IS NULL
                    WHEN 'pending' THEN o.reported_at IS NOT NULL
                    ELSE false END AS is_wrong
FROM overage_reports AS o
WHERE o.org_id = ANY (%(keys)s::uuid[])
"""

OVERAGE: tuple[Invariant, ...] = (
    Invariant(
        "overage_revisions",
        "revisions of a month are numbered without holes, their totals are the sums so far, their time is in the month",
        "overage",
        REVISIONS,
    ),
    Invariant(
        "overage_units",
        "no more overage is reported than was metered beyond the included units",
        "overage",
        OWED + TOO_MUCH,
    ),
    Invariant(
        "overage_complete",
        "two days past a month what it owes has a report, and past the next one's report all of it was told",
        "overage",
        OWED + TOO_LITTLE,
    ),
    Invariant(
        "overage_called",
        "what is reported was called for, and what was not is not reported",
        "overage",
        CALLED,
    ),
)
