"""Idempotency-Key: the same request again gets the same answer, for 24 hours per org and key env.

A request is the same when method, path, batch mode and the body's value are; order of names and white space do not
count. The answer is kept by store.accept in the transaction that accepts the messages. Other operations check the
header's form and need nothing more: they end in the same state however often they run, or hold a secret in their
answer and are never kept.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from nightmail.store.accept import Idempotency, NewMessage, Replay, accept_messages
from nightmail.web.limits import refused_by_rating
from nightmail.web.operation import Call, Reply
from nightmail.web.problems import Problem

_VISIBLE = re.compile(rb"[\x21-\x7e]{1,256}")
_canonical = msgspec.json.Encoder(order="deterministic").encode


def read_idempotency_key(headers: Mapping[bytes, bytes]) -> str | None:
    """Return the key, None when the request has none. Raises Problem (400)."""
    key = headers.get(b"idempotency-key")
    if key is None:
        return None
    if _VISIBLE.fullmatch(key) is None:
        raise Problem(
            400, "invalid_idempotency_key", "The Idempotency-Key must have 1 to 256 visible ASCII characters."
        )
    return key.decode("ascii")


def digest_request(method: str, path: str, mode: str, body: Any) -> bytes:
    """Return the SHA-256 of what a request asks."""
    head = f"{method} {path} {mode}\n".encode()
    return hashlib.sha256(head + _canonical(body)).digest()


async def accept_once(
    call: Call[Any], messages: Sequence[NewMessage], content: bytes, *, mode: str = "", status: int = 200
) -> Reply:
    """Accept the messages and reply `content`, or what the same request got before. Raises Problem: 402, 409, 429."""
    key = read_idempotency_key(call.headers)
    record = None
    if key is not None:
        digest = digest_request(call.scope["method"], call.scope["path"], mode, call.raw)
        record = Idempotency(key, digest, status, content.decode())
    result = await accept_messages(
        call.services.database, org_id=call.key.org_id, env=call.key.env, messages=messages, idempotency=record
    )
    if isinstance(result, Replay):
        return Reply(result.response.encode(), result.status, [(b"idempotent-replayed", b"true")])
    if result == "in_progress":
        raise Problem(
            409, "concurrent_idempotent_requests", "A request with this Idempotency-Key is still running; try again."
        )
    if result == "other_body":
        raise Problem(
            409, "invalid_idempotent_request", "This Idempotency-Key was used before with a different request."
        )
    if result != "accepted":
        raise refused_by_rating(result)
    return Reply(content, status)
