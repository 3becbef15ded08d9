"""send-scheduled on real PostgreSQL, with the real adapters calling the fake provider's process."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from psycopg import AsyncConnection

from nightmail.clock import monotonic
from nightmail.ids import new_claim_id
from nightmail.jobs.send_scheduled import KEYS, cancel_until_over, run, work_lanes
from nightmail.ports import Accepted, OutgoingEmail
from nightmail.store import queue
from nightmail.store.messages import cancel_message, reschedule_message
from nightmail.store.suppressions import add_suppressions
from tests.crash.world import FakeProviderProcess, World
from tests.ports import make_ports

pytestmark = pytest.mark.anyio

AFTER_BACKOFF = "40 seconds"
AFTER_THROTTLE = "10 seconds"


def to(behaviour: str, number: int = 0) -> list[str]:
    """One recipient that makes the provider behave so, kept apart from other tests' by a random tag."""
    return [f"{behaviour}+{number}{new_claim_id().hex[:8]}@recipient.test"]


async def until(condition: Any, *, limit_s: float = 10.0) -> None:
    """Wait until a condition that another task or process brings about holds."""
    async with asyncio.timeout(limit_s):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.01)


# ── its work ──


async def test_due_messages_of_every_lane_are_sent_and_accounted_for(world: World) -> None:
    await world.accept(20)
    await world.accept(5, env="test")
    await world.accept(3, channel="sms", to=lambda number: [f"+1555{number:03}0000"])
    counts = await world.run()
    assert (counts["claimed"], counts["sent"]) == (28, 28)
    account = world.account()
    assert not account.violations
    assert (account.calls, account.claims_left, account.queue_left) == (23, 0, 0)


async def test_nothing_due_gives_every_count_as_zero(world: World) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)
    (message,) = await world.accept(at=later)
    async with world.database() as database:
        result = await run(world.context(database))
    assert dict(result.counts) == dict.fromkeys(KEYS, 0)
    assert not result.more
    assert world.state(message)[0] == "scheduled"


async def test_a_dry_run_reports_and_changes_nothing(world: World) -> None:
    await world.accept(3)
    async with world.database() as database:
        ctx = world.context(database)
        ctx.dry = True
        result = await run(ctx)
    assert result.counts["claimed"] == 3
    assert world.ask("SELECT count(*) FROM message_queue WHERE claim_id IS NULL AND attempts = 0") == [3]
    assert not world.account().calls


async def test_running_twice_is_running_once(world: World) -> None:
    await world.accept(12)
    first, second = await world.run(), await world.run()
    assert (first["sent"], second["claimed"]) == (12, 0)
    account = world.account()
    assert not account.violations
    assert account.calls == 12


async def test_two_runners_work_disjoint_rows(world: World, provider: FakeProviderProcess) -> None:
    provider.follow(latency_ms=20)
    await world.accept(120)
    runs = await asyncio.gather(world.run(), world.run())
    assert sum(counts["claimed"] for counts in runs) == 120
    assert all(counts["sent"] > 0 for counts in runs)
    account = world.account()
    assert not account.violations
    assert (account.calls, account.doubles) == (120, 0)


# ── stopping ──


async def test_the_deadline_stops_cleanly_and_gives_back_what_was_not_begun(
    world: World, provider: FakeProviderProcess
) -> None:
    provider.follow(latency_ms=150)
    await world.accept(200)
    async with world.database() as database:
        ctx = world.context(database, deadline_s=3.0, send_concurrency=4)
        counts, more = await work_lanes(ctx, ("live:email",))
        assert ctx.deadline.at - monotonic() > 0.5
    assert more
    assert 0 < counts["sent"] < 200
    assert world.ask("SELECT count(*) FROM message_queue WHERE claim_id IS NOT NULL OR intent_at IS NOT NULL") == [0]
    assert world.ask("SELECT count(*) FROM claims") == [0]
    account = world.account()
    assert (account.calls, account.sent, account.doubles) == (counts["sent"], counts["sent"], 0)


