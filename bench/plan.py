"""How much of everything: normal (about ten minutes), full (with ten million rows) and quick (seconds, for CI)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.report import Rates

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes of a run."""

    rounds: int = 3
    core_rounds: int = 9
    orgs: int = 20
    test_messages: int = 200_000
    peer_jobs: int = 40_000
    live_messages: int = 5_000
    claim_base: int = 10_000
    claim_many: int = 1_000_000
    claim_stored: tuple[int, ...] = (1_000_000,)
    claim_orgs: int = 10_000
    claim_repeats: int = 60
    memory_test: int = 1_000_000
    memory_live: int = 100_000
    accept_seconds: float = 6.0
    accept_warm_s: float = 2.0
    dispatch_messages: int = 200
    shape_messages: int = 200_000
    deliveries: int = 20_000
    starve_backlog: int = 100_000
    starve_due: int = 100
    fan_out_messages: int = 40_000
    arrivals: int = 200
    credit_users: int = 1_000_000
    credit_rounds: int = 1
    credit_loop: int = 5_000
    is_quick: bool = False


NORMAL = Plan()
FULL = Plan(claim_stored=(1_000_000, 10_000_000))
QUICK = Plan(
    rounds=1,
    core_rounds=1,
    test_messages=2_000,
    peer_jobs=500,
    live_messages=100,
    claim_base=2_000,
    claim_many=4_000,
    claim_stored=(4_000,),
    claim_orgs=50,
    claim_repeats=5,
    memory_test=2_000,
    memory_live=500,
    accept_seconds=0.5,
    accept_warm_s=0.2,
    dispatch_messages=10,
    shape_messages=2_000,
    deliveries=300,
    starve_backlog=1_000,
    starve_due=20,
    fan_out_messages=1_000,
    arrivals=10,
    credit_users=2_000,
    credit_loop=200,
    is_quick=True,
)


def alternate(contenders: Mapping[str, Callable[[], float]], rounds: int, tell: Tell) -> dict[str, Rates]:
    """Measure the contenders in turn, round by round, so that what else the machine does falls on all alike."""
    values: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, measure in contenders.items():
            tell(f"{name}, {number + 1} of {rounds}")
            values[name].append(measure())
    return {name: Rates(found) for name, found in values.items()}
