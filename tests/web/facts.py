"""Facts for the webhook tests, told as the engine tells them: through store.fan_out, in a transaction."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg

from nightmail.store.fan_out import Fact, fan_out
from tests.web.serving import Org, Server


def tell_fact(server: Server, org: Org, topic: str, *, env: str = "live", **fields: Any) -> None:
    """Let a fact happen; `fields` are those of Fact."""
    tell_facts(server, [Fact(UUID(org.id), env, topic, **fields)])


def tell_facts(server: Server, facts: list[Fact]) -> None:
    """Let facts happen in one transaction."""

    async def tell() -> None:
        async with await psycopg.AsyncConnection.connect(server.conninfo) as conn:
            await fan_out(conn, facts)

    asyncio.run(tell())


def domain_fact(org: Org, name: str, occurred_at: datetime | None = None) -> Fact:
    """Return a fact that is about no message."""
    return Fact(UUID(org.id), "live", "domain.verified", data={"name": name}, occurred_at=occurred_at)


def event_ids(server: Server, webhook: str) -> list[str]:
    """Return the ids of an endpoint's events, oldest first."""
    query = "SELECT event_id::text FROM webhook_deliveries WHERE endpoint_id = %s ORDER BY event_id"
    return [event_id for (event_id,) in server.rows(query, webhook)]


def finish(server: Server, event: str, state: str, reason: str | None = None) -> None:
    """Let the attempts of an event have ended."""
    server.rows(
        "UPDATE webhook_deliveries SET state = %s, reason = %s, attempts = 3, claim_id = NULL, finished_at = now()"
        " WHERE event_id = %s",
        state,
        reason,
        event,
    )


def note_attempt(server: Server, event: str, status: int | None, *, error: str | None = None) -> None:
    """Let an attempt have been made."""
    server.rows(
        "INSERT INTO webhook_attempts (endpoint_id, event_id, sent_at, duration_ms, http_status, error, response)"
        " SELECT endpoint_id, event_id, now(), 12, %s, %s, %s FROM webhook_deliveries WHERE event_id = %s",
        status,
        error,
        None if status is None else "thank you",
        event,
    )