async def test_asked_to_stop_it_finishes_what_has_begun_and_begins_nothing(
    world: World, provider: FakeProviderProcess
) -> None:
    provider.follow(latency_ms=200)
    await world.accept(60)
    async with world.database() as database:
        ctx = world.context(database, send_concurrency=4)
        working = asyncio.create_task(work_lanes(ctx, ("live:email", "test")))
        await until(lambda: world.intents() == 4)
        ctx.stopping.set()
        counts, more = await working
    assert more
    assert 4 <= counts["sent"] <= 8
    account = world.account()
    assert account.calls == counts["sent"]
    assert account.claims_left == 0
    assert not await asyncio.to_thread(world.intents)


# ── how a call ends ──


async def test_a_throttled_message_goes_back_with_backoff_and_burns_no_attempt(world: World) -> None:
    (message,) = await world.accept(to=partial(to, "throttle-once"))
    counts = await world.run()
    assert (counts["claimed"], counts["retried"], counts["sent"]) == (1, 1, 0)
    row = world.queued(message)
    assert (row["attempts"], row["takeovers"], row["intent"], row["claim_id"]) == (0, 0, False, None)
    assert 3 < row["wait_s"] < 6.1
    assert (await world.run())["claimed"] == 0
    assert (await world.run(offset=AFTER_THROTTLE))["sent"] == 1
    account = world.account()
    assert not account.violations
    assert account.calls == 1


async def test_a_used_up_quota_ends_the_lanes_run(world: World) -> None:
    await world.accept(40, to=partial(to, "quota"))
    counts = await world.run(send_concurrency=2)
    assert 0 < counts["retried"] <= 4
    assert world.ask("SELECT count(*) FROM message_queue WHERE attempts = 0 AND claim_id IS NULL") == [40]


async def test_a_temporary_refusal_is_tried_again_after_its_backoff(world: World) -> None:
    world.sender = "smtp"
    (message,) = await world.accept(to=partial(to, "tempfail-once"))
    assert (await world.run())["retried"] == 1
    row = world.queued(message)
    assert (row["attempts"], row["takeovers"], row["intent"]) == (1, 0, False)
    assert 28 < row["wait_s"] < 36.1
    assert (await world.run(offset=AFTER_BACKOFF))["sent"] == 1
    assert not world.account().violations


async def test_five_attempts_and_it_has_failed(world: World) -> None:
    world.sender = "smtp"
    recipient = to("tempfail")
    (message,) = await world.accept(to=lambda _: recipient)
    for hours in range(5):
        assert world.state(message)[0] == "scheduled"
        await world.run(offset=f"{hours} hours")
    assert world.state(message) == ("failed", "attempts exhausted")
    assert len(world.provider.attempts(recipient[0])) == 5
    assert (await world.run(offset="9 hours"))["claimed"] == 0
    assert world.ask("SELECT kind FROM message_events") == ["failed"]
    assert not world.account().violations


async def test_a_permanent_refusal_fails_with_its_code(world: World) -> None:
    (message,) = await world.accept(to=partial(to, "reject"))
    counts = await world.run()
    assert counts["failed"] == 1
    assert world.state(message) == ("failed", "MessageRejected")
    assert "not verified" in world.ask("SELECT last_error FROM messages")[0]
    account = world.account()
    assert not account.violations
    assert account.usage == (0, 0)


DOUBTS = ["hang-after-accept", "reset-after", "fail5xx-after-accept", "garbage", "empty"]


@pytest.mark.parametrize("behaviour", DOUBTS)
async def test_in_doubt_at_least_once_is_sent_again(world: World, behaviour: str) -> None:
    (message,) = await world.accept(to=partial(to, f"{behaviour}-once"))
    counts = await world.run(provider_timeout_s=0.6)
    assert (counts["retried"], counts["sent"]) == (1, 0)
    row = world.queued(message)
    assert (row["attempts"], row["takeovers"], row["intent"], row["claim_id"]) == (1, 1, True, None)
    assert 28 < row["wait_s"] < 36.1
    assert (await world.run(offset=AFTER_BACKOFF))["sent"] == 1
    account = world.account()
    assert not account.violations
    assert (account.calls, account.takeovers, account.states) == (2, 1, {"sent": 1})


