"""Run seeds, shrink what fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nightmail.store.database import Connection
from tests.simulation.simulation import Result, Simulation, choices_of
from tests.simulation.world import Mutant

__all__ = ["Failure", "run_choices", "run_seed", "search", "shrink"]


@dataclass(frozen=True, slots=True)
class Failure:
    """A seed that violated something."""

    seed: int
    result: Result


async def run_choices(connections: Sequence[Connection], choices: Sequence[int], mutant: Mutant) -> Result:
    """Run the schedule these numbers drive."""
    return await Simulation(connections, choices, mutant).run()


async def run_seed(connections: Sequence[Connection], seed: int, mutant: Mutant) -> Result:
    """Run a seed's schedule."""
    return await run_choices(connections, choices_of(seed), mutant)


async def search(
    connections: Sequence[Connection],
    seeds: Iterable[int],
    mutant: Mutant,
    *,
    told: Callable[[Result], None] = lambda result: None,
) -> list[Failure]:
    """Run all seeds; return those that violated something."""
    failures = []
    for seed in seeds:
        result = await run_seed(connections, seed, mutant)
        told(result)
        if result.violation is not None:
            failures.append(Failure(seed, result))
    return failures


async def shrink(connections: Sequence[Connection], seed: int, mutant: Mutant, *, runs: int = 150) -> Result:
    """Return the shortest failing trace found by leaving out pieces of the seed's numbers."""
    first, *rest = choices_of(seed)
    best = await run_choices(connections, [first, *rest], mutant)
    size = len(rest) // 2
    while size and runs > 0:
        start = 0
        while start < len(rest) and runs > 0:
            shorter = rest[:start] + rest[start + size :]
            runs -= 1
            result = await run_choices(connections, [first, *shorter], mutant)
            if result.violation is not None and len(result.trace) <= len(best.trace):
                rest, best = shorter, result
            else:
                start += size
        size //= 2
    return best
