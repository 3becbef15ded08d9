"""What the dashboard reads of usage: orgs with what a month includes, and how each of their months was paid.

Live env only, as nobody is charged for the test env. A page reads a bounded number of orgs, and of an org the rows of
MONTHS months.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from nightmail.store.database import Connection
from nightmail.store.overview import SCAN

ORGS_PAGE = 25
MONTHS = 6
CHANNELS = ("email", "sms")


@dataclass(frozen=True, slots=True)
class OrgRow:
    """A tenant and what its plan includes; the quotas are None should its plan be unknown."""

    id: UUID
    name: str
    plan: str
    billing: str
    billing_user: str
    stripe_customer_id: str | None
    created_at: datetime
    included_emails: int | None
    included_sms: int | None
    email_credits: int | None
    sms_credits: int | None

    def included(self, channel: str) -> int | None:
        """Return how many units of a channel a month includes."""
        return self.included_emails if channel == "email" else self.included_sms

    def price(self, channel: str) -> int | None:
        """Return what a unit beyond costs in credits."""
        return self.email_credits if channel == "email" else self.sms_credits


@dataclass(frozen=True, slots=True)
class OrgPage:
    """Tenants, newest first; `next_before` continues, None at the end. `scanned` when the look ended before it."""

    rows: list[OrgRow] = field(default_factory=list)
    next_before: UUID | None = None
    scanned: bool = False


ORG_COLUMNS = """
SELECT o.id, o.name, o.plan, o.billing, o.billing_user, o.stripe_customer_id, o.created_at, p.included_emails,
       p.included_sms, p.email_credits, p.sms_credits
FROM shown AS o
LEFT JOIN message_plans AS p ON p.id = o.plan
ORDER BY o.id DESC
"""

SHOWN = """
WITH shown AS MATERIALIZED (
    SELECT *
    FROM (
        SELECT *
        FROM orgs
        WHERE %(before)s::uuid IS NULL OR id < %(before)s
        ORDER BY id DESC
        LIMIT %(scan)s
    ) AS scanned
    WHERE (%(billing)s::text IS NULL OR billing = %(billing)s)
      AND (%(name)s = '' OR strpos(lower(name), lower(%(name)s)) > 0)
    ORDER BY id DESC
    LIMIT %(limit)s + 1
)"""
LIST_ORGS = SHOWN + ORG_COLUMNS

LAST_SCANNED = """
SELECT id
FROM orgs
WHERE %(before)s::uuid IS NULL OR id < %(before)s
ORDER BY id DESC
LIMIT 1 OFFSET %(scan)s - 1
"""


async def list_orgs(conn: Connection, *, name: str, billing: str | None, before: UUID | None) -> OrgPage:
    """Return a page of tenants; `name` is any part of the name, in whichever case."""
    arguments = {"name": name, "billing": billing, "before": before, "scan": SCAN, "limit": ORGS_PAGE}
    rows = [OrgRow(*row) for row in await (await conn.execute(LIST_ORGS, arguments)).fetchall()]
    if len(rows) > ORGS_PAGE:
        return OrgPage(rows[:ORGS_PAGE], rows[ORGS_PAGE - 1].id)
    if not (name or billing):
        return OrgPage(rows)
    last = await (await conn.execute(LAST_SCANNED, arguments)).fetchone()
    return OrgPage(rows, last[0] if last else None, last is not None)


ONE_SHOWN = """
WITH shown AS MATERIALIZED (
    SELECT *
    FROM orgs
    WHERE id = %(org_id)s
)"""
GET_ORG = ONE_SHOWN + ORG_COLUMNS


async def get_org(conn: Connection, org_id: UUID) -> OrgRow | None:
    """Return a tenant, None when there is none with this id."""
    row = await (await conn.execute(GET_ORG, {"org_id": org_id})).fetchone()
    return OrgRow(*row) if row else None


@dataclass(frozen=True, slots=True)
class MonthUsage:
    """Units of an org, channel and month by who paid: used, and reserved for what is scheduled.

    `told` are the percentages of the quota of which the org was told; `reported` is what Stripe was told to bill.
    """

    org_id: UUID
    channel: str
    period: str
    included: int = 0
    credits: int = 0
    metered: int = 0
    included_reserved: int = 0
    credits_reserved: int = 0
    metered_reserved: int = 0
    reported: int = 0
    told: Sequence[int] = ()

    @property
    def used(self) -> int:
        """Return what was sent."""
        return self.included + self.credits + self.metered

    @property
    def reserved(self) -> int:
        """Return what is scheduled and not sent yet."""
        return self.included_reserved + self.credits_reserved + self.metered_reserved

    @property
    def total(self) -> int:
        """Return what was sent and what is scheduled."""
        return self.used + self.reserved


# The primary key begins with org, channel, env and period: each group is a few rows beside each other. A shard may be
# below zero by itself, the sums are not.
MONTHS_OF_ORGS = """
SELECT w.org_id, w.channel, w.period, u.included, u.credits, u.metered, u.included_reserved, u.credits_reserved,
       u.metered_reserved,
       (
           SELECT coalesce(sum(r.units) FILTER (WHERE r.state = 'reported'), 0)::bigint
           FROM overage_reports AS r
           WHERE r.org_id = w.org_id
             AND r.channel = w.channel
             AND r.period = w.period
       ),
       ARRAY(
           SELECT n.percent::integer
           FROM usage_notices AS n
           WHERE n.org_id = w.org_id
             AND n.channel = w.channel
             AND n.period = w.period
           ORDER BY n.percent
       )
