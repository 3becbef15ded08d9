"""overage_reports: what became metered, as meter events: written before the call, claimed for it, recorded after it.

One report of a customer, meter and month is under way at a time, the oldest first: so a report whose call ended in
doubt can be looked for in Stripe's sum, which holds the earlier ones and nothing later.

    pending ──claim──► calling ──► reported      accepted, known already, or found in Stripe's sum
       ▲                  │ └────► failed        refused, at once or later: its units are in the next revision
       └──not accepted────┘ └────► too_old       35 days are over
                          in doubt: stays, without claim_id; the next run repeats the call or asks first
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from psycopg.types.json import Jsonb

from nightmail.ports import MeterEvent
from nightmail.store.database import Connection

# Stripe takes timestamps of the past 35 calendar days; some minutes less, so that the call still fits in.
OLDEST_HOURS = 35 * 24 - 1
# Stripe knows an identifier for at least 24 hours.
SURE_HOURS = 23


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a preparation found or made: revisions to be reported, too old ones, and months without a customer."""

    reports: int
    emails: int
    sms: int
    too_old: int
    skipped: int
    orgs: int


# nm_overage_owed is in schema/0006. Two preparations at once: the primary key lets one of them write a revision.
PREPARE = """
WITH owed AS MATERIALIZED (
    SELECT * FROM nm_overage_owed(%(with_open)s)
), reported AS (
    INSERT INTO overage_reports (
        org_id, channel, period, revision, units, total, identifier, event_name, stripe_customer_id, event_at, state,
        error
    )
    SELECT o.org_id, o.channel, o.period, o.revision, o.units, o.total,
           format('nightmail-%%s-%%s-%%s-%%s', o.org_id, o.channel, o.period, o.revision),
           CASE o.channel WHEN 'email' THEN %(email_event)s ELSE %(sms_event)s END, o.stripe_customer_id, o.event_at,
           CASE WHEN is_old THEN 'too_old' ELSE 'pending' END, CASE WHEN is_old THEN 'over 35 days old' END
    FROM owed AS o
    CROSS JOIN LATERAL (SELECT o.event_at <= nm_now() - make_interval(hours => %(oldest_hours)s) AS is_old) AS age
    WHERE o.stripe_customer_id IS NOT NULL
    ORDER BY o.org_id, o.channel, o.period
    ON CONFLICT DO NOTHING
    RETURNING org_id, channel, units, state
), skipped AS (
    INSERT INTO overage_skips AS s (org_id, channel, period, units)
    SELECT org_id, channel, period, units
    FROM owed
    WHERE stripe_customer_id IS NULL
    ORDER BY org_id, channel, period
    ON CONFLICT (org_id, channel, period) DO UPDATE
    SET units = excluded.units
    WHERE s.units <> excluded.units
), mended AS (
    DELETE FROM overage_skips AS s
    WHERE NOT EXISTS (
        SELECT
        FROM owed AS o
        WHERE o.org_id = s.org_id AND o.channel = s.channel AND o.period = s.period AND o.stripe_customer_id IS NULL
    )
)
SELECT count(*) FILTER (WHERE state = 'pending'),
       coalesce(sum(units) FILTER (WHERE state = 'pending' AND channel = 'email'), 0)::bigint,
       coalesce(sum(units) FILTER (WHERE state = 'pending' AND channel = 'sms'), 0)::bigint,
       count(*) FILTER (WHERE state = 'too_old'),
       (SELECT count(*) FROM owed WHERE stripe_customer_id IS NULL),
       count(DISTINCT org_id) FILTER (WHERE state = 'pending')
FROM reported
"""


async def prepare(conn: Connection, *, with_open: bool, email_event: str, sms_event: str) -> Prepared:
    """Write a revision for each month that owes more than was told; with `with_open` also for the one that runs."""
    arguments = {
        "with_open": with_open,
        "email_event": email_event,
        "sms_event": sms_event,
        "oldest_hours": OLDEST_HOURS,
    }
    async with conn.transaction():
        row = await (await conn.execute(PREPARE, arguments)).fetchone()
    assert row is not None, "an aggregate has one row"
    return Prepared(*row)


# Those that are open already are reported as well.
COUNT = """
WITH due AS MATERIALIZED (
    SELECT org_id, channel, units, stripe_customer_id,
           event_at <= nm_now() - make_interval(hours => %(oldest_hours)s) AS is_old
    FROM nm_overage_owed(%(with_open)s)
    UNION ALL
    SELECT org_id, channel, units, stripe_customer_id, false
    FROM overage_reports
    WHERE state IN ('pending', 'calling')
)
SELECT count(*) FILTER (WHERE fits), coalesce(sum(units) FILTER (WHERE fits AND channel = 'email'), 0)::bigint,
       coalesce(sum(units) FILTER (WHERE fits AND channel = 'sms'), 0)::bigint,
       count(*) FILTER (WHERE is_old AND stripe_customer_id IS NOT NULL),
       count(*) FILTER (WHERE stripe_customer_id IS NULL), count(DISTINCT org_id) FILTER (WHERE fits)
FROM due
CROSS JOIN LATERAL (SELECT stripe_customer_id IS NOT NULL AND NOT is_old AS fits) AS f
"""


