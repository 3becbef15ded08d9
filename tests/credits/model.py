"""The ledger as a state machine: Hypothesis calls its operations in any order, the oracle checks each answer."""

from __future__ import annotations

from typing import Any

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from nightmail.rules.credits import period_start
from nightmail.store import credit_grants, credits
from nightmail.store.credit_grants import NewGrant
from nightmail.store.credit_history import get_balance
from nightmail.store.credits import Done, Insufficient, Settled, TooMuch
from nightmail.store.plans import Plan, put_plan
from nightmail.store.purchases import NewPurchase, PurchaseView, create_purchase, set_status
from tests.credits.ledger import Ledger
from tests.credits.oracle import NEVER, Oracle, Subscription

AMOUNTS = st.integers(1, 60)
REFERENCES = st.sampled_from(["a", "b", "c", "d", "e", "f", "g", "h"])
EXPIRIES = st.sampled_from([0.5, 1.5, 4.5, 9.5, 40.5, NEVER])
PERIODS = 30


class TakenBack(Exception):
    """The transaction around a call is rolled back."""


class LedgerMachine(RuleBasedStateMachine):
    """Every answer is as the oracle says, and every batch in the end; the clock goes on by whole days."""

    ledger: Ledger

    def __init__(self) -> None:
        super().__init__()
        self.ledger.begin()
        self.oracle = Oracle(midnight=self.ledger.midnight)
        self.purchases: list[PurchaseView] = []
        self.paid: list[tuple[list[dict[str, Any]], list[tuple[int, int]]]] = []

    @rule(reference=REFERENCES, amount=AMOUNTS, priority=st.sampled_from([10, 100]), lasts=EXPIRIES)
    def grant(self, reference: str, amount: int, priority: int, lasts: float) -> None:
        """Give credits, perhaps with a reference that was used before."""
        expires = self.oracle.now + lasts
        new = NewGrant(amount, reference, priority=priority, expires_at=self.ledger.at(expires))
        result = self.do(credit_grants.grant(self.ledger.conn, self.ledger.wallet, new))
        assert self.told(result) == self.oracle.grant(reference, amount, priority, expires)

    @rule(kind=st.sampled_from(["consume", "reserve"]), reference=REFERENCES, amount=AMOUNTS)
    def spend(self, kind: str, reference: str, amount: int) -> None:
        """Spend or set aside."""
        call = credits.consume if kind == "consume" else credits.reserve
        result = self.do(call(self.ledger.conn, self.ledger.wallet, amount=amount, reference=reference, service="s"))
        expected = self.oracle.spend(kind, reference, amount, "s")
        assert self.told(result) == expected
        if isinstance(result, Done):
            lines = [(batch.made, taken) for batch, taken in self.oracle.spends[reference].lines]
            self.paid.append((result.answer["batches"], lines))

    @rule(reference=REFERENCES, amount=st.none() | AMOUNTS)
    def capture(self, reference: str, amount: int | None) -> None:
        """Spend what was set aside, or a part of it."""
        result = self.do(credits.capture(self.ledger.conn, self.ledger.wallet, reference=reference, amount=amount))
        assert self.told(result) == self.oracle.close("capture", reference, amount)

    @rule(reference=REFERENCES)
    def release(self, reference: str) -> None:
        """Give back what was set aside."""
        result = self.do(credits.release(self.ledger.conn, self.ledger.wallet, reference=reference))
        assert self.told(result) == self.oracle.close("release", reference, None)

    @precondition(lambda self: any(spend.open for spend in self.oracle.spends.values()))
    @rule(data=st.data())
    def settle(self, data: Any) -> None:
        """Settle several reservations at once, as the record step does; one of them may not be open."""
        account = self.ledger.ask("SELECT id FROM credit_accounts WHERE user_id = %s", self.ledger.wallet.user_id)[0][0]
        is_open = [name for name, spend in self.oracle.spends.items() if spend.open]
        chosen = data.draw(st.lists(st.sampled_from([*is_open, "never"]), unique=True, min_size=1))
        wanted = []
        for name in sorted(chosen):
            held = sum(amount for _, amount in self.oracle.spends[name].lines) if name != "never" else 1
            wanted.append(credits.Settlement(account, name, data.draw(st.integers(0, held))))
        settled = self.do(credits.settle(self.ledger.conn, wanted))
        assert sorted(settled) == [item for item in wanted if item.reference != "never"]
        for item in sorted(settled):
            kind = "capture" if item.captured else "release"
            assert self.oracle.close(kind, item.reference, item.captured or None) == "done"
            # nobody asked for this by a request that could come again
            self.oracle.spends[item.reference].settled = ("record step",)

    @rule(reference=REFERENCES, of=REFERENCES, amount=st.none() | AMOUNTS)
    def refund(self, reference: str, of: str, amount: int | None) -> None:
        """Give back what was spent."""
        result = self.do(
            credit_grants.refund(self.ledger.conn, self.ledger.wallet, reference=reference, of=of, amount=amount)
        )
        assert self.told(result) == self.oracle.refund(reference, of, amount)

    @precondition(lambda self: self.oracle.batches)
    @rule(reference=REFERENCES, which=st.integers(0, 20), amount=st.none() | AMOUNTS)
    def claw_back(self, reference: str, which: int, amount: int | None) -> None:
        """Take back what is left of a batch."""
        batch = self.oracle.batches[which % len(self.oracle.batches)]
        result = self.do(
            credit_grants.claw_back(
                self.ledger.conn,
                self.ledger.wallet,
                reference=reference,
                batch_id=self.ledger.batch_ids()[batch.made],
                amount=amount,
                reason="test",
            )
        )
        assert self.told(result) == self.oracle.claw_back(reference, batch, amount)

    @precondition(lambda self: len(self.oracle.subscriptions) < 2)
    @rule(
        amount=AMOUNTS,
        begun=st.integers(-70, 20),
        missed=st.integers(0, 2),
        grace=st.sampled_from([0, 3]),
        cap=st.sampled_from([0, 25]),
    )
    def subscribe(self, amount: int, begun: int, missed: int, grace: int, cap: int) -> None:
        """Buy a subscription that began earlier, now or will begin later."""
        number = len(self.oracle.subscriptions)
        plan = Plan(
            f"plan-{number}", "p", "subscription", amount, priority=100 + number, grace_days=grace, rollover_cap=cap
        )
        assert self.do(put_plan(self.ledger.conn, plan, actor="test"))
        anchor = self.ledger.at(self.oracle.now + begun + 0.5)
        assert anchor is not None
        starts = [self.ledger.day_of(period_start(anchor, n)) for n in range(PERIODS)]
        running = max([n for n, start in enumerate(starts) if start <= self.oracle.now], default=0)
        first = max(running - missed, 0)
        new = NewPurchase(plan.id, anchor=anchor, grants_from=period_start(anchor, first) if missed else None)
        made = self.do(create_purchase(self.ledger.conn, self.ledger.wallet, new, actor="test"))
        assert isinstance(made, PurchaseView)
        self.purchases.append(made)
        self.oracle.subscriptions.append(Subscription(number, amount, starts, 100 + number, grace, cap, next=first))
        # Only its own: what other subscriptions are due for waits for the job.
        others = [s.holds_from for s in self.oracle.subscriptions[:-1]]
        for s in self.oracle.subscriptions[:-1]:
            s.holds_from = -NEVER
        self.oracle.grant_periods(1)
        for s, holds in zip(self.oracle.subscriptions, others, strict=False):
            s.holds_from = holds

    @precondition(lambda self: self.purchases)
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        """End a subscription now."""
        number = data.draw(st.integers(0, len(self.purchases) - 1))
        if (
            self.oracle.subscriptions[number].holds_from != NEVER
            or self.oracle.subscriptions[number] in self.oracle.due()
        ):
            return
        ended = self.do(
            set_status(
                self.ledger.conn,
                self.purchases[number].id,
                "canceled",
                actor="test",
                ends_at=self.ledger.at(self.oracle.now),
            )
        )
        assert isinstance(ended, PurchaseView)
        self.oracle.subscriptions[number].holds_from = self.oracle.now

    @rule(limit=st.integers(1, 3))
    def run_grant_job(self, limit: int) -> None:
        """Grant what is due, in chunks."""
        assert self.ledger.grant_due(limit) == self.oracle.grant_periods(limit)

    @rule(limit=st.integers(1, 3))
    def run_expire_job(self, limit: int) -> None:
        """Book what has ended, in chunks."""
        assert self.ledger.expire(limit) == self.oracle.expire()

    @rule(days=st.sampled_from([1, 1, 3, 10, 32, 65]))
    def wait(self, days: int) -> None:
        """Let time pass."""
        if self.oracle.now + days < 300:
            self.oracle.now += days
            self.ledger.set_day(self.oracle.now)

    @rule(reference=REFERENCES, amount=AMOUNTS)
    def break_off(self, reference: str, amount: int) -> None:
        """Spend and set aside in a transaction that does not commit: nothing has happened."""

        async def torn() -> None:
            conn, wallet = self.ledger.conn, self.ledger.wallet
            async with conn.transaction():
                await credits.consume(conn, wallet, amount=amount, reference=reference, service="torn")
                await credits.reserve(conn, wallet, amount=amount, reference=reference + "!", service="torn")
                await credits.release(conn, wallet, reference=reference)
                raise TakenBack

        try:
            self.ledger.tear(torn())
        except TakenBack:
            note("taken back")

    @rule()
    def look(self) -> None:
        """Show the balance: what can be spent now, in the order in which it will be."""
        shown = self.do(get_balance(self.ledger.conn, self.ledger.wallet))
        assert (shown.balance if shown else 0) == self.oracle.balance
        if shown:
            assert shown.reserved == sum(batch.reserved for batch in self.oracle.batches)
            assert [b.remaining for b in shown.batches] == [b.remaining for b in self.oracle.spendable()]

    def teardown(self) -> None:
        """Every batch, what paid for each spend, and the balance are as the oracle says; the audit finds nothing."""
        ids, found, booked = self.ledger.batches()
        expected = [batch.columns for batch in self.oracle.batches]
        assert found == expected, f"{found} should be {expected}"
        assert booked == self.oracle.booked
        for parts, lines in self.paid:
            assert [(ids.index(part["id"]), part["amount"]) for part in parts] == lines
        if self.ledger.is_audited():
            assert self.ledger.violations() == []

    def do(self, step: Any) -> Any:
        """Run one call of the store."""
        return self.ledger.do(step)

    @staticmethod
    def told(result: Any) -> Any:
        """Return the answer in the oracle's words."""
        match result:
            case Done():
                return "replay" if result.is_replay else "done"
            case Insufficient():
                return result.available, result.missing
            case TooMuch():
                return result.limit
            case Settled():
                return "settled"
            case _:
                return result
