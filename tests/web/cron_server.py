"""A real server on loopback in a thread of its own, and a client that sends and reads bytes."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette

from nightmail.engine.job import JobSpec
from nightmail.engine.tick import Ticker
from nightmail.jobs.table import JOBS
from nightmail.web.cron import cron_routes
from tests.engine.place import SECRET, Place, place

SEND = "/api/cron/send-scheduled"


@dataclass(frozen=True)
class Reply:
    """A reply as it came over the wire."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Server:
    """Where the server listens; `here` is what it stands on."""

    port: int = 0
    here: Place | None = None
    ready: threading.Event = field(default_factory=threading.Event)

    def raw(self, request: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(request)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def call(self, path: str = SEND, method: str = "GET", headers: Sequence[tuple[str, str | bytes]] = ()) -> Reply:
        lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: localhost", b"Connection: close"]
        for name, value in headers:
            lines.append(name.encode() + b": " + (value.encode("latin-1") if isinstance(value, str) else value))
        return parse(self.raw(b"\r\n".join([*lines, b"", b""])))

    def with_secret(
        self, path: str = SEND, method: str = "GET", headers: Sequence[tuple[str, str | bytes]] = ()
    ) -> Reply:
        return self.call(path, method, [("Authorization", f"Bearer {SECRET}"), *headers])


def parse(answer: bytes) -> Reply:
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return Reply(int(first.split()[1]), {name.lower(): value for name, value in headers.items()}, body)


@contextmanager
def serving(
    url: str, *, jobs: Sequence[JobSpec] = JOBS, bound_host: str = "127.0.0.1", clock_offset: str = "", **overrides: Any
) -> Iterator[Server]:
    """Serve the job routes in a thread; `bound_host` is what the routes are told."""
    server = Server()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with place(url, jobs, clock_offset=clock_offset, **overrides) as here:
            server.here = here
            app.router.routes += cron_routes(here.engine, Ticker(here.engine), here.engine.settings, bound_host)
            yield

    listener = socket.create_server(("127.0.0.1", 0))
    server.port = listener.getsockname()[1]
    config = uvicorn.Config(
        Starlette(lifespan=lifespan),
        lifespan="on",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        http="httptools",
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not running.started:
            thread.join(0.01)
            assert thread.is_alive(), "the server did not start"
        yield server
    finally:
        running.should_exit = True
        thread.join(30)
        listener.close()
