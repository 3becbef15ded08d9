"""A real server for tests: the app under uvicorn in a thread, on loopback, against a real database."""

from __future__ import annotations

import socket
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
import requests
import uvicorn
from starlette.applications import Starlette
from starlette.routing import BaseRoute
from valkey.asyncio import Valkey

from nightmail.ids import new_id
from nightmail.settings import load
from nightmail.store.database import Database
from nightmail.web.app import create_app
from nightmail.web.services import Services, template_environment

ADMIN_TOKEN = "admin-token-of-the-tests-8f2c"
TABLES = (
    "orgs",
    "api_keys",
    "messages",
    "message_bodies",
    "message_attachments",
    "message_queue",
    "message_events",
    "suppressions",
    "idempotency_keys",
    "usage_records",
    "usage_quotas",
    "usage_notices",
    "audit_logs",
    "webhook_endpoints",
    "webhook_deliveries",
    "credit_accounts",
    "credit_transactions",
    "credit_entries",
    "credit_reservations",
    "credit_prices",
    "credit_bonuses",
    "plans",
    "purchases",
    "plan_prices",
    "stripe_events",
    "stripe_subscriptions",
    "stripe_payments",
    "stripe_refunds",
    "overage_reports",
)


@dataclass(frozen=True, slots=True)
class Org:
    """A tenant with its two first keys."""

    id: str
    live_key: str
    test_key: str


@dataclass(slots=True)
class Server:
    """A running server and the database behind it."""

    url: str
    conninfo: str
    app: Starlette
    session: requests.Session = field(default_factory=requests.Session)

    def call(
        self, method: str, path: str, key: str | None = None, json: Any = None, **options: Any
    ) -> requests.Response:
        """Make a request; `key` is the bearer token."""
        headers = dict(options.pop("headers", {}))
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        return self.session.request(method, self.url + path, json=json, headers=headers, timeout=30, **options)

    def make_org(self, name: str = "Acme", **fields: Any) -> Org:
        """Make a tenant through the admin API."""
        answer = self.call("POST", "/orgs", ADMIN_TOKEN, {"name": name, **fields})
        assert answer.status_code == 201, answer.text
        body = answer.json()
        return Org(body["id"], body["live_key"], body["test_key"])

    def rows(self, query: str, *arguments: Any) -> list[tuple[Any, ...]]:
        """Ask the database itself."""
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            cursor = connection.execute(query, arguments)
            return cursor.fetchall() if cursor.description else []

    def counts(self) -> dict[str, int]:
        """Return how many rows each table holds."""
        query = " UNION ALL ".join(f"SELECT '{table}', count(*) FROM {table}" for table in TABLES)
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            return dict(connection.execute(query.encode()).fetchall())


def make_run(server: Server, job: str = "send-scheduled", state: str = "succeeded") -> str:
    """Write down a run as if it had just ended, and return its id."""
    [(run_id,)] = server.rows(
        "INSERT INTO job_runs (job_id, job, slot, trigger, host, started_at, deadline_s, finished_at, state,"
        " duration_ms) VALUES (%s, %s, now(), 'http', 'h', clock_timestamp(), 25, now(), %s, 5) RETURNING job_id",
        new_id(),
        job,
        state,
    )
    return str(run_id)


@contextmanager
def serving(
    conninfo: str,
    *,
    valkey_url: str | None = None,
    bound_host: str = "127.0.0.1",
    extra_routes: Sequence[BaseRoute] = (),
    ports: Any = None,
    **settings: Any,
) -> Iterator[Server]:
    """Serve the app until the block ends; `settings` are fields of Settings."""
    database = Database(conninfo)
    services = Services(
        settings=load({"nightmail_env": "test", "admin_token": ADMIN_TOKEN, "api_rate_per_s": 100_000, **settings}),
        database=database,
        bound_host=bound_host,
        templates=template_environment(),
        valkey=Valkey.from_url(valkey_url) if valkey_url else None,
        ports=ports,
    )

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await database.open()
        yield
        await database.close()
        if services.valkey is not None:
            await services.valkey.aclose()

    app = create_app(services, lifespan=lifespan, extra_routes=extra_routes)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, log_config=None, access_log=False, proxy_headers=False, lifespan="on", timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    running = Server(url, conninfo, app)
    try:
        _wait_until_ready(running, thread)
        yield running
    finally:
        running.session.close()
        server.should_exit = True
        thread.join(15)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"


def _wait_until_ready(server: Server, thread: threading.Thread) -> None:
    """Ask until the server answers; the listener is open from the start, so the first request waits for it."""
    assert thread.is_alive()
    assert server.call("GET", "/healthz").json() == {"status": "ok"}
