"""What the engine's tests share: an engine over a table of small jobs on a real database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import psycopg
import structlog

from nightmail.engine.alerts import Alerts
from nightmail.engine.crash import CrashPoints
from nightmail.engine.job import JobContext, JobResult, JobSpec, Run
from nightmail.engine.runner import Engine
from nightmail.ports import Accepted, OutgoingEmail, OutgoingSms
from nightmail.settings import Settings
from nightmail.store.database import Database
from tests.ports import make_ports

SECRET = "correct-horse-battery-staple"
# A cluster of fields that the environment of the test run must not decide.
PLAIN: dict[str, Any] = {
    "nightmail_env": "test",
    "cron_secret": SECRET,
    "alert_email": None,
    "alert_webhook_url": None,
    "healthchecks_ping_url": None,
}

# One text over every row of every table: equal hashes mean that nothing changed.
TABLES = """
SELECT c.oid::regclass::text
FROM pg_class AS c
WHERE c.relkind = 'r' AND c.relnamespace = 'public'::regnamespace
ORDER BY 1
"""


@dataclass
class Outbox:
    """Sends nothing and keeps what it was given."""

    name: str = "outbox"
    emails: list[OutgoingEmail] = field(default_factory=list)

    async def send_email(self, email: OutgoingEmail, *, timeout_s: float) -> Accepted:
        self.emails.append(email)
        return Accepted(f"outbox_{email.message_id}")

    async def send_sms(self, sms: OutgoingSms, *, timeout_s: float) -> Accepted:
        return Accepted(f"outbox_{sms.message_id}")

    async def close(self) -> None:
        pass


def settings_of(**overrides: Any) -> Settings:
    return Settings(**{**PLAIN, **overrides})


def job(
    name: str,
    run: Run | None,
    *,
    holds: Literal["rows", "table"] = "rows",
    schedule: str = "0 0 * * *",
    keys: tuple[str, ...] = ("claimed", "failed"),
    after: tuple[str, ...] = (),
) -> JobSpec:
    title = name.replace("-", " ").title() + " Job"
    return JobSpec(name, f"/api/cron/{name}", schedule, title, f"{name} work", keys, holds, run=run, after=after)


def counting(calls: list[str], name: str, *, counts: dict[str, int] | None = None, more: bool = False) -> Run:
    """Return a job that notes its call."""

    async def run(ctx: JobContext) -> JobResult:
        calls.append(name)
        return JobResult(counts or {"claimed": 1, "failed": 0}, more)

    return run


@dataclass
class Place:
    """An engine with everything it stands on."""

    database: Database
    engine: Engine
    outbox: Outbox
    stopping: asyncio.Event
    url: str

    def rows(self, query: str, *arguments: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url, autocommit=True) as connection:
            return connection.execute(query, arguments).fetchall()

    def execute(self, query: str, *arguments: Any) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(query, arguments)

    async def settled(self) -> None:
        """Wait for what goes on in the background."""
        await self.engine.background.drain(5)
        if self.engine.alerts is not None:
            await self.engine.alerts._background.drain(5)


@asynccontextmanager
async def place(
    url: str, jobs: Sequence[JobSpec], *, clock_offset: str = "", crash: str | None = None, **overrides: Any
) -> AsyncIterator[Place]:
    if not structlog.is_configured():  # the default prints stacks with every local variable, a second's work each
        renderer = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        structlog.configure(processors=[structlog.processors.add_log_level, renderer])
    settings = settings_of(**overrides)
    database = Database(url, pool_max=10, clock_offset=clock_offset)
    await database.open()
    outbox, stopping = Outbox(), asyncio.Event()
    ports = make_ports(email=outbox, sms=outbox)
    alerts = Alerts(jobs, database, ports, settings)
    engine = Engine(jobs, database, ports, settings, "here", stopping, CrashPoints.parse(crash), alerts)
    try:
        yield Place(database, engine, outbox, stopping, url)
    finally:
        stopping.set()
        await engine.close(5)
        await alerts.close()
        await database.close()


def content_of(url: str) -> dict[str, str]:
    """Return a hash of each table's rows."""
    with psycopg.connect(url, autocommit=True) as connection:
        names = [row[0] for row in connection.execute(TABLES)]
        hashes = {}
        for name in names:
            query = f"SELECT coalesce(md5(string_agg(t::text, '|' ORDER BY t::text)), '') FROM {name} AS t"
            (hashes[name],) = connection.execute(query).fetchone() or ("",)
    return hashes
