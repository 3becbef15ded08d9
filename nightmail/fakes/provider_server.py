"""The fake provider: SES v2, SNS, End User Messaging SMS and SMTP on loopback, in a process of its own.

    python -m nightmail.fakes.provider_server --log FILE [--attempts-log FILE] [--port 0] [--smtp-port 0]
                                              [--script JSON] [--latency-ms N] [--keep N] [--exit-with-parent]

prints `ready http://127.0.0.1:PORT smtp://127.0.0.1:PORT` and runs until SIGTERM. What it does to whom:
nightmail.fakes.script. What it took: nightmail.fakes.message_log. Control, on the same port:

    GET  /_log/summary              {"requests", "total", "distinct", "doubles", "without_id"}; requests since the
                                    start, the others of the whole log
    GET  /_log/counts?at_least=2    {our message id: times taken}
    GET  /_log/messages?id=<ours>   the kept messages of that id, content in base64 (needs --keep)
    GET  /_script  POST /_script    the script; POST replaces it, counts for "the first n times" begin anew

It has no timer and no task per request on the plain path, so that a benchmark measures its client.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast
from urllib.parse import parse_qs

import httptools
import msgspec
import uvloop

from nightmail.fakes.aws_api import Answer, AwsService, InvalidRequestError, service_of
from nightmail.fakes.message_log import MessageLog
from nightmail.fakes.script import ACCEPTING, Behaviour, Chooser, Script
from nightmail.fakes.smtp_server import FakeSmtp, reset

__all__ = ["FakeProvider", "main"]

HOST = "127.0.0.1"  # never anything else: it believes every signature
BODY_MAX = 60_000_000

_GARBAGE = Answer(200, "text/html", b"<html><body>It works!</body></html>")
_REASONS = {200: "OK", 400: "Bad Request", 403: "Forbidden", 404: "Not Found", 429: "Too Many Requests"}


class FakeProvider:
    """The state all connections share."""

    def __init__(self, *, log: MessageLog, script: Script) -> None:
        self.log = log
        self.chooser = Chooser(script)
        self.smtp = FakeSmtp(log=log, chooser=self.chooser)

    def replace_script(self, script: Script) -> None:
        """Follow another script from the next request on."""
        self.chooser = Chooser(script)
        self.smtp.chooser = self.chooser

    def control(self, method: str, path: str, query: str, body: bytes) -> Answer:
        """Answer a request to the control paths."""
        asked = {name: values[-1] for name, values in parse_qs(query).items()}
        if path == "/_log/summary":
            return _encoded(self.log.summary())
        if path == "/_log/counts":
            return _encoded(self.log.counts(at_least=int(asked.get("at_least", "1"))))
        if path == "/_log/messages":
            return _encoded(self.log.kept(asked.get("id", "")))
        if path == "/_script":
            if method == "POST":
                try:
                    self.replace_script(msgspec.json.decode(body, type=Script))
                except msgspec.MsgspecError as exc:
                    return Answer(400, "text/plain", str(exc).encode("utf-8"))
            return _encoded(self.chooser.script)
        return Answer(404, "text/plain", b"no such path")


class _Http(asyncio.Protocol):
    """One HTTP connection; one request at a time, kept alive."""

    def __init__(self, provider: FakeProvider) -> None:
        self._provider = provider
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._url = b""
        self._headers: dict[str, str] = {}
        self._body = bytearray()

    # asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are no subclass

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._abort()

    # httptools

    def on_message_begin(self) -> None:
        self._url, self._headers, self._body = b"", {}, bytearray()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._body += body
        if len(self._body) > BODY_MAX:
            self._abort()

    def on_message_complete(self) -> None:
        path, _, query = self._url.decode("latin-1").partition("?")
        method = self._parser.get_method().decode("ascii")
        body = bytes(self._body)
        if path.startswith("/_"):
            self._write(self._provider.control(method, path, query, body))
            return
        service = service_of(path, self._headers)
        if method != "POST" or service is None:
            self._write(Answer(404, "text/plain", b"no such operation"))
        elif "authorization" not in self._headers:
            self._write(service.refused_for(Behaviour.CREDENTIALS))
        else:
            self._serve(service, body)

    # behaviour

    def _serve(self, service: AwsService, body: bytes) -> None:
        provider = self._provider
        try:
            submission = service.read(self._headers, body)
        except InvalidRequestError as exc:
            provider.log.attempt(
                service=service.name, message_id="", recipients=(), behaviour="invalid", accepted=False
            )
            self._write(exc.answer)
            return
        behaviour = provider.chooser.choose(submission.recipients, submission.message_id)
        is_accepted = behaviour in ACCEPTING
        provider.log.attempt(
            service=service.name,
            message_id=submission.message_id,
            recipients=submission.recipients,
            behaviour=behaviour,
            accepted=is_accepted,
        )
        provider_message_id = provider.log.take(submission) if is_accepted else ""
        self._answer(service, behaviour, provider_message_id)

    def _answer(self, service: AwsService, behaviour: Behaviour, provider_message_id: str) -> None:
        script = self._provider.chooser.script
        delay_ms = script.latency_ms + (random.random() * script.jitter_ms if script.jitter_ms else 0.0)
        match behaviour:
            case Behaviour.OK:
                self._later(delay_ms, lambda: self._write(service.accepted(provider_message_id)))
            case Behaviour.SLOW:
                self._later(script.slow_ms, lambda: self._write(service.accepted(provider_message_id)))
            case Behaviour.EMPTY:
                self._later(delay_ms, lambda: self._write(service.accepted("")))
            case Behaviour.GARBAGE:
                self._later(delay_ms, lambda: self._write(_GARBAGE))
            case Behaviour.HANG | Behaviour.HANG_AFTER_ACCEPT:
                self._later(script.hang_s * 1000, self._abort)
            case Behaviour.RESET_BEFORE | Behaviour.RESET_AFTER:
                self._later(delay_ms, self._reset)
            case Behaviour.DRIP:
                self._drip(_wire(service.accepted(provider_message_id)), script.drip_ms)
            case _:
                self._later(delay_ms, lambda: self._write(service.refused_for(behaviour)))

    def _later(self, delay_ms: float, act: Callable[[], None]) -> None:
        if delay_ms > 0:
            asyncio.get_running_loop().call_later(delay_ms / 1000, act)
        else:
            act()

    def _drip(self, octets: bytes, drip_ms: float) -> None:
        if self._transport is not None and octets:
            self._transport.write(octets[:1])
            self._later(max(1.0, drip_ms), lambda: self._drip(octets[1:], drip_ms))

    def _write(self, answer: Answer) -> None:
        if self._transport is not None:
            self._transport.write(_wire(answer))

    def _reset(self) -> None:
        if self._transport is not None:
            reset(self._transport)

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _wire(answer: Answer) -> bytes:
    lines = [
        f"HTTP/1.1 {answer.status} {_REASONS.get(answer.status, 'Answer')}",
        f"content-type: {answer.content_type}",
        f"content-length: {len(answer.body)}",
        "x-amzn-requestid: 00000000-0000-4000-8000-000000000000",
        *(f"{name}: {value}" for name, value in answer.headers),
        "\r\n",
    ]
    return "\r\n".join(lines).encode("latin-1") + answer.body


def _encoded(body: object) -> Answer:
    return Answer(200, "application/json", msgspec.json.encode(body))


async def _serve_until_stopped(options: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    script = msgspec.json.decode(options.script, type=Script)
    if options.latency_ms is not None:
        script = msgspec.structs.replace(script, latency_ms=options.latency_ms)
    log = MessageLog(options.log, attempts_path=options.attempts_log, keep=options.keep)
    provider = FakeProvider(log=log, script=script)
    http = await loop.create_server(lambda: _Http(provider), HOST, options.port, backlog=1024)
    smtp = await loop.create_server(provider.smtp.protocol, HOST, options.smtp_port, backlog=1024)
    http_port, smtp_port = (server.sockets[0].getsockname()[1] for server in (http, smtp))
    print(f"ready http://{HOST}:{http_port} smtp://{HOST}:{smtp_port}", flush=True)
    watch = asyncio.create_task(_watch_parent(os.getppid(), stop)) if options.exit_with_parent else None
    await stop.wait()
    if watch is not None:
        watch.cancel()
    http.close()
    smtp.close()
    log.close()


async def _watch_parent(parent: int, stop: asyncio.Event) -> None:
    """Stop when the process that started us has gone, so that a killed test leaves no server behind."""
    while os.getppid() == parent:  # noqa: ASYNC110 - nothing tells a process that it became an orphan
        await asyncio.sleep(0.5)
    stop.set()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the server until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m nightmail.fakes.provider_server")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--smtp-port", type=int, default=0)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--attempts-log", type=Path)
    parser.add_argument("--script", default="{}", help="JSON, see nightmail.fakes.script")
    parser.add_argument("--latency-ms", type=float)
    parser.add_argument("--keep", type=int, default=0, help="whole messages to keep for /_log/messages")
    parser.add_argument("--exit-with-parent", action="store_true")
    options = parser.parse_args(arguments)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve_until_stopped(options))


if __name__ == "__main__":
    main()
