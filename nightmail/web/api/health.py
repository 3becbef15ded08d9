"""/healthz and /readyz, for load balancers and process managers."""

from __future__ import annotations

from typing import Literal

import msgspec

from nightmail.errors import DatabaseAway
from nightmail.store.database import Database
from nightmail.store.health import is_writable
from nightmail.web.operation import Call, Operation, Reply

READY_TIMEOUT_S = 2.0


class Health(msgspec.Struct):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(msgspec.Struct):
    """Whether requests can be served; `rate_limits` are counted per `process` while Valkey is away or not set."""

    status: Literal["ok", "unavailable"]
    reasons: list[str]
    rate_limits: Literal["shared", "process"]


async def healthz(call: Call[None]) -> Reply:
    """Say that the process answers."""
    return Reply(b'{"status":"ok"}')


async def readyz(call: Call[None]) -> Reply:
    """Say whether the database answers and takes writes."""
    reasons = []
    try:
        if not await call.state.background.within(READY_TIMEOUT_S, _takes_writes(call.services.database)):
            reasons.append("database: read-only")
    except TimeoutError:
        reasons.append(f"database: no answer within {READY_TIMEOUT_S:.0f} s")
    except DatabaseAway:
        # What libpq says names hosts and users: for the log, not for anybody who asks.
        reasons.append("database: cannot be reached")
    scope: Literal["shared", "process"] = "shared" if call.state.limiter.is_shared else "process"
    body = Readiness("unavailable" if reasons else "ok", reasons, scope)
    return Reply(body, 503 if reasons else 200)


async def _takes_writes(database: Database) -> bool:
    async with database.connection() as conn:
        return await is_writable(conn)


OPERATIONS = (
    Operation(
        method="GET", path="/healthz", handler=healthz, summary="Whether the process answers", access="open",
        tag="Health", reply=Health,
    ),
    Operation(
        method="GET", path="/readyz", handler=readyz, summary="Whether requests can be served", access="open",
        tag="Health", reply=Readiness, description="503 with the same body and its reasons while they cannot.",
    ),
)  # fmt: skip
