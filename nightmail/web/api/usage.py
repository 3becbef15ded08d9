"""/usage: Resend's shape, from usage_records and the day's messages; what Nightmail does not count is 0.

And beyond Resend what pays: `credits` and `metered`.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated

import msgspec
from msgspec import Meta

from nightmail import clock
from nightmail.store.daily_usage import count_today
from nightmail.store.message_plans import Terms, get_terms
from nightmail.store.usage_records import UsageTotal, list_totals
from nightmail.web.operation import Call, Operation, Reply


class Window(msgspec.Struct, kw_only=True):
    """Units in a window: `used` includes what is accepted and not sent yet.

    `limit` is what the plan includes in the month; more is refused, paid with credits or metered, as the org is billed.
    None means that none is enforced: by day, and in the test env.
    """

    used: int
    limit: int | None
    sent: int
    received: int
    resets_at: datetime


class ChannelUsage(msgspec.Struct):
    """A channel today and this month (UTC): recipients of email, segments of SMS."""

    daily: Window
    monthly: Window


class Quota(msgspec.Struct):
    """Something counted."""

    used: int = 0
    limit: int | None = None


class AiCredits(msgspec.Struct):
    """Resend has them; Nightmail does not."""

    used: int = 0
    limit: int | None = 0
    next_increase_at: datetime | None = None


class AutomationRuns(msgspec.Struct):
    """Resend has them; Nightmail does not."""

    resets_at: datetime
    used: int = 0
    limit: int = 0


class RateLimit(msgspec.Struct):
    """Requests per window that this key may make."""

    limit: int
    duration: str = "1000ms"


class CreditUsage(msgspec.Struct):
    """The wallet that pays for messages beyond the quota: what can be spent, and what waiting messages hold."""

    available: int
    reserved: int


class MeteredUsage(msgspec.Struct):
    """Units of this month that are billed at its end, of waiting messages too."""

    emails: int
    sms: int


class Usage(msgspec.Struct, kw_only=True):
    """What the org used, in the env of the key."""

    emails: ChannelUsage
    sms: ChannelUsage
    contacts: Quota
    segments: Quota
    broadcasts: Quota
    ai_credits: AiCredits
    automation_runs: AutomationRuns
    domains: Quota
    rate_limit: RateLimit
    credits: Annotated[CreditUsage | None, Meta(description="null when no wallet pays for the org's messages.")]
    metered: MeteredUsage
    object: str = "usage"


async def get_usage(call: Call[None]) -> Reply:
    """Return the org's usage."""
    org_id, env = call.key.org_id, call.key.env
    midnight = clock.now().replace(hour=0, minute=0, second=0, microsecond=0)
    async with call.services.database.connection() as conn:
        totals = await list_totals(conn, org_id, f"{midnight:%Y-%m}")
        emails = await count_today(conn, org_id=org_id, env=env, channel="email")
        sms = await count_today(conn, org_id=org_id, env=env, channel="sms")
        terms = await get_terms(conn, org_id) if env == "live" else None
    month = [total for total in totals if total.env == env]
    next_month = (midnight.replace(day=1) + timedelta(days=32)).replace(day=1)
    return Reply(
        Usage(
            emails=_channel(month, "email", emails, midnight, next_month, terms.included_emails if terms else None),
            sms=_channel(month, "sms", sms, midnight, next_month, terms.included_sms if terms else None),
            contacts=Quota(limit=0),
            segments=Quota(),
            broadcasts=Quota(),
            ai_credits=AiCredits(),
            automation_runs=AutomationRuns(next_month),
            domains=Quota(),
            rate_limit=RateLimit(call.key.rate_per_s or call.services.settings.api_rate_per_s),
            credits=_credits(terms),
            metered=MeteredUsage(_metered(month, "email"), _metered(month, "sms")),
        )
    )


def _credits(terms: Terms | None) -> CreditUsage | None:
    if terms is None or terms.available is None or terms.reserved is None:
        return None
    return CreditUsage(terms.available, terms.reserved)


def _metered(totals: list[UsageTotal], channel: str) -> int:
    return sum(total.used + total.reserved for total in totals if (total.channel, total.rating) == (channel, "metered"))


def _channel(
    totals: list[UsageTotal],
    channel: str,
    today: tuple[int, int],
    midnight: datetime,
    next_month: datetime,
    limit: int | None,
) -> ChannelUsage:
    mine = [total for total in totals if total.channel == channel]
    sent = sum(total.used for total in mine)
    reserved = sum(total.reserved for total in mine)
    tomorrow = midnight + timedelta(days=1)
    return ChannelUsage(
        Window(used=today[0], limit=None, sent=today[1], received=0, resets_at=tomorrow),
        Window(used=sent + reserved, limit=limit, sent=sent, received=0, resets_at=next_month),
    )


OPERATIONS = (
    Operation(
        method="GET", path="/usage", handler=get_usage, summary="Get usage", access="full", tag="Usage", reply=Usage
    ),
)
