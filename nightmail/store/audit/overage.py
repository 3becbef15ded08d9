"""Overage reports (L10): what Stripe was told of a month adds up, and is what the month owes."""

from __future__ import annotations

from typing import LiteralString

from nightmail.store.audit.invariant import Invariant

REVISIONS: LiteralString = """
SELECT r.org_id AS key, concat_ws(' ', r.org_id, r.channel, r.period, r.revision) AS id, 1 AS things,
       r.revision <> r.nth OR r.total <> r.so_far
       OR to_char(r.event_at AT TIME ZONE 'UTC', 'YYYY-MM') <> r.period AS is_wrong
FROM (
    SELECT o.*, row_number() OVER earlier AS nth, sum(o.units) OVER earlier AS so_far
    FROM overage_reports AS o
    WHERE o.org_id = ANY (%(keys)s::uuid[])
    WINDOW earlier AS (PARTITION BY o.org_id, o.channel, o.period ORDER BY o.revision ROWS UNBOUNDED PRECEDING)
) AS r
"""

# Whatever the plan is now, no more is reported than was metered. A month whose reporting is over, that is which is two
# days past and has no open report, is reported in full: what is beyond the included units, unless credits paid for it.
# A plan or a way of billing that changed since the report leaves only the first to be checked.
UNITS: LiteralString = """
WITH told AS MATERIALIZED (
    SELECT o.org_id, o.channel, o.period, sum(o.units) AS units, max(o.created_at) AS last_at,
           bool_or(o.state <> 'reported') AS is_open
    FROM overage_reports AS o
    WHERE o.org_id = ANY (%(keys)s::uuid[])
    GROUP BY o.org_id, o.channel, o.period
), usage AS MATERIALIZED (
    SELECT u.org_id, u.channel, u.period,
           coalesce(sum(u.used) FILTER (WHERE u.rating = 'metered'), 0) AS metered,
           coalesce(sum(u.used) FILTER (WHERE u.rating IN ('included', 'metered')), 0) AS used
    FROM usage_records AS u
    WHERE u.org_id = ANY (%(keys)s::uuid[])
      AND u.env = 'live'
    GROUP BY u.org_id, u.channel, u.period
)
SELECT t.org_id AS key, concat_ws(' ', t.org_id, t.channel, t.period) AS id, 1 AS things,
       t.units > coalesce(u.metered, 0)
       OR (
           NOT t.is_open
           AND to_char((nm_now() - interval '48 hours') AT TIME ZONE 'UTC', 'YYYY-MM') > t.period
           AND o.billing = 'metered'
           AND NOT EXISTS (
               SELECT FROM audit_logs AS l
               WHERE l.org_id = t.org_id AND l.target = t.org_id::text AND l.action LIKE 'org.%%'
                 AND l.action <> 'org.created' AND l.at >= (t.period || '-01')::timestamp AT TIME ZONE 'UTC'
           )
           AND t.units > least(coalesce(u.metered, 0), greatest(0, coalesce(u.used, 0) - n.included))
       ) AS is_wrong
FROM told AS t
JOIN orgs AS o ON o.id = t.org_id
CROSS JOIN LATERAL (
    SELECT CASE t.channel WHEN 'email' THEN p.included_emails ELSE p.included_sms END AS included
    FROM message_plans AS p
    WHERE p.id = o.plan
) AS n
LEFT JOIN usage AS u ON u.org_id = t.org_id AND u.channel = t.channel AND u.period = t.period
"""

# A month's report is due a day after its end; what was changed about the org since its beginning cannot be judged.
COMPLETE: LiteralString = """
SELECT u.org_id AS key, concat_ws(' ', u.org_id, u.channel, u.period) AS id, 1 AS things,
       coalesce(t.units, 0) < least(u.metered, greatest(0, u.used - u.included)) AS is_wrong
FROM (
    SELECT u.org_id, u.channel, u.period, min(CASE u.channel WHEN 'email' THEN p.included_emails
                                                             ELSE p.included_sms END) AS included,
           coalesce(sum(u.used) FILTER (WHERE u.rating = 'metered'), 0) AS metered,
           coalesce(sum(u.used) FILTER (WHERE u.rating IN ('included', 'metered')), 0) AS used
    FROM usage_records AS u
    JOIN orgs AS o ON o.id = u.org_id
    JOIN message_plans AS p ON p.id = o.plan
    WHERE u.org_id = ANY (%(keys)s::uuid[])
      AND u.env = 'live'
      AND o.billing = 'metered'
      AND o.stripe_customer_id IS NOT NULL
      AND u.period < to_char((nm_now() - interval '48 hours') AT TIME ZONE 'UTC', 'YYYY-MM')
      AND NOT EXISTS (
          SELECT FROM audit_logs AS l
          WHERE l.org_id = u.org_id AND l.target = u.org_id::text AND l.action LIKE 'org.%%'
            AND l.action <> 'org.created' AND l.at >= (u.period || '-01')::timestamp AT TIME ZONE 'UTC'
      )
    GROUP BY u.org_id, u.channel, u.period
) AS u
LEFT JOIN (
    SELECT o.org_id, o.channel, o.period, sum(o.units) AS units
    FROM overage_reports AS o
    WHERE o.org_id = ANY (%(keys)s::uuid[])
    GROUP BY o.org_id, o.channel, o.period
) AS t ON t.org_id = u.org_id AND t.channel = u.channel AND t.period = u.period
"""

# An accepted call is answered at once; what is in doubt is asked again by the next run, and Stripe forgets after a day.
CALLED: LiteralString = """
SELECT o.org_id AS key, o.identifier AS id, 1 AS things,
       o.state = 'reported' AND (o.reported_at IS NULL OR o.first_called_at IS NULL)
       OR o.state = 'pending' AND o.reported_at IS NOT NULL AS is_wrong
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
        "overage_units", "no more overage is reported than was metered beyond the included units", "overage", UNITS
    ),
    Invariant(
        "overage_complete", "two days past a month, what was metered beyond the included units has a report", "overage",
        COMPLETE,
    ),
    Invariant("overage_called", "what is reported was called for, and what was not is not reported", "overage", CALLED),
)  # fmt: skip