@pytest.mark.parametrize("behaviour", DOUBTS)
async def test_in_doubt_at_most_once_ends_ambiguous(world: World, behaviour: str) -> None:
    (message,) = await world.accept(to=partial(to, behaviour), policy="at_most_once")
    await world.run(provider_timeout_s=0.6)
    counts = await world.run(offset=AFTER_BACKOFF)
    assert counts["ambiguous"] == 1
    assert world.state(message) == ("ambiguous", "call interrupted")
    account = world.account()
    assert not account.violations
    assert (account.calls, account.queue_left) == (1, 0)
    assert (await world.run(offset="1 hour"))["claimed"] == 0


async def test_the_orgs_policy_holds_where_the_message_has_none(world: World) -> None:
    org_id = await world.add_org(send_policy="at_most_once")
    (careful,) = await world.accept(to=partial(to, "reset-after"), org_id=org_id)
    (again,) = await world.accept(to=partial(to, "reset-after-once"), org_id=org_id, policy="at_least_once")
    await world.run()
    await world.run(offset=AFTER_BACKOFF)
    assert world.state(careful)[0] == "ambiguous"
    assert world.state(again)[0] == "sent"


def add_evidence(world: World, message: UUID, kind: str = "delivered") -> None:
    world.tell(
        "INSERT INTO message_events (message_id, org_id, recipient, kind, provider_ref, occurred_at, data)"
        " VALUES (%s, %s, 'x', %s, 'event-1', now(), '{\"provider_message_id\": \"0100-evidence\"}')",
        message,
        world.org_id,
        kind,
    )


@pytest.mark.parametrize("policy", ["at_least_once", "at_most_once"])
async def test_evidence_ends_the_doubt_without_a_second_call(world: World, policy: str) -> None:
    evidence: dict[str, Any] = {
        "sns_topic_arns": "arn:aws:sns:eu:1:t",
        "ses_configuration_set": "events",
        "evidence_wait_s": 120,
    }
    (message,) = await world.accept(to=partial(to, "reset-after"), policy=policy)
    await world.run(**evidence)
    assert 119 < world.queued(message)["wait_s"] < 121
    assert (await world.run(offset="110 seconds", **evidence))["claimed"] == 0
    add_evidence(world, message)
    assert (await world.run(offset="130 seconds", **evidence))["sent"] == 1
    assert world.ask("SELECT state, provider_message_id FROM messages") == [("sent", "0100-evidence")]
    account = world.account()
    assert account.calls == 1
    assert not {key: value for key, value in account.violations.items() if key != "foreign_ids"}


async def test_evidence_of_an_earlier_call_counts_after_a_later_one_was_refused(world: World) -> None:
    world.sender = "smtp"
    recipient = to("reset-after-once")
    (message,) = await world.accept(to=lambda _: recipient)
    await world.run()
    world.tell("UPDATE message_bodies SET to_addresses = %s", to("tempfail"))  # the second call is refused
    await world.run(offset="1 hour")
    assert world.queued(message)["intent"] is False
    add_evidence(world, message)
    assert (await world.run(offset="2 hours"))["sent"] == 1
    assert world.account().calls == 1


async def test_an_unknown_error_of_an_adapter_is_treated_as_doubt(world: World) -> None:
    class Broken:
        name = "broken"

        async def send_email(self, email: OutgoingEmail, *, timeout_s: float) -> Accepted:
            raise RuntimeError("defect")

        async def close(self) -> None: ...

    (message,) = await world.accept()
    ports = make_ports(email=Broken())
    assert (await world.run(ports=ports))["retried"] == 1
    assert world.queued(message)["takeovers"] == 1


