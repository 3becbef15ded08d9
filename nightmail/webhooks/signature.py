"""Standard Webhooks signatures, in both header families.

Signed is `id.timestamp.body` with HMAC-SHA256; the key is what `whsec_` is followed by, decoded from base64. Svix's
libraries read `svix-*` and fall back to `webhook-*`, so both are sent with equal values. During a rotation the header
holds two signatures, parted by exactly one space: verifiers refuse any other.
"""

from __future__ import annotations

import base64
import hmac
import secrets
from collections.abc import Sequence
from functools import lru_cache

SECRET_PREFIX = "whsec_"  # noqa: S105 - a public prefix
SECRET_BYTES = 32


def new_secret() -> str:
    """Return a fresh signing secret."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def sign(secret: str, *, webhook_id: str, timestamp: int, body: bytes) -> str:
    """Return `v1,<base64>` for one secret."""
    signed = f"{webhook_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(_key(secret), signed, "sha256")).decode()


@lru_cache(maxsize=1024)
def _key(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix(SECRET_PREFIX))


def signature_headers(secrets_now: Sequence[str], *, webhook_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """Return the headers of one attempt, signed with every secret that holds now.

    `timestamp` is the attempt's, in seconds: verifiers allow five minutes either way.
    """
    signature = " ".join(sign(secret, webhook_id=webhook_id, timestamp=timestamp, body=body) for secret in secrets_now)
    values = {"id": webhook_id, "timestamp": str(timestamp), "signature": signature}
    return {f"{family}-{name}": value for family in ("webhook", "svix") for name, value in values.items()}
