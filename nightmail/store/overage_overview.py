"""What the dashboard reads of money on its way to and from Stripe: reports of overage, open months, events received."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from nightmail.store.database import Connection
from nightmail.store.overview import PAGE, SCAN

STATES = ("pending", "calling", "reported", "too_old", "failed")
OUTCOMES = ("applied", "ignored", "stale", "failed")
# Metered orgs that are looked through for months to be reported: 5,000 take about 160 ms.
ORGS_LOOKED_AT = 5_000
OPEN_SHOWN = 50
# Stripe takes no timestamp of over 35 days: what is older than these months is too old for it.
OPEN_MONTHS = 3


@dataclass(frozen=True, slots=True)
class ReportRow:
    """One meter event: what became metered since the revision before."""

    org_id: UUID
    org: str
    channel: str
    period: str
    revision: int
    units: int
    total: int
    identifier: str
    event_name: str
    stripe_customer_id: str
    event_at: datetime
    state: str
    attempts: int
    first_called_at: datetime | None
    reported_at: datetime | None
    answer: Any
    error: str | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class ReportFilter:
    """Which reports; None leaves it open."""

    org_id: UUID | None = None
    state: str | None = None
    period: str | None = None


@dataclass(frozen=True, slots=True)
class ReportPage:
    """Reports, newest first; `next_before` (an identifier) continues. `scanned` when the look ended before the end."""

    rows: list[ReportRow] = field(default_factory=list)
    next_before: str | None = None
    scanned: bool = False


# Paged by (created_at, identifier) along overage_reports_listed.
LIST_REPORTS = """
SELECT r.org_id, coalesce(o.name, ''), r.channel, r.period, r.revision, r.units, r.total, r.identifier, r.event_name,
       r.stripe_customer_id, r.event_at, r.state, r.attempts, r.first_called_at, r.reported_at, r.answer, r.error,
       r.created_at
FROM (
    SELECT *
    FROM (
        SELECT *
        FROM overage_reports
        WHERE (created_at, identifier) < (
            coalesce((SELECT created_at FROM overage_reports WHERE identifier = %(before)s), 'infinity'), %(before)s
        )
        ORDER BY created_at DESC, identifier DESC
        LIMIT %(scan)s
    ) AS scanned
    WHERE (%(state)s::text IS NULL OR state = %(state)s)
      AND (%(period)s::text IS NULL OR period = %(period)s)
    ORDER BY created_at DESC, identifier DESC
    LIMIT %(limit)s + 1
) AS r
LEFT JOIN orgs AS o ON o.id = r.org_id
ORDER BY r.created_at DESC, r.identifier DESC
"""
# An org's are few: the primary key begins with it.
LIST_REPORTS_OF_ORG = LIST_REPORTS.replace("WHERE (created_at", "WHERE org_id = %(org_id)s\n          AND (created_at")

LAST_SCANNED = """
SELECT identifier
FROM overage_reports
WHERE (created_at, identifier) < (
    coalesce((SELECT created_at FROM overage_reports WHERE identifier = %(before)s), 'infinity'), %(before)s
)
ORDER BY created_at DESC, identifier DESC
LIMIT 1 OFFSET %(scan)s - 1
"""


async def list_reports(conn: Connection, wanted: ReportFilter, *, before: str | None = None) -> ReportPage:
    """Return a page of reports, newest first."""
    arguments = {
        "org_id": wanted.org_id,
        "state": wanted.state,
        "period": wanted.period,
        "before": before or "",
        "scan": SCAN,
        "limit": PAGE,
    }
    cursor = await conn.execute(LIST_REPORTS if wanted.org_id is None else LIST_REPORTS_OF_ORG, arguments)
    rows = [ReportRow(*row) for row in await cursor.fetchall()]
    if len(rows) > PAGE:
        return ReportPage(rows[:PAGE], rows[PAGE - 1].identifier)
    if wanted.org_id is not None or not (wanted.state or wanted.period):
        return ReportPage(rows)
    last = await (await conn.execute(LAST_SCANNED, arguments)).fetchone()
    return ReportPage(rows, last[0] if last else None, last is not None)


@dataclass(frozen=True, slots=True)
class ReportTotals:
    """Reports and units by state among the newest SCAN reports."""

    by_state: dict[str, tuple[int, int]]
    is_all: bool


REPORT_TOTALS = """
SELECT state, count(*), sum(units)::bigint
FROM (
    SELECT state, units
    FROM overage_reports
    ORDER BY created_at DESC, identifier DESC
    LIMIT %(scan)s
) AS newest
GROUP BY state
"""


async def count_reports(conn: Connection) -> ReportTotals:
    """Count the newest reports and their units by state."""
    rows = await (await conn.execute(REPORT_TOTALS, {"scan": SCAN})).fetchall()
    return ReportTotals({row[0]: (row[1], row[2]) for row in rows}, sum(row[1] for row in rows) < SCAN)


@dataclass(frozen=True, slots=True)
class OpenPeriod:
    """A month that is over and of which Stripe was not told all that is metered.

    What was refused counts as not reported: its units are in a later revision. `has_customer` False: nobody to bill.
    """

    org_id: UUID
    org: str
    channel: str
    period: str
    metered: int
    reported: int
    waiting: int
    too_old: int
    has_customer: bool

    @property
    def missing(self) -> int:
        """Return what no report stands for yet."""
        return max(self.metered - self.reported - self.waiting - self.too_old, 0)


# What is metered is what report-overage bills: all beyond the included units that no credits were spent for. An org
# whose quota is counted exactly (usage_quotas) has it in its ratings; for the others the sum of the month decides.
OPEN_PERIODS = """
SELECT o.id, o.name, c.channel, p.period, u.metered, r.reported, r.waiting, r.too_old,
       o.has_customer