async def count_owed(conn: Connection, *, with_open: bool) -> Prepared:
    """Return what a run would find to report; changes nothing."""
    row = await (await conn.execute(COUNT, {"with_open": with_open, "oldest_hours": OLDEST_HOURS})).fetchone()
    assert row is not None, "an aggregate has one row"
    return Prepared(*row)


@dataclass(frozen=True, slots=True)
class ClaimedReport:
    """A report that is ours to call for.

    `first_called_at` is as it was before this claim, None when Stripe cannot have it. `is_sure` is whether Stripe still
    knows the identifier of any call that was made; `is_too_old` whether it would refuse the timestamp.
    """

    org_id: UUID
    channel: str
    period: str
    revision: int
    event: MeterEvent
    first_called_at: datetime | None
    begins_at: datetime
    ends_at: datetime
    is_sure: bool
    is_too_old: bool


# Each is tried once in a run (%(began_at)s). A call in doubt has no claim_id and may be tried again; one that somebody
# is making, or died making, after its lease. NOT EXISTS: nothing older of the same customer, meter and month is open.
CLAIM = """
WITH due AS MATERIALIZED (
    SELECT r.org_id, r.channel, r.period, r.revision, r.first_called_at
    FROM overage_reports AS r
    WHERE r.state IN ('pending', 'calling')
      AND (r.called_at IS NULL OR r.called_at < %(began_at)s)
      AND (r.claim_id IS NULL OR r.called_at < nm_now() - make_interval(secs => %(lease_s)s))
      AND NOT EXISTS (
          SELECT
          FROM overage_reports AS e
          WHERE e.stripe_customer_id = r.stripe_customer_id AND e.event_name = r.event_name AND e.period = r.period
            AND e.state IN ('pending', 'calling')
            AND (e.created_at, e.org_id, e.revision) < (r.created_at, r.org_id, r.revision)
      )
    ORDER BY r.period, r.org_id, r.channel, r.revision
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
)
UPDATE overage_reports AS r
SET state = 'calling',
    claim_id = %(claim_id)s,
    attempts = r.attempts + 1,
    called_at = nm_now(),
    first_called_at = coalesce(r.first_called_at, nm_now())
FROM due AS d
WHERE r.org_id = d.org_id AND r.channel = d.channel AND r.period = d.period AND r.revision = d.revision
RETURNING r.org_id, r.channel, r.period, r.revision, r.event_name, r.identifier, r.stripe_customer_id, r.units,
          r.event_at, d.first_called_at, (r.period || '-01')::timestamp AT TIME ZONE 'UTC',
          least(((r.period || '-01')::timestamp + interval '1 month') AT TIME ZONE 'UTC',
                date_trunc('minute', nm_now()) + interval '1 minute'),
          coalesce(d.first_called_at, nm_now()) > nm_now() - make_interval(hours => %(sure_hours)s),
          r.event_at <= nm_now() - make_interval(hours => %(oldest_hours)s)
"""


async def claim_reports(
    conn: Connection, *, claim_id: UUID, began_at: datetime, lease_s: float, limit: int
) -> list[ClaimedReport]:
    """Take up to `limit` open reports that were not called for since `began_at`, oldest month first."""
    arguments = {
        "claim_id": claim_id,
        "began_at": began_at,
        "lease_s": lease_s,
        "limit": limit,
        "sure_hours": SURE_HOURS,
        "oldest_hours": OLDEST_HOURS,
    }
    rows = await (await conn.execute(CLAIM, arguments)).fetchall()
    return [_claimed(*row) for row in rows]


def _claimed(*row: Any) -> ClaimedReport:
    org_id, channel, period, revision, event_name, identifier, customer, units, event_at, *rest = row
    event = MeterEvent(event_name, identifier, customer, units, event_at)
    first_called_at, begins_at, ends_at, is_sure, is_too_old = rest
    return ClaimedReport(
        org_id, channel, period, revision, event, first_called_at, begins_at, ends_at, is_sure, is_too_old
    )


KNOWN = """
SELECT coalesce(sum(units), 0)::bigint
FROM overage_reports
WHERE stripe_customer_id = %(customer)s
  AND event_name = %(event_name)s
  AND period = %(period)s
  AND state = 'reported'
"""


