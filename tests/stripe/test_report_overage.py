"""report-overage: Stripe holds exactly the overage of each month, whoever runs the job, and however it ends."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from datetime import timedelta
from functools import partial

import pytest

from nightmail.engine.deadline import Deadline
from nightmail.engine.job import JobContext
from nightmail.fakes.script import Behaviour, Rule, Script
from nightmail.fakes.stripe_api import FakeStripe, TakenEvent
from nightmail.ids import new_id
from nightmail.jobs import report_overage
from nightmail.jobs.table import DAILY_OVERAGE, jobs_for
from nightmail.store import orgs, overage
from nightmail.store.audit import audit
from tests.engine.place import Place, content_of, settings_of
from tests.stripe.billing import EMAIL, REPORTS, SMS, at, billing, metered_org, offset_to, report, use

pytestmark = pytest.mark.anyio

FIRST = at(2030, 11, 1)
ALERTS = "SELECT preset FROM alerts WHERE closed_at IS NULL ORDER BY 1"


def results(**counts: int) -> dict[str, int]:
    return {**dict.fromkeys(report_overage.KEYS, 0), **counts}


def once(behaviour: str) -> Script:
    return Script(rules=[Rule(match="*", behaviour=Behaviour(behaviour), times=1)])


async def test_a_month_that_closed_is_told_once_inside_its_period(database_url: str, stripe_api: FakeStripe) -> None:
    org = metered_org(database_url)
    use(database_url, org, "2030-10", included=9_000, metered=4_000)  # 3,000 beyond 10,000: late rating rated more
    use(database_url, org, "2030-10", channel="sms", included=1_000, metered=7)
    use(database_url, org, "2030-10", env="test", metered=99_000)
    use(database_url, org, "2030-11", metered=50_000)
    spared = metered_org(database_url, "cus_2")
    use(database_url, spared, "2030-10", included=10_000, credits=5_000)
    demoted = metered_org(database_url, "cus_3", "free")  # its quota was larger when these were rated
    use(database_url, demoted, "2030-10", included=9_000, metered=100)
    async with billing(database_url, stripe_api, FIRST) as here:
        before = content_of(database_url)
        foretold = await report(here, dry=True)
        assert content_of(database_url) == before
        told = await report(here)
        assert told.counts == results(orgs=2, events=3, email_overage=3_100, sms_overage=7)
        assert foretold.counts == told.counts
        assert (await report(here)).counts == results()
        assert here.rows(REPORTS) == [
            ("email", "2030-10", 1, 3_000, 3_000, "reported"),
            ("sms", "2030-10", 1, 7, 7, "reported"),
            ("email", "2030-10", 1, 100, 100, "reported"),
        ]
    assert {(e.event_name, e.customer, e.value) for e in stripe_api.events} == {
        (EMAIL, "cus_1", 3_000),
        (SMS, "cus_1", 7),
        (EMAIL, "cus_3", 100),
    }
    last_second = at(2030, 11, 1, 0) - timedelta(seconds=1)
    assert {event.at for event in stripe_api.events} == {last_second}
    assert len({event.identifier for event in stripe_api.events}) == 3


async def test_two_platforms_at_once_and_no_lease_tell_it_once(database_url: str, stripe_api: FakeStripe) -> None:
    for number in range(12):
        org = metered_org(database_url, f"cus_{number}")
        use(database_url, org, "2030-10", included=10_000, metered=100 + number)
    async with billing(database_url, stripe_api, FIRST) as here, billing(database_url, stripe_api, FIRST) as twin:
        outcomes = await asyncio.gather(report(here), report(twin))
        assert {outcome.state for outcome in outcomes} <= {"succeeded", "deduplicated"}
        for number in range(12):
            use(database_url, here.rows("SELECT id FROM orgs ORDER BY id")[number][0], "2030-10", metered=5)
        contexts = [_context(place) for place in (here, twin) * 4]
        done = await asyncio.gather(*(report_overage.run(context) for context in contexts))
        assert sum(result.counts["events"] for result in done) == 12
        while (await report(here)).more:
            continue
    assert len(stripe_api.attempts) == 24, "nobody called for what somebody else was calling for"
    assert [stripe_api.counted(f"cus_{n}") for n in range(12)] == [105 + n for n in range(12)]


def _context(here: Place) -> JobContext:
    engine = here.engine
    return JobContext(
        job_id=new_id(), job="report-overage", database=engine.database, ports=engine.ports, settings=engine.settings,
        deadline=Deadline.after(25), runner="here", log=engine.log,
    )  # fmt: skip


@pytest.mark.parametrize("point", ["prepared", "claimed", "before_call", "called"])
async def test_a_run_that_dies_anywhere_is_taken_up_and_told_once(
    database_url: str, stripe_api: FakeStripe, point: str
) -> None:
    org = metered_org(database_url)
    use(database_url, org, "2030-10", included=10_000, metered=250)
    async with billing(database_url, stripe_api, FIRST, crash=f"report-overage:{point}:raise") as here:
        assert (await report(here)).state == "failed"
    async with billing(database_url, stripe_api, FIRST) as here:
        settled = point == "prepared"
        now = await report(here)
        assert (now.counts["events"], now.more) == ((1, False) if settled else (0, True)), "the claim is alive"
    use(database_url, org, "2030-10", metered=50)
    async with billing(database_url, stripe_api, FIRST + timedelta(days=1 / 24)) as here:
        assert (await report(here)).counts["email_overage"] == (50 if settled else 300)
        assert [row[2:] for row in here.rows(REPORTS)] == [(1, 250, 250, "reported"), (2, 50, 300, "reported")]
    assert stripe_api.counted("cus_1") == 300
    assert len(stripe_api.attempts) == (3 if point == "called" else 2)


@pytest.mark.crash
@pytest.mark.parametrize(("point", "taken"), [("prepared", 0), ("before_call", 0), ("called", 1)])
async def test_a_process_that_is_killed_leaves_one_event_in_the_end(
    database_url: str, stripe_api: FakeStripe, point: str, taken: int
) -> None:
    org = metered_org(database_url)
    use(database_url, org, "2030-10", included=10_000, metered=250)
    stripe_api.offset = offset_to(FIRST)
    arguments = [database_url, stripe_api.url, str(stripe_api.offset.total_seconds()), f"report-overage:{point}:exit"]
    command = [sys.executable, "-m", "tests.stripe.overage_runner", *arguments]
    killed = await asyncio.to_thread(subprocess.run, command, capture_output=True, timeout=60)
    assert killed.returncode == -9, killed.stderr
    assert [event.value for event in stripe_api.events] == [250] * taken
    async with billing(database_url, stripe_api, FIRST + timedelta(hours=2)) as here:
        state = "pending" if point == "prepared" else "calling"
        assert here.rows("SELECT state FROM overage_reports") == [(state,)]
        assert (await report(here)).counts == results(orgs=1, events=1, email_overage=250)
        assert here.rows("SELECT answer FROM overage_reports") == [({"outcome": ("accepted", "duplicate")[taken]},)]
    assert stripe_api.counted("cus_1") == 250


DOUBTS = ("hang-after-accept", "reset-after", "fail5xx-after-accept", "garbage")
REFUSED = ("hang", "reset-before", "fail5xx", "throttle", "credentials")


@pytest.mark.parametrize("hours", [1, 30])
async def test_what_is_in_doubt_is_told_once_however_it_was_and_however_long(
    database_url: str, stripe_api: FakeStripe, hours: int
) -> None:
    """Within 24 hours by the same identifier, after that by asking for the sum: both when it was taken and when not."""
    stripe_api.has_duplicate_code = hours == 1
    rules = []
    for behaviour in DOUBTS + REFUSED:
        org = metered_org(database_url, f"cus_{behaviour}")
        use(database_url, org, "2030-10", included=10_000, metered=250)
        rules.append(Rule(match=f"cus_{behaviour}", behaviour=Behaviour(behaviour), times=1))
    stripe_api.script = Script(rules=rules, hang_s=3)
    async with billing(database_url, stripe_api, FIRST, provider_timeout_s=1.0) as here:
        first = await report(here)
        assert (first.counts, first.more) == (results(failed=9), True)
        states = here.rows("SELECT stripe_customer_id, state FROM overage_reports")
        assert {c.removeprefix("cus_") for c, state in states if state == "pending"} == {"throttle", "credentials"}
    use(database_url, org, "2030-10", metered=5)
    async with billing(database_url, stripe_api, FIRST + timedelta(hours=hours)) as here:
        assert (await report(here)).counts == results(orgs=9, events=10, email_overage=9 * 250 + 5)
        ways = dict(
            here.rows("SELECT stripe_customer_id, answer ->> 'outcome' FROM overage_reports WHERE revision = 1")
        )
        known = "duplicate" if hours == 1 else "found"
        assert ways == {f"cus_{b}": known if b in DOUBTS else "accepted" for b in DOUBTS + REFUSED}
    assert [stripe_api.counted(f"cus_{b}") for b in DOUBTS + REFUSED] == [250] * 8 + [255]


async def test_a_missing_variable_is_501_and_the_next_run_tells_the_month(
    database_url: str, stripe_api: FakeStripe
) -> None:
    org = metered_org(database_url)
    use(database_url, org, "2030-10", included=10_000, metered=250)
    async with billing(database_url, stripe_api, FIRST, stripe_sms_overage_meter_event=None) as here:
        outcome = await report(here)
        assert (outcome.state, outcome.missing) == ("not_configured", ("STRIPE_SMS_OVERAGE_METER_EVENT",))
        await here.settled()
        assert ("overage_not_configured",) in here.rows(ALERTS)
    async with billing(database_url, stripe_api, FIRST + timedelta(hours=1)) as here:
        assert (await report(here)).counts["email_overage"] == 250
        await here.settled()
        assert here.rows(ALERTS) == []


async def test_no_customer_and_too_old_are_seen_and_nothing_is_dropped(
    database_url: str, stripe_api: FakeStripe
) -> None:
    nobody, late = metered_org(database_url, None), metered_org(database_url, "cus_late")
    use(database_url, nobody, "2030-10", included=10_000, metered=11)
    use(database_url, late, "2030-09", included=10_000, metered=22)
    use(database_url, late, "2030-10", included=10_000, metered=33)
    async with billing(database_url, stripe_api, at(2030, 11, 30)) as here:
        foretold = await report(here, dry=True)
        told = await report(here)
        assert told.counts == foretold.counts == results(orgs=1, events=1, email_overage=33, skipped=1, failed=1)
        await here.settled()
        assert here.rows(ALERTS) == [("overage_too_old",), ("overage_without_customer",)]
        assert [row[1:] for row in here.rows(REPORTS)] == [
            ("2030-09", 1, 22, 22, "too_old"),
            ("2030-10", 1, 33, 33, "reported"),
        ]
        assert (await report(here)).counts == results(skipped=1)
        here.execute("UPDATE orgs SET stripe_customer_id = 'cus_new' WHERE id = %s", nobody)
        assert (await report(here)).counts == results(orgs=1, events=1, email_overage=11)
        await here.settled()
        assert here.rows(ALERTS) == [("overage_too_old",)]
    assert (stripe_api.counted("cus_new"), stripe_api.counted("cus_late")) == (11, 33)


async def test_what_stripe_refuses_is_in_the_next_revision(database_url: str, stripe_api: FakeStripe) -> None:
    org = metered_org(database_url)
    use(database_url, org, "2030-10", included=10_000, metered=250)
    stripe_api.script = once("reject")
    async with billing(database_url, stripe_api, FIRST) as here:
        assert (await report(here)).counts == results(failed=1)
        await here.settled()
        assert here.rows(ALERTS) == [("overage_refused",)]
        here.execute("UPDATE orgs SET stripe_customer_id = 'cus_other'")
        assert (await report(here)).counts == results(orgs=1, events=1, email_overage=250)
        await here.settled()
        assert here.rows(ALERTS) == []
        assert here.rows(REPORTS) == [
            ("email", "2030-10", 1, 250, 250, "failed"),
            ("email", "2030-10", 2, 250, 250, "reported"),
        ]
        refused = await here.database.run(
            lambda conn: overage.mark_refused_later(conn, {stripe_api.events[0].identifier: "no_meter: gone"})
        )
        assert refused == [org]
        assert (await report(here)).counts["email_overage"] == 250
    assert len({event.identifier for event in stripe_api.events}) == 2


async def test_daily_tells_each_days_part_and_closes_the_month_within_the_hour_of_the_draft(
    database_url: str, stripe_api: FakeStripe
) -> None:
    assert [s.schedule for s in jobs_for(settings_of(overage_reporting="daily")) if s.name == "report-overage"] == [
        DAILY_OVERAGE
    ]
    org = metered_org(database_url)
    days = [(at(2030, 10, 30, 0, 15), 10_100), (at(2030, 10, 31, 0, 15), 40), (at(2030, 11, 1, 0, 15), 2)]
    for moment, used in days:
        use(database_url, org, "2030-10", metered=used)
        async with billing(database_url, stripe_api, moment, overage_reporting="daily") as here:
            told = await report(here)
            assert told.slot == moment
            assert told.counts["email_overage"] == (100 if used > 10_000 else used)
    assert stripe_api.counted("cus_1") == 142
    assert [e.at.replace(second=0, microsecond=0) for e in stripe_api.events] == [
        at(2030, 10, 30, 0, 15),
        at(2030, 10, 31, 0, 15),
        at(2030, 10, 31, 23, 59),
    ]


async def test_a_larger_plan_after_the_month_does_not_take_its_overage_away(
    database_url: str, stripe_api: FakeStripe
) -> None:
    org = metered_org(database_url)
    use(database_url, org, "2030-10", included=10_000, metered=4_000)
    async with billing(database_url, stripe_api, at(2030, 11, 1, 0, 5)) as here:
        here.execute("INSERT INTO message_plans SELECT 'big', 900000, 900000, 1, 1")
        for plan in ("big", "free", "big"):
            change = partial(orgs.change_org, org_id=org, change=orgs.OrgChange(plan), actor="test")
            await here.database.run(change)
    async with billing(database_url, stripe_api, FIRST) as here:
        assert (await report(here)).counts["email_overage"] == 4_000
        async with here.database.connection() as conn:
            assert [f.name for f in await audit(conn) if f.violations and f.name.startswith("overage")] == []


async def test_a_sum_that_holds_units_of_somebody_else_is_not_taken_for_ours(
    database_url: str, stripe_api: FakeStripe
) -> None:
    org = metered_org(database_url)
    use(database_url, org, "2030-10", included=10_000, metered=250)
    stripe_api.script = once("fail5xx")
    async with billing(database_url, stripe_api, FIRST) as here:
        assert (await report(here)).counts == results(failed=1)
    stripe_api.events.append(TakenEvent("theirs", EMAIL, "cus_1", 700, at(2030, 10, 9), at(2030, 10, 9)))
    async with billing(database_url, stripe_api, FIRST + timedelta(hours=30)) as here:
        assert (await report(here)).counts == results(failed=1), "700 of somebody else are not our 250"
        assert here.rows("SELECT state FROM overage_reports") == [("calling",)]
        stripe_api.events[-1].is_counted = False
        assert (await report(here)).counts["email_overage"] == 250
    assert stripe_api.counted("cus_1") == 250