FROM (
    SELECT id, name, plan, stripe_customer_id IS NOT NULL AS has_customer
    FROM orgs
    WHERE billing = 'metered'
    ORDER BY id DESC
    LIMIT %(orgs)s
) AS o
JOIN message_plans AS n ON n.id = o.plan
CROSS JOIN (VALUES ('email'), ('sms')) AS c (channel)
CROSS JOIN unnest(%(periods)s::text[]) AS p (period)
CROSS JOIN LATERAL (
    SELECT CASE
               WHEN EXISTS (
                   SELECT FROM usage_quotas AS q
                   WHERE q.org_id = o.id AND q.channel = c.channel AND q.period = p.period
               ) THEN coalesce(sum(used) FILTER (WHERE rating = 'metered'), 0)::bigint
               ELSE greatest(
                   coalesce(sum(used) FILTER (WHERE rating <> 'credits'), 0)
                   - CASE c.channel WHEN 'email' THEN n.included_emails ELSE n.included_sms END, 0
               )::bigint
           END AS metered
    FROM usage_records
    WHERE org_id = o.id
      AND channel = c.channel
      AND env = 'live'
      AND period = p.period
) AS u
CROSS JOIN LATERAL (
    SELECT coalesce(sum(units) FILTER (WHERE state = 'reported'), 0)::bigint AS reported,
           coalesce(sum(units) FILTER (WHERE state IN ('pending', 'calling')), 0)::bigint AS waiting,
           coalesce(sum(units) FILTER (WHERE state = 'too_old'), 0)::bigint AS too_old
    FROM overage_reports
    WHERE org_id = o.id
      AND channel = c.channel
      AND period = p.period
) AS r
WHERE u.metered > r.reported
ORDER BY p.period, o.id, c.channel
LIMIT %(limit)s + 1
"""


async def list_open_periods(conn: Connection, periods: list[str]) -> tuple[list[OpenPeriod], bool]:
    """Return the closed months that are not fully reported, oldest first, and whether there are more."""
    arguments = {"periods": periods, "orgs": ORGS_LOOKED_AT, "limit": OPEN_SHOWN}
    rows = [OpenPeriod(*row) for row in await (await conn.execute(OPEN_PERIODS, arguments)).fetchall()]
    return rows[:OPEN_SHOWN], len(rows) > OPEN_SHOWN


@dataclass(frozen=True, slots=True)
class StripeEventRow:
    """An event that Stripe sent, and what came of it; `account_id` is the wallet of the purchase it was about."""

    id: str
    type: str
    created_at: datetime
    received_at: datetime
    outcome: Literal["applied", "ignored", "stale", "failed"]
    error: str | None
    org_id: UUID | None
    org: str | None
    purchase_id: UUID | None
    account_id: int | None


# Along stripe_events_received; an outcome is looked for in the newest SCAN events.
STRIPE_EVENTS = """
SELECT e.id, e.type, e.created_at, e.received_at, e.outcome, e.error, e.org_id, o.name, e.purchase_id, p.account_id
FROM (
    SELECT *
    FROM (
        SELECT *
        FROM stripe_events
        WHERE (received_at, id) < (
            coalesce((SELECT received_at FROM stripe_events WHERE id = %(before)s), 'infinity'), %(before)s
        )
        ORDER BY received_at DESC, id DESC
        LIMIT %(scan)s
    ) AS scanned
    WHERE %(outcome)s::text IS NULL OR outcome = %(outcome)s
    ORDER BY received_at DESC, id DESC
    LIMIT %(limit)s + 1
) AS e
LEFT JOIN orgs AS o ON o.id = e.org_id
LEFT JOIN purchases AS p ON p.id = e.purchase_id
ORDER BY e.received_at DESC, e.id DESC
"""


async def list_stripe_events(
    conn: Connection, *, outcome: str | None, before: str | None
) -> tuple[list[StripeEventRow], str | None]:
    """Return a page of what Stripe sent, newest first, and the id after which the next page begins."""
    arguments = {"outcome": outcome, "before": before or "", "scan": SCAN, "limit": PAGE}
    rows = [StripeEventRow(*row) for row in await (await conn.execute(STRIPE_EVENTS, arguments)).fetchall()]
    return rows[:PAGE], rows[PAGE - 1].id if len(rows) > PAGE else None
