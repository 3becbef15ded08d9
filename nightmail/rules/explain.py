"""Why a message cost what it cost, what a wallet holds, what an org owes: the facts, and the sentences they make.

The facts are what is recorded; a sentence says "now" where only the present is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

NOUNS = {"email": ("email", "recipient"), "sms": ("SMS", "segment")}


@dataclass(frozen=True, slots=True)
class BatchPart:
    """What a spend took from a batch. `expires_at` None means that the batch does not end."""

    batch_id: UUID
    amount: int
    priority: int | None
    source: str | None
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class EntryLine:
    """A movement of a wallet, with its balance after it."""

    seq: int
    amount: int
    balance_after: int
    batch_id: UUID


@dataclass(frozen=True, slots=True)
class Reservation:
    """Credits set aside for a message, and what became of them; `settled` None means that they are still held."""

    reference: str
    user_id: str
    transaction_id: UUID
    at: datetime
    amount: int
    batches: Sequence[BatchPart]
    settled: str | None
    settled_at: datetime | None
    captured: int
    released: int
    expired: int
    entries: Sequence[EntryLine]


@dataclass(frozen=True, slots=True)
class OverageLine:
    """One meter event of a month, as far as it got."""

    channel: str
    period: str
    revision: int
    units: int
    total: int
    identifier: str
    event_at: datetime
    state: str
    reported_at: datetime | None
    answer: Any
    error: str | None


@dataclass(frozen=True, slots=True)
class EventLine:
    """A fact in a message's life; `recipient` is '' when it concerns the whole message."""

    kind: str
    recipient: str
    at: datetime
    units: int | None


@dataclass(frozen=True, slots=True)
class UsageLine:
    """Units of a month by what pays for them."""

    channel: str
    env: str
    period: str
    rating: str
    reserved: int
    used: int


@dataclass(frozen=True, slots=True)
class QuotaLine:
    """A channel's included units of a month, and how many of them are taken now (None: not counted one by one)."""

    channel: str
    period: str
    included: int
    taken: int | None


@dataclass(frozen=True, slots=True)
class MessageStory:
    """A message from accept to invoice. `quota` and `usage` are those of its month now; a test message has no quota."""

    id: UUID
    org_id: UUID
    env: str
    channel: str
    purpose: str
    state: str
    reason: str | None
    accepted_at: datetime
    scheduled_at: datetime | None
    sent_at: datetime | None
    provider_message_id: str | None
    period: str
    units: int
    included_units: int
    credit_units: int
    metered_units: int
    credits: int
    rerated: int
    plan: str
    billing: str
    quota: QuotaLine | None
    events: Sequence[EventLine] = ()
    reservations: Sequence[Reservation] = ()
    usage: Sequence[UsageLine] = ()
    overage: Sequence[OverageLine] = ()

    @property
    def used_units(self) -> int | None:
        """Return the units that were used, None when it was not sent."""
        sent = next((event for event in self.events if event.kind == "sent" and not event.recipient), None)
        if sent is None:
            return None
        return self.units if sent.units is None else sent.units


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A batch that holds something."""

    batch_id: UUID
    source: str
    priority: int
    remaining: int
    reserved: int
    granted: int
    issued_at: datetime
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class LedgerLine:
    """An entry of a wallet; `replayed` is the sum of it and all before, which `balance_after` must be."""

    seq: int
    at: datetime
    kind: str
    reference: str | None
    amount: int
    balance_after: int
    replayed: int
    batch_id: UUID


@dataclass(frozen=True, slots=True)
class NextGrant:
    """The next month that a subscription gives."""

    at: datetime
    amount: int
    plan: str


@dataclass(frozen=True, slots=True)
class WalletStory:
    """A wallet. `balance` is what the ledger holds, `spendable` what may be spent now; entries are the newest."""

    org_id: UUID
    env: str
    user_id: str
    balance: int
    spendable: int
    reserved: int
    entries_in_all: int
    next_expiry: tuple[datetime, int] | None
    next_grant: NextGrant | None
    batches: Sequence[BatchLine]
    entries: Sequence[LedgerLine]


@dataclass(frozen=True, slots=True)
class OrgStory:
    """What an org used and owes; `wallet` is the one that pays for its live messages, None when there is none."""

    id: UUID
    name: str
    plan: str
    billing: str
    stripe_customer_id: str | None
    billing_user: str
    quotas: Sequence[QuotaLine]
    usage: Sequence[UsageLine]
    overage: Sequence[OverageLine]
    wallet: WalletStory | None = field(default=None)


# ── sentences ──


def tell_message(story: MessageStory) -> list[str]:
    """Return the message's story, a sentence each."""
    noun, unit = NOUNS[story.channel]
    said = [f"This {noun} of org {story.org_id} ({story.env}) was accepted at {_time(story.accepted_at)}."]
    if story.scheduled_at is not None:
        said.append(f"It was scheduled for {_time(story.scheduled_at)}.")
    said.append(f"It counts as {_count(story.units, unit)}, in the month {story.period}.")
    said += _rating(story)
    for reservation in story.reservations:
        said += _reservation(reservation)
    said += [_event(event) for event in story.events]
    said += _fate(story, unit)
    return said + [_overage(line) for line in story.overage]


