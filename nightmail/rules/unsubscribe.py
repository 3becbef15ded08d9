"""Links that unsubscribe one recipient of one email: RFC 8058 and the token in them.

The token is the message's id and a keyed hash of it, so that nobody can unsubscribe a stranger and nothing is stored
per message. 128 bits of HMAC-SHA256 are kept: the link must fit into a header line.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from uuid import UUID

# What a mail program posts, and what our own page does (RFC 8058 section 3.2).
FORM_NAME, FORM_VALUE = "List-Unsubscribe", "One-Click"

_HASH_BYTES = 16
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")
_PURPOSE = b"nightmail unsubscribe\n"


def make_token(secret: bytes, message_id: UUID) -> str:
    """Return the token of a message: 43 characters that may stand in a URL."""
    return base64.urlsafe_b64encode(message_id.bytes + _hash(secret, message_id)).rstrip(b"=").decode()


def read_token(secret: bytes, token: str) -> UUID | None:
    """Return the message a token was made for, None when it was not made with this secret."""
    if _TOKEN.fullmatch(token) is None:
        return None
    message_id = UUID(bytes=base64.urlsafe_b64decode(token + "=")[:16])
    # The texts are compared, not the octets: 43 characters hold two bits more, and each link shall have one form.
    return message_id if hmac.compare_digest(token, make_token(secret, message_id)) else None


def unsubscribe_headers(public_url: str, token: str) -> list[tuple[str, str]]:
    """Return the two headers that make mail programs show their own button."""
    return [
        ("List-Unsubscribe", f"<{public_url}/unsubscribe/{token}>"),
        ("List-Unsubscribe-Post", f"{FORM_NAME}={FORM_VALUE}"),
    ]


def _hash(secret: bytes, message_id: UUID) -> bytes:
    return hmac.digest(secret, _PURPOSE + message_id.bytes, hashlib.sha256)[:_HASH_BYTES]
