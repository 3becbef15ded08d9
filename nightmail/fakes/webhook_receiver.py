"""A webhook endpoint on loopback that does what it is told, and remembers what it was told.

    async with Receiver() as receiver:
        receiver.behave("/hook", "status 500", "delay 0.2", "ok")   # one each, then the last one for ever
        ... post to receiver.url("/hook"), or to receiver.url("/status/503?retry_after=7") ...
        await receiver.wait_for(3)
        receiver.requests[0].json()

or as a process, which prints `ready http://127.0.0.1:PORT` and runs until SIGTERM:

    python -m nightmail.fakes.webhook_receiver [--port 0] [--log FILE] [--behave PATH TEXT]... [--count-only]
                                               [--exit-with-parent]

Behaviours: nightmail.fakes.webhook_script. The log gets one JSON line per request with a single write before the
answer, so it is the truth whoever is killed. Control, on the same port:

    GET  /_summary     {"total", "distinct", "doubles", "connections", "most_open"}
    GET  /_requests    what came, without what --count-only forgets
    POST /_behave      {"path": "/hook", "behaviours": ["status 500", "ok"]}
    POST /_release     answers what hangs

It has no timer and no task per request on the plain path, so that a benchmark measures its client.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import ssl
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httptools
import msgspec
import uvloop

from nightmail.fakes.smtp_server import reset
from nightmail.fakes.webhook_script import Behaviour, head, read_path, read_text

__all__ = ["Received", "Receiver", "main"]

HOST = "127.0.0.1"
DRIP_S = 0.05
ENDLESS_CHUNK = b"endless " * 8192


@dataclass(frozen=True, slots=True)
class Received:
    """One request. `open_at_once` counts the unanswered requests with its webhook-id, itself included."""

    path: str
    headers: dict[str, str]
    body: bytes
    at: float
    open_at_once: int
    connection: int

    @property
    def webhook_id(self) -> str:
        """The event's id; '' when the request has none."""
        return self.headers.get("webhook-id", "")

    def json(self) -> Any:
        """Return the body, decoded."""
        return msgspec.json.decode(self.body)


@dataclass(slots=True)
class _Plan:
    steps: Sequence[Behaviour]
    calls: int = 0

    def next(self) -> Behaviour:
        """Return what to do with the next request."""
        step = self.steps[min(self.calls, len(self.steps) - 1)]
        self.calls += 1
        return step


