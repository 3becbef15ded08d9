"""Which addresses a webhook may never reach: everything that is not plainly part of the public Internet.

The lists are our own. `ipaddress.is_private`, `is_global` and the like differ between Python versions and let through
multicast, shared address space, NAT64 forms of the metadata address and site-local addresses.

Sources: IANA's special-purpose registries (IPv4 and IPv6, as of October 2025), and what clouds put elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

Network = IPv4Network | IPv6Network

_V4 = [
    (IPv4Network(prefix), reason)
    for prefix, reason in (
        ("0.0.0.0/8", "unspecified"),  # Linux connects 0.0.0.0 to this machine
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "shared by a carrier"),  # Alibaba's metadata service is in it
        ("127.0.0.0/8", "loopback"),
        ("168.63.129.16/32", "a cloud's own service"),  # Azure's WireServer, in the middle of public space
        ("169.254.0.0/16", "link-local"),  # the metadata service of most clouds
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "reserved for protocols"),  # Oracle's metadata service is in it
        ("192.0.2.0/24", "for documentation"),
        ("192.31.196.0/24", "reserved for protocols"),
        ("192.52.193.0/24", "reserved for protocols"),
        ("192.88.99.0/24", "a 6to4 relay"),
        ("192.168.0.0/16", "private"),
        ("192.175.48.0/24", "reserved for protocols"),
        ("198.18.0.0/15", "for benchmarks"),
        ("198.51.100.0/24", "for documentation"),
        ("203.0.113.0/24", "for documentation"),
        ("224.0.0.0/4", "multicast"),
        ("255.255.255.255/32", "broadcast"),
        ("240.0.0.0/4", "reserved"),
    )
]
_V6 = [
    (IPv6Network(prefix), reason)
    for prefix, reason in (
        ("::/128", "unspecified"),
        ("::1/128", "loopback"),
        ("100::/64", "discarded"),
        ("100:0:0:1::/64", "discarded"),
        ("2001::/23", "reserved for protocols"),  # benchmarks, ORCHID, AMT, drone ids
        ("2001:db8::/32", "for documentation"),
        ("2620:4f:8000::/48", "reserved for protocols"),
        ("3fff::/20", "for documentation"),
        ("5f00::/16", "for segment routing"),
        ("fc00::/7", "private"),  # the metadata services of AWS and Google by IPv6
        ("fe80::/10", "link-local"),
        ("fec0::/10", "site-local"),
        ("ff00::/8", "multicast"),
    )
]
# All that IANA has given to hosts; the rest is not routed on the Internet, but may be in somebody's network.
_GLOBAL_UNICAST = IPv6Network("2000::/3")

# Forms in which an IPv6 address carries an IPv4 one, and how far the low end of that is from the low end of the whole.
# None is an address that a public receiver has; a gateway would take us to the address inside.
_WRAPPERS = [
    (IPv6Network(prefix), shift, name)
    for prefix, shift, name in (
        ("::ffff:0:0/96", 0, "IPv4-mapped"),
        ("::ffff:0:0:0/96", 0, "IPv4-translated"),
        ("64:ff9b::/96", 0, "NAT64"),
        ("64:ff9b:1::/48", 0, "NAT64"),
        ("2002::/16", 80, "6to4"),
        ("2001::/32", 0, "Teredo"),
        ("::/96", 0, "IPv4-compatible"),
    )
]
_V4_MASK = 0xFFFFFFFF


def refusal(address: str | IPv4Address | IPv6Address, allow: Sequence[Network] = ()) -> str | None:
    """Return why we never connect to the address, in a word or three, or None when we do.

    `allow` is asked about the address as it would be connected to: listing an IPv4 network says nothing of the
    IPv4-mapped form of its addresses. A text that is no address, and an address with a scope, are refused always.
    """
    if isinstance(address, str):
        try:
            address = ip_address(address)
        except ValueError:
            return "unreadable"
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        return "bound to a network interface"
    if any(address in network for network in allow):
        return None
    return _v4_refusal(address) if isinstance(address, IPv4Address) else _v6_refusal(address)


def _v4_refusal(address: IPv4Address) -> str | None:
    return next((reason for network, reason in _V4 if address in network), None)


def _v6_refusal(address: IPv6Address) -> str | None:
    number = int(address)
    if number > 1:  # :: and ::1 look IPv4-compatible, and are not
        for network, shift, name in _WRAPPERS:
            if address in network:
                inside = number >> shift & _V4_MASK
                if name == "Teredo":
                    inside ^= _V4_MASK  # RFC 4380 stores the client's address inverted
                reason = _v4_refusal(IPv4Address(inside))
                return f"{reason} ({name})" if reason else name
    for network, reason in _V6:
        if address in network:
            return reason
    return None if address in _GLOBAL_UNICAST else "not public"