def _rating(story: MessageStory) -> list[str]:
    if story.env == "test":
        return ["Test messages are always included: no quota, no credits, no invoice."]
    said = []
    if story.purpose == "keyword_reply":
        said.append("An answer to STOP, START or HELP is always included.")
    elif story.included_units == story.units:
        said.append("All of it fitted into the included quota when it was rated.")
    else:
        parts = [
            f"{units:,} {how}"
            for units, how in (
                (story.included_units, "included in the quota"),
                (story.credit_units, f"paid with {story.credits:,} credits"),
                (story.metered_units, "metered for the invoice"),
            )
            if units
        ]
        said.append(f"It was rated when accepted, quota first, then credits, then metered: {', '.join(parts)}.")
    if story.rerated:
        said.append(f"Rescheduling rated it anew {_count(story.rerated, 'time')}, for another month.")
    if story.quota is not None:
        taken = "" if story.quota.taken is None else f", of which {story.quota.taken:,} are taken now"
        said.append(
            f"The org is on the plan {story.plan}, billed by {story.billing}: {story.quota.included:,} units of this"
            f" channel are included in {story.period}{taken}."
        )
    return said


def _reservation(reservation: Reservation) -> list[str]:
    said = [
        f"{_count(reservation.amount, 'credit')} of {reservation.user_id} were reserved at {_time(reservation.at)}"
        f" ({reservation.reference}): {'; '.join(_part(part) for part in reservation.batches)}."
    ]
    if reservation.settled is None or reservation.settled_at is None:
        return [*said, "They are still reserved."]
    became = [
        f"{amount:,} {word}"
        for amount, word in (
            (reservation.captured, "spent"),
            (reservation.released, "given back"),
            (reservation.expired, "expired, because their batch had ended"),
        )
        if amount
    ]
    said.append(f"Settled at {_time(reservation.settled_at)} ({reservation.settled}): {', '.join(became)}.")
    said += [
        f"Entry {entry.seq} of the wallet: {entry.amount:+,} on batch {entry.batch_id},"
        f" balance after it {entry.balance_after:,}."
        for entry in reservation.entries
    ]
    return said


def _part(part: BatchPart) -> str:
    ends = "does not end" if part.expires_at is None else f"ends {_time(part.expires_at)}"
    about = f" ({part.source}, priority {part.priority}, {ends})" if part.source is not None else ""
    return f"{part.amount:,} from batch {part.batch_id}{about}"


def _event(event: EventLine) -> str:
    about = f" for {event.recipient}" if event.recipient else ""
    units = "" if event.units is None else f", {event.units:,} units used"
    return f"{_time(event.at)}: {event.kind}{about}{units}."


