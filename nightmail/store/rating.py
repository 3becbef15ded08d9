"""Rating of messages: what a refusal says, and what becomes of a rated message's units and credits when it ends.

Accept rates by the function nm_rate of the schema, inside its own statement. Whatever ends a message settles it here,
in the transaction that changes its state. Locks: queue rows → messages (both the caller's) → quota rows → wallets →
their batches → usage_records → hints of the queue (the caller's) → deliveries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from nightmail.rules.rating import Split, quota_resets_at
from nightmail.store import credits, usage_records
from nightmail.store.credits import Insufficient
from nightmail.store.database import Connection
from nightmail.store.fan_out import Fact
from nightmail.store.usage_records import Settlement


@dataclass(frozen=True, slots=True)
class QuotaExceeded:
    """The plan includes no more units of a channel in a month; nothing was changed. `used` includes what waits."""

    channel: str
    period: str
    limit: int
    used: int
    required: int

    @property
    def resets_at(self) -> datetime:
        """Return when the next month begins."""
        return quota_resets_at(self.period)


Refusal = QuotaExceeded | Insufficient


def read_refusal(outcome: str, answer: dict[str, Any]) -> Refusal:
    """Return what nm_rate refused with."""
    return QuotaExceeded(**answer) if outcome == "quota_exceeded" else Insufficient(**answer)


def rating_facts(org_id: UUID, told: Sequence[dict[str, Any]]) -> list[Fact]:
    """Return what nm_rate wants to be told in its transaction: usage.threshold and credits.low."""
    return [Fact(org_id, "live", fact["topic"], data=fact["data"]) for fact in told]


@dataclass(frozen=True, slots=True)
class Rated:
    """A message as it was rated; the fields are the columns, in the order of every statement that returns them.

    `credits` are reserved for its `credit_units`; `rerated` counts how often a reschedule rated it anew.
    """

    id: UUID
    org_id: UUID
    channel: str
    env: str
    period: str
    units: int
    credit_units: int
    metered_units: int
    credits: int
    account_id: int | None
    rerated: int

    @property
    def split(self) -> Split:
        """Return the units by who pays for them."""
        return Split(self.units - self.credit_units - self.metered_units, self.credit_units, self.metered_units)

    @property
    def reference(self) -> str:
        """Return the reference of its reservation: one reference stands for one reservation."""
        return reservation_of(self.id, self.rerated)


def reservation_of(message_id: UUID, rerated: int) -> str:
    """Return the reference of a message's reservation."""
    return f"message:{message_id}/{rerated}" if rerated else f"message:{message_id}"


@dataclass(frozen=True, slots=True)
class Ended:
    """A message that is over, and how many of its units were used."""

    rated: Rated
    used: int


READ = """
SELECT id, org_id, channel, env, period, units, credit_units, metered_units, credits, credit_account_id, rerated
FROM messages
WHERE id = %(message_id)s
"""


async def read_rated(conn: Connection, message_id: UUID) -> Rated:
    """Return how a message that is there was rated; the caller holds the lock that keeps it so."""
    row = await (await conn.execute(READ, {"message_id": message_id})).fetchone()
    assert row is not None, "the message was found before"
    return Rated(*row)


MOVE_QUOTA = """
SELECT nm_quota_move(%(org_ids)s::uuid[], %(channels)s::text[], %(periods)s::text[], %(units)s::bigint[])
"""


async def settle_messages(conn: Connection, ended: Sequence[Ended], *, shard: int) -> None:
    """Turn what was reserved for these messages into use, and give back the rest; part of the caller's transaction."""
    await usage_records.settle(conn, await _settle_payment(conn, ended), shard=shard)


async def _settle_payment(conn: Connection, ended: Sequence[Ended]) -> list[Settlement]:
    """Give back quota and settle reservations; return what is to change in usage_records, in key order."""
    given_back: Counter[tuple[UUID, str, str]] = Counter()
    reservations = []
    sums: dict[tuple[UUID, str, str, str, str], list[int]] = {}
    for message in ended:
        rated, split = message.rated, message.rated.split
        used = split.used(message.used)
        if rated.env == "live" and split.included > used.included:
            given_back[rated.org_id, rated.channel, rated.period] += split.included - used.included
        if rated.account_id is not None:
            captured = rated.credits // rated.credit_units * used.credits
            reservations.append(credits.Settlement(rated.account_id, rated.reference, captured))
        for (rating, reserved), (_, spent) in zip(split.parts(), used.parts(), strict=True):
            if reserved:
                total = sums.setdefault((rated.org_id, rated.channel, rated.env, rated.period, rating), [0, 0])
                total[0] += reserved
                total[1] += spent
    if given_back:
        arguments = {
            "org_ids": [org_id for org_id, _, _ in given_back],
            "channels": [channel for _, channel, _ in given_back],
            "periods": [period for _, _, period in given_back],
            "units": [-units for units in given_back.values()],
        }
        await conn.execute(MOVE_QUOTA, arguments)
    await credits.settle(conn, reservations)
    return [Settlement(*key, reserved=reserved, used=used) for key, (reserved, used) in sorted(sums.items())]


LOCK_QUOTA = """
SELECT nm_quota_lock(%(org_id)s, %(channel)s, %(periods)s::text[], %(account_id)s)
"""

RATE = """
SELECT outcome, answer, credit_units[1], metered_units[1], credits[1], account_id, facts
FROM nm_rate(
    %(org_id)s, ARRAY[%(reference)s], ARRAY[%(channel)s], ARRAY[%(period)s], ARRAY[%(units)s::bigint], true
)
"""

RERATED = """
UPDATE messages
SET rating = %(rating)s,
    credit_units = %(credit_units)s,
    metered_units = %(metered_units)s,
    credits = %(credits)s,
    credit_account_id = %(account_id)s,
    rerated = rerated + 1
WHERE id = %(message_id)s
"""


async def rerate_message(conn: Connection, rated: Rated, period: str, *, shard: int) -> list[Fact] | Refusal:
    """Rate a waiting message anew for another month; part of a transaction that a refusal must roll back.

    What it held is given back first, so that its own credits can pay for it again. Returns what is to be told.
    """
    split, facts = rated.split, list[Fact]()
    if rated.env == "live":
        names: dict[str, Any] = {"org_id": rated.org_id, "channel": rated.channel, "units": rated.units}
        await conn.execute(LOCK_QUOTA, {**names, "periods": [rated.period, period], "account_id": rated.account_id})
    changes = await _settle_payment(conn, [Ended(rated, 0)])
    if rated.env == "live":
        reference = reservation_of(rated.id, rated.rerated + 1)
        row = await (await conn.execute(RATE, {**names, "period": period, "reference": reference})).fetchone()
        assert row is not None, "the function returns one row"
        outcome, answer, credit_units, metered_units, amount, account_id, told = row
        if outcome != "rated":
            return read_refusal(outcome, answer)
        split = Split(rated.units - credit_units - metered_units, credit_units, metered_units)
        facts = rating_facts(rated.org_id, told)
        await conn.execute(
            RERATED,
            {
                "message_id": rated.id,
                "rating": split.rating,
                "credit_units": credit_units,
                "metered_units": metered_units,
                "credits": amount,
                "account_id": account_id,
            },
        )
    changes += [
        Settlement(rated.org_id, rated.channel, rated.env, period, rating, reserved=-units, used=0)
        for rating, units in split.parts()
        if units
    ]
    await usage_records.settle(conn, sorted(changes), shard=shard)
    return facts
