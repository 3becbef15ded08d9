"""The grant job over four years: every anchor, whatever the gaps between runs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from nightmail.store.plans import Plan, put_plan
from nightmail.store.purchases import NewPurchase, PurchaseView, create_purchase
from tests.credits.calendar import ANCHORS, walk
from tests.credits.ledger import Ledger

FIRST, LAST = ANCHORS[0] - timedelta(days=1), ANCHORS[0] + timedelta(days=4 * 366)

GRANTED = """
SELECT g.purchase_id, g.period_start, b.issued_at, b.expires_at
FROM credit_grants AS g
JOIN credit_batches AS b ON b.id = g.transaction_id
ORDER BY g.purchase_id, g.period_start
"""


@pytest.mark.parametrize("gap", [1, 3, 45, 90])
def test_every_anchor_day_over_four_years_with_gaps(database_url: str, gap: int) -> None:
    ledger = Ledger.open(database_url)
    try:
        ledger.tell("SET TIME ZONE 'America/New_York'")  # a day has 23 or 25 hours there, now and then
        run_calendar(ledger, gap)
    finally:
        ledger.close()


def run_calendar(ledger: Ledger, gap: int) -> None:
    """Run the job every `gap` days; after each run exactly the months that have begun are granted."""
    day = timedelta(days=1)

    def move(at: datetime) -> None:
        ledger.set_day((at - ledger.start) / day)

    move(FIRST)
    assert ledger.do(put_plan(ledger.conn, Plan("dated", "d", "subscription", 1, grace_days=2), actor="test"))
    made: dict[PurchaseView, datetime] = {}
    for anchor in ANCHORS:
        purchase = ledger.do(
            create_purchase(ledger.conn, ledger.wallet, NewPurchase("dated", anchor=anchor), actor="t")
        )
        assert isinstance(purchase, PurchaseView)
        made[purchase] = anchor
    expected = {purchase.id: list(walk(anchor, LAST + 100 * day)) for purchase, anchor in made.items()}
    begun = sorted(start for starts in expected.values() for start in starts)
    now, granted = FIRST, 0
    while now < LAST:
        now += timedelta(days=gap)
        move(now)
        granted += ledger.grant_due(1000)
        assert granted == sum(start <= now for start in begun), now
    # in UTC: Python calls two moments different when one of them is in an hour that its zone has twice
    found = [(id, *(at.astimezone(UTC) for at in moments)) for id, *moments in ledger.ask(GRANTED)]
    for purchase_id, starts in expected.items():
        rows = [row for row in found if row[0] == purchase_id]
        assert [row[1] for row in rows] == [start for start in starts if start <= now]
        assert all(row[2] == row[1] for row in rows)
        assert [row[3] for row in rows] == [start + 2 * day for start in starts[1 : len(rows) + 1]]
