"""Random histories of the ledger against the oracle; `python -m tests.credits` runs many more of them."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.credits.ledger import Ledger
from tests.credits.model import LedgerMachine

EXAMPLES, STEPS = 2000, 6


def test_the_ledger_is_as_the_oracle_says(database_url: str) -> None:
    """Many short histories; `python -m tests.credits` plays long ones, and others each time."""
    run_model(database_url, EXAMPLES, STEPS, is_random=False)


def run_model(database_url: str, examples: int, steps: int, *, is_random: bool = True) -> None:
    """Run the state machine on a connection of its own."""
    LedgerMachine.ledger = Ledger.open(database_url)
    try:
        run_state_machine_as_test(
            LedgerMachine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                database=None,
                derandomize=not is_random,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        LedgerMachine.ledger.close()
