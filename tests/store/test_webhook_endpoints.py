"""Endpoints and their events in the store: what must hold when two transactions meet, and replays in parts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import psycopg
import pytest

from nightmail.ids import new_id
from nightmail.store import webhook_endpoints, webhook_events
from nightmail.store.database import Connection
from nightmail.store.fan_out import Fact, fan_out
from nightmail.store.orgs import NewOrg, create_org
from nightmail.store.webhook_endpoints import MAX_ENDPOINTS, EndpointChange, NewEndpoint
from nightmail.store.webhook_events import ReplayFilter

pytestmark = pytest.mark.anyio

ENDPOINT = NewEndpoint(
    url="https://hooks.example.com/",
    description="",
    dialect="nightmail",
    types=["domain.verified"],
    topics=["domain.verified"],
    schedule="default",
    secret="whsec_x",
)


@asynccontextmanager
async def connect(database_url: str) -> AsyncIterator[Connection]:
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as conn:
        yield conn


@pytest.fixture
async def org_id(database_url: str) -> UUID:
    """An org."""
    async with connect(database_url) as conn:
        org, _, _ = await create_org(conn, NewOrg("Acme"), actor="test")
    return org.id


async def insert(conn: Connection, org_id: UUID) -> UUID:
    endpoint_id = await webhook_endpoints.insert_endpoint(
        conn, org_id=org_id, env="live", endpoint=ENDPOINT, actor="test"
    )
    assert endpoint_id is not None
    return endpoint_id


async def ask(conn: Connection, query: str, *arguments: Any) -> list[tuple[Any, ...]]:
    cursor = await conn.execute(query, arguments or None)
    return await cursor.fetchall()


async def wait_for_lock(conn: Connection, pid: int) -> None:
    """Return when a backend waits for a lock."""
    query = "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"
    async with asyncio.timeout(10):
        while not await ask(conn, query, pid):
            await asyncio.sleep(0.01)


async def test_two_requests_cannot_both_take_the_last_place(database_url: str, org_id: UUID) -> None:
    async with connect(database_url) as one, connect(database_url) as two, connect(database_url) as watcher:
        for _ in range(MAX_ENDPOINTS - 1):
            await insert(one, org_id)
        async with one.transaction():
            await insert(one, org_id)
            late = asyncio.create_task(
                webhook_endpoints.insert_endpoint(two, org_id=org_id, env="live", endpoint=ENDPOINT, actor="test")
            )
            await wait_for_lock(watcher, two.info.backend_pid)
        assert await late is None
        assert await ask(one, "SELECT count(*) FROM webhook_endpoints") == [(MAX_ENDPOINTS,)]


async def test_what_prints_an_endpoint_does_not_print_its_secret(database_url: str, org_id: UUID) -> None:
    async with connect(database_url) as conn:
        endpoint_id = await insert(conn, org_id)
        view = await webhook_endpoints.get_endpoint(conn, org_id=org_id, env="live", endpoint_id=endpoint_id)
    assert view is not None
    assert view.secret == ENDPOINT.secret
    assert ENDPOINT.secret not in repr(view) + repr(ENDPOINT)


async def test_a_new_endpoint_does_not_hold_up_the_orgs_messages(database_url: str, org_id: UUID) -> None:
    """Its lock on the org must not meet the key locks of inserts that name the org."""
    async with connect(database_url) as one, connect(database_url) as two:
        await two.execute("SET lock_timeout = '1s'")
        async with one.transaction():
            await insert(one, org_id)
            await two.execute(
                "INSERT INTO suppressions (id, org_id, env, channel, address, origin)"
                " VALUES (%s, %s, 'live', 'email', 'a@example.com', 'manual')",
                [new_id(), org_id],
            )


async def test_a_fact_and_a_change_of_the_endpoint_do_not_wait_for_each_other(database_url: str, org_id: UUID) -> None:
    """Fan-out is on the hot path: an open PATCH or rotation must not hold it up, nor the other way round."""
    fact = Fact(org_id, "live", "domain.verified")
    async with connect(database_url) as one, connect(database_url) as two:
        await insert(one, org_id)
        endpoint_id = await insert(one, org_id)
        for conn in (one, two):
            await conn.execute("SET lock_timeout = '1s'")
        async with one.transaction():
            endpoint = await webhook_endpoints.lock_endpoint(one, org_id=org_id, env="live", endpoint_id=endpoint_id)
            assert endpoint is not None
            change = EndpointChange(status="disabled")
            await webhook_endpoints.change_endpoint(one, org_id=org_id, endpoint=endpoint, change=change, actor="test")
            assert await fan_out(two, [fact]) == 2
        async with one.transaction():
            assert await fan_out(one, [fact]) == 1
            assert await webhook_endpoints.rotate_secret(
                two, org_id=org_id, env="live", endpoint_id=endpoint_id, secret="whsec_y", actor="test"
            )


async def test_a_replay_in_parts_takes_every_event_once(database_url: str, org_id: UUID) -> None:
    async with connect(database_url) as conn:
        endpoint_id, other = await insert(conn, org_id), await insert(conn, org_id)
        await fan_out(conn, [Fact(org_id, "live", "domain.verified") for _ in range(20)])
        # Of 20 every third is waiting for its third attempt. Both endpoints have the same events.
        await conn.execute("UPDATE webhook_deliveries SET attempts = 2")
        await conn.execute(
            "UPDATE webhook_deliveries AS d SET state = 'delivered', finished_at = now() FROM ("
            "    SELECT event_id, row_number() OVER (ORDER BY event_id) AS place FROM webhook_deliveries"
            "    WHERE endpoint_id = %s"
            ") AS n WHERE n.event_id = d.event_id AND n.place %% 3 <> 0",
            [endpoint_id],
        )
        delivered = "SELECT event_id FROM webhook_deliveries WHERE endpoint_id = %s AND state = 'delivered' ORDER BY 1"
        expected = await ask(conn, delivered, endpoint_id)
        taken: list[tuple[Any, ...]] = []
        after = None
        while True:
            async with conn.transaction():
                replayed, after = await webhook_events.replay_events(
                    conn,
                    endpoint_id,
                    ReplayFilter("delivered", after=after),
                    org_id=org_id,
                    actor="test",
                    limit=3,
                    scan=4,
                )
            # They are delivered again before the next part is asked for, and must not be taken again.
            again = await ask(
                conn,
                "UPDATE webhook_deliveries SET state = 'delivered', finished_at = now(), attempts = 1"
                " WHERE state = 'pending' AND attempts = 0 RETURNING event_id",
            )
            assert len(again) == replayed <= 3
            taken += sorted(again)
            if after is None:
                break
        assert taken == expected
        assert len(taken) == 14
        assert await ask(conn, delivered, other) == expected


async def test_a_replay_leaves_alone_what_someone_set_going_meanwhile(database_url: str, org_id: UUID) -> None:
    async with connect(database_url) as one, connect(database_url) as two, connect(database_url) as watcher:
        endpoint_id = await insert(one, org_id)
        await fan_out(one, [Fact(org_id, "live", "domain.verified") for _ in range(3)])
        await one.execute("UPDATE webhook_deliveries SET state = 'failed', finished_at = now()")
        async with one.transaction():
            await one.execute(
                "UPDATE webhook_deliveries SET state = 'delivered'"
                " WHERE event_id = (SELECT event_id FROM webhook_deliveries ORDER BY event_id LIMIT 1)"
            )
            late = asyncio.create_task(
                webhook_events.replay_events(two, endpoint_id, ReplayFilter("failed"), org_id=org_id, actor="test")
            )
            await wait_for_lock(watcher, two.info.backend_pid)
        assert await late == (2, None)
        states = await ask(one, "SELECT state FROM webhook_deliveries ORDER BY event_id")
        assert states == [("delivered",), ("pending",), ("pending",)]
