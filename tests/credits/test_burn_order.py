"""Which batch pays: priority, then expiry, then issue, never one that has ended."""

from __future__ import annotations

from tests.credits.burn_order import compare_histories


def test_burn_order_equals_the_oracle_on_random_histories(database_url: str) -> None:
    assert compare_histories(database_url, 700, seed=1) == 4200
