"""/api/cron/* and /api/jobs/*: address list → method → bearer → engine → JSON.

The order is the contract's. The address list comes first, so that others learn nothing but 403; a name is looked up
only after the secret was right, so that unknown and known names answer alike without one. Nothing of the body is read.

| status | body |
| --- | --- |
| 200 | {"success":true,"jobId","job","date","duration","results","more"}; also "deduplicated" and "callId" |
| 400 | {"error":"Bad Request","message"} for an unusable slot, deadline or dry |
| 401 | {"error":"Unauthorized"} |
| 403 | {"error":"Forbidden"} |
| 404 | {"error":"Not Found"}, only with the right secret |
| 405 | {"error":"Method Not Allowed"} |
| 429 | {"error":"Too Many Requests"} after 20 failures in a minute from one address, for failing calls only |
| 500 | {"success":false,"jobId","error"} when the run itself broke |
| 501 | {"error":"Not Implemented","missing":[…]} |
| 503 | {"error":"Service Unavailable"} while the database is away, or without a secret to all but this machine |
"""

from __future__ import annotations

import hmac
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from hashlib import sha256
from ipaddress import ip_address
from typing import Any

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send
from structlog.typing import FilteringBoundLogger

from nightmail.clock import monotonic
from nightmail.engine.runner import ANSWER_BEFORE_S, Engine, RunOutcome
from nightmail.engine.schedule import BadSlot, named_slot
from nightmail.engine.tick import Ticker, TickOutcome
from nightmail.errors import DatabaseAway
from nightmail.log import escape
from nightmail.settings import LOOPBACK_HOSTS, Settings
from nightmail.store import cron_secrets
from nightmail.web.auth import is_local_call
from nightmail.web.client_address import client_address, is_within
from nightmail.web.failures import Failures

PREFIXES = ("/api/cron", "/api/jobs")
TICK_PATH = "/api/cron/tick"
TICK_NAME = "tick"
METHODS = ("GET", "POST")

NOTE_USE_EVERY_S = 60.0
MIN_DEADLINE_S = 1.0
# Nobody signs in with more; hashing stays cheap.
MAX_TOKEN_BYTES = 4096

# Headers in which a platform names the occurrence, after ?slot=.
SLOT_HEADERS = ("x-nightmail-slot", "x-cloudscheduler-scheduletime")
# What a User-Agent holds → the trigger in the run's record; the first that fits.
USER_AGENTS = (
    ("vercel-cron", "vercel"),
    ("cron-job.org", "cron-job.org"),
    ("upstash", "qstash"),
    ("github", "github-actions"),
    ("google-cloud-scheduler", "cloud-scheduler"),
    ("amazon/eventbridge", "eventbridge"),
    ("cloudflare", "cloudflare"),
    ("kube", "kubernetes"),
)
PLATFORM = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")
# Triggers of our own processes, which a header must not claim.
RESERVED_TRIGGERS = frozenset({"scheduler", "dispatcher", "cli", "dashboard"})
UNKNOWN_PLATFORM = "http"


class BadCall(ValueError):
    """The call is allowed and cannot be understood; the message says what would do."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a call asks for; `slot` is the text a platform named, None when it named none."""

    slot: str | None
    deadline_s: float | None
    dry: bool
    trigger: str


def cron_routes(engine: Engine, ticker: Ticker, settings: Settings, bound_host: str) -> list[Route]:
    """Return the routes of all jobs, the tick, and whatever else lies under their two prefixes.

    `bound_host` is the address the server listens on.
    """
    endpoint = CronEndpoint(engine, ticker, settings, Guard(engine, settings, bound_host))
    return [PrefixRoute(prefix, endpoint, name=f"cron:{prefix}", include_in_schema=False) for prefix in PREFIXES]


class PrefixRoute(Route):
    """Everything under a prefix, even with line ends in it, which the pattern `{rest:path}` would leave to a 404."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Return whether the path is the prefix or under it."""
        path: str = scope.get("path", "")
        if scope["type"] == "http" and (path == self.path or path.startswith(self.path + "/")):
            return Match.FULL, {"endpoint": self.endpoint, "path_params": {}}
        return Match.NONE, {}


