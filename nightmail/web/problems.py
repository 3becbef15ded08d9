"""Refusals in Resend's shape: {"statusCode", "name", "message"}."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

Header = tuple[bytes, bytes]

JSON_TYPE: Header = (b"content-type", b"application/json")
MAX_MESSAGE = 500


class ProblemBody(msgspec.Struct, rename={"status_code": "statusCode"}):
    """An error as clients see it; `name` is stable, `message` is for people."""

    status_code: int
    name: str
    message: str


class Problem(Exception):
    """A request is refused; raised anywhere below an operation, answered by it."""

    def __init__(self, status: int, name: str, message: str, headers: Sequence[Header] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.name = name
        self.message = message
        self.headers = headers


def problem_body(status: int, name: str, message: str) -> bytes:
    """Return the JSON of a refusal; the message is cut to MAX_MESSAGE characters, unprintable ones replaced."""
    text = message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…"
    text = text.encode("utf-8", "replace").decode()
    return msgspec.json.encode(ProblemBody(status, name, text))


def missing_api_key() -> Problem:
    """401: no bearer key came with the request."""
    return Problem(
        401,
        "missing_api_key",
        "Missing API key in the authorization header. Send `Authorization: Bearer nm_live_…`.",
        [(b"www-authenticate", b"Bearer")],
    )


def invalid_api_key(message: str = "API key is invalid.") -> Problem:
    """403: the key is unknown, revoked, expired or used from elsewhere."""
    return Problem(403, "invalid_api_key", message)


def restricted_api_key() -> Problem:
    """401: the key may only send."""
    return Problem(401, "restricted_api_key", "This API key is restricted to only send emails and SMS.")


def not_found(noun: str = "Resource") -> Problem:
    """404: nothing there, or nothing that this key may see."""
    return Problem(404, "not_found", f"{noun} not found.")


def invalid(message: str) -> Problem:
    """422: a value is understood and refused."""
    return Problem(422, "validation_error", message)


def missing_field(name: str) -> Problem:
    """422: a needed field is absent."""
    return Problem(422, "missing_required_field", f"Missing `{name}` field.")


def too_large(message: str) -> Problem:
    """413: the body or what it decodes to is over the limit."""
    return Problem(413, "payload_too_large", message)


def unavailable(message: str, *, retry_after_s: int = 2) -> Problem:
    """503: the database is away or the process is full; the same request may be sent again."""
    return Problem(503, "application_error", message, [(b"retry-after", str(retry_after_s).encode())])


DATABASE_AWAY = (
    "The database cannot be reached. It is unknown whether the request was carried out: "
    "repeat it with the same Idempotency-Key."
)