async def test_the_runs_deadline_cuts_no_call_short(world: World) -> None:
    """Calls take 1 s of the 2 s they may; a run of 6 s must begin none that it would have to give up."""
    await world.accept(40, to=lambda number: to("slow", number))
    counts = await world.run(deadline_s=6.0, send_concurrency=4, provider_timeout_s=4.0)
    assert counts["sent"] > 0
    assert counts["retried"] == 0
    assert world.account().calls == counts["sent"]


async def test_results_wait_for_a_busy_database_while_the_leases_last(world: World) -> None:
    """A session that holds the usage rows for longer than the lock timeout costs time, not results."""
    await world.accept(5)
    locker = await AsyncConnection.connect(world.database_url)
    await locker.execute("SELECT FROM usage_records FOR UPDATE")
    await locker.execute("LOCK TABLE usage_records IN SHARE MODE")

    async def let_go() -> None:
        await asyncio.sleep(9)  # longer than one try with its three retries of 2 s each
        await locker.rollback()

    letting_go = asyncio.create_task(let_go())
    counts = await world.run(lanes=["live:email"])
    await letting_go
    await locker.close()
    assert counts["sent"] == 5
    assert world.account().calls == 5


# ── suppressed, canceled, moved ──


async def suppress(world: World, *addresses: str, channel: str = "email") -> None:
    async with world.database() as database, database.connection() as conn:
        for env in ("live", "test"):
            await add_suppressions(
                conn, org_id=world.org_id, env=env, channel=channel, addresses=addresses, origin="manual", actor="test"
            )


@pytest.mark.parametrize("env", ["live", "test"])
async def test_a_message_suppressed_after_scheduling_is_never_sent(world: World, env: str) -> None:
    recipient = to("ok")
    (message,) = await world.accept(to=lambda _: recipient, env=env)
    (sms,) = await world.accept(to=lambda _: ["+15551230000"], env=env, channel="sms")
    await suppress(world, recipient[0])
    await suppress(world, "+15551230000", channel="sms")
    counts = await world.run()
    assert (counts["canceled"], counts["sent"]) == (2, 0)
    assert world.state(message) == world.state(sms) == ("canceled", "suppressed")
    assert world.ask("SELECT DISTINCT kind FROM message_events") == ["suppressed"]
    account = world.account()
    assert not account.violations
    assert (account.calls, account.usage) == (0, (0, 0))


async def test_only_the_recipients_that_are_left_are_called_and_charged(world: World) -> None:
    recipients = [*to("ok", 1), *to("ok", 2), *to("ok", 3)]
    await world.accept(to=lambda _: recipients)
    await world.accept(to=lambda _: recipients, env="test")
    await suppress(world, recipients[1])
    assert (await world.run())["sent"] == 2
    (call,) = world.provider.taken(recipients[0])
    assert call["recipients"] == [recipients[0], recipients[2]]
    assert set(world.ask("SELECT address, state FROM recipient_outcomes")) == {(recipients[1], "suppressed")}
    account = world.account()
    assert not account.violations
    assert account.usage == (4, 4)


async def test_a_recipient_dropped_at_the_first_attempt_stays_dropped(world: World) -> None:
    """It was told as suppressed and is not charged: lifting the suppression before the retry changes neither."""
    recipients = [*to("throttle-once", 1), *to("ok", 2)]
    await world.accept(to=lambda _: recipients)
    await suppress(world, recipients[1])
    await world.run()
    assert world.ask("SELECT count(*) FROM message_queue") == [1]
    world.tell("DELETE FROM suppressions")
    await world.run(offset=AFTER_BACKOFF)
    assert [call["recipients"] for call in world.provider.taken(recipients[0])] == [[recipients[0]]]
    assert world.account().usage == (1, 1)


async def test_evidence_charges_only_the_recipients_that_were_called(world: World) -> None:
    recipients = [*to("reset-after", 1), *to("ok", 2), *to("ok", 3)]
    (message,) = await world.accept(to=lambda _: recipients)
    await suppress(world, recipients[1])
    await world.run()
    add_evidence(world, message)
    await world.run(offset=AFTER_BACKOFF)
    account = world.account()
    assert account.states == {"sent": 1}
    assert account.usage == (2, 2)


