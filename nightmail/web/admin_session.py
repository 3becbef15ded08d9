"""The operator's session in a browser: a signed cookie, and no request from elsewhere.

The cookie holds its end and an HMAC keyed by ADMIN_TOKEN, so that every process accepts it, none stores it, and a new
token ends all sessions. SameSite=Strict keeps it off requests that other sites start; besides, what changes something
must come from a page of ours (Sec-Fetch-Site, else Origin), which also holds where no token is needed.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from pydantic import SecretStr

from nightmail.web.auth import check_open
from nightmail.web.problems import Problem
from nightmail.web.services import Services

COOKIE = "nightmail_admin"
LIFE_S = 12 * 3600
# Wrong tokens from one address within a minute; a right one is always taken.
FAILURES_MAX = 10


def check_session(services: Services, headers: Mapping[bytes, bytes]) -> bool:
    """Return whether the caller is the operator. Raises Problem 503 while no ADMIN_TOKEN is set and none may miss."""
    token = services.settings.admin_token
    if token is None:
        check_open(services, headers)
        return True
    return is_valid(token, _cookie_of(headers))


def check_token(services: Services, text: str) -> bool:
    """Return whether the text is the ADMIN_TOKEN, in a time that does not depend on it."""
    token = services.settings.admin_token
    if token is None:
        return False
    given, expected = (hashlib.sha256(t.encode("utf-8", "replace")).digest() for t in (text, token.get_secret_value()))
    return hmac.compare_digest(given, expected)


def sign(token: SecretStr, *, ends_at: int, nonce: str) -> str:
    """Return the value of a session cookie."""
    key = hashlib.sha256(b"nightmail dashboard session:" + token.get_secret_value().encode()).digest()
    signature = hmac.new(key, f"{ends_at}.{nonce}".encode(), hashlib.sha256).hexdigest()
    return f"{ends_at}.{nonce}.{signature}"


def is_valid(token: SecretStr, value: str) -> bool:
    """Return whether a cookie was signed with this token and has not ended."""
    end, _, rest = value.partition(".")
    nonce = rest.partition(".")[0]
    if not (end.isascii() and end.isdigit() and len(end) < 12 and value.isascii()):
        return False
    expected = sign(token, ends_at=int(end), nonce=nonce)
    return hmac.compare_digest(value.encode(), expected.encode()) and time.time() < int(end)


def new_cookie(services: Services, headers: Mapping[bytes, bytes], scheme: str) -> str:
    """Return the Set-Cookie header of a fresh session."""
    token = services.settings.admin_token
    assert token is not None, "without a token there is no session"
    value = sign(token, ends_at=int(time.time()) + LIFE_S, nonce=secrets.token_urlsafe(12))
    return _set_cookie(value, LIFE_S, is_secure=_is_https(services, headers, scheme))


def end_cookie(services: Services, headers: Mapping[bytes, bytes], scheme: str) -> str:
    """Return the Set-Cookie header that ends the session in this browser."""
    return _set_cookie("", 0, is_secure=_is_https(services, headers, scheme))


def refuse_foreign(headers: Mapping[bytes, bytes]) -> None:
    """Let requests pass that a page of ours started. Raises Problem 403."""
    site = headers.get(b"sec-fetch-site")
    if site is not None:
        is_ours = site == b"same-origin"
    else:
        # Browsers leave Sec-Fetch-Site out on plain http beyond this machine, but always name the origin of a POST.
        origin = urlsplit(headers.get(b"origin", b"").decode("latin-1"))
        is_ours = bool(origin.netloc) and origin.netloc.lower() == headers.get(b"host", b"").decode("latin-1").lower()
    if not is_ours:
        raise Problem(403, "forbidden", "This request did not come from a page of this dashboard, so nothing was done.")


def _cookie_of(headers: Mapping[bytes, bytes]) -> str:
    try:
        found = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found is not None else ""


def _set_cookie(value: str, life_s: int, *, is_secure: bool) -> str:
    secure = "; Secure" if is_secure else ""
    return f"{COOKIE}={value}; Path=/dashboard; Max-Age={life_s}; HttpOnly; SameSite=Strict{secure}"


def _is_https(services: Services, headers: Mapping[bytes, bytes], scheme: str) -> bool:
    """Return whether the browser talks https to us, perhaps through a proxy that ends TLS for PUBLIC_URL."""
    public = urlsplit(services.settings.public_url or "")
    is_public = public.netloc.lower() == headers.get(b"host", b"").decode("latin-1").lower()
    return scheme == "https" or (public.scheme == "https" and is_public)
