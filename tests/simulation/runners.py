"""What a runner does: the job's steps as functions of the world, one atomic effect each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch
from uuid import UUID

from nightmail.ports import OutgoingEmail
from nightmail.store import queue
from nightmail.store.record import Outcome, Recorded
from tests.simulation.invariants import Violation
from tests.simulation.world import CALL_S, LANE, LEASE_S, LIMIT, Call, Runner, World


async def claim(world: World, runner: Runner) -> str:
    """Claim, as the job does."""
    await world.at_now(runner.conn)
    claim_id = UUID(int=world.source.getrandbits(128), version=4)
    if world.mutant.has_counter:
        world.claim_numbers += 1
        claim_id = UUID(int=world.claim_numbers)
    with patch.object(queue, "new_claim_id", lambda: claim_id):
        rows = await world.mutant.claim_due(runner.conn, LANE, runner=f"r{runner.number}", limit=LIMIT, lease_s=LEASE_S)
    rows = sorted(rows, key=lambda row: row.message_id)
    if len(rows) > LIMIT:
        raise Violation(f"claimed {len(rows)} rows, the limit is {LIMIT}")
    for row in rows:
        if world.rows[row.message_id].claim_id is not None:
            raise Violation(f"{world.names[row.message_id]} was claimed and is another's")
    if rows:
        runner.held = rows
        runner.claims[claim_id] = world.now + LEASE_S
        runner.beat_at = world.now + LEASE_S / 3
        world.owners[claim_id] = (runner.number, runner.life)
        world.newest_claim = claim_id
    return world.names_of(row.message_id for row in rows)


async def gate(world: World, runner: Runner) -> str:
    """Pass the gate with one or all held rows of a claim."""
    world.newest_claim = None
    await world.at_now(runner.conn)
    claim_id = runner.held[0].claim_id
    mine = [row for row in runner.held if row.claim_id == claim_id]
    chosen = mine[: 1 + (world.choose(2) or 0)]
    runner.held = [row for row in runner.held if row not in chosen]
    if claim_id not in runner.claims:
        return "lost " + world.names_of(row.message_id for row in chosen)
    ids = [row.message_id for row in chosen]
    result = await world.mutant.pass_gate(runner.conn, claim_id, ids, call_s=CALL_S, shard=runner.number)
    begin_before = runner.claims[claim_id] - CALL_S
    runner.gated += [(passed, begin_before) for passed in result.passed]
    for passed in result.passed:
        world.begun_under[passed.message_id] = claim_id
        assert isinstance(passed.outgoing, OutgoingEmail)
        if wrong := set(passed.outgoing.to) & set(world.suppressed):
            raise Violation(f"{sorted(wrong)} passed the gate after their suppression")
    return f"{world.names_of(ids)} → {world.names_of(passed.message_id for passed in result.passed)}"


async def call(world: World, runner: Runner) -> str:
    """Begin a call; what the provider does is decided now, and whether the runner learns it later."""
    passed, begin_before = runner.gated.pop(0)
    name = world.names[passed.message_id]
    if world.now > begin_before:
        return f"{name} not begun: the lease may have ended"
    kinds = ("ok", "ok", "ok", "ok", "throttled", "retry", "failed", "doubt accepted", "doubt")
    kind = kinds[(world.choose(len(kinds)) or 0)] if not world.is_ending else "ok"
    provider_id = f"{name}-{len(world.taken)}"
    if kind in ("ok", "doubt accepted"):
        world.taken.append((passed.message_id, provider_id))
        if passed.message_id in world.canceled and not world.takeovers[passed.message_id]:
            raise Violation(f"{name} was called after it was canceled")
    outcome = Outcome(passed.message_id, passed.claim_id, "sent", passed.units, "simulated", provider_id)
    if kind != "ok":
        refused: Any = "in_doubt" if kind.startswith("doubt") else kind
        outcome = Outcome(passed.message_id, passed.claim_id, refused, provider="simulated", code=kind, wait_s=7.0)
    runner.calls.append(Call(passed, outcome, world.now + CALL_S))
    return f"{name} {kind}"


async def answer(world: World, runner: Runner) -> str:
    """Learn the outcome of the oldest call."""
    call = runner.calls.pop(0)
    runner.results.append(call.outcome)
    return f"{world.names[call.passed.message_id]} {call.outcome.kind}"


async def record(world: World, runner: Runner) -> str:
    """Write what ended."""
    await world.at_now(runner.conn)
    outcomes, runner.results = runner.results, []
    recorded = await world.mutant.record_outcomes(runner.conn, outcomes, shard=runner.number)
    for outcome in outcomes:
        row = world.rows[outcome.message_id]
        if outcome.message_id in recorded.written:
            if outcome.kind == "in_doubt":
                world.takeovers[outcome.message_id] += 1
            if row.claim_id != outcome.claim_id:
                raise Violation(f"{world.names[row.id]} was recorded by a runner that did not hold it")
    if world.mutant.record_rest is not None and recorded.written:
        actions = {
            "rest": lambda: record_rest(world, runner, outcomes, recorded),
            "crash": lambda: crash(world, runner),
        }
        name = "rest" if world.is_ending or (world.choose(6) or 0) else "crash"
        return f"{world.names_of(recorded.written)}, then {name} {await actions[name]()}"
    said = [f"{world.names[o.message_id]}:{o.kind if o.message_id in recorded.written else 'lost'}" for o in outcomes]
    return " ".join(said)


async def record_rest(world: World, runner: Runner, outcomes: Sequence[Outcome], recorded: Recorded) -> str:
    """Do what a mutant does after its record transaction."""
    await world.mutant.record_rest(runner.conn, outcomes, recorded, shard=runner.number)
    return ""


async def rescue(world: World, runner: Runner) -> str:
    """Free what expired claims hold."""
    world.newest_claim = None
    await world.at_now(runner.conn)
    freed = await queue.rescue_expired(runner.conn, evidence_wait_s=0)
    return f"{freed} rows"


async def release(world: World, runner: Runner) -> str:
    """End the run: give back what was not begun."""
    await world.at_now(runner.conn)
    not_begun = [row.message_id for row in runner.held]
    freed = await queue.release_claims(runner.conn, list(runner.claims), not_begun=not_begun)
    runner.held = []
    return f"{freed} rows"


async def end_run(world: World, runner: Runner) -> str:
    """End a run that has nothing left in hand; what its claims still hold in the database is for a rescue."""
    await world.at_now(runner.conn)
    freed = await queue.release_claims(runner.conn, list(runner.claims))
    runner.was_frozen |= set(runner.claims)
    runner.claims = {}
    return f"{freed} rows"


async def beat(world: World, runner: Runner) -> None:
    """Renew the leases, drop what is gone: the job's keep_leases."""
    runner.beat_at = world.now + LEASE_S / 3
    if not world.mutant.has_heartbeat or not runner.claims:
        return
    await world.at_now(runner.conn)
    for claim_id in await queue.end_claims(runner.conn, list(runner.claims)):
        del runner.claims[claim_id]
    alive = await queue.renew_claims(runner.conn, list(runner.claims), lease_s=LEASE_S)
    for claim_id in list(runner.claims):
        if claim_id in alive:
            runner.claims[claim_id] = world.now + LEASE_S
        else:
            del runner.claims[claim_id]
            runner.held = [row for row in runner.held if row.claim_id != claim_id]


async def crash(world: World, runner: Runner) -> str:
    """Forget everything; a new runner takes the place."""
    world.newest_claim = None
    fresh = Runner(runner.number, runner.conn, life=runner.life + 1, beat_at=world.now)
    world.runners[runner.number] = fresh
    return ""


async def freeze(world: World, runner: Runner) -> str:
    """Stop moving."""
    runner.frozen = True
    runner.was_frozen |= set(runner.claims)
    return ""


async def thaw(world: World, runner: Runner) -> str:
    """Go on; timers that ran out meanwhile fire in the order of the event loop: the heartbeat may be late."""
    runner.frozen = False
    if (world.choose(2) or 0) == 0:
        await beat(world, runner)
    return ""