def _fate(story: MessageStory, unit: str) -> list[str]:
    if story.used_units is None:
        if story.state in ("scheduled", "ambiguous"):
            return [f"It is {story.state}: its units are reserved, not used."]
        reason = f" ({story.reason})" if story.reason else ""
        return [f"It was not sent, it is {story.state}{reason}: nothing of it is used or paid."]
    said = []
    if story.provider_message_id is not None:
        said.append(f"The provider calls it {story.provider_message_id}.")
    counted = ", ".join(f"{line.rating} (now {line.used:,} used)" for line in story.usage if line.used)
    said.append(
        f"{_count(story.used_units, unit)} of it are counted in the usage of {story.period}"
        + (f": {counted}." if counted else ".")
    )
    return said


def tell_wallet(story: WalletStory) -> list[str]:
    """Return the wallet's story, a sentence each."""
    said = [
        f"{story.user_id} of org {story.org_id} ({story.env}) can spend {_count(story.spendable, 'credit')} now;"
        f" {story.reserved:,} more are reserved. The ledger holds {story.balance:,}, ended and not yet booked included."
    ]
    for place, batch in enumerate(story.batches, 1):
        ends = "does not end" if batch.expires_at is None else f"ends {_time(batch.expires_at)}"
        said.append(
            f"Batch {place} in the order of spending, {batch.batch_id}: {batch.remaining:,} of {batch.granted:,} left"
            f" and {batch.reserved:,} reserved ({batch.source}, priority {batch.priority}, {ends})."
        )
    if story.next_expiry is not None:
        said.append(f"Next, {_count(story.next_expiry[1], 'credit')} end at {_time(story.next_expiry[0])}.")
    if story.next_grant is not None:
        grant = story.next_grant
        said.append(f"The plan {grant.plan} gives {_count(grant.amount, 'credit')} at {_time(grant.at)}.")
    wrong = [line for line in story.entries if line.replayed != line.balance_after]
    said.append(
        f"{_count(story.entries_in_all, 'entry', 'entries')} replayed from the first: "
        + (f"entry {wrong[-1].seq} is the first shown that does not add up." if wrong else "every balance adds up.")
    )
    for line in story.entries:
        about = f" ({line.reference})" if line.reference else ""
        said.append(
            f"{_time(line.at)}: entry {line.seq}, {line.kind}{about}, {line.amount:+,} → {line.balance_after:,}."
        )
    return said


def tell_org(story: OrgStory) -> list[str]:
    """Return the org's story, a sentence each."""
    customer = story.stripe_customer_id or "none"
    said = [f"{story.name} is on the plan {story.plan}, billed by {story.billing}; Stripe customer: {customer}."]
    for line in story.usage:
        said.append(
            f"{line.period}, {NOUNS[line.channel][0]}, {line.env}, {line.rating}: {line.used:,} used,"
            f" {line.reserved:,} reserved."
        )
    for quota in story.quotas:
        taken = "" if quota.taken is None else f", {quota.taken:,} taken now"
        said.append(f"{quota.period}, {NOUNS[quota.channel][0]}: {quota.included:,} included in the plan{taken}.")
    said += [_overage(line) for line in story.overage]
    if story.wallet is None:
        said.append(f"Its user {story.billing_user}, who would pay for its messages, has no wallet.")
    else:
        said += tell_wallet(story.wallet)
    return said


def _overage(line: OverageLine) -> str:
    answer = f" at {_time(line.reported_at)}" if line.reported_at is not None else ""
    error = f": {line.error}" if line.error else ""
    return (
        f"Overage of {NOUNS[line.channel][0]} in {line.period}, revision {line.revision}: {line.units:,} units,"
        f" {line.total:,} in all, {line.state}{answer} with the identifier {line.identifier}"
        f" for {_time(line.event_at)}{error}."
    )


def _count(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _time(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"
