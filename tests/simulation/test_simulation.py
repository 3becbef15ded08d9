"""The simulation in its short form: the shipped store holds, a seed repeats, and every mutant is found."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import pytest

from nightmail.store.database import Connection
from tests.simulation.mutants import MUTANTS, SHIPPED
from tests.simulation.search import run_seed, search, shrink
from tests.simulation.world import open_connections

pytestmark = pytest.mark.anyio

SEEDS, LEAST_SEEDS = 100, 20
SECONDS = 12.0
# The rarest mutant is found in about one schedule of twenty.
MUTANT_SEEDS = 300


@pytest.fixture
async def connections(database_url: str) -> AsyncIterator[list[Connection]]:
    connections = await open_connections(database_url)
    yield connections
    for connection in connections:
        await connection.close()


async def test_no_interleaving_violates_an_invariant(connections: list[Connection]) -> None:
    end = time.monotonic() + SECONDS  # a busy machine does fewer: make chaos and python -m tests.simulation do more
    for seed in range(SEEDS):
        for failure in await search(connections, [seed], SHIPPED):
            trace = (await shrink(connections, seed, SHIPPED)).trace
            pytest.fail(f"seed {seed}: {failure.result.violation}\n" + "\n".join(trace))
        if seed >= LEAST_SEEDS and time.monotonic() > end:
            break


async def test_a_seed_repeats_its_trace(connections: list[Connection]) -> None:
    for seed in (3, 5):
        first, second = [await run_seed(connections, seed, SHIPPED) for _ in range(2)]
        assert first.trace == second.trace
        assert first.hash == second.hash
    assert first.hash != (await run_seed(connections, 4, SHIPPED)).hash


@pytest.mark.parametrize("name", MUTANTS)
async def test_the_mutant_is_found(connections: list[Connection], name: str) -> None:
    mutant = MUTANTS[name]
    for seed in range(MUTANT_SEEDS):
        result = await run_seed(connections, seed, mutant)
        if result.violation is not None:
            assert (await run_seed(connections, seed, mutant)).hash == result.hash
            return
    pytest.fail(f"{name} was not found in {MUTANT_SEEDS} schedules")


async def test_a_failing_trace_is_shrunk(connections: list[Connection]) -> None:
    mutant = MUTANTS["claim without a lock"]
    (failure,) = await search(connections, [0], mutant)
    shrunk = await shrink(connections, failure.seed, mutant, runs=40)
    assert shrunk.violation is not None
    assert len(shrunk.trace) <= len(failure.result.trace)
