"""What the tests of the credit jobs share: an engine with the real jobs, a database with wallets, and looks into it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg

from nightmail.engine.runner import RunOutcome
from nightmail.ids import new_id
from nightmail.jobs.table import JOBS
from nightmail.store.audit import audit
from nightmail.store.credits import Wallet
from tests.credits.seeds import seed_purchases, seed_wallets
from tests.engine.place import Place, place

ENDPOINT = """
INSERT INTO webhook_endpoints (id, org_id, env, url, dialect, types, topics, secret)
VALUES (%(id)s, %(org_id)s, 'live', 'https://example.com/', 'nightmail', %(topics)s, %(topics)s, 'whsec_x')
"""


@dataclass
class Office:
    """An engine over one database, whose clock is shifted by `place`."""

    place: Place
    org_id: UUID

    async def run(self, job: str, **options: Any) -> RunOutcome:
        """Run a job as a cron platform would."""
        outcome = await self.place.engine.run(job, trigger="test", **options)
        assert outcome.state in ("succeeded", "deduplicated"), outcome
        return outcome

    def rows(self, query: str, *arguments: Any) -> list[tuple[Any, ...]]:
        """Return what the database has, in one order or none."""
        return self.place.rows(query, *arguments)

    def wallet(self, number: int = 1) -> Wallet:
        """Return a seeded wallet."""
        return Wallet(self.org_id, "live", f"user-{number:07}")

    async def violations(self) -> dict[str, list[str]]:
        """Return what the audit finds."""
        async with self.place.database.connection() as conn:
            return {finding.name: finding.first for finding in await audit(conn) if finding.violations}


def listen(url: str, org_id: UUID, *topics: str) -> None:
    """Subscribe an endpoint of the org."""
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(ENDPOINT, {"id": new_id(), "org_id": org_id, "topics": list(topics)})


@asynccontextmanager
async def office(
    url: str,
    *,
    wallets: int = 0,
    org_id: UUID | None = None,
    plan: str = "monthly",
    ago: str | None = None,
    **options: Any,
) -> AsyncIterator[Office]:
    """Open the engine; with `wallets` make an org first, with `ago` a subscription for each of them."""
    with psycopg.connect(url, autocommit=True) as conn:
        if wallets:
            org_id = seed_wallets(conn, wallets)
            if ago is not None:
                seed_purchases(conn, org_id, plan=plan, ago=ago)
    async with place(url, JOBS, **options) as opened:
        yield Office(opened, org_id or new_id())
