"""What the tests of report-overage share: an engine at a moment of our choice, metered orgs, and a fake Stripe."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg

from nightmail.engine.runner import RunOutcome
from nightmail.fakes.stripe_api import FakeStripe
from nightmail.ids import new_id
from nightmail.jobs.table import jobs_for
from nightmail.providers.stripe_meter import StripeMeter
from tests.engine.place import Place, place, settings_of
from tests.ports import make_ports

EMAIL, SMS = "email_overage", "sms_overage"
SETTINGS = {
    "stripe_api_key": "sk_test_of_the_tests",
    "stripe_email_overage_meter_event": EMAIL,
    "stripe_sms_overage_meter_event": SMS,
}
ORG = """
INSERT INTO orgs (id, name, plan, billing, stripe_customer_id) VALUES (%s, 'Acme', %s, 'metered', %s)
"""
USE = """
INSERT INTO usage_records AS u (org_id, channel, env, period, rating, shard, used) VALUES (%s, %s, %s, %s, %s, %s, %s)
ON CONFLICT (org_id, channel, env, period, rating, shard) DO UPDATE SET used = u.used + excluded.used
"""
REPORTS = """
SELECT channel, period, revision, units, total, state FROM overage_reports ORDER BY org_id, channel, period, revision
"""


def at(year: int, month: int, day: int, hour: int = 6, minute: int = 0) -> datetime:
    """Return a moment in UTC."""
    return datetime(year, month, day, hour, minute, tzinfo=UTC)


def offset_to(moment: datetime) -> timedelta:
    """Return what a clock must be shifted by to show this moment now."""
    return moment - datetime.now(UTC)


def metered_org(url: str, customer: str | None = "cus_1", plan: str = "pro") -> UUID:
    """Make a metered org."""
    org_id = new_id()
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(ORG, [org_id, plan, customer])
    return org_id


def use(url: str, org_id: UUID, period: str, *, channel: str = "email", env: str = "live", **used: int) -> None:
    """Count usage of a month by rating, spread over two shards."""
    with psycopg.connect(url, autocommit=True) as conn:
        for rating, units in used.items():
            for shard, part in ((1, units // 3), (6, units - units // 3)):
                conn.execute(USE, [org_id, channel, env, period, rating, shard, part])


@asynccontextmanager
async def billing(url: str, fake: FakeStripe, moment: datetime, **overrides: Any) -> AsyncIterator[Place]:
    """Open an engine, and shift its clock and the fake's to the moment."""
    fake.offset = offset_to(moment)
    options = {**SETTINGS, "provider_timeout_s": 5.0, **overrides}
    crash = options.pop("crash", None)
    jobs = jobs_for(settings_of(**options))
    async with place(url, jobs, clock_offset=f"{fake.offset.total_seconds()} seconds", crash=crash, **options) as here:
        key = options.get("stripe_api_key")
        meter = StripeMeter(api_key=key, api_base=fake.url, timeout_s=here.engine.settings.provider_call_s)
        here.engine.ports = make_ports(meter=meter)
        try:
            yield here
        finally:
            await meter.close()


async def report(here: Place, **options: Any) -> RunOutcome:
    """Run the job as a platform does."""
    return await here.engine.run("report-overage", trigger="test", **options)
