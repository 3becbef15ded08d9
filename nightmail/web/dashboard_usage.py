"""The operator's pages about usage: what orgs used of their quota, who paid for the rest, and what Stripe was told."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID

from starlette.responses import Response
from starlette.routing import BaseRoute

from nightmail.store import credit_overview, overage_overview, usage_overview
from nightmail.store.credits import Wallet
from nightmail.store.database import Connection
from nightmail.store.overview import SCAN
from nightmail.store.usage_overview import CHANNELS, MONTHS, MonthUsage, OrgRow
from nightmail.web import money_charts
from nightmail.web.dashboard_credits import one_of, org_filter
from nightmail.web.pages import Dashboard, Page, address_of, uuid_of
from nightmail.web.problems import invalid

BILLINGS = ("quota", "prepaid", "metered")
PERIOD = re.compile(r"[0-9]{4}-(0[1-9]|1[0-2])")
# Of their quota, from which on orgs are shown in the colour of warnings.
NEARLY = 0.8
UNITS = {"email": "emails", "sms": "SMS segments"}
ONE_UNIT = {"email": "recipient", "sms": "segment"}


@dataclass(frozen=True, slots=True)
class Quota:
    """This month of a channel against what the plan includes."""

    usage: MonthUsage
    included: int | None

    @property
    def percent(self) -> str:
        """Return the share of the quota that is taken; some is never shown as nothing."""
        if not self.included:
            return "–"
        share = self.usage.total / self.included * 100
        return "0 %" if not self.usage.total else "< 1 %" if share < 1 else f"{share:,.0f} %"

    @property
    def tone(self) -> str:
        """Return the colour: more than included is red, nearly all of it amber."""
        if not self.included or self.usage.total <= NEARLY * self.included:
            return ""
        return "over" if self.usage.total > self.included else "near"

    @property
    def width(self) -> float:
        """Return how much of a meter of 100 is filled."""
        return round(min(self.usage.total / self.included, 1.0) * 100, 1) if self.included else 0.0


@dataclass(frozen=True, slots=True)
class ChannelMonths:
    """A channel on an org's page: this month, the months before and after it, newest first, and their drawing."""

    channel: str
    quota: Quota
    months: Sequence[MonthUsage]
    plot: money_charts.Months


def usage_pages(dashboard: Dashboard) -> list[BaseRoute]:
    """Return the pages below /dashboard/usage and /dashboard/overage."""
    at = dashboard.route
    return [
        at("/usage", show_orgs),
        at("/usage/{org}", show_org),
        at("/overage", show_reports),
        at("/overage/events", show_stripe_events),
    ]


async def show_orgs(page: Page) -> Response:
    """GET /dashboard/usage: all orgs and what they used this month."""
    search = page.query("q")
    org_id = uuid_of(search)
    if org_id is not None:
        return page.go(f"/dashboard/usage/{org_id}")
    billing = one_of(page, "billing", BILLINGS)
    before = _id_filter(page, "before")
    period = f"{page.now:%Y-%m}"
    found, months = await page.read(
        partial(_read_orgs, name=search, billing=billing or None, before=before, period=period)
    )
    kept = {"q": search, "billing": billing}
    older = address_of("/dashboard/usage", **kept, before=str(found.next_before)) if found.next_before else ""
    lines = [
        (row, [Quota(months[row.id, channel, period], row.included(channel)) for channel in CHANNELS])
        for row in found.rows
    ]
    return page.show(
        "orgs.html.j2", found=found, lines=lines, older=older, chosen=kept, billings=BILLINGS, period=period,
        is_first=before is None, scan=SCAN,
        newest=address_of("/dashboard/usage", **kept) if any(kept.values()) else "/dashboard/usage",
    )  # fmt: skip


async def _read_orgs(
    conn: Connection, name: str, billing: str | None, before: UUID | None, period: str
) -> tuple[usage_overview.OrgPage, Mapping[tuple[UUID, str, str], MonthUsage]]:
    found = await usage_overview.list_orgs(conn, name=name, billing=billing, before=before)
    return found, await usage_overview.read_months(conn, [row.id for row in found.rows], [period])


async def show_org(page: Page) -> Response:
    """GET /dashboard/usage/{org}: how each month was paid, channel by channel."""
    org_id = uuid_of(page.request.path_params["org"])
    values = await page.read(partial(_read_org, org_id=org_id, moment=page.now)) if org_id else None
    if values is None:
        return page.refuse(404, "There is no org with this id.")
    return page.show("org.html.j2", **values, units=UNITS, one_unit=ONE_UNIT, period=f"{page.now:%Y-%m}")


