"""Included quota → credits → metered: at accept, in every way a message ends, and when it moves to another month."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from nightmail.rules.rating import Split
from nightmail.store.credits import Insufficient
from nightmail.store.messages import cancel_message, release_message, reschedule_message
from nightmail.store.orgs import OrgChange, change_org
from nightmail.store.rating import QuotaExceeded
from nightmail.store.suppressions import add_suppressions
from tests import provider_reports as said
from tests.store.inbound_world import apply
from tests.store.till import Till, new_message, open_till

pytestmark = pytest.mark.anyio

NEXT = (datetime.now(UTC).replace(day=1, hour=12) + timedelta(days=40)).replace(day=3)
AFTER = (NEXT + timedelta(days=40)).replace(day=3)
EMPTY = (
    "SELECT (SELECT count(*) FROM messages), (SELECT count(*) FROM message_queue), (SELECT count(*) FROM queue_turns),"
)
EMPTY += " (SELECT count(*) FROM idempotency_keys), (SELECT count(*) FROM usage_records)"


# ── accept ──


async def test_a_quota_is_used_up_to_the_last_unit_and_refuses_whole_requests(database_url: str) -> None:
    async with open_till(database_url, "quota") as till:
        assert await till.offer(new_message(4), new_message(7), key="k") == QuotaExceeded(
            "email", f"{datetime.now(UTC):%Y-%m}", limit=10, used=0, required=11
        )
        assert till.ask(EMPTY) == [(0, 0, 0, 0, 0)], "not even the idempotency key is kept"
        assert await till.offer(new_message(4), new_message(6), key="k") == "accepted"
        refused = await till.offer(new_message(1, at=None))
        assert isinstance(refused, QuotaExceeded)
        assert (refused.used, refused.required) == (10, 1)
        await till.accept(4, channel="sms")
        await till.accept(10, at=NEXT)
        # A batch over two months is refused for the one that is full, and takes nothing of the other.
        assert isinstance(await till.offer(new_message(1), new_message(1, at=AFTER)), QuotaExceeded)
        assert till.taken() == [10, 10, 4] or till.taken() == [10, 10, 0, 4]
        await till.check()


async def test_test_messages_are_not_rated(database_url: str) -> None:
    async with open_till(database_url, "prepaid", "none") as till:
        assert await till.offer(new_message(50), env="test") == "accepted"
        assert (till.usage(), till.taken()) == ({"included": (50, 0)}, [])
        assert isinstance(await till.offer(new_message(1)), Insufficient)
        await till.check()


async def test_32_at_once_use_a_quota_up_exactly(database_url: str) -> None:
    async with open_till(database_url, "quota", "hundred") as till:
        answers = await asyncio.gather(*(till.offer(new_message(5)) for _ in range(32)))
        assert answers.count("accepted") == 20
        assert {answer.used for answer in answers if isinstance(answer, QuotaExceeded)} == {100}
        assert (till.usage(), till.taken()) == ({"included": (100, 0)}, [100])
        await till.check()


@pytest.mark.parametrize("billing", ["quota", "metered"])
async def test_from_far_to_near_a_large_quota_is_used_up_exactly(database_url: str, billing: str) -> None:
    """Far from the border there is no row to wait for, and at the border nobody has got too much."""
    soon = datetime.now(UTC) + timedelta(minutes=1)
    async with open_till(database_url, billing, "thousand") as till:

        async def offer(count: int) -> list[Any]:
            return await asyncio.gather(
                *(till.offer(new_message(1, at=soon if n % 8 == 0 else None)) for n in range(count))
            )

        assert set(await offer(500)) == {"accepted"}
        assert till.taken() == []
        assert (await offer(600)).count("accepted") == (500 if billing == "quota" else 600)
        assert till.taken() == [1000]
        assert till.usage() == {"included": (1000, 0)} | ({"metered": (100, 0)} if billing == "metered" else {})
        assert [data["percent"] for topic, data in till.told() if topic == "usage.threshold"] == [80, 100]
        await till.check()
    async with open_till(database_url, billing, "thousand") as till:
        await till.accept(20)
        assert till.taken() == [20], "what is large for the quota goes by the row from the first"


async def test_32_at_once_spend_a_prepaid_wallet_to_the_last_credit(database_url: str) -> None:
    # 10 included and 90 / 3 = 30 paid: 40 units in twenties of 2, some of which straddle nothing, and one in threes.
    async with open_till(database_url, "prepaid", credits=90) as till:
        await till.accept(1)
        answers = await asyncio.gather(*(till.offer(new_message(3)) for _ in range(32)))
        assert answers.count("accepted") == 13
        assert {(answer.required, answer.available) for answer in answers if isinstance(answer, Insufficient)} == {
            (9, 0)
        }
        assert till.usage() == {"included": (10, 0), "credits": (30, 0)}
        assert (till.wallet(), till.taken()) == ((0, 90, 0), [10])
        await till.check()


async def test_32_at_once_straddle_all_three_and_none_is_refused(database_url: str) -> None:
    async with open_till(database_url, "metered", credits=20) as till:
        assert set(await asyncio.gather(*(till.offer(new_message(1)) for _ in range(32)))) == {"accepted"}
        # 20 credits are six whole units, and two credits over.
        assert till.usage() == {"included": (10, 0), "credits": (6, 0), "metered": (16, 0)}
        assert (till.wallet(), till.taken()) == ((2, 18, 0), [10])
        await till.check()


async def test_a_message_is_split_where_it_straddles(database_url: str) -> None:
    async with open_till(database_url, "metered", credits=8) as till:
        first = new_message(7)
        second, third = new_message(6), new_message(2)
        assert await till.offer(first, second, third) == "accepted"
        assert [till.split(m.id) for m in (first, second, third)] == [Split(7), Split(3, 2, 1), Split(0, 0, 2)]
        rows = till.ask("SELECT rating, credits::int, credit_account_id IS NULL FROM messages ORDER BY id")
        assert rows == [("included", 0, True), ("metered", 6, False), ("metered", 0, True)]
        await till.check()


async def test_an_insufficient_wallet_refuses_the_whole_batch_and_changes_nothing(database_url: str) -> None:
    async with open_till(database_url, "prepaid", credits=10) as till:
        assert await till.offer(new_message(12), new_message(3)) == Insufficient(15, 10, 5)
        assert till.ask(EMPTY) == [(0, 0, 0, 0, 0)]
        assert (till.taken(), till.wallet()) == ([0], (10, 0, 0))
        await till.give(5)
        assert await till.offer(new_message(12), new_message(3)) == "accepted"
        assert till.wallet() == (0, 15, 0)
        await till.check()


async def test_32_at_once_of_a_metered_org_without_a_wallet_get_the_included_units_once(database_url: str) -> None:
    async with open_till(database_url, "metered") as till:
        assert set(await asyncio.gather(*(till.offer(new_message(9)) for _ in range(32)))) == {"accepted"}
        assert (till.usage(), till.taken()) == ({"included": (10, 0), "metered": (278, 0)}, [10])
        # What is full is nobody's to wait for.
        async with till.database.connection() as conn, conn.transaction():
            await conn.execute("SELECT FROM usage_quotas FOR UPDATE")
            assert till.split(await till.accept(4)) == Split(0, 0, 4)
        await till.check()


async def test_a_wallet_that_comes_while_messages_are_accepted_and_canceled_changes_no_count(database_url: str) -> None:
    async with open_till(database_url, "metered", "hundred") as till:

        async def one(number: int) -> None:
            if number == 12:
                await till.give(1000)
            message = await till.accept(2)
            if number % 3 == 0:
                async with till.database.connection() as conn:
                    where: dict[str, Any] = {"org_id": till.org_id, "env": "live", "channel": "email"}
                    assert await cancel_message(conn, **where, message_id=message) == "done"

        await asyncio.gather(*(one(number) for number in range(36)))
        assert till.taken() == [48]
        await till.check()


# ── what is told ──


async def test_80_and_100_percent_are_told_once_and_low_credits_when_they_are_crossed(database_url: str) -> None:
    async with open_till(database_url, "prepaid", credits=30, low_below=20) as till:
        await till.accept(7)
        assert till.told() == []
        await till.accept(1)
        month = {"channel": "email", "period": f"{datetime.now(UTC):%Y-%m}", "limit": 10}
        assert till.told() == [("usage.threshold", {**month, "percent": 80, "used": 8})]
        (waiting,) = till.ask("SELECT id FROM messages WHERE units = 1")
        async with till.database.connection() as conn:
            where: dict[str, Any] = {"org_id": till.org_id, "env": "live", "channel": "email"}
            await cancel_message(conn, **where, message_id=waiting[0])
        await asyncio.gather(*(till.accept(1) for _ in range(8)))
        told = Counter(data.get("percent", topic) for topic, data in till.told())
        assert told == {80: 1, 100: 1, "credits.low": 1}
        low = next(data for topic, data in till.told() if topic == "credits.low")
        assert low == {"user_id": "billing", "balance": 18, "low_below": 20}
        await till.check()


# ── every way to end ──


async def end_sent(till: Till, message: Any) -> int:
    await till.finish(message)
    return 6


async def end_partly_refused(till: Till, message: Any) -> int:
    (passed,) = await till.begin(message)
    await till.record(passed, "sent", refused=["a0@recipient.test", "a3@recipient.test"])
    return 4


async def end_partly_suppressed(till: Till, message: Any) -> int:
    await suppress(till, 5)
    await till.finish(message)
    return 1


async def end_suppressed(till: Till, message: Any) -> int:
    await suppress(till, 6)
    assert await till.begin(message) == []
    return 0


async def end_failed(till: Till, message: Any) -> int:
    await till.finish(message, kind="failed")
    return 0


async def end_retried(till: Till, message: Any) -> int:
    await till.finish(message, kind="retry")
    assert till.usage()["credits"] == (2, 0)
    await till.finish(message)
    return 6


async def end_exhausted(till: Till, message: Any) -> int:
    till.tell("UPDATE message_queue SET attempts = 5")
    assert await till.begin(message) == []
    return 0


async def end_canceled(till: Till, message: Any) -> int:
    async with till.database.connection() as conn:
        for _ in range(2):
            answer = await cancel_message(conn, org_id=till.org_id, env="live", channel="email", message_id=message)
            assert answer == "done"
    return 0


async def make_ambiguous(till: Till, message: Any) -> None:
    await till.finish(message, kind="in_doubt")
    assert await till.begin(message) == []
    assert till.ask("SELECT state FROM messages WHERE id = %s", message) == [("ambiguous",)]
    assert till.usage()["credits"] == (2, 0), "the reservation stays until someone decides"
    await till.check()


async def end_marked_sent(till: Till, message: Any) -> int:
    await make_ambiguous(till, message)
    await release(till, message, "mark_sent")
    return 6


async def end_given_up(till: Till, message: Any) -> int:
    await make_ambiguous(till, message)
    await release(till, message, "cancel")
    return 0


async def end_sent_again(till: Till, message: Any) -> int:
    await make_ambiguous(till, message)
    await release(till, message, "resend")
    await till.finish(message)
    return 6


async def end_evidenced(till: Till, message: Any) -> int:
    await make_ambiguous(till, message)
    async with till.database.connection() as conn:
        for _ in range(2):
            await apply(conn, said.ses("Send", message, {}))
    return 6


async def end_evidenced_at_the_gate(till: Till, message: Any) -> int:
    await till.finish(message, kind="in_doubt")
    async with till.database.connection() as conn:
        await apply(conn, said.ses("Send", message, {}))
    assert await till.begin(message) == []
    return 6


async def end_taken_before_it_was_canceled(till: Till, message: Any) -> int:
    await till.finish(message, kind="in_doubt")
    till.tell("UPDATE message_queue SET due_at = nm_now() WHERE message_id = %s", message)
    await till.finish(message, kind="retry")
    async with till.database.connection() as conn:
        await apply(conn, said.ses("Send", message, {}))
        where: dict[str, Any] = {"org_id": till.org_id, "env": "live", "channel": "email", "message_id": message}
        assert await reschedule_message(conn, **where, scheduled_at=AFTER) == "already_sending"
        assert await cancel_message(conn, **where) == "already_sending"
    assert await till.begin(message) == []
    return 6


async def suppress(till: Till, count: int) -> None:
    async with till.database.connection() as conn:
        await add_suppressions(
            conn,
            org_id=till.org_id,
            env="live",
            channel="email",
            addresses=[f"a{number}@recipient.test" for number in range(count)],
            origin="manual",
            actor="test",
        )


async def release(till: Till, message: Any, action: Any) -> None:
    async with till.database.connection() as conn:
        where: dict[str, Any] = {"org_id": till.org_id, "env": "live", "channel": "email", "message_id": message}
        assert await release_message(conn, **where, action=action) == "released"
        assert await release_message(conn, **where, action=action) == "not_ambiguous"


ENDS = (
    end_sent, end_partly_refused, end_partly_suppressed, end_suppressed, end_failed, end_retried, end_exhausted,
    end_canceled, end_marked_sent, end_given_up, end_sent_again, end_evidenced, end_evidenced_at_the_gate,
    end_taken_before_it_was_canceled,
)  # fmt: skip


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__.removeprefix("end_"))
async def test_what_was_used_is_charged_cheapest_first_and_the_rest_is_given_back(database_url: str, end: Any) -> None:
    async with open_till(database_url, "metered", credits=7) as till:
        await till.accept(8, at=NEXT, tag="other")
        waiting = await till.accept(7, tag="other")
        message = await till.accept(6)
        split = till.split(message)
        assert split == Split(3, 2, 1)
        if end in (end_marked_sent, end_given_up, end_sent_again, end_evidenced):
            till.tell("UPDATE messages SET send_policy = 'at_most_once' WHERE id = %s", message)
        till.tell("UPDATE message_queue SET due_at = due_at + interval '1 day' WHERE message_id = %s", waiting)
        used = split.used(await end(till, message))
        month = f"{datetime.now(UTC):%Y-%m}"
        assert till.usage(month) == {
            rating: count
            for rating, count in {
                "included": (7, used.included),
                "credits": (0, used.credits),
                "metered": (0, used.metered),
            }.items()
            if any(count)
        }
        assert till.wallet() == (7 - 3 * used.credits, 0, 3 * used.credits)
        assert till.taken() == [7 + used.included, 8]
        kinds = till.ask("SELECT kind, amount::int FROM credit_transactions WHERE reference LIKE 'message:%'")
        assert sorted(kinds) == sorted(
            [("reserve", 6), ("capture", 3 * used.credits) if used.credits else ("release", 6)]
        )
        await till.check()


# ── another month ──


async def move(till: Till, message: Any, at: datetime) -> Any:
    async with till.database.connection() as conn:
        return await reschedule_message(
            conn, org_id=till.org_id, env="live", channel="email", message_id=message, scheduled_at=at
        )


async def test_a_move_to_another_month_is_rated_anew_with_what_the_message_held(database_url: str) -> None:
    async with open_till(database_url, "prepaid", credits=9) as till:
        await till.accept(8, at=NEXT)
        message = await till.accept(13, at=AFTER)
        assert (till.split(message), till.wallet()) == (Split(10, 3), (0, 9, 0))
        # Within the month nothing moves.
        assert await move(till, message, AFTER + timedelta(hours=1)) == "done"
        assert till.ask("SELECT rerated FROM messages WHERE id = %s", message) == [(0,)]
        # Next month has two units left: eleven would cost 33 credits, of which nine are its own.
        assert await move(till, message, NEXT) == Insufficient(33, 9, 24)
        assert (till.split(message), till.wallet(), till.taken()) == (Split(10, 3), (0, 9, 0), [8, 10])
        assert till.ask("SELECT rerated, period FROM messages WHERE id = %s", message) == [(0, f"{AFTER:%Y-%m}")]
        await till.check()
        await till.give(24)
        assert await move(till, message, NEXT) == "done"
        assert (till.split(message), till.wallet(), till.taken()) == (Split(2, 11), (0, 33, 0), [10, 0])
        await till.check()
        assert await move(till, message, AFTER) == "done"
        assert (till.split(message), till.wallet(), till.taken()) == (Split(10, 3), (24, 9, 0), [8, 10])
        await till.check()
        assert await end_canceled(till, message) == 0
        assert (till.wallet(), till.taken()) == ((33, 0, 0), [8, 0])
        await till.check()


async def test_a_move_to_a_full_month_is_refused_and_changes_nothing(database_url: str) -> None:
    async with open_till(database_url, "quota") as till:
        await till.accept(9, at=NEXT)
        message = await till.accept(2, at=AFTER)
        before = till.ask("SELECT due_at FROM message_queue WHERE message_id = %s", message)
        assert await move(till, message, NEXT) == QuotaExceeded("email", f"{NEXT:%Y-%m}", 10, 9, 2)
        assert till.ask("SELECT due_at FROM message_queue WHERE message_id = %s", message) == before
        assert till.taken() == [9, 2]
        await till.check()


async def test_a_message_may_be_moved_for_ever(database_url: str) -> None:
    async with open_till(database_url, "prepaid", "none", credits=9) as till:
        message = await till.accept(3, at=NEXT)
        till.tell("UPDATE messages SET rerated = 32767")
        till.tell("UPDATE credit_reservations SET reference = reference || '/32767'")
        assert await move(till, message, AFTER) == "done"
        assert (till.wallet(), till.split(message)) == ((0, 9, 0), Split(0, 3))


# ── all of it at once ──


async def test_whatever_is_done_at_once_the_books_agree_and_nobody_deadlocks(database_url: str) -> None:
    async with (
        open_till(database_url, "quota", "hundred") as quota,
        open_till(database_url, "prepaid", credits=300, low_below=100) as prepaid,
        open_till(database_url, "metered", credits=60) as metered,
    ):
        tills = (quota, prepaid, metered)
        accepted: list[tuple[Till, Any]] = []

        async def act(till: Till, chance: random.Random) -> None:
            mine = [message for owner, message in accepted if owner is till]
            match chance.randrange(8) if mine else 0:
                case 0 | 1 | 2:
                    batch = [
                        new_message(chance.randint(1, 9), at=chance.choice([None, None, NEXT, AFTER]))
                        for _ in range(chance.randint(1, 3))
                    ]
                    if await till.offer(*batch) == "accepted":
                        accepted.extend((till, message.id) for message in batch)
                case 3 | 4:
                    await move(till, chance.choice(mine), chance.choice([NEXT, AFTER]))
                case 5:
                    async with till.database.connection() as conn:
                        where: dict[str, Any] = {"org_id": till.org_id, "env": "live", "channel": "email"}
                        await cancel_message(conn, **where, message_id=chance.choice(mine))
                case 6:
                    await till.finish(*chance.sample(mine, min(len(mine), 4)), kind=chance.choice(["sent", "failed"]))
                case 7:
                    change = OrgChange(plan=chance.choice(["tiny", "tiny", "hundred"]))
                    async with till.database.connection() as conn:
                        await change_org(conn, till.org_id, change, actor="test")

        async def busy(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(25):
                await act(chance.choice(tills), chance)

        await asyncio.gather(*(busy(seed) for seed in range(10)))
        for till in tills:
            await till.check()
            assert all(taken <= 100 for taken in till.taken())
        ratings = "SELECT DISTINCT rating FROM usage_records WHERE org_id = %s ORDER BY rating"
        assert [[rating for (rating,) in till.ask(ratings, till.org_id)] for till in tills] == [
            ["included"], ["credits", "included"], ["credits", "included", "metered"]
        ]  # fmt: skip
        deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        assert quota.ask(deadlocks) == [(0,)]
