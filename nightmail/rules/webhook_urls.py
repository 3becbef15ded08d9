"""Webhook URLs: one strict spelling, so that every reader of a URL understands the same by it.

What the host leads to is not decided here: names change what they resolve to, so the address is judged each time a
connection is made (rules.networks). Spellings that resolvers and parsers read differently are refused outright.
"""

from __future__ import annotations

import re
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from urllib.parse import quote

import idna

MAX_LENGTH = 2048
MIN_UNPRIVILEGED_PORT = 1024

_URL = re.compile(r"(https?)://([^/?#]*)([^#]*)(#.*)?", re.IGNORECASE)
_AUTHORITY = re.compile(r"(\[[^\]]*\]|[^:\[\]]*)(:.*)?")
_PORT = re.compile(r":([1-9][0-9]{0,4})")
# Underscores are no part of host names, but of what Docker and others let people call their services.
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
# A host whose last label is a number is an IPv4 address to resolvers and browsers, however it is spelled.
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_KEPT = "/?:@!$&'()*+,;=~-._%[]"


def check_webhook_url(text: str, *, allow_http: bool) -> str:
    """Return the URL in canonical form: host lower-case ASCII, no default port, everything else percent-encoded.

    Raises ValueError, in words for the caller.
    """
    if not text or len(text) > MAX_LENGTH:
        raise ValueError(f"must be a URL of at most {MAX_LENGTH} characters, such as https://example.com/hooks")
    if not text.isprintable() or " " in text or "\\" in text:
        raise ValueError("must not contain spaces, line ends, control characters or backslashes")
    found = _URL.fullmatch(text)
    if found is None:
        raise ValueError("must be an absolute URL such as https://example.com/hooks")
    scheme, authority, rest, fragment = found[1].lower(), found[2], found[3], found[4]
    if scheme == "http" and not allow_http:
        raise ValueError("must begin with https://")
    if "@" in authority:
        raise ValueError("must not contain a user name or password: a secret in the path or query works as well")
    if fragment is not None:
        raise ValueError("must not contain a fragment: nothing after # is ever sent")
    parts = _AUTHORITY.fullmatch(authority)
    if parts is None:
        raise ValueError("must have a host name or address, and at most one port, after //")
    url = f"{scheme}://{_check_host(parts[1])}{_check_port(parts[2], scheme)}{_check_rest(rest)}"
    if len(url) > MAX_LENGTH:
        raise ValueError(f"must have at most {MAX_LENGTH} characters once non-ASCII characters are percent-encoded")
    return url


def mask_url(url: str) -> str:
    """Return the URL as lists and logs show it: `…` for the query, and for a user name and password.

    These are where receivers keep secrets that their readers would not look for; a path is needed to tell URLs apart.
    """
    start, question, _ = url.partition("?")
    scheme, slashes, rest = start.partition("://")
    authority, slash, path = rest.partition("/")
    _, at, host = authority.rpartition("@")
    user = "…@" if at else ""
    return f"{scheme}{slashes}{user}{host}{slash}{path}{'?…' if question else ''}"


def _check_host(host: str) -> str:
    if not host:
        raise ValueError("must have a host name after //")
    if host.startswith("["):
        return f"[{_check_v6(host[1:-1])}]"
    if "%" in host:
        raise ValueError("must not have percent-encoding in the host name")
    name = host.lower()
    if not name.isascii() or "xn--" in name:
        try:
            name = idna.encode(name, uts46=True).decode("ascii")
        except (idna.IDNAError, UnicodeError):
            raise ValueError("has a host name that is not valid in IDNA") from None
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]) or (not labels[-1] and len(labels) > 1 and _NUMBER.fullmatch(labels[-2])):
        # Resolvers read 127.1, 0x7f.1, 2130706433 and 0177.0.0.1 as one address, and not all read the same one.
        if name != host:
            raise ValueError("must have an IPv4 address in plain digits, such as 192.0.2.1")
        return _check_v4(name)
    if not labels[-1]:
        raise ValueError("must not have a dot at the end of the host name")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("must have a host name of letters, digits and hyphens, separated by dots")
    return name


def _check_v4(host: str) -> str:
    try:
        return str(IPv4Address(host))
    except AddressValueError:
        raise ValueError("must have an IPv4 address as four decimal numbers, such as 192.0.2.1") from None


def _check_v6(host: str) -> str:
    if "%" in host:
        raise ValueError("must not have a scope (%) in an IPv6 address")
    try:
        return str(IPv6Address(host))
    except AddressValueError:
        raise ValueError("must have an IPv6 address such as [2001:db8::1] between brackets") from None


def _check_port(text: str | None, scheme: str) -> str:
    if text is None:
        return ""
    found = _PORT.fullmatch(text)
    port = int(found[1]) if found else 0
    if port not in (80, 443) and not MIN_UNPRIVILEGED_PORT <= port <= 65535:
        raise ValueError(f"must have port 80, 443, or one from {MIN_UNPRIVILEGED_PORT} to 65535")
    return "" if port == {"http": 80, "https": 443}[scheme] else f":{port}"


def _check_rest(rest: str) -> str:
    if _BAD_PERCENT.search(rest):
        raise ValueError("must have two hexadecimal digits after each %")
    path = rest if rest.startswith("/") else "/" + rest
    return quote(path, safe=_KEPT)