async def read_known_units(conn: Connection, report: ClaimedReport) -> int:
    """Return what Stripe's sum of the report's customer, meter and month holds without this report."""
    arguments = {
        "customer": report.event.stripe_customer_id,
        "event_name": report.event.event_name,
        "period": report.period,
    }
    row = await (await conn.execute(KNOWN, arguments)).fetchone()
    return row[0] if row else 0


BEGIN_AGAIN = """
UPDATE overage_reports
SET first_called_at = nm_now()
WHERE org_id = %(org_id)s
  AND channel = %(channel)s
  AND period = %(period)s
  AND revision = %(revision)s
  AND claim_id = %(claim_id)s
  AND state = 'calling'
"""


async def begin_again(conn: Connection, report: ClaimedReport, claim_id: UUID) -> bool:
    """Note that earlier calls had no effect, so that the next one counts as the first; False when it is not ours."""
    return (await conn.execute(BEGIN_AGAIN, _key(report, claim_id))).rowcount == 1


RECORD = """
UPDATE overage_reports
SET state = %(state)s,
    claim_id = NULL,
    first_called_at = CASE WHEN %(state)s = 'pending' THEN %(first_called_at)s ELSE first_called_at END,
    reported_at = CASE WHEN %(state)s = 'reported' THEN nm_now() END,
    answer = %(answer)s,
    error = %(error)s
WHERE org_id = %(org_id)s
  AND channel = %(channel)s
  AND period = %(period)s
  AND revision = %(revision)s
  AND claim_id = %(claim_id)s
  AND state = 'calling'
"""


async def record_report(
    conn: Connection,
    report: ClaimedReport,
    claim_id: UUID,
    state: Literal["pending", "calling", "reported", "too_old", "failed"],
    *,
    answer: dict[str, Any] | None = None,
    error: str | None = None,
) -> bool:
    """Write what became of a call; False when the report is no longer ours. `calling` leaves it in doubt."""
    arguments = {
        **_key(report, claim_id),
        "state": state,
        "first_called_at": report.first_called_at,
        "answer": Jsonb(answer) if answer is not None else None,
        "error": error,
    }
    return (await conn.execute(RECORD, arguments)).rowcount == 1


def _key(report: ClaimedReport, claim_id: UUID) -> dict[str, Any]:
    return {
        "org_id": report.org_id,
        "channel": report.channel,
        "period": report.period,
        "revision": report.revision,
        "claim_id": claim_id,
    }


OPEN = "SELECT count(*) FROM overage_reports WHERE state IN ('pending', 'calling')"


async def count_open(conn: Connection) -> int:
    """Return how many reports are still to be made."""
    row = await (await conn.execute(OPEN)).fetchone()
    return row[0] if row else 0


REFUSE = """
WITH told AS MATERIALIZED (
    SELECT r.org_id, r.channel, r.period, r.revision, t.error
    FROM unnest(%(identifiers)s::text[], %(errors)s::text[]) AS t (identifier, error)
    JOIN overage_reports AS r ON r.identifier = t.identifier
    WHERE r.state IN ('calling', 'reported')
    ORDER BY r.org_id, r.channel, r.period, r.revision
    FOR UPDATE OF r
)
UPDATE overage_reports AS r
SET state = 'failed', claim_id = NULL, error = t.error
FROM told AS t
WHERE r.org_id = t.org_id AND r.channel = t.channel AND r.period = t.period AND r.revision = t.revision
RETURNING r.org_id
"""


async def mark_refused_later(conn: Connection, errors: dict[str, str]) -> list[UUID]:
    """Note that Stripe could not count reports it had accepted; return the orgs of those that are ours."""
    arguments = {"identifiers": list(errors), "errors": list(errors.values())}
    return [row[0] for row in await (await conn.execute(REFUSE, arguments)).fetchall()]


@dataclass(frozen=True, slots=True)
class ReportView:
    """A report as it stands."""

    org_id: UUID
    channel: str
    period: str
    revision: int
    units: int
    total: int
    identifier: str
    event_name: str
    stripe_customer_id: str
    state: str
    attempts: int
    error: str | None
    event_at: datetime
    reported_at: datetime | None


LIST = """
SELECT org_id, channel, period, revision, units, total, identifier, event_name, stripe_customer_id, state, attempts,
       error, event_at, reported_at
FROM overage_reports
WHERE %(state)s::text IS NULL OR state = %(state)s
ORDER BY period DESC, org_id, channel, revision DESC
LIMIT %(limit)s
"""


async def list_reports(conn: Connection, *, state: str | None, limit: int) -> list[ReportView]:
    """Return the newest reports, those in one state if it is given."""
    cursor = await conn.execute(LIST, {"state": state, "limit": limit})
    return [ReportView(*row) for row in await cursor.fetchall()]
