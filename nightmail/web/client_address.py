"""Whose request this is: the peer, or behind trusted proxies the right-most hop that is not one of them.

Proxies append to X-Forwarded-For, so what stands left of the first untrusted hop is the caller's own claim and is never
believed. Without TRUSTED_PROXIES the header is not read at all. The server in front must not rewrite the peer itself
(uvicorn: `proxy_headers=False`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from starlette.types import Scope

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# ::ffff:0:0/96 holds the IPv4 addresses as a dual-stack socket shows them.
MAPPED = IPv6Network("::ffff:0:0/96")
# No real chain of proxies is longer; a longer header is somebody's experiment.
MAX_HOPS = 32
# The longest form: [v6 with an embedded v4]:port.
MAX_HOP_LENGTH = 64


def parse_address(text: str) -> Address | None:
    """Return the address in `1.2.3.4`, `1.2.3.4:80`, `::1`, `[::1]` or `[::1]:80`, mapped IPv4 as IPv4; else None."""
    text = text.strip(" \t")
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not _is_port(rest)):
            return None
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
        if not _is_port(":" + port):
            return None
    else:
        host = text
    if "%" in host:  # a zone names an interface of the machine that wrote it
        return None
    try:
        address = ip_address(host)
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _is_port(text: str) -> bool:
    return text[0] == ":" and text[1:].isascii() and text[1:].isdigit() and len(text) <= 6


def is_within(address: Address, networks: Iterable[Network]) -> bool:
    """Return whether one of the networks holds the address; mapped networks hold IPv4 addresses."""
    mapped = IPv6Address((0xFFFF << 32) | int(address)) if isinstance(address, IPv4Address) else None
    return any(
        address in network
        or (mapped is not None and isinstance(network, IPv6Network) and network.subnet_of(MAPPED) and mapped in network)
        for network in networks
    )


def client_address(scope: Scope, trusted: Sequence[Network]) -> Address | None:
    """Return the address that made the request; None when there is none, as on a Unix socket.

    A hop that cannot be read ends the search: the proxy that passed it on is then all that is known.
    """
    peer = scope["client"][0] if scope.get("client") else None
    address = parse_address(peer) if peer else None
    if address is None or not trusted or not is_within(address, trusted):
        return address
    forwarded = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
    hops = b",".join(forwarded).split(b",") if forwarded else []
    for hop in list(reversed(hops))[:MAX_HOPS]:
        known = parse_address(hop.decode("latin-1")) if len(hop) <= MAX_HOP_LENGTH else None
        if known is None:
            return address
        address = known
        if not is_within(address, trusted):
            return address
    return address
