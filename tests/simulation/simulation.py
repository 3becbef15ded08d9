"""A seeded search through interleavings of runners, over the shipped SQL on real PostgreSQL.

Three runners are state machines whose every atomic effect is a function of nightmail.store on a connection of their
own. One scheduler, driven by a list of numbers, picks who moves: a runner, a crash, a freeze, a thaw, the clock, a
failover that forgets the newest claim, a customer who cancels, suppresses or reschedules. The provider is a list, to
which nothing is ever taken away. The same numbers give the same trace, so a seed is a bug report.

    crash     the runner forgets everything; another starts in its place
    freeze    the runner does not move, whatever the clock does; thawed, it goes on where it was
    clock     moves by seconds. Runners that are neither dead nor frozen beat in time: their heartbeats and the
              timeouts of their calls happen before the clock passes them

    world.py         messages, runners, the provider's list, the clock; the database they are in
    runners.py       what a runner does
    surroundings.py  what everybody else does
    invariants.py    what must hold after every step, and when everybody healthy has finished
    mutants.py       faults that must be found
    search.py        many seeds, and the shortest trace of one that failed
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from nightmail.store.database import Connection
from tests.simulation import runners, surroundings
from tests.simulation.invariants import Violation, check, check_end
from tests.simulation.world import RUNNERS, Mutant, Runner, World

__all__ = ["Result", "Simulation", "choices_of"]

STEPS = 70
# Effects that do not touch the database.
IN_MEMORY = frozenset({"call", "answer", "crash", "freeze"})

Effect = Callable[[], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class Result:
    """One schedule: its trace, and what it violated."""

    trace: tuple[str, ...]
    violation: str | None
    steps: int

    @property
    def hash(self) -> str:
        """Return the trace's digest."""
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()[:16]


def choices_of(seed: int) -> list[int]:
    """Return the numbers that drive a seed's schedule; the first seeds what is random inside the store."""
    source = random.Random(seed)
    return [source.getrandbits(32) for _ in range(STEPS * 3)]


class Simulation:
    """One schedule."""

    def __init__(self, connections: Sequence[Connection], choices: Sequence[int], mutant: Mutant) -> None:
        self.world = World(connections, choices, mutant)

    async def run(self) -> Result:
        """Set up, take the steps, end; return what happened."""
        world = self.world
        try:
            await world.set_up()
            while world.steps < STEPS:
                if not await self.step():
                    break
            await self.end()
        except Violation as violation:
            return Result(tuple(world.trace), str(violation), world.steps)
        return Result(tuple(world.trace), None, world.steps)

    async def step(self) -> bool:
        """Let the scheduler pick one effect, carry it out and check; return False when the numbers have run out."""
        world = self.world
        actions = [action for runner in world.runners for action in self.actions_of(runner)] + self.other_actions()
        chosen = world.choose(len(actions))
        if chosen is None:
            return False
        name, effect = actions[chosen]
        await self.carry_out(name, effect)
        return True

    async def carry_out(self, name: str, effect: Effect) -> None:
        """Do one effect, note it, look, check."""
        world = self.world
        world.steps += 1
        said = await effect()
        world.trace.append(f"{world.now:6.0f} {name} {said}".rstrip())
        before = world.rows
        if name.rpartition(" ")[2] not in IN_MEMORY:
            world.rows = await world.look()
        check(world, name, before)

    def actions_of(self, runner: Runner) -> list[tuple[str, Effect]]:
        """Return what a runner could do now, likelier things more than once."""
        world = self.world
        if runner.frozen:
            return [(f"r{runner.number} thaw", lambda: runners.thaw(world, runner))]
        name = f"r{runner.number}"
        actions: list[tuple[str, Effect]] = []
        if runner.is_idle:
            if runner.claims:
                actions += [(f"{name} end", lambda: runners.end_run(world, runner))] * 3
            if not world.is_ending or not runner.claims:
                actions += [(f"{name} claim", lambda: runners.claim(world, runner))] * 3
                actions += [(f"{name} rescue", lambda: runners.rescue(world, runner))]
        else:
            if not world.is_ending:
                actions += [(f"{name} crash", lambda: runners.crash(world, runner))]
                actions += [(f"{name} freeze", lambda: runners.freeze(world, runner))]
            if runner.held:
                actions += [(f"{name} gate", lambda: runners.gate(world, runner))] * 3
                actions += [(f"{name} release", lambda: runners.release(world, runner))] if not world.is_ending else []
            if runner.gated:
                actions += [(f"{name} call", lambda: runners.call(world, runner))] * 3
            if runner.calls:
                actions += [(f"{name} answer", lambda: runners.answer(world, runner))] * 3
            if runner.results:
                actions += [(f"{name} record", lambda: runners.record(world, runner))] * 3
        return actions

    def other_actions(self) -> list[tuple[str, Effect]]:
        """Return what else could happen: the clock, customers, a failover."""
        world = self.world
        actions: list[tuple[str, Effect]] = [("clock", lambda: surroundings.move_clock(world))] * 3
        actions += [("customer cancel", lambda: surroundings.cancel(world))]
        actions += [("customer suppress", lambda: surroundings.suppress(world))]
        actions += [("customer reschedule", lambda: surroundings.reschedule(world))]
        if world.newest_claim is not None:
            actions += [("failover", lambda: surroundings.failover(world))] * 2
        return actions

    async def end(self) -> None:
        """Let everybody healthy finish, then check that nothing is left and nothing lost."""
        world = self.world
        world.is_ending = True
        for runner in world.runners:
            if runner.frozen:
                await self.carry_out(f"r{runner.number} thaw", lambda runner=runner: runners.thaw(world, runner))  # type: ignore[misc]
        for _ in range(400):
            runner = world.runners[world.steps % RUNNERS]
            if not runner.is_idle or any(row.queued for row in world.rows.values()):
                actions = self.actions_of(runner)
                wanted = "rescue" if runner.is_idle and world.steps % 7 == 0 else ""
                name, effect = next((a for a in actions if a[0].endswith(wanted) and wanted), actions[0])
                await self.carry_out(name, effect)
            elif all(other.is_idle for other in world.runners):
                break
            else:
                world.steps += 1
            if world.steps % 5 == 0:
                await surroundings.pass_time(world, 3700 if all(other.is_idle for other in world.runners) else 1)
        await check_end(world)
