"""The grant job over four years: every anchor, whatever the gaps between runs."""

from __future__ import annotations

from bisect import bisect_right
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from nightmail.store.credit_accounts import register
from nightmail.store.plans import Plan, put_plan
from tests.credits.calendar import ANCHORS, walk
from tests.credits.ledger import Ledger

FIRST, LAST = ANCHORS[0] - timedelta(days=1), ANCHORS[0] + timedelta(days=4 * 366)
EXPECTED = [list(walk(anchor, LAST + timedelta(days=100))) for anchor in ANCHORS]

# As create_purchase leaves them; three hundred calls of it are tested by nobody's patience.
PURCHASES = """
INSERT INTO purchases (id, org_id, env, account_id, plan_id, status, anchor, grants_from, next_grant_at)
SELECT nm_uuid7(), a.org_id, a.env, a.id, 'dated', 'active', anchor, anchor, anchor
FROM credit_accounts AS a, unnest(%(anchors)s::timestamptz[]) AS anchor
"""

GRANTED = """
SELECT p.anchor, g.period_start, b.issued_at, b.expires_at
FROM credit_grants AS g
JOIN credit_batches AS b ON b.id = g.transaction_id
JOIN purchases AS p ON p.id = g.purchase_id
ORDER BY p.anchor, g.period_start
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
    ledger.do(register(ledger.conn, ledger.wallet))
    ledger.tell(PURCHASES, anchors=ANCHORS)
    ledger.commit()
    begun = sorted(start for starts in EXPECTED for start in starts)
    now, granted = FIRST, 0
    while now < LAST:
        now += timedelta(days=gap)
        move(now)
        granted += ledger.grant_due(1000)
        assert granted == bisect_right(begun, now), now
    # in UTC: Python calls two moments different when one of them is in an hour that its zone has twice
    found = [tuple(at.astimezone(UTC) for at in moments) for moments in ledger.ask(GRANTED)]
    grace = 2 * day
    assert found == [
        (starts[0], start, start, following + grace)
        for starts in EXPECTED
        for start, following in pairwise(starts)
        if start <= now
    ]
