"""Many at once on few wallets: with the lock or the constraints nothing drifts; without both the audit sees it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest

from nightmail.store import credits
from nightmail.store.audit import audit
from nightmail.store.credit_grants import NewGrant, grant
from nightmail.store.credits import Done, Insufficient, Wallet
from nightmail.store.database import Connection, Database
from tests.credits.crowd import WALLETS
from tests.credits.seeds import seed_batches, seed_org, seed_purchases, seed_wallets

REFUSED = {"23505", "23514"}


def run_crowd(
    url: str, *, seconds: float, mutant: str = "none", kill: bool = False, processes: int = 8
) -> dict[str, int]:
    """Let the crowd work on wallets that have subscriptions; return how its calls ended."""
    with psycopg.connect(url, autocommit=True) as conn:
        org_id = seed_wallets(conn, WALLETS)
        for months in range(3):
            seed_purchases(conn, org_id, ago=f"{25 * months} days")
        seed_batches(conn, org_id, reference="first", amount=200, lasts="9 days")
    arguments = [url, "1", str(seconds), str(processes), mutant, "kill" if kill else "spare"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.credits.crowd", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


def violations(url: str) -> dict[str, int]:
    """Return what the audit finds."""

    async def run() -> dict[str, int]:
        async with await psycopg.AsyncConnection[Any].connect(url, autocommit=True) as conn:
            return {finding.name: finding.violations for finding in await audit(conn) if finding.violations}

    return asyncio.run(run())


@pytest.mark.crash
def test_eight_processes_killed_at_random_leave_a_ledger_that_adds_up(database_url: str) -> None:
    counts = run_crowd(database_url, seconds=4, kill=True)
    assert violations(database_url) == {}
    assert counts["killed"] > 10
    assert counts["answered"] > 300
    assert not {how for how in counts if how[0].isdigit()}, "nothing is refused by a constraint, and nothing deadlocks"


@pytest.mark.crash
def test_without_the_lock_the_constraints_refuse_and_nothing_drifts(database_url: str) -> None:
    counts = run_crowd(database_url, seconds=3, mutant="unlocked")
    assert sum(counts.get(state, 0) for state in REFUSED) > 10, counts
    # What a spend read before it waited may be another order than the right one; the sums hold all the same.
    assert set(violations(database_url)) <= {"credit_burn_order"}


@pytest.mark.crash
def test_without_lock_and_constraints_the_audit_finds_the_drift(database_url: str) -> None:
    counts = run_crowd(database_url, seconds=2, mutant="naked")
    assert counts["answered"] > 50
    found = violations(database_url)
    assert found, "neither the constraints nor the lock were there"


@pytest.mark.anyio
async def test_64_callers_with_one_reference_get_one_answer(database_url: str) -> None:
    async with await psycopg.AsyncConnection[Any].connect(database_url, autocommit=True) as conn:
        with psycopg.connect(database_url, autocommit=True) as plain:
            wallet = Wallet(seed_org(plain), "live", "ada")
        await grant(conn, wallet, NewGrant(100, "start"))
    database = Database(database_url, pool_max=16)
    await database.open()
    same = await asyncio.gather(
        *(database.run(lambda conn: credits.consume(conn, wallet, amount=60, reference="one")) for _ in range(64))
    )
    assert [result.is_replay for result in same if isinstance(result, Done)].count(False) == 1
    assert len({str(result.answer) for result in same if isinstance(result, Done)}) == 1

    def spend(number: int) -> Callable[[Connection], Awaitable[object]]:
        return lambda conn: credits.consume(conn, wallet, amount=15, reference=f"{number}")

    others = await asyncio.gather(*(database.run(spend(number)) for number in range(8)))
    assert sum(isinstance(result, Done) for result in others) == 2
    assert {result.missing for result in others if isinstance(result, Insufficient)} == {5}
    await database.close()