class Receiver:
    """The endpoint: a server while it is entered, its counts and requests also afterwards.

    With `keep` False it only counts; `tls` makes it speak HTTPS.
    """

    def __init__(
        self, *, port: int = 0, log: Path | None = None, keep: bool = True, tls: ssl.SSLContext | None = None
    ) -> None:
        self.port = port
        self.keeps = keep
        self.requests: list[Received] = []
        self.total = 0
        self.connections = 0
        self.ids: Counter[str] = Counter()
        self.most_open: Counter[str] = Counter()
        """The highest number of unanswered requests at once, by path."""
        self.open_ids: Counter[str] = Counter()
        self.open_paths: Counter[str] = Counter()
        self.open_connections: set[_Http] = set()
        self._tls = tls
        self._set: dict[str, _Plan] = {}
        self._implied: dict[str, _Plan] = {}
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._server: asyncio.Server | None = None
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if log else None

    async def __aenter__(self) -> Receiver:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Http(self), HOST, self.port, backlog=1024, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for connection in list(self.open_connections):
            connection.abort()
        await self._server.wait_closed()
        if self._log is not None:
            os.close(self._log)
            self._log = None

    def url(self, path: str = "/ok") -> str:
        """Return the URL of a path."""
        return f"{'https' if self._tls else 'http'}://{HOST}:{self.port}{path}"

    def behave(self, path: str, *behaviours: str | Behaviour) -> None:
        """Do this with the coming requests to a path, whatever it says: one each, the last one for ever."""
        self._set[path] = _Plan(
            [step for one in behaviours for step in ([one] if isinstance(one, Behaviour) else read_text(one))]
        )

    def received(self, path: str) -> list[Received]:
        """Return the requests to a path."""
        return [request for request in self.requests if request.path == path]

    async def wait_for(self, total: int, *, timeout_s: float = 10.0) -> None:
        """Return once `total` requests have come since the start."""
        if self.total < total:
            come: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((total, come))
            async with asyncio.timeout(timeout_s):
                await come

    def release(self) -> None:
        """Answer the requests that hang now."""
        for connection in list(self.open_connections):
            connection.release()

    def take(self, target: str, headers: dict[str, str], body: bytes, connection: int) -> Behaviour:
        """Note a request and return what to do with it."""
        path = target.partition("?")[0]
        plan = self._set.get(path) or self._implied.get(target)
        if plan is None:
            plan = self._implied[target] = _Plan(read_path(target))
        webhook_id = headers.get("webhook-id", "")
        self.total += 1
        self.ids[webhook_id] += 1
        open_of_path = self.open_paths[path] + 1
        if open_of_path > self.most_open[path]:
            self.most_open[path] = open_of_path
        if self.keeps or self._log is not None:
            request = Received(path, headers, body, time.time(), self.open_ids[webhook_id] + 1, connection)
            if self.keeps:
                self.requests.append(request)
            if self._log is not None:
                os.write(self._log, _line(request))
        if self._waiting:
            self._wake()
        return plan.next()

    def summary(self) -> dict[str, Any]:
        """Return the counts; `doubles` are requests beyond the first with the same webhook-id."""
        with_id = self.total - self.ids[""]
        distinct = len(self.ids) - ("" in self.ids)
        return {
            "total": self.total,
            "distinct": distinct,
            "doubles": with_id - distinct,
            "connections": self.connections,
            "most_open": dict(self.most_open),
        }

    def _wake(self) -> None:
        for total, come in self._waiting:
            if self.total >= total and not come.done():
                come.set_result(None)
        self._waiting = [waiting for waiting in self._waiting if not waiting[1].done()]


def _line(request: Received) -> bytes:
    fields = {
        "at": request.at,
        "path": request.path,
        "webhook_id": request.webhook_id,
        "open_at_once": request.open_at_once,
        "headers": request.headers,
        "body": request.body.decode("utf-8", "replace"),
    }
    return msgspec.json.encode(fields) + b"\n"


class _Asked(msgspec.Struct):
    path: str
    behaviours: list[str]


def _control(receiver: Receiver, path: str, body: bytes) -> bytes:
    answer: Any = {}
    if path == "/_summary":
        answer = receiver.summary()
    elif path == "/_requests":
        answer = [msgspec.json.decode(_line(request)) for request in receiver.requests]
    elif path == "/_behave":
        asked = msgspec.json.decode(body, type=_Asked)
        receiver.behave(asked.path, *asked.behaviours)
    elif path == "/_release":
        receiver.release()
    octets = msgspec.json.encode(answer)
    return head(200, [("content-type", "application/json"), ("content-length", str(len(octets)))]) + octets


