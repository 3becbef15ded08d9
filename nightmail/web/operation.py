"""What an operation is, and how a request becomes a call of its handler and a reply.

Each operation is declared once. From the declaration come the route, the checks before the handler, the page /docs and
/openapi.json, so that none of them can disagree with another. In order, and nothing is read before its turn:

    method → key → rate limit → query and path → body (counted, parsed, converted) → handler → JSON
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import parse_qsl
from uuid import UUID

import msgspec
import structlog
from starlette.types import Receive, Scope, Send

from nightmail.engine.background import Background
from nightmail.errors import DatabaseAway
from nightmail.store.api_keys import ApiKey
from nightmail.web.auth import Access, KeyCache, authenticate
from nightmail.web.bodies import ONE_MIB, BodyBudget, budgeted, convert, explain, parse_json, read_body
from nightmail.web.failures import Failures
from nightmail.web.problems import (
    DATABASE_AWAY,
    JSON_TYPE,
    Header,
    Problem,
    invalid,
    problem_body,
    unavailable,
)
from nightmail.web.rate_limit import RateLimiter
from nightmail.web.services import Services

B = TypeVar("B")
encode = msgspec.json.Encoder().encode

# For finding the key, and again for the handler; reading the body counts for neither.
ANSWER_LIMIT_S = 10.0
# A handler has more time for a large body: this many bytes are stored in a second even on a slow machine.
SLOWEST_BYTES_A_S = 4_000_000


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer; `content` is sent as it is when it is bytes: JSON, or what `media` says."""

    content: Any
    status: int = 200
    headers: Sequence[Header] = ()
    media: str = "application/json"


@dataclass(frozen=True, slots=True)
class State:
    """What all operations of a process share."""

    services: Services
    keys: KeyCache
    limiter: RateLimiter
    budget: BodyBudget = field(default_factory=BodyBudget)
    failures: Failures = field(default_factory=Failures)
    background: Background = field(default_factory=Background)


@dataclass(slots=True)
class Call(Generic[B]):
    """One request that passed the checks; `raw` is the body as plain values, `body` as the declared type."""

    state: State
    scope: Scope
    headers: Mapping[bytes, bytes]
    caller: ApiKey | None
    ids: Mapping[str, Any]
    query: Any
    raw: Any
    body: B

    @property
    def services(self) -> Services:
        """Return the shared services."""
        return self.state.services

    @property
    def key(self) -> ApiKey:
        """Return the caller's key; operations of access `sending` and `full` have one."""
        assert self.caller is not None, "the operation is declared for callers with a key"
        return self.caller

    @property
    def actor(self) -> str:
        """Return who is asking, for the audit log."""
        return f"key:{self.caller.id}" if self.caller else "admin"


Handler = Callable[[Call[Any]], Awaitable[Reply]]
PathKind = Literal["uuid", "text", "position"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """An operation of the API.

    `body` is the type of the JSON body, None when a body is ignored; with `convert_body` False the handler converts
    it itself. `path_kinds` says what each `{name}` in the path is. `errors` are the statuses that the handler adds to
    those that follow from the declaration. `headers` are request headers it reads (see openapi.HEADERS).
    """

    method: str
    path: str
    handler: Handler
    summary: str
    access: Access
    reply: Any
    tag: str
    status: int = 200
    media: str = "application/json"
    description: str = ""
    body: Any = None
    convert_body: bool = True
    body_limit: int = ONE_MIB
    query: type[msgspec.Struct] | None = None
    path_kinds: Mapping[str, PathKind] = field(default_factory=dict)
    errors: Sequence[int] = ()
    headers: Sequence[str] = ()
    example: Any = None

    @property
    def id(self) -> str:
        """Return the operation's name in OpenAPI, the handler's."""
        return getattr(self.handler, "__name__", "operation")


class Watchdog:
    """Answers in a request's place when its work takes too long, and cancels the work without waiting for it.

    A statement on a frozen PostgreSQL ignores its cancellation, and whoever awaits it is stuck with it: so the answer
    is sent from beside. Its timers cost a request 6 µs; a task around each handler costs 16 and more.
    """

    __slots__ = ("_answer", "_task", "_timer", "has_answered")

    def __init__(self, answer: Callable[[], None]) -> None:
        self.has_answered = False
        self._answer = answer
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None

    def start(self, seconds: float) -> None:
        """Give the work so much time from now on."""
        self.stop()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._end)

    def stop(self) -> None:
        """Count no time for now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        self.has_answered = True
        self._answer()
        if self._task is not None:
            self._task.cancel()

    def took_back(self) -> bool:
        """Return whether a cancellation was the watchdog's alone: then nobody else wants the task to end."""
        return self.has_answered and (self._task is None or self._task.uncancel() == 0)


