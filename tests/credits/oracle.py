"""A second opinion on the ledger, from the specification and not from the SQL: plain Python, no sets, no windows.

Time is a number of days since some start; expiry at exactly `now` has happened.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import floor
from typing import Any

REFUND_DAYS = 30
NEVER = float("inf")


@dataclass
class Batch:
    """Credits that came together; `made` counts batches of the wallet in the order in which they were made."""

    made: int
    granted: int
    priority: int
    source: str
    issued: float
    expires: float = NEVER
    remaining: int = 0
    reserved: int = 0
    consumed: int = 0
    expired: int = 0
    purchase: int | None = None
    period: float | None = None
    rolls_over: bool = False
    was_clawed: bool = False

    @property
    def columns(self) -> tuple[Any, ...]:
        """Return what the database must show of it."""
        return (
            self.granted,
            self.remaining,
            self.reserved,
            self.consumed,
            self.expired,
            self.priority,
            self.source,
            self.expires,
        )


@dataclass
class Spend:
    """What a reference took: from which batch how much; `open` while it is only reserved."""

    kind: str
    request: tuple[Any, ...]
    lines: list[tuple[Batch, int]]
    captured: list[tuple[Batch, int]] = field(default_factory=list)
    open: bool = False
    settled: tuple[Any, ...] | None = None
    refunded: int = 0

    @property
    def charged(self) -> int:
        """Return the credits that were spent in the end."""
        return sum(amount for _, amount in self.captured)


@dataclass
class Subscription:
    """A purchase of a plan; `starts` are the beginnings of its periods, all of them."""

    number: int
    credits: int
    starts: list[float]
    priority: int = 100
    grace: float = 0
    cap: int = 0
    next: int = 0
    holds_from: float = NEVER

    def place(self, midnight: float) -> tuple[int, int]:
        """Return where its next period stands in the order of a run: by the day on which it begins, and number."""
        return floor(self.starts[self.next] - midnight), self.number


@dataclass
class Oracle:
    """One wallet; a UTC day begins at `midnight`, a part of a day before or after the start."""

    now: float = 0
    midnight: float = 0
    batches: list[Batch] = field(default_factory=list)
    spends: dict[str, Spend] = field(default_factory=dict)
    grants: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    refunds: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    clawbacks: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    subscriptions: list[Subscription] = field(default_factory=list)

    def spendable(self) -> list[Batch]:
        """Return the batches that may be spent now, in the order in which they are."""
        alive = [batch for batch in self.batches if batch.remaining > 0 and batch.expires > self.now]
        return sorted(alive, key=lambda batch: (batch.priority, batch.expires, batch.issued, batch.made))

    @property
    def balance(self) -> int:
        """Return what is shown: what can be spent now."""
        return sum(batch.remaining for batch in self.spendable())

    @property
    def booked(self) -> int:
        """Return the ledger's balance: what is there until its expiry is booked."""
        return sum(batch.remaining + batch.reserved for batch in self.batches)

    def add(self, amount: int, source: str, *, priority: int, expires: float, issued: float | None = None) -> Batch:
        """Put a new batch into the wallet."""
        when = self.now if issued is None else issued
        batch = Batch(len(self.batches), amount, priority, source, when, expires, remaining=amount)
        self.batches.append(batch)
        return batch

    def grant(self, reference: str, amount: int, priority: int, expires: float) -> str:
        request = (amount, priority, expires)
        if reference in self.grants:
            return "replay" if self.grants[reference] == request else "other_body"
        self.grants[reference] = request
        self.add(amount, "bonus", priority=priority, expires=expires)
        return "done"

    def spend(self, kind: str, reference: str, amount: int, service: str) -> str | tuple[int, int]:
        """Return how it ended; (available, missing) when there is not enough."""
        request = (kind, amount, service)
        if reference in self.spends:
            return "replay" if self.spends[reference].request == request else "other_body"
        available = self.balance
        if available < amount:
            return available, amount - available
        lines = []
        left = amount
        for batch in self.spendable():
            take = min(left, batch.remaining)
            if take == 0:
                break
            batch.remaining -= take
            if kind == "consume":
                batch.consumed += take
            else:
                batch.reserved += take
            lines.append((batch, take))
            left -= take
        spend = Spend(kind, request, lines, open=kind == "reserve")
        spend.captured = [] if spend.open else lines
        self.spends[reference] = spend
        return "done"

    def close(self, kind: str, reference: str, amount: int | None) -> str | int:
        """Return how it ended; the reserved credits when more was to be captured."""
        spend = self.spends.get(reference)
        if spend is None or spend.kind == "consume":
            return "not_found"
        if spend.settled is not None:
            if spend.settled == (kind, amount):
                return "replay"
            return "other_body" if spend.settled[0] == kind else "settled"
        reserved = sum(held for _, held in spend.lines)
        if amount is not None and amount > reserved:
            return reserved
        left = 0 if kind == "release" else reserved if amount is None else amount
        for batch, held in spend.lines:
            take = min(left, held)
            left -= take
            batch.reserved -= held
            batch.consumed += take
            if take:
                spend.captured.append((batch, take))
            if batch.expires > self.now:
                batch.remaining += held - take
            else:
                batch.expired += held - take
        spend.open, spend.settled = False, (kind, amount)
        return "done"

    def refund(self, reference: str, of: str, amount: int | None) -> str | int:
        """Return how it ended; what may be refunded when that is less."""
        request = (of, amount)
        if reference in self.refunds:
            return "replay" if self.refunds[reference] == request else "other_body"
        spend = self.spends.get(of)
        if spend is None or not spend.captured:
            return "not_found"
        left = spend.charged - spend.refunded
        if left == 0 or (amount is not None and amount > left):
            return left
        back, before = left if amount is None else amount, spend.refunded
        spend.refunded += back
        self.refunds[reference] = request
        for batch, amount in reversed(spend.captured):
            earlier = min(before, amount)
            part = min(amount - earlier, back)
            before, back = before - earlier, back - part
            is_kept = batch.source == "refund" or batch.was_clawed
            ends = batch.expires if is_kept else max(batch.expires, self.now + REFUND_DAYS)
            if part > 0:
                self.add(part, "refund", priority=batch.priority, expires=ends)
        return "done"

    def claw_back(self, reference: str, batch: Batch, amount: int | None) -> str:
        request = (batch.made, amount)
        if reference in self.clawbacks:
            return "replay" if self.clawbacks[reference] == request else "other_body"
        self.clawbacks[reference] = request
        take = batch.remaining if amount is None else min(amount, batch.remaining)
        batch.remaining -= take
        batch.consumed += take
        batch.was_clawed = True
        if amount is None:
            batch.expires = min(batch.expires, self.now)
            batch.rolls_over = False
        return "done"

    def due(self) -> list[Subscription]:
        """Return the subscriptions that have a period to grant."""
        return [s for s in self.subscriptions if s.starts[s.next] <= self.now and s.starts[s.next] < s.holds_from]

    def grant_periods(self, limit: int) -> int:
        """Grant every period that is due, one of up to `limit` subscriptions at a time; return how many."""
        count = 0
        while self.due():
            passed: tuple[float, int] = (-NEVER, 0)
            while chunk := sorted(p for s in self.due() if (p := s.place(self.midnight)) > passed)[:limit]:
                members = [self.subscriptions[number] for number in sorted(number for _, number in chunk)]
                starts = [s.starts[s.next] for s in members]
                for s in members:
                    self._grant_period(s)
                for s, start in zip(members, starts, strict=True):
                    self._carry_over(s, start)
                count, passed = count + len(chunk), chunk[-1]
                if len(chunk) < limit:
                    break
        return count

    def _grant_period(self, s: Subscription) -> None:
        start, ends = s.starts[s.next], s.starts[s.next + 1] + s.grace
        s.next += 1
        batch = self.add(s.credits, "subscription", priority=s.priority, expires=ends, issued=start)
        batch.purchase, batch.period, batch.rolls_over = s.number, start, s.cap > 0

    def _carry_over(self, s: Subscription, start: float) -> None:
        carried, room, ends = 0, s.cap, s.starts[s.next] + s.grace
        for old in sorted(self.batches, key=lambda old: (old.period or 0, old.made), reverse=True):
            if old.purchase == s.number and old.rolls_over and old.period != start and old.expires >= start:
                take = min(room, old.remaining)
                old.remaining -= take
                old.consumed += take
                carried, room = carried + take, room - take
        if carried:
            more = self.add(carried, "rollover", priority=s.priority, expires=ends, issued=start)
            more.purchase, more.period, more.rolls_over = s.number, start, True

    def expire(self) -> tuple[int, int]:
        """Book what has ended; return how many batches and credits."""
        waiting = {s.number for s in self.due()}
        count = amount = 0
        for batch in self.batches:
            if batch.remaining and batch.expires <= self.now and not (batch.rolls_over and batch.purchase in waiting):
                count, amount = count + 1, amount + batch.remaining
                batch.expired += batch.remaining
                batch.remaining = 0
        return count, amount