@dataclass(slots=True, eq=False)
class _Http(asyncio.Protocol):
    """One HTTP connection; one request at a time, kept alive."""

    receiver: Receiver
    number: int = 0
    parser: Any = None
    transport: asyncio.Transport | None = None
    target: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    # What is unanswered: path, webhook-id and what to do on release.
    held: tuple[str, str, Behaviour] | None = None
    is_paused: bool = False

    # asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's transports are no subclass
        self.parser = httptools.HttpRequestParser(self)
        self.receiver.connections += 1
        self.number = self.receiver.connections
        self.receiver.open_connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """End; what was unanswered stays so."""
        self.transport = None
        self.receiver.open_connections.discard(self)
        self._let_go()

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            if self.transport is not None:
                self.transport.write(head(400, [("connection", "close")]))
                self.transport.close()

    def pause_writing(self) -> None:
        """Hold the endless body: the client does not read."""
        self.is_paused = True

    def resume_writing(self) -> None:
        self.is_paused = False

    # httptools

    def on_message_begin(self) -> None:
        self.target, self.headers, self.body = b"", {}, b""

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header; one that only counts keeps the id alone."""
        if self.receiver.keeps or name.lower() == b"webhook-id":
            self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        target = self.target.decode("latin-1")
        if target.startswith("/_"):
            self._write(_control(self.receiver, target, self.body))
            return
        behaviour = self.receiver.take(target, self.headers, self.body, self.number)
        if behaviour.kind in ("ok", "status"):
            self._write(behaviour.wire)
        else:
            self._hold(target, behaviour)

    # behaviour

    def _hold(self, target: str, behaviour: Behaviour) -> None:
        path, webhook_id = target.partition("?")[0], self.headers.get("webhook-id", "")
        self.held = (path, webhook_id, behaviour)
        self.receiver.open_paths[path] += 1
        self.receiver.open_ids[webhook_id] += 1
        match behaviour.kind:
            case "delay":
                asyncio.get_running_loop().call_later(behaviour.seconds, self.release)
            case "hang":
                pass
            case "reset" if self.transport is not None:
                reset(self.transport)
            case "close" | "garbage" | "cut" if self.transport is not None:
                self.transport.write(behaviour.wire)
                self.transport.close()
            case "drip" | "drip-body":
                self._write(behaviour.wire)
                self._drip(b"d")
            case "interim":
                self._drip(behaviour.wire)
            case "endless":
                self._write(behaviour.wire)
                self._pour()
            case _:
                self.release()

    def release(self) -> None:
        if self.held is not None and self.held[2].kind not in ("drip", "drip-body", "interim", "endless"):
            wire = self.held[2].wire
            self._let_go()
            self._write(wire)

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def _let_go(self) -> None:
        if self.held is not None:
            path, webhook_id, _ = self.held
            self.held = None
            self.receiver.open_paths[path] -= 1
            self.receiver.open_ids[webhook_id] -= 1

    def _drip(self, octets: bytes) -> None:
        if self.transport is not None:
            self.transport.write(octets)
            asyncio.get_running_loop().call_later(DRIP_S, self._drip, octets)

    def _pour(self) -> None:
        if self.transport is not None:
            if not self.is_paused:
                self.transport.write(ENDLESS_CHUNK)
            asyncio.get_running_loop().call_later(0.001, self._pour)

    def _write(self, octets: bytes) -> None:
        if self.transport is not None:
            self.transport.write(octets)


async def _serve_until_stopped(options: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    receiver = Receiver(port=options.port, log=options.log, keep=not options.count_only)
    for path, text in options.behave:
        receiver.behave(path, text)
    async with receiver:
        print(f"ready http://{HOST}:{receiver.port}", flush=True)
        watch = asyncio.create_task(_watch_parent(os.getppid(), stop)) if options.exit_with_parent else None
        await stop.wait()
        if watch is not None:
            watch.cancel()


async def _watch_parent(parent: int, stop: asyncio.Event) -> None:
    """Stop when the process that started us has gone, so that a killed test leaves no server behind."""
    while os.getppid() == parent:  # noqa: ASYNC110 - nothing tells a process that it became an orphan
        await asyncio.sleep(0.5)
    stop.set()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the receiver until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m nightmail.fakes.webhook_receiver")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--behave", nargs=2, action="append", default=[], metavar=("PATH", "TEXT"))
    parser.add_argument("--count-only", action="store_true", help="keep no requests, only counts")
    parser.add_argument("--exit-with-parent", action="store_true")
    options = parser.parse_args(arguments)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve_until_stopped(options))


if __name__ == "__main__":
    main()