FROM (
    SELECT o.id AS org_id, c.channel, p.period
    FROM unnest(%(org_ids)s::uuid[]) AS o (id)
    CROSS JOIN unnest(%(channels)s::text[]) AS c (channel)
    CROSS JOIN unnest(%(periods)s::text[]) AS p (period)
) AS w
CROSS JOIN LATERAL (
    SELECT coalesce(sum(used) FILTER (WHERE rating = 'included'), 0)::bigint AS included,
           coalesce(sum(used) FILTER (WHERE rating = 'credits'), 0)::bigint AS credits,
           coalesce(sum(used) FILTER (WHERE rating = 'metered'), 0)::bigint AS metered,
           coalesce(sum(reserved) FILTER (WHERE rating = 'included'), 0)::bigint AS included_reserved,
           coalesce(sum(reserved) FILTER (WHERE rating = 'credits'), 0)::bigint AS credits_reserved,
           coalesce(sum(reserved) FILTER (WHERE rating = 'metered'), 0)::bigint AS metered_reserved
    FROM usage_records
    WHERE org_id = w.org_id
      AND channel = w.channel
      AND env = 'live'
      AND period = w.period
) AS u
"""


async def read_months(
    conn: Connection, org_ids: Sequence[UUID], periods: Sequence[str]
) -> dict[tuple[UUID, str, str], MonthUsage]:
    """Return the usage of each org, channel and period (`YYYY-MM`), also of those without any."""
    arguments = {"org_ids": list(org_ids), "channels": list(CHANNELS), "periods": list(periods)}
    rows = [MonthUsage(*row) for row in await (await conn.execute(MONTHS_OF_ORGS, arguments)).fetchall()]
    return {(row.org_id, row.channel, row.period): row for row in rows}


SCHEDULED_PERIODS = """
SELECT DISTINCT period
FROM usage_records
WHERE org_id = %(org_id)s
  AND env = 'live'
  AND period > %(period)s
ORDER BY period
LIMIT 3
"""


async def later_periods(conn: Connection, org_id: UUID, period: str) -> list[str]:
    """Return the months after this one into which something is scheduled, at most 3."""
    cursor = await conn.execute(SCHEDULED_PERIODS, {"org_id": org_id, "period": period})
    return [row[0] for row in await cursor.fetchall()]
