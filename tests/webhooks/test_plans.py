"""The statements of the delivery under load: what is claimed is bounded under any plan, and the dead cost nothing."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import psycopg
import pytest

from nightmail.ids import new_id
from nightmail.store import webhook_attempts, webhook_deliveries
from nightmail.store.database import Connection
from nightmail.store.webhook_attempts import Outcome
from nightmail.webhooks.stamp import stamp_fresh
from tests.webhooks.desk import Desk

pytestmark = pytest.mark.anyio

# `numbered`: whether they have been claimed before; `ahead_s`: when they are due, 0 is now.
FILL = """
WITH endpoint AS (
    UPDATE webhook_endpoints
    SET next_seq = next_seq + CASE WHEN %(numbered)s THEN %(count)s ELSE 0 END
    WHERE id = %(endpoint)s
    RETURNING id, org_id, next_seq - %(count)s AS first
)
INSERT INTO webhook_deliveries (endpoint_id, event_id, org_id, topic, occurred_at, seq, body, due_at, attempts)
SELECT e.id, gen_random_uuid(), e.org_id, 'domain.verified', now(),
       CASE WHEN %(numbered)s THEN e.first + n - 1 END, CASE WHEN %(numbered)s THEN '{}' END,
       now() + make_interval(secs => %(ahead_s)s - n * 0.001), %(numbered)s::int
FROM endpoint AS e, generate_series(1, %(count)s) AS n
"""
PLANS = {
    "planner's choice": "",
    "nested loop": "SET enable_hashjoin = off; SET enable_mergejoin = off",
    "hash join": "SET enable_nestloop = off; SET enable_mergejoin = off",
    "merge join": "SET enable_nestloop = off; SET enable_hashjoin = off",
    "no index": "SET enable_indexscan = off; SET enable_bitmapscan = off; SET enable_indexonlyscan = off",
    "no tid scan": "SET enable_tidscan = off",
    "parallel": "SET debug_parallel_query = on; SET parallel_setup_cost = 0; SET min_parallel_table_scan_size = 0",
}
STATISTICS = ["of an empty table", "fresh"]


@pytest.fixture
async def conn(desk: Desk) -> AsyncIterator[Connection]:
    """A connection of its own, whose planner a test may lead astray."""
    async with await psycopg.AsyncConnection.connect(desk.database_url, autocommit=True) as conn:
        yield conn


async def fill(conn: Connection, endpoint: UUID, count: int, *, numbered: bool, ahead_s: float = 0.0) -> None:
    await conn.execute(FILL, {"endpoint": endpoint, "count": count, "numbered": numbered, "ahead_s": ahead_s})


async def claim(conn: Connection, limit: int, per_endpoint: int, busy: dict[UUID, int] | None = None) -> Any:
    async with conn.transaction(force_rollback=True):
        claimed = await webhook_deliveries.claim_deliveries(
            conn, limit=limit, per_endpoint=per_endpoint, lease_s=60, busy=busy or {}
        )
        cursor = await conn.execute(
            "SELECT endpoint_id, count(*), count(seq) FROM webhook_deliveries WHERE claim_id IS NOT NULL GROUP BY 1"
        )
        rows = await cursor.fetchall()
    assert (
        sum(count for _, count, _ in rows) == len(claimed) == len({(one.endpoint_id, one.event_id) for one in claimed})
    )
    assert all(count == numbered for _, count, numbered in rows)
    return {endpoint: count for endpoint, count, _ in rows}


# ── bounded claims ──


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("plan", PLANS)
async def test_a_claim_never_takes_more_than_its_limits(
    desk: Desk, conn: Connection, plan: str, statistics: str
) -> None:
    """In all and of each endpoint, fresh ones and repeats together, less what is busy; a failing one gets one."""
    await conn.execute("ALTER TABLE webhook_deliveries SET (autovacuum_enabled = off)")
    await conn.execute("ALTER TABLE webhook_endpoints SET (autovacuum_enabled = off)")
    if statistics == "of an empty table":
        await conn.execute("ANALYZE webhook_deliveries, webhook_endpoints")
    endpoints = [desk.add_endpoint() for _ in range(5)]
    for endpoint in endpoints:
        await fill(conn, endpoint, 300, numbered=False)
        await fill(conn, endpoint, 300, numbered=True)
    failing, busy = endpoints[:2]
    await conn.execute("UPDATE webhook_endpoints SET failures = 10 WHERE id = %s", [failing])
    if statistics == "fresh":
        await conn.execute("ANALYZE webhook_deliveries, webhook_endpoints")
    if PLANS[plan]:
        await conn.execute(PLANS[plan])
    for limit in (1, 2, 7, 100):
        for per_endpoint in (1, 4, 25):
            taken = await claim(conn, limit, per_endpoint, {busy: 3})
            assert 1 <= sum(taken.values()) <= limit
            assert taken.get(failing, 0) <= 1
            assert taken.get(busy, 0) <= max(0, per_endpoint - 3)
            assert all(count <= per_endpoint for count in taken.values())
    # And it takes what it may: nobody is starved by the shape of the plan.
    assert sum((await claim(conn, 100, 25)).values()) >= 80
    async with conn.transaction(force_rollback=True):
        assert await stamp_fresh(conn, busy, limit=9) == 9
        cursor = await conn.execute(
            "SELECT max(seq), count(seq) FROM webhook_deliveries WHERE endpoint_id = %s", [busy]
        )
        assert await cursor.fetchone() == (309, 309)
    async with conn.transaction(force_rollback=True):
        assert await webhook_deliveries.fail_pending(conn, failing, is_removed=True, limit=11) == 11


# ── the plans ──


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a plan's nodes."""
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


