"""One org, its endpoints at a receiver, and the runs that deliver to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import psycopg
import structlog

from nightmail.engine.crash import CrashPoints
from nightmail.engine.deadline import Deadline
from nightmail.engine.job import JobContext, JobResult
from nightmail.fakes.webhook_receiver import Receiver
from nightmail.ids import new_id
from nightmail.jobs import retry_webhooks
from nightmail.rules.webhooks import NIGHTMAIL_TYPES, dialect_of, topics_of
from nightmail.settings import load
from nightmail.store.database import Database
from nightmail.store.fan_out import Fact, fan_out
from nightmail.store.orgs import NewOrg, create_org
from nightmail.webhooks.deliver import DeliveryRun
from nightmail.webhooks.signature import new_secret
from tests.ports import make_ports

ADD_ENDPOINT = """
INSERT INTO webhook_endpoints (id, org_id, env, url, dialect, types, topics, secret, schedule, status, disabled_reason)
VALUES (%(id)s, %(org_id)s, %(env)s, %(url)s, %(dialect)s, %(types)s, %(topics)s, %(secret)s, %(schedule)s,
        %(status)s::text, CASE WHEN %(status)s::text = 'disabled' THEN 'test' END)
"""


class Desk:
    """Tells facts and delivers them."""

    def __init__(self, database_url: str, receiver: Receiver, database: Database, org_id: UUID) -> None:
        self.database_url = database_url
        self.receiver = receiver
        self.database = database
        self.org_id = org_id
        self.ports = make_ports()

    @classmethod
    @asynccontextmanager
    async def open(cls, database_url: str, receiver: Receiver) -> AsyncIterator[Desk]:
        """Make the org; close everything at the end."""
        database = Database(database_url, pool_max=8)
        await database.open()
        async with database.connection() as conn:
            org, _, _ = await create_org(conn, NewOrg(name="Crossing"), actor="test")
        desk = cls(database_url, receiver, database, org.id)
        try:
            yield desk
        finally:
            await desk.ports.webhooks.close()
            await desk.ports.sns.close()
            await database.close()

    def add_endpoint(
        self,
        path: str = "/ok",
        *,
        types: Sequence[str] = tuple(NIGHTMAIL_TYPES),
        env: str = "live",
        org_id: UUID | None = None,
        schedule: str = "default",
        status: str = "enabled",
        secret: str | None = None,
        url: str | None = None,
    ) -> UUID:
        """Insert an endpoint at the receiver's path (or `url`); return its id."""
        endpoint_id = new_id()
        dialect = dialect_of(types)
        self.execute(
            ADD_ENDPOINT,
            {
                "id": endpoint_id,
                "org_id": org_id or self.org_id,
                "env": env,
                "url": url or self.receiver.url(path),
                "dialect": dialect,
                "types": list(types),
                "topics": topics_of(dialect, types),
                "secret": secret or new_secret(),
                "schedule": schedule,
                "status": status,
            },
        )
        return endpoint_id

    async def tell(
        self,
        facts: int = 1,
        *,
        topic: str = "domain.verified",
        env: str = "live",
        data: Mapping[str, Any] | None = None,
    ) -> int:
        """Make facts, in one transaction; return how many deliveries they became."""
        made = [
            Fact(self.org_id, env, topic, data=dict(data) if data is not None else {"number": number})
            for number in range(facts)
        ]
        async with self.database.connection() as conn, conn.transaction():
            return await fan_out(conn, made)

    def context(self, database: Database | None = None, *, deadline_s: float = 25.0, **options: Any) -> JobContext:
        """Return the context of one run; options are settings, `crash` and `ports`."""
        crash = CrashPoints.parse(options.pop("crash", None))
        ports = options.pop("ports", None) or self.ports
        return JobContext(
            job_id=new_id(),
            job="retry-webhooks",
            database=database or self.database,
            ports=ports,
            settings=load({"nightmail_env": "test", **options}),
            deadline=Deadline.after(deadline_s),
            runner="test",
            log=structlog.get_logger(),
            crash=crash,
        )

    async def deliver(self, *, offset: str = "", **options: Any) -> Counter[str]:
        """Deliver what is due, with the database's clock `offset` ahead; return the counts."""
        if not offset:
            counts, _ = await DeliveryRun(self.context(**options)).drain()
            return counts
        database = Database(self.database_url, pool_max=4, clock_offset=offset)
        await database.open()
        try:
            counts, _ = await DeliveryRun(self.context(database, **options)).drain()
        finally:
            await database.close()
        return counts

    async def run_job(self, **options: Any) -> JobResult:
        """Run the whole job once."""
        return await retry_webhooks.run(self.context(**options))

    def ask(self, query: str, *arguments: Any) -> list[Any]:
        """Return the rows of a query on a connection of its own; single columns come as values."""
        with psycopg.connect(self.database_url, autocommit=True) as conn:
            rows = conn.execute(query, arguments or None).fetchall()
        return [row[0] if len(row) == 1 else row for row in rows]

    def execute(self, statement: str, arguments: Any = None) -> None:
        """Run a statement on a connection of its own."""
        with psycopg.connect(self.database_url, autocommit=True) as conn:
            conn.execute(statement, arguments)

    def states(self, endpoint_id: UUID | None = None) -> Counter[str]:
        """Count deliveries by state."""
        return Counter(
            self.ask(
                "SELECT state FROM webhook_deliveries WHERE %s::uuid IS NULL OR endpoint_id = %s",
                endpoint_id,
                endpoint_id,
            )
        )

    def numbers(self, endpoint_id: UUID) -> list[int | None]:
        """Return the seqs of an endpoint's deliveries, lowest first."""
        return self.ask("SELECT seq FROM webhook_deliveries WHERE endpoint_id = %s ORDER BY seq", endpoint_id)
