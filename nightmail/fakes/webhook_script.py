"""What the webhook receiver does with a request: a word and its arguments, in a path or as text.

    ok                   200                      hang           no answer until released
    status N             that status              drip           a byte of the head now and then, for ever
    gone                 410                      drip-body      200, then a byte of the body now and then, for ever
    delay S              200 after S seconds      endless        200, then a body without end
    redirect             302 or `status` to `to`  huge-headers   200 with a header of 1 MB
    fail N [STATUS]      N times, then 200        interim        100 Continue, for ever
    reset                a TCP reset              upgrade        101 Switching Protocols
    close                the end, no answer       cut            200, less body than announced, then the end
    garbage              bytes that are no HTTP   bomb           200, 10 MB of zeros as 10 KB of gzip

As text the arguments follow after spaces (`status 503 retry_after=7`), in a path after slashes, with the options as
its query (`/status/503?retry_after=7`). Options: `retry_after`, `to`, `status`, `body`. What follows the arguments in
a path only makes it different; an unknown word is ok.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import responses
from urllib.parse import parse_qsl, unquote

__all__ = ["Behaviour", "head", "read_path", "read_text"]

HUGE_HEADER_BYTES = 1_000_000
BOMB_BYTES = 10_000_000


@dataclass(frozen=True, slots=True)
class Behaviour:
    """One thing to do; `wire` is the whole answer where there is one, `seconds` what passes before it."""

    kind: str = "ok"
    seconds: float = 0.0
    wire: bytes = b""


def head(status: int, headers: Sequence[tuple[str, str]] = ()) -> bytes:
    """Return status line and headers, with the empty line after them."""
    reason = responses.get(status, "Answer")
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _answer(status: int, body: bytes, headers: Sequence[tuple[str, str]] = ()) -> bytes:
    if status in (204, 304):
        return head(status, headers)
    return head(status, [("content-type", "text/plain"), ("content-length", str(len(body))), *headers]) + body


def _cut() -> bytes:
    return head(200, [("content-length", "100")]) + b"less"


def _bomb() -> bytes:
    return _answer(200, gzip.compress(bytes(BOMB_BYTES)), [("content-encoding", "gzip")])


_WIRES: dict[str, Callable[[], bytes]] = {
    "endless": lambda: head(200, [("content-type", "text/plain")]),
    "drip": lambda: b"HTTP/1.1 200 OK\r\nx-drip: ",
    "drip-body": lambda: head(200, [("content-length", "1000000")]),
    "huge-headers": lambda: _answer(200, b"ok", [("x-huge", "h" * HUGE_HEADER_BYTES)]),
    "garbage": lambda: b"\x00\x01\xffSSH-2.0-no HTTP at all\r\n\r\n",
    "interim": lambda: b"HTTP/1.1 100 Continue\r\n\r\n",
    "upgrade": lambda: head(101, [("connection", "upgrade"), ("upgrade", "other")]),
    "cut": _cut,
    "bomb": _bomb,
    "hang": lambda: _answer(200, b"ok"),
    "reset": lambda: b"",
    "close": lambda: b"",
}


def read_text(text: str) -> list[Behaviour]:
    """Return what `text` asks for: one behaviour per request, the last one for all that follow."""
    words = text.split()
    options = dict(word.split("=", 1) for word in words if "=" in word)
    return _read([word for word in words if "=" not in word], options)


def read_path(target: str) -> list[Behaviour]:
    """Return what the path and query of a request ask for."""
    path, _, query = target.partition("?")
    return _read([unquote(part) for part in path.split("/")[1:]], dict(parse_qsl(query)))


def _read(words: Sequence[str], options: Mapping[str, str]) -> list[Behaviour]:
    kind, *arguments = words or ["ok"]
    body = options.get("body", "ok").encode()
    headers = [("retry-after", options["retry_after"])] if "retry_after" in options else []
    ok = Behaviour("ok", wire=_answer(200, body, headers))
    numbers = [float(word) for word in arguments if word.replace(".", "", 1).isdigit()]
    first = numbers[0] if numbers else None
    if kind in _WIRES:
        return [Behaviour(kind, wire=_WIRES[kind]())]
    if kind == "status" and first is not None:
        return [Behaviour("status", wire=_answer(int(first), body, headers))]
    if kind == "gone":
        return [Behaviour("status", wire=_answer(410, body, headers))]
    if kind == "delay" and first is not None:
        return [Behaviour("delay", seconds=first, wire=ok.wire)]
    if kind == "redirect":
        status = int(options.get("status", "302"))
        return [Behaviour("status", wire=_answer(status, body, [("location", options.get("to", "/ok"))]))]
    if kind == "fail" and first is not None:
        status = int(numbers[1]) if len(numbers) > 1 else 500
        return [Behaviour("status", wire=_answer(status, body, headers))] * int(first) + [ok]
    return [ok]