async def _read_org(conn: Connection, org_id: UUID, moment: datetime) -> dict[str, Any] | None:
    org = await usage_overview.get_org(conn, org_id)
    if org is None:
        return None
    this_period = f"{moment:%Y-%m}"
    periods = [*months_before(moment, MONTHS - 1), this_period]
    periods += await usage_overview.later_periods(conn, org_id, this_period)
    months = await usage_overview.read_months(conn, [org_id], periods)
    account_id = await credit_overview.find_wallet(conn, Wallet(org_id, "live", org.billing_user))
    return {
        "org": org,
        "wallet": await credit_overview.get_wallet(conn, account_id) if account_id is not None else None,
        "channels": [_channel(org, channel, periods, months, this_period) for channel in CHANNELS],
    }


def _channel(
    org: OrgRow,
    channel: str,
    periods: Sequence[str],
    found: Mapping[tuple[UUID, str, str], MonthUsage],
    this_period: str,
) -> ChannelMonths:
    months = [found[org.id, channel, period] for period in periods]
    quota = Quota(found[org.id, channel, this_period], org.included(channel))
    plot = money_charts.draw_months(months, org.included(channel), this_period)
    return ChannelMonths(channel, quota, months[::-1], plot)


async def show_reports(page: Page) -> Response:
    """GET /dashboard/overage: what Stripe was told to bill, and what it was not told yet."""
    org_id = org_filter(page)
    state = one_of(page, "state", overage_overview.STATES)
    period = page.query("period")
    if period and not PERIOD.fullmatch(period):
        raise invalid("The `period` of this address is a month such as 2030-12.")
    before = page.query("before")
    wanted = overage_overview.ReportFilter(org_id, state or None, period or None)
    values = await page.read(partial(_read_reports, wanted=wanted, before=before or None, moment=page.now))
    kept = {"org": str(org_id) if org_id else "", "state": state, "period": period}
    next_before = values["found"].next_before
    return page.show(
        "overage.html.j2", **values, chosen=kept, states=overage_overview.STATES, is_first=not before, scan=SCAN,
        older=address_of("/dashboard/overage", **kept, before=next_before) if next_before else "",
        newest=address_of("/dashboard/overage", **kept) if any(kept.values()) else "/dashboard/overage",
    )  # fmt: skip


async def _read_reports(
    conn: Connection, wanted: overage_overview.ReportFilter, before: str | None, moment: datetime
) -> dict[str, Any]:
    closed = months_before(moment, overage_overview.OPEN_MONTHS)
    is_plain = wanted == overage_overview.ReportFilter() and before is None
    open_periods, has_more_open = await overage_overview.list_open_periods(conn, closed) if is_plain else ([], False)
    events, next_event = (
        await overage_overview.list_stripe_events(conn, outcome=None, before=None) if is_plain else ([], None)
    )
    return {
        "found": await overage_overview.list_reports(conn, wanted, before=before),
        "totals": await overage_overview.count_reports(conn),
        "open_periods": open_periods,
        "has_more_open": has_more_open,
        "is_plain": is_plain,
        "closed": closed,
        "orgs_looked_at": overage_overview.ORGS_LOOKED_AT,
        "events": events[:10],
        "has_more_events": len(events) > 10 or next_event is not None,
    }


async def show_stripe_events(page: Page) -> Response:
    """GET /dashboard/overage/events: what Stripe sent, and what came of it."""
    outcome = one_of(page, "outcome", overage_overview.OUTCOMES)
    before = page.query("before")
    events, next_before = await page.read(
        lambda conn: overage_overview.list_stripe_events(conn, outcome=outcome or None, before=before or None)
    )
    here = "/dashboard/overage/events"
    return page.show(
        "stripe_events.html.j2", events=events, outcome=outcome, outcomes=overage_overview.OUTCOMES,
        older=address_of(here, outcome=outcome, before=next_before) if next_before else "", is_first=not before,
        newest=address_of(here, outcome=outcome) if outcome else here, here=here, scan=SCAN,
    )  # fmt: skip


def months_before(moment: datetime, count: int) -> list[str]:
    """Return the periods of so many months before that of the moment, oldest first."""
    months = moment.year * 12 + moment.month - 1
    return [f"{number // 12:04}-{number % 12 + 1:02}" for number in range(months - count, months)]


def _id_filter(page: Page, name: str) -> UUID | None:
    text = page.query(name)
    found = uuid_of(text)
    if text and found is None:
        raise invalid(f"The `{name}` of this address is not an id.")
    return found
