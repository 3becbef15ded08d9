"""The ASGI app: routes from the list of operations, and the layer around all of them.

The outermost layer gives every answer a request id and security headers, and turns what escaped everything else into
JSON: a lost database is 503, a defect 500 without its details.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Lifespan, Message, Receive, Scope, Send

from nightmail.errors import DatabaseAway
from nightmail.ids import new_id
from nightmail.web.api.table import OPERATIONS
from nightmail.web.auth import KeyCache
from nightmail.web.directory import Directory
from nightmail.web.inbound import inbound_routes
from nightmail.web.inbound_stripe import stripe_routes
from nightmail.web.openapi import documentation_routes
from nightmail.web.operation import Operation, OperationsAt, Reply, State, reply_away, send_reply
from nightmail.web.problems import Header, problem_body
from nightmail.web.rate_limit import RateLimiter
from nightmail.web.services import Services
from nightmail.web.unsubscribe import unsubscribe_routes

DEFECT = "Something went wrong on our side. If it stays so, tell us the request id."

# A response that sets one of these itself keeps its own.
SECURITY_HEADERS: tuple[Header, ...] = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)


def create_app(
    services: Services,
    *,
    extra_routes: Sequence[BaseRoute] = (),
    operations: Sequence[Operation] = OPERATIONS,
    lifespan: Lifespan[Starlette] | None = None,
) -> Starlette:
    """Return the app. `extra_routes` (cron, dashboard, metrics) come after the API's and inside its outermost layer."""
    state = State(services, KeyCache(services.database), RateLimiter(services.valkey))
    app = Starlette(
        routes=[
            *operation_routes(state, operations),
            *documentation_routes(services, operations),
            *inbound_routes(services),
            *stripe_routes(services),
            *unsubscribe_routes(services),
            *extra_routes,
        ],
        middleware=[Middleware(OutermostLayer)],
        exception_handlers={HTTPException: _answer_http_exception},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.api = state
    return app


def operation_routes(state: State, operations: Sequence[Operation]) -> list[BaseRoute]:
    """Return the route of all operations: of two paths the one that is written out comes before a parameter."""
    by_path: dict[str, list[Operation]] = {}
    for operation in operations:
        by_path.setdefault(operation.path, []).append(operation)
    paths = sorted(by_path, key=lambda path: [part.startswith("{") for part in path.split("/")])
    return [Directory([Route(path, OperationsAt(state, by_path[path])) for path in paths])]


def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Answer what Starlette refuses: an unknown path, or an unknown method of an extra route."""
    assert isinstance(error, HTTPException)
    names = {404: ("not_found", "This path does not exist."), 405: ("method_not_allowed", "Method not allowed here.")}
    name, message = names.get(error.status_code, ("application_error", str(error.detail)))
    body = problem_body(error.status_code, name, message)
    return Response(body, error.status_code, dict(error.headers or {}), "application/json")


class OutermostLayer:
    """Request id, security headers, and JSON for what escaped."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = str(new_id())
        scope["request_id"] = request_id
        has_started = False

        async def send_on(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                message["headers"] = add_headers(message["headers"], request_id)
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        except DatabaseAway as error:
            structlog.get_logger().warning("http.database_away", request_id=request_id, error=str(error))
            if has_started:
                raise
            await send_reply(send_on, reply_away())
        except Exception as error:
            structlog.get_logger().error("http.defect", request_id=request_id, **describe_defect(error))
            if has_started:
                raise
            await send_reply(send_on, Reply(problem_body(500, "internal_server_error", DEFECT), 500))


def describe_defect(error: BaseException) -> dict[str, str]:
    """Return what may be logged of a defect: class and places. Its text and variables may hold what a caller sent."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    return {"error": type(error).__name__, "at": places}


def add_headers(given: Iterable[Header], request_id: str) -> list[Header]:
    """Return the headers with a request id and the security headers that the response does not set itself."""
    headers = list(given)
    names = {name for name, _ in headers}
    headers.append((b"x-request-id", request_id.encode()))
    headers += [header for header in SECURITY_HEADERS if header[0] not in names]
    return headers