class CronEndpoint:
    """The ASGI application behind every route: one place for the order of checks."""

    def __init__(self, engine: Engine, ticker: Ticker, settings: Settings, guard: Guard) -> None:
        self._engine = engine
        self._ticker = ticker
        self._settings = settings
        self._guard = guard
        self._names: dict[str, str] = {spec.path: spec.name for spec in engine.jobs.values()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        response = await self.answer(Request(scope))
        await response(scope, receive, send)

    async def answer(self, request: Request) -> Response:
        """Check the call in the contract's order, run what it names, and say what came of it."""
        came = monotonic()
        if not self._guard.is_listed(request):
            return _error(403, "Forbidden")
        if request.method not in METHODS:
            return _error(405, "Method Not Allowed", {"Allow": ", ".join(METHODS)})
        refusal = self._guard.refusal(request)
        if refusal is not None:
            return refusal
        path: str = request.scope["path"]
        if path != TICK_PATH and path not in self._names:
            return _error(404, "Not Found")
        try:
            wish = read_wish(request, self._settings)
            if not wish.dry:
                self._guard.note_use(request)
            return await (self.tick(wish) if path == TICK_PATH else self.run(self._names[path], wish, came))
        except (BadCall, BadSlot) as error:
            return _json(400, {"error": "Bad Request", "message": str(error)})
        except DatabaseAway:
            return away()

    async def run(self, name: str, wish: Wish, came: float) -> Response:
        """Run a job. Raises BadSlot, DatabaseAway."""
        total_s = wish.deadline_s or self._settings.job_deadline_s
        slot = await self.slot_of(name, wish, limit_s=total_s - ANSWER_BEFORE_S)
        outcome = await self._engine.run(
            name,
            slot=slot,
            trigger=wish.trigger,
            deadline_s=max(total_s - (monotonic() - came), MIN_DEADLINE_S),
            dry=wish.dry,
        )
        status, body = render_outcome(outcome)
        return away() if status == 503 else _json(status, _marked(body, wish))

    async def slot_of(self, name: str, wish: Wish, *, limit_s: float) -> datetime | None:
        """Return the slot the platform named, by the database's clock. Raises BadSlot, DatabaseAway."""
        if wish.slot is None:
            return None
        return named_slot(self._engine.jobs[name].schedule, wish.slot, await self._engine.read_clock(limit_s))

    async def tick(self, wish: Wish) -> Response:
        """Run what is due, whatever slot the platform named. Raises DatabaseAway."""
        outcome = await self._ticker.tick(trigger=wish.trigger, deadline_s=wish.deadline_s, dry=wish.dry)
        return _json(200, _marked(render_tick(outcome), wish))


# ── who may call ──


class Guard:
    """The address list, the secrets, and the count of failures by address."""

    def __init__(self, engine: Engine, settings: Settings, bound_host: str) -> None:
        self._engine = engine
        self._settings = settings
        self._log: FilteringBoundLogger = structlog.get_logger()
        self._hashes = [sha256(s.get_secret_value().encode()).digest() for s in settings.cron_secret]
        self._failures = Failures()
        self._noted: dict[bytes, float] = {}
        self._is_open = not self._hashes and settings.nightmail_env != "production" and is_loopback(bound_host)
        if self._is_open:
            self._log.warning("cron.open", reason="no CRON_SECRET: every caller on this machine may run jobs")
        elif not self._hashes:
            self._log.warning("cron.closed", reason="no CRON_SECRET and not bound to loopback: job routes answer 503")

    def is_listed(self, request: Request) -> bool:
        """Return whether the address list lets the caller in; without a list everybody."""
        if not self._settings.cron_allowed_ips:
            return True
        address = self._address(request)
        return address is not None and is_within(ip_address(address), self._settings.cron_allowed_ips)

    def refusal(self, request: Request) -> Response | None:
        """Return the answer to a caller without the secret, None when the call may go on."""
        if self._is_open and is_local_call(dict(request.scope["headers"])):
            return None
        if not self._hashes:
            return away()
        if self._matching(request) is not None:
            return None
        address = self._address(request) or "unknown"
        if self._failures.is_over(address):
            return _error(429, "Too Many Requests", {"Retry-After": "60"})
        self._failures.note(address)
        self._log.warning(
            f"[Security] Unauthorized cron attempt from {address}",
            kind="cron.unauthorized",
            address=address,
            path=escape(request.scope["path"][:200]),
            user_agent=escape(request.headers.get("user-agent", "")[:200]),
        )
        return _error(401, "Unauthorized", {"WWW-Authenticate": "Bearer"})

    def note_use(self, request: Request) -> None:
        """Remember in the database that the secret was used, at most once a minute, without waiting for it."""
        used = self._matching(request)
        if used is None or monotonic() - self._noted.get(used, -math.inf) < NOTE_USE_EVERY_S:
            return
        self._noted[used] = monotonic()
        self._engine.background.start(self._note(used))

    async def _note(self, used: bytes) -> None:
        try:
            await self._engine.database.run(partial(cron_secrets.note_use, sha256=used))
        except DatabaseAway:
            del self._noted[used]  # the next call tries again

    def _matching(self, request: Request) -> bytes | None:
        """Return the hash of the secret in force that the call carries; all are compared, in constant time."""
        headers = [value for name, value in request.scope["headers"] if name == b"authorization"]
        token = b""
        if len(headers) == 1:
            scheme, _, rest = headers[0].partition(b" ")
            if scheme.lower() == b"bearer" and len(rest) <= MAX_TOKEN_BYTES:
                token = rest
        given = sha256(token).digest()
        match: bytes | None = None
        for candidate in self._hashes:
            match = candidate if hmac.compare_digest(candidate, given) else match
        return match

    def _address(self, request: Request) -> str | None:
        address = client_address(request.scope, self._settings.trusted_proxies)
        return str(address) if address is not None else None


def is_loopback(host: str) -> bool:
    """Return whether a server bound to this host is reachable from this machine only."""
    if host in LOOPBACK_HOSTS:
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


# ── what the call asks for ──


def read_wish(request: Request, settings: Settings) -> Wish:
    """Read slot, deadline, dry and platform. Raises BadCall."""
    slot = _single(request, "slot")
    for header in SLOT_HEADERS:
        slot = slot or request.headers.get(header) or None
    deadline = _single(request, "deadline")
    return Wish(
        slot=slot,
        deadline_s=_deadline(deadline, settings.job_deadline_max_s) if deadline is not None else None,
        dry=_flag(_single(request, "dry")),
        trigger=platform_of(request.headers),
    )


def _single(request: Request, name: str) -> str | None:
    values = request.query_params.getlist(name)
    if len(values) > 1:
        raise BadCall(f"{name} may be given once")
    return values[0] if values else None


def _deadline(text: str, most_s: float) -> float:
    # float() takes underscores, nan, inf and other scripts' digits; a number of seconds has none of them
    if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) is None or not MIN_DEADLINE_S <= float(text) <= most_s:
        raise BadCall(f"deadline must be a number of seconds from {MIN_DEADLINE_S:g} to {most_s:g}")
    return float(text)


