"""Bodies: counted while they arrive, and JSON read so that two readers cannot see two different things.

Refused as malformed (400): invalid UTF-8, a byte order mark, NaN and Infinity, a name twice in one object, anything
RFC 8259 does not allow. Refused as unusable (422): numbers beyond a double, NUL and lone surrogates (PostgreSQL cannot
store them), nesting deeper than MAX_DEPTH. With `clean` the characters are replaced instead: for what a signature
vouches for, but whose texts come from strangers.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any, NoReturn

import msgspec
from starlette.types import Receive

from nightmail.web.problems import Problem, invalid, missing_field, too_large, unavailable

ONE_MIB = 1_048_576
EMAIL_BODY_BYTES = 60_000_000
ATTACHMENT_BYTES = 40_000_000
MAX_DEPTH = 64
READ_TIMEOUT_S = 60.0
# Bodies above this are parsed outside the event loop, so that other requests go on between two of Python's switches.
OFF_LOOP_BYTES = 262_144
# Bytes of large bodies one process holds at a time; each may take several times its size while it is parsed.
BUDGET_BYTES = 256_000_000

_HIDDEN = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


class BodyBudget:
    """Bytes of bodies over 1 MiB that this process holds now."""

    def __init__(self, limit: int = BUDGET_BYTES) -> None:
        self._limit = limit
        self._held = 0

    def take(self, size: int) -> None:
        """Count bytes that are about to be held. Raises Problem (503) when the process is full."""
        if self._held + size > self._limit:
            raise unavailable("Too many large requests at once; please try again.")
        self._held += size

    def give_back(self, size: int) -> None:
        """Count bytes that were let go."""
        self._held -= size


async def read_body(receive: Receive, *, declared: bytes | None, limit: int, budget: BodyBudget) -> bytes:
    """Return the whole body. Raises Problem: 413 over `limit` bytes, 408 when it does not arrive in time.

    `declared` is the Content-Length: it saves reading what is too long, and is not trusted to be true. What is over
    1 MiB is taken from the budget; the caller gives `budgeted(body)` back.
    """
    if declared is not None and (not declared.isdigit() or int(declared[:20]) > limit):
        raise _over(limit)
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            return await _read(receive, limit, budget)
    except TimeoutError:
        raise Problem(
            408, "request_timeout", f"The request body did not arrive within {READ_TIMEOUT_S:.0f} s."
        ) from None


async def _read(receive: Receive, limit: int, budget: BodyBudget) -> bytes:
    chunks: list[bytes] = []
    size = held = 0
    try:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Problem(400, "validation_error", "The client went away before the body was complete.")
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > limit:
                raise _over(limit)
            if size > ONE_MIB:
                budget.take(size - held)
                held = size
            chunks.append(chunk)
            if not message.get("more_body", False):
                return chunk if len(chunks) == 1 else b"".join(chunks)
    except BaseException:
        budget.give_back(held)
        raise


def budgeted(body: bytes) -> int:
    """Return how much of the budget a body holds."""
    return len(body) if len(body) > ONE_MIB else 0


def _over(limit: int) -> Problem:
    return too_large(f"The request body must not be larger than {limit} bytes.")


async def parse_json(raw: bytes, *, clean: bool = False) -> Any:
    """Return the value of a strict JSON text. Raises Problem."""
    if len(raw) > OFF_LOOP_BYTES:
        return await asyncio.to_thread(read_json, raw, clean=clean)
    return read_json(raw, clean=clean)


def read_json(raw: bytes, *, clean: bool = False) -> Any:
    """Return the value of a strict JSON text; `clean` puts U+FFFD for what cannot be stored. Raises Problem."""
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_distinct,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except UnicodeDecodeError:
        raise malformed("it is not valid UTF-8") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise malformed(str(error)) from None
    hides = _HIDDEN.search(raw) is not None
    if hides and clean:
        return _cleaned(value, MAX_DEPTH)
    if hides or raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
        _check(value, MAX_DEPTH)
    return value


def malformed(why: str) -> Problem:
    """400: the body is not JSON."""
    return Problem(400, "validation_error", f"The request body is not valid JSON: {why}.")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise invalid("The request body holds a number that is out of range.")
    return number


def _check(value: Any, depth: int) -> None:
    """Refuse what no column can hold, anywhere in the value, and nesting deeper than `depth`."""
    if isinstance(value, str):
        if "\0" in value:
            raise invalid("The request body must not contain NUL characters.")
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            raise invalid("The request body must not contain unpaired surrogates.")
    elif isinstance(value, (dict, list)):
        if depth == 0:
            raise _too_deep()
        if isinstance(value, dict):
            for name, item in value.items():
                _check(name, depth)
                _check(item, depth - 1)
        elif not value or not isinstance(value[0], int):
            for item in value:
                _check(item, depth - 1)
        else:
            # Byte arrays have millions of items, none of which needs a look; strings among them are still found.
            for item in filter(_is_not_number, value):
                _check(item, depth - 1)


def _cleaned(value: Any, depth: int) -> Any:
    """Return the value with U+FFFD for what no column can hold. Raises Problem when it is nested too deep."""
    if isinstance(value, str):
        return _UNSTORABLE.sub("\ufffd", value)
    if not isinstance(value, (dict, list)):
        return value
    if depth == 0:
        raise _too_deep()
    if isinstance(value, list):
        return [_cleaned(item, depth - 1) for item in value]
    return {_cleaned(name, depth): _cleaned(item, depth - 1) for name, item in value.items()}


def _too_deep() -> Problem:
    return invalid(f"The request body must not be nested deeper than {MAX_DEPTH} levels.")


def _is_not_number(item: Any) -> bool:
    return not isinstance(item, (int, float))


def convert(value: Any, kind: Any) -> Any:
    """Return the value as the declared type. Raises Problem (422) with the field's name."""
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        raise explain(error) from None


def explain(error: msgspec.ValidationError) -> Problem:
    """Turn msgspec's words into ours: `Missing `to` field.`, or what was expected and where."""
    text, _, where = str(error).partition(" - at ")
    path = where.strip("`").removeprefix("$").removeprefix(".")
    if text.startswith("Object missing required field "):
        name = text.removeprefix("Object missing required field ").strip("`")
        return missing_field(f"{path}.{name}" if path else name)
    if text.startswith("Object contains unknown field "):
        name = text.removeprefix("Object contains unknown field ").strip("`")
        return invalid(f"Unknown field `{f'{path}.{name}' if path else name}`.")
    return invalid(f"Invalid `{path}` field: {text}." if path else f"Invalid request: {text}.")
