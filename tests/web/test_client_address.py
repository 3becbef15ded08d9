"""Whose request it is."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest

from nightmail.web.client_address import client_address, is_within, parse_address

PROXIES = tuple(ip_network(text) for text in ("10.0.0.0/8", "fd00::/8", "127.0.0.1"))


def scope(peer: str | None, *forwarded: str) -> dict[str, Any]:
    headers = [(b"x-forwarded-for", value.encode("latin-1")) for value in forwarded]
    return {"client": (peer, 1) if peer else None, "headers": [(b"host", b"x"), *headers]}


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("203.0.113.9", [], "203.0.113.9"),
        ("203.0.113.9", ["198.51.100.1"], "203.0.113.9"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["1.1.1.1, 198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["1.1.1.1, 198.51.100.1, 10.9.9.9"], "198.51.100.1"),
        ("10.0.0.1", ["1.1.1.1", "198.51.100.1", "10.9.9.9"], "198.51.100.1"),
        ("10.0.0.1", ["198.51.100.1:4711"], "198.51.100.1"),
        ("10.0.0.1", ["[2001:db8::7]:4711"], "2001:db8::7"),
        ("10.0.0.1", ["[2001:db8::7]"], "2001:db8::7"),
        ("10.0.0.1", ["2001:db8::7"], "2001:db8::7"),
        ("fd00::1", ["::ffff:198.51.100.1"], "198.51.100.1"),
        ("::ffff:10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["198.51.100.1, nonsense"], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1, "], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1, nonsense, 10.2.2.2"], "10.2.2.2"),
        ("10.0.0.1", ["198.51.100.1, " + "9" * 5000], "10.0.0.1"),
        ("10.0.0.1", ["10.1.1.1, 10.2.2.2"], "10.1.1.1"),
        ("10.0.0.1", ["\xff\xfe\x00"], "10.0.0.1"),
        ("10.0.0.1", ["fe80::1%eth0"], "10.0.0.1"),
        ("10.0.0.1", ['"198.51.100.1"'], "10.0.0.1"),
        (None, ["198.51.100.1"], None),
    ],
)
def test_the_right_most_untrusted_hop_is_the_client(peer: str | None, forwarded: list[str], client: str | None) -> None:
    found = client_address(scope(peer, *forwarded), PROXIES)
    assert (str(found) if found else None) == client


def test_nobody_is_trusted_by_default() -> None:
    assert str(client_address(scope("127.0.0.1", "198.51.100.1"), ())) == "127.0.0.1"


def test_networks_of_both_families_and_mapped_ones() -> None:
    v4, v6 = parse_address("198.51.100.1"), parse_address("2001:db8::1")
    assert v4 is not None
    assert v6 is not None
    assert is_within(v4, [ip_network("198.51.100.0/24")])
    assert is_within(v4, [ip_network("::ffff:198.51.100.0/120")])
    assert not is_within(v4, [ip_network("::/0"), ip_network("198.51.101.0/24")])
    assert is_within(v6, [ip_network("2001:db8::/32")])
    assert not is_within(v6, [ip_network("0.0.0.0/0")])


@pytest.mark.parametrize("text", ["", "[", "[]", "[::1", "[::1]x", "[::1]:", "[::1]:x", "1.2.3.4:x", "1.2.3", "::1:g"])
def test_what_is_no_address_is_none(text: str) -> None:
    assert parse_address(text) is None