async def test_a_message_canceled_after_its_claim_is_never_sent(world: World, provider: FakeProviderProcess) -> None:
    provider.follow(latency_ms=400)
    messages = await world.accept(4)
    async with world.database() as database:
        working = asyncio.create_task(work_lanes(world.context(database, send_concurrency=1), ("live:email",)))
        await until(lambda: world.intents() == 1)
        held = world.ask("SELECT message_id FROM message_queue WHERE claim_id IS NOT NULL AND intent_at IS NULL")
        begun = world.ask("SELECT message_id FROM message_queue WHERE intent_at IS NOT NULL")
        assert held
        async with database.connection() as conn:
            where: dict[str, Any] = {"org_id": world.org_id, "env": "live", "channel": "email"}
            assert await cancel_message(conn, **where, message_id=held[0]) == "done"
            assert await cancel_message(conn, **where, message_id=begun[0]) == "already_sending"
        counts, _ = await working
    assert (counts["sent"], counts["lost"]) == (3, 1)
    assert world.state(held[0]) == ("canceled", "requested")
    assert not world.taken()[str(held[0])]
    account = world.account()
    assert not account.violations
    assert account.states == {"sent": 3, "canceled": 1}
    assert len(messages) == 4


async def test_a_message_rescheduled_after_its_claim_leaves_at_its_new_time(
    world: World, provider: FakeProviderProcess
) -> None:
    provider.follow(latency_ms=400)
    await world.accept(4)
    async with world.database() as database:
        working = asyncio.create_task(work_lanes(world.context(database, send_concurrency=1), ("live:email",)))
        await until(lambda: world.intents() == 1)
        (held,) = world.ask("SELECT message_id FROM message_queue WHERE claim_id IS NOT NULL AND intent_at IS NULL")
        async with database.connection() as conn:
            later = datetime.now(UTC) + timedelta(hours=1)
            where: dict[str, Any] = {
                "org_id": world.org_id,
                "env": "live",
                "channel": "email",
                "message_id": held,
            }
            assert await reschedule_message(conn, **where, scheduled_at=later) == "done"
        await working
    assert not world.taken()[str(held)]
    assert (await world.run(offset="61 minutes"))["sent"] == 1
    assert not world.account().violations


# ── poison, leases, zombies ──