def _flag(text: str | None) -> bool:
    if text is None or text.lower() in ("0", "false"):
        return False
    if text.lower() in ("1", "true", ""):
        return True
    raise BadCall("dry must be 1 or 0")


def platform_of(headers: Mapping[str, str]) -> str:
    """Return who triggered the call, as the run's record names it."""
    named = headers.get("x-nightmail-platform", "").strip().lower()
    if PLATFORM.fullmatch(named) and named not in RESERVED_TRIGGERS:
        return named
    agent = headers.get("user-agent", "").lower()
    for part, platform in USER_AGENTS:
        if part in agent:
            return platform
    return UNKNOWN_PLATFORM


# ── answers ──


def render_outcome(outcome: RunOutcome) -> tuple[int, dict[str, Any]]:
    """Return status and body of a run's answer.

    `jobId` of a deduplicated call is the run that holds the job; `callId` is the call's own.
    """
    if outcome.state == "away":
        return 503, {"error": "Service Unavailable"}
    if outcome.state == "not_configured":
        return 501, {"error": "Not Implemented", "missing": list(outcome.missing)}
    if outcome.state == "failed":
        return 500, {"success": False, "jobId": str(outcome.job_id), "error": outcome.error or "Error"}
    body: dict[str, Any] = {
        "success": True,
        "jobId": str(outcome.running_job_id or outcome.job_id),
        "job": outcome.job,
        "date": outcome.slot.date().isoformat(),
        "duration": outcome.duration_ms,
        "results": {camel_case(key): count for key, count in outcome.counts.items()},
        "more": outcome.more,
    }
    if outcome.running_job_id is not None:
        body |= {"deduplicated": True, "runningJobId": str(outcome.running_job_id), "callId": str(outcome.job_id)}
    return 200, body


def render_tick(outcome: TickOutcome) -> dict[str, Any]:
    """Return the body of a tick's answer."""
    ran = [{"job": ran.job, "jobId": str(ran.job_id), "status": ran.status} for ran in outcome.ran]
    return {
        "success": True,
        "jobId": str(outcome.tick_id),
        "job": TICK_NAME,
        "date": outcome.at.date().isoformat(),
        "duration": outcome.duration_ms,
        "results": {"ran": ran, "waiting": outcome.waiting},
        "more": outcome.waiting > 0,
    }


def camel_case(name: str) -> str:
    """Return `action_required` as `actionRequired`."""
    first, *others = name.split("_")
    return first + "".join(part.capitalize() for part in others)


def away() -> Response:
    """Return the 503 of a service that cannot answer now."""
    return _error(503, "Service Unavailable", {"Retry-After": "10"})


def _marked(body: dict[str, Any], wish: Wish) -> dict[str, Any]:
    return body | {"dry": True} if wish.dry else body


def _error(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    return _json(status, {"error": text}, headers)


def _json(status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(
        msgspec.json.encode(body),
        status_code=status,
        media_type="application/json",
        headers={"Cache-Control": "no-store", **(headers or {})},
    )
