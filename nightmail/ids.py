"""Public ids (UUIDv7, so that they sort by time) and secrets with a prefix."""

from __future__ import annotations

import hashlib
import secrets
from uuid import UUID, uuid4

from uuid_utils.compat import uuid7

__all__ = ["UUID", "new_api_key", "new_claim_id", "new_id", "sha256"]


def new_id() -> UUID:
    """Return a fresh UUIDv7."""
    return uuid7()


def new_claim_id() -> UUID:
    """Return a random fencing token; never a counter, which an asynchronous failover could repeat."""
    return uuid4()


def new_api_key(env: str) -> str:
    """Return `nm_<env>_` and 43 characters that hold 32 random bytes."""
    return f"nm_{env}_{secrets.token_urlsafe(32)}"


def sha256(text: str) -> bytes:
    """Return the SHA-256 of the UTF-8 text; lone surrogates are hashed, not refused."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