class Watching:
    """The real adapter, with a note of what else was in flight at each call."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.name = inner, inner.name
        self.in_flight: set[UUID] = set()
        self.company: dict[UUID, set[UUID]] = {}

    async def send_email(self, email: OutgoingEmail, *, timeout_s: float) -> Accepted:
        self.in_flight.add(email.message_id)
        for message_id in self.in_flight:
            self.company.setdefault(message_id, set()).update(self.in_flight)
        try:
            accepted: Accepted = await self.inner.send_email(email, timeout_s=timeout_s)
            return accepted
        finally:
            self.in_flight.discard(email.message_id)

    async def close(self) -> None: ...


@pytest.fixture
async def watching(world: World) -> Watching:
    return Watching(world.ports().email)


async def test_a_row_taken_over_twice_is_worked_alone(
    world: World, provider: FakeProviderProcess, watching: Watching
) -> None:
    provider.follow(latency_ms=30)
    messages = await world.accept(30)
    suspicious = messages[7:9]
    world.tell("UPDATE message_queue SET takeovers = 2, attempts = 2 WHERE message_id = ANY (%s)", suspicious)
    ports = make_ports(email=watching)
    assert (await world.run(ports=ports))["sent"] == 30
    for message in suspicious:
        assert watching.company[message] == {message}
    assert max(len(company) for company in watching.company.values()) > 4


@pytest.mark.parametrize("point", ["claimed", "before_gate"])
async def test_a_crash_loop_fails_no_message_that_was_not_called(world: World, point: str) -> None:
    messages = await world.accept(6)
    for number in range(7):
        with pytest.raises(Exception, match="send-scheduled:"):
            await world.run(
                offset=f"{number * 2} minutes", lanes=("live:email",), crash=f"send-scheduled:{point}:raise"
            )
    assert {world.queued(message)["attempts"] for message in messages} == {0}
    assert (await world.run(offset="20 minutes"))["sent"] == 6
    account = world.account()
    assert not account.violations
    assert account.doubles == 0


async def test_a_defect_in_a_call_ends_the_run_and_keeps_the_other_results(
    world: World, provider: FakeProviderProcess
) -> None:
    provider.follow(latency_ms=100)
    await world.accept(20)
    with pytest.raises(Exception, match="send-scheduled:called"):
        await world.run(crash="send-scheduled:called:raise:2", send_concurrency=4)
    account = world.account()
    assert account.calls == account.sent + 1
    assert await asyncio.to_thread(world.intents) == 1


class Slowly:
    """A send rate of five calls a second."""

    next_at = 0.0

    async def take(self, account: str, wanted: int) -> int:
        if not wanted or monotonic() < self.next_at:
            return 0
        self.next_at = monotonic() + 0.2
        return 1


async def test_leases_are_renewed_while_rows_are_held(world: World) -> None:
    await world.accept(14)
    ports = make_ports(email=world.ports().email, send_rate=Slowly())
    async with world.database() as database:
        # One claim holds all of them for nearly three leases.
        ctx = world.context(database, send_lease_s=1, send_concurrency=8, ports=ports)
        working = asyncio.create_task(work_lanes(ctx, ("live:email",)))
        while not working.done():
            async with database.connection() as conn:
                assert await queue.rescue_expired(conn, evidence_wait_s=0) == 0
            await asyncio.sleep(0.05)
        counts, _ = await working
    assert (counts["sent"], counts["lost"]) == (14, 0)
    assert world.account().doubles == 0


async def test_rows_of_a_claim_that_is_gone_are_dropped_and_the_late_result_is_kept(
    world: World, provider: FakeProviderProcess
) -> None:
    provider.follow(latency_ms=700)
    await world.accept(4)
    async with world.database() as database, world.database("1 hour") as future:
        working = asyncio.create_task(
            work_lanes(world.context(database, send_lease_s=1.5, send_concurrency=2), ("live:email",))
        )
        await until(lambda: world.intents() == 2 and len(world.taken()) >= 2)
        async with future.connection() as conn:
            assert await queue.rescue_expired(conn, evidence_wait_s=3600) == 4
        counts, _ = await working
    assert counts["lost"] >= 2
    assert world.ask("SELECT count(*) FROM message_events WHERE kind = 'late_result'") == [2]
    assert counts["sent"] == 2  # the two that had not begun, claimed again
    # Our own late result is evidence too: the doubt ends without a second call.
    assert (await world.run(offset="2 hours"))["sent"] == 2
    account = world.account()
    assert not account.violations
    assert (account.calls, account.doubles, account.takeovers) == (4, 0, 2)


async def test_a_row_in_doubt_that_was_claimed_and_not_begun_is_given_back(
    world: World, provider: FakeProviderProcess
) -> None:
    provider.follow(latency_ms=300)
    messages = await world.accept(8)
    world.tell("UPDATE message_queue SET intent_at = now(), takeovers = 1, attempts = 1")
    async with world.database() as database:
        ctx = world.context(database, send_concurrency=2)
        working = asyncio.create_task(work_lanes(ctx, ("live:email",)))
        await until(lambda: world.ask("SELECT count(*) FROM message_queue WHERE attempts = 2") == [2])
        ctx.stopping.set()
        counts, _ = await working
    assert counts["sent"] == 2
    assert world.ask("SELECT count(*) FROM message_queue WHERE claim_id IS NULL AND takeovers = 1") == [6]
    assert len(messages) == 8


async def test_a_helper_that_loses_its_cancellation_does_not_outlive_the_run() -> None:
    lost = 0

    async def helper() -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                lost += 1
                if lost == 2:
                    raise

    task = asyncio.create_task(helper())
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await cancel_until_over([task])
    assert task.cancelled()
    assert lost == 2
