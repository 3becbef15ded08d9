"""Report what metered orgs used beyond their plan to Stripe.

Path      /api/cron/report-overage, 06:00 on the first of the month; OVERAGE_REPORTING=daily: 00:15 every day
Reads     usage_records and message_plans: months that are over, daily also the one that runs        (store.overage)
Writes    overage_reports, committed before the call; the claim; the result, under its claim_id
Calls     BillingMeter, outside any transaction, one call at a time per customer, meter and month
Safe      to run twice or at once: a revision is a row, Stripe counts its identifier once within 24 hours, and after
          that its sum is asked before a call in doubt is repeated
Late      months that were missed are reported while Stripe takes their time (35 days); then they are `too_old`
Result    orgs, events, email_overage, sms_overage: what was reported; skipped: months without a customer;
          failed: reports that were refused, are too old, or not settled, which the next run takes up
Source    messaging cron specification, report-overage
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Literal
from uuid import UUID

from nightmail.engine.job import JobContext, JobResult
from nightmail.errors import InDoubt, Permanent, ProviderError
from nightmail.ids import new_claim_id
from nightmail.store import overage, queue
from nightmail.store.overage import ClaimedReport, Prepared

KEYS = ("orgs", "events", "email_overage", "sms_overage", "skipped", "failed")
# So many calls at once: Stripe takes 1,000 a second, and each is one org's month.
BATCH = 8
# A claim outlives its two calls, sum and report, by this.
LEASE_MARGIN_S = 30.0
# Below this no call begins: Stripe answers within it as a rule.
LEAST_CALL_S = 0.5
# A shorter run is hardly of use: it might begin no call.
LEAST_RUN_S = 5.0


@dataclass(slots=True)
class Tally:
    """What a run has done so far."""

    skipped: int = 0
    failed: int = 0
    events: int = 0
    units: dict[str, int] = field(default_factory=lambda: {"email": 0, "sms": 0})
    orgs: set[UUID] = field(default_factory=set)

    def result(self, *, more: bool) -> JobResult:
        """Return the run's counts."""
        counts = (len(self.orgs), self.events, self.units["email"], self.units["sms"], self.skipped, self.failed)
        return JobResult(dict(zip(KEYS, counts, strict=True)), more)


async def run(ctx: JobContext) -> JobResult:
    """Prepare what is owed, then claim, call and record until nothing is left or the deadline is near."""
    with_open = ctx.settings.overage_reporting == "daily"
    if ctx.dry:
        return _foretold(await ctx.database.run(partial(overage.count_owed, with_open=with_open)))
    began_at = await ctx.database.run(queue.read_clock)
    prepared = await ctx.database.run(
        partial(
            overage.prepare,
            with_open=with_open,
            email_event=ctx.settings.stripe_email_overage_meter_event or "",
            sms_event=ctx.settings.stripe_sms_overage_meter_event or "",
        )
    )
    ctx.reach("prepared")
    tally = Tally(skipped=prepared.skipped, failed=prepared.too_old)
    while call_s(ctx) >= LEAST_CALL_S and not ctx.stopping.is_set() and await work_set(ctx, tally, began_at):
        continue
    return tally.result(more=await ctx.database.run(overage.count_open) > 0)


def call_s(ctx: JobContext) -> float:
    """Return how long a call may take now: two of them and what is written after fit into what the deadline leaves."""
    return min(ctx.settings.provider_call_s, (ctx.deadline.left_s - 0.5) / 2)


async def work_set(ctx: JobContext, tally: Tally, began_at: datetime) -> bool:
    """Claim a set, call for each report of it and record; return whether there was any."""
    claim_id = new_claim_id()
    lease_s = 2 * ctx.settings.provider_call_s + LEASE_MARGIN_S
    claimed = await ctx.database.run(
        partial(overage.claim_reports, claim_id=claim_id, began_at=began_at, lease_s=lease_s, limit=BATCH)
    )
    ctx.reach("claimed")
    await asyncio.gather(*(_work(ctx, tally, report, claim_id) for report in claimed))
    return bool(claimed)


async def _work(ctx: JobContext, tally: Tally, report: ClaimedReport, claim_id: UUID) -> None:
    """Report one revision, and write what became of it."""
    record = partial(overage.record_report, report=report, claim_id=claim_id)
    try:
        how = await _report(ctx, report, claim_id)
    except ProviderError as error:
        tally.failed += 1
        await ctx.database.run(partial(record, state=_state_after(report, error), error=str(error)[:300]))
        ctx.log.warning(
            "overage.not_reported",
            identifier=report.event.identifier,
            error=str(error)[:300],
            kind=type(error).__name__,
        )
        return
    if how == "too_old":
        tally.failed += 1
        why = "over 35 days old"
        if report.first_called_at is not None:
            why += ", and Stripe's sum does not tell whether it holds it: look before invoicing"
        await ctx.database.run(partial(record, state="too_old", error=why))
    elif await ctx.database.run(partial(record, state="reported", answer={"outcome": how})):
        tally.events += 1
        tally.units[report.channel] += report.event.value
        tally.orgs.add(report.org_id)
        ctx.log.info("overage.reported", identifier=report.event.identifier, units=report.event.value, how=how)


async def _report(ctx: JobContext, report: ClaimedReport, claim_id: UUID) -> str:
    """Make the call, unless it had effect before or can have none; return how it ended. Raises ProviderError."""
    if not report.is_sure:
        is_counted = await _is_counted(ctx, report)
        if is_counted:
            return "found"
        if report.is_too_old:
            return "too_old"
        if is_counted is None:
            raise InDoubt(
                "unexplained_sum", "Stripe's sum is larger than what was reported: who else writes to the meter?"
            )
        if not await ctx.database.run(partial(overage.begin_again, report=report, claim_id=claim_id)):
            raise InDoubt("claim_lost", "another run has taken this report over")
    elif report.is_too_old and report.first_called_at is None:
        return "too_old"
    ctx.reach("before_call")
    how = await ctx.ports.meter.report(report.event, timeout_s=call_s(ctx))
    ctx.reach("called")
    return how


def _state_after(report: ClaimedReport, error: ProviderError) -> Literal["failed", "calling", "pending"]:
    """Return the state that an error leaves: refused for good, in doubt, or to be tried again as if never called.

    A repeated call may be refused although the first one was taken: it stays in doubt until Stripe's sum is asked.
    """
    was_in_doubt = report.first_called_at is not None and report.is_sure
    if isinstance(error, Permanent):
        return "calling" if was_in_doubt else "failed"
    return "calling" if isinstance(error, InDoubt) or report.first_called_at is not None else "pending"


async def _is_counted(ctx: JobContext, report: ClaimedReport) -> bool | None:
    """Return whether Stripe's sum already holds a report whose identifier it may have forgotten.

    None when it holds more than ours with this report: somebody else's units may hide that it is missing.
    """
    try:
        counted = await ctx.ports.meter.sum_of(
            event_name=report.event.event_name,
            stripe_customer_id=report.event.stripe_customer_id,
            start=report.begins_at,
            end=report.ends_at,
            timeout_s=call_s(ctx),
        )
    except ProviderError as error:
        raise InDoubt(error.code, f"Stripe's sum: {error.detail}") from error
    known = await ctx.database.run(partial(overage.read_known_units, report=report))
    whole = known + report.event.value
    return None if counted > whole else counted == whole


def _foretold(found: Prepared) -> JobResult:
    counts = (found.orgs, found.reports, found.emails, found.sms, found.skipped, found.too_old)
    return JobResult(dict(zip(KEYS, counts, strict=True)))