class Listening:
    """A connection that notes what it is asked to run."""

    def __init__(self, conn: Connection) -> None:
        self.conn = conn
        self.transaction = conn.transaction
        self.heard: list[tuple[str, dict[str, Any]]] = []

    async def execute(self, statement: str, arguments: dict[str, Any] | None = None, **options: bool) -> Any:
        """Note and run."""
        self.heard.append((statement, arguments or {}))
        return await self.conn.execute(statement, arguments, **options)


def outcome(endpoint_id: UUID, event_id: UUID, claim_id: UUID, kind: webhook_attempts.Kind) -> Outcome:
    return Outcome(endpoint_id, event_id, claim_id, kind, datetime.now(UTC), 1, True, http_status=200, response="ok")


async def hear(conn: Connection, one: UUID, keys: list[tuple[UUID, UUID]]) -> list[tuple[str, str, dict[str, Any]]]:
    """Run what a delivery runs, take it back, and return the statements that read deliveries, by name."""
    mine: Any = Listening(conn)
    store = webhook_deliveries
    made = [store.Stamped(*key, "domain.verified", "", {}, datetime.now(UTC), None) for key in keys]
    steps: dict[str, Callable[[], Awaitable[Any]]] = {
        "claim": lambda: store.claim_deliveries(mine, limit=100, per_endpoint=25, lease_s=60, busy={one: 3}),
        "work": lambda: store.has_work(mine),
        "closed": lambda: store.list_closed_endpoints(mine, limit=100),
        "stamp": lambda: store.number_fresh(mine, one, limit=2000),
        "bodies": lambda: store.set_bodies(mine, made, ["{}"] * len(keys)),
        "record": lambda: webhook_attempts.record_attempts(mine, [outcome(*key, new_id(), "retry") for key in keys]),
        "fail": lambda: store.fail_pending(mine, one, is_removed=True, limit=2000),
    }
    heard = []
    for name, step in steps.items():
        async with conn.transaction(force_rollback=True):
            await step()
        heard += [(name, statement, arguments) for statement, arguments in mine.heard]
        mine.heard.clear()
    return [one for one in heard if "INSERT INTO webhook_deliveries" not in one[1]]


# The most rows of webhook_deliveries that each may touch; a claim also counts where it jumps from endpoint to endpoint.
MOST = {"claim": 400, "work": 100, "closed": 100, "stamp": 30, "bodies": 150, "record": 150, "fail": 60}


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
@pytest.mark.parametrize("due", ["now", "far ahead"])
async def test_what_waits_behind_a_dead_endpoint_is_not_read(desk: Desk, conn: Connection, due: str, mode: str) -> None:
    """50,000 of it beside 40 endpoints with 20 each, and 20,000 delivered: the rows each statement touches."""
    dead, *others = [desk.add_endpoint() for _ in range(41)]
    await fill(conn, dead, 50_000, numbered=True, ahead_s=0.0 if due == "now" else 36_000.0)
    for endpoint in others:
        await fill(conn, endpoint, 10, numbered=False)
        await fill(conn, endpoint, 10, numbered=True)
    await fill(conn, others[0], 20_000, numbered=True)
    await conn.execute(
        "UPDATE webhook_deliveries SET state = 'delivered', finished_at = now() WHERE endpoint_id = %s AND seq > 10",
        [others[0]],
    )
    await conn.execute("VACUUM ANALYZE webhook_deliveries")
    cursor = await conn.execute(
        "SELECT endpoint_id, event_id FROM webhook_deliveries WHERE endpoint_id = %s LIMIT 100", [dead]
    )
    keys: list[tuple[UUID, UUID]] = await cursor.fetchall()
    names = set()
    for name, statement, arguments in await hear(conn, others[1], keys):
        plan = await explain(conn, statement, arguments, mode)
        scans = [node for node in nodes(plan) if node.get("Relation Name") == "webhook_deliveries"]
        reads = [node for node in scans if "Scan" in node["Node Type"]]
        names |= {name} if reads else set()
        for scan in reads:
            assert "Seq Scan" not in scan["Node Type"], (name, json.dumps(scan, indent=1))
        touched = sum(
            (scan["Actual Rows"] + scan.get("Rows Removed by Filter", 0) + scan.get("Rows Removed by Index Recheck", 0))
            * scan["Actual Loops"]
            for scan in reads
        )
        assert touched <= MOST[name], (name, touched, json.dumps(plan, indent=1))
    assert names == set(MOST)


# As the driver tells them.
TYPES: dict[type, str] = {int: "smallint", float: "float8", bool: "bool"}


async def explain(conn: Connection, statement: str, arguments: dict[str, Any], mode: str) -> dict[str, Any]:
    """Run a statement as the driver prepares it, take it back, and return its plan with what it read."""
    cursor = psycopg.AsyncClientCursor(conn)
    types = ", ".join(TYPES.get(type(value), "unknown") for value in arguments.values())
    text = statement.replace("%%", "%")
    for number, name in enumerate(arguments, 1):
        text = text.replace(f"%({name})s", f"${number}").replace(f"%({name})b", f"${number}")
    given = ", ".join("%s" for _ in arguments)
    async with conn.transaction(force_rollback=True):
        await conn.execute("SELECT set_config('plan_cache_mode', %s, true)", [mode])
        await conn.execute(f"PREPARE explained{f'({types})' if types else ''} AS {text}".encode())
        await cursor.execute(
            f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE explained{f'({given})' if given else ''}".encode(),
            list(arguments.values()),
        )
        row = await cursor.fetchone()
        await conn.execute("DEALLOCATE explained")
    assert row is not None
    plan: dict[str, Any] = row[0][0]["Plan"]
    return plan