class OperationsAt:
    """The ASGI app of one path: its operations by method."""

    def __init__(self, state: State, operations: Sequence[Operation]) -> None:
        self._state = state
        self._operations = {operation.method: operation for operation in operations}
        if "GET" in self._operations:
            self._operations["HEAD"] = self._operations["GET"]
        self._allow: Header = (b"allow", ", ".join(self._operations).encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; refusals are answered here, defects are left to the outermost layer."""
        extra: list[Header] = []
        watchdog = Watchdog(lambda: self._give_up(scope, send))
        try:
            operation = self._operations.get(scope["method"])
            if operation is None:
                raise Problem(
                    405, "method_not_allowed", f"Method {scope['method'][:20]} is not allowed here.", [self._allow]
                )
            reply = await self._answer(operation, scope, receive, extra, watchdog)
        except Problem as problem:
            content = problem_body(problem.status, problem.name, problem.message)
            reply = Reply(content, problem.status, problem.headers)
        except DatabaseAway:
            reply = reply_away()
        except asyncio.CancelledError:
            if watchdog.took_back():
                return
            raise
        finally:
            watchdog.stop()
        if not watchdog.has_answered:
            await send_reply(send, reply, extra)

    def _give_up(self, scope: Scope, send: Send) -> None:
        """Answer from beside the task that is stuck."""
        structlog.get_logger().warning("http.gave_up", request_id=scope.get("request_id"), path=scope["route"].path)
        self._state.background.start(send_reply(send, reply_away()))

    async def _answer(
        self, operation: Operation, scope: Scope, receive: Receive, extra: list[Header], watchdog: Watchdog
    ) -> Reply:
        headers = dict(scope["headers"])
        state = self._state
        watchdog.start(ANSWER_LIMIT_S)
        key = await authenticate(state.services, state.keys, state.failures, scope, headers, operation.access)
        if key is not None:
            rate = key.rate_per_s or state.services.settings.api_rate_per_s
            extra += await state.limiter.take(key.id, rate)
        ids = read_path(operation, scope["path_params"]) if operation.path_kinds else {}
        query = read_query(operation.query, scope["query_string"]) if operation.query else None
        call = Call(state, scope, headers, key, ids, query, None, None)
        if operation.body is None:
            return await operation.handler(call)
        watchdog.stop()
        return await self._answer_body(operation, call, receive, watchdog)

    async def _answer_body(self, operation: Operation, call: Call[Any], receive: Receive, watchdog: Watchdog) -> Reply:
        budget = self._state.budget
        declared = call.headers.get(b"content-length")
        body = await read_body(receive, declared=declared, limit=operation.body_limit, budget=budget)
        try:
            call.raw = await parse_json(body)
            if operation.convert_body:
                call.body = convert(call.raw, operation.body)
            watchdog.start(ANSWER_LIMIT_S + len(body) / SLOWEST_BYTES_A_S)
            return await operation.handler(call)
        finally:
            budget.give_back(budgeted(body))


def reply_away() -> Reply:
    """Return the 503 of a database that is away or gives no answer."""
    away = unavailable(DATABASE_AWAY)
    return Reply(problem_body(away.status, away.name, away.message), away.status, away.headers)


async def send_reply(send: Send, reply: Reply, extra: Sequence[Header] = ()) -> None:
    """Send a reply."""
    content = reply.content if isinstance(reply.content, bytes) else encode(reply.content)
    length: Header = (b"content-length", b"%d" % len(content))
    # A refusal for rate carries its own ratelimit headers, and then `extra` is empty.
    kind = JSON_TYPE if reply.media == "application/json" else (b"content-type", reply.media.encode())
    headers = [kind, length, *extra, *reply.headers]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def read_path(operation: Operation, given: Mapping[str, str]) -> dict[str, Any]:
    """Return the path's parts as what they are declared to be. Raises Problem (422)."""
    ids: dict[str, Any] = {}
    for name, kind in operation.path_kinds.items():
        text = given[name]
        if kind == "uuid":
            ids[name] = read_uuid(text, name)
        elif kind == "position":
            if not (text.isascii() and text.isdigit() and len(text) <= 4):
                raise invalid(f"The `{name}` must be a number.")
            ids[name] = int(text)
        else:
            if "\0" in text or len(text) > 1000 or any("\ud800" <= char <= "\udfff" for char in text):
                raise invalid(f"The `{name}` holds characters that are not allowed.")
            ids[name] = text
    return ids


def read_uuid(text: str, name: str) -> UUID:
    """Return the UUID in its usual form of 36 characters. Raises Problem (422)."""
    if len(text) == 36:
        try:
            return UUID(text)
        except ValueError:
            pass
    raise invalid(f"The `{name}` must be a valid UUID.")


@cache
def _names_of(kind: type[msgspec.Struct]) -> list[str]:
    """Return the names of a struct's fields; msgspec evaluates its annotations anew at each call."""
    return [field.encode_name for field in msgspec.structs.fields(kind)]


def read_query(kind: type[msgspec.Struct], query: bytes) -> Any:
    """Return the query string as the declared type. Raises Problem (422), also for a name that is not declared."""
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=50)
    except ValueError:
        raise invalid("The query string cannot be read.") from None
    given = dict(pairs)
    known = _names_of(kind)
    for name, value in pairs:
        if name not in known:
            raise invalid(f"Unknown query parameter `{name[:50]}`; there are: {', '.join(known)}.")
        if value != given[name]:
            raise invalid(f"The query parameter `{name}` is given twice.")
        if value.lower() == "null":  # msgspec would read it as absent
            raise invalid(f"Invalid `{name}` parameter.")
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        raise explain(error) from None
