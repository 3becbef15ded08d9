"""Addresses we never connect to: both ends of every range, what lies beside it, and IPv4 inside IPv6."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_network

import pytest

from nightmail.rules.networks import refusal

# First and last address of each range, from IANA's registries rather than from the module's prefixes.
RANGES = """
0.0.0.0 0.255.255.255
10.0.0.0 10.255.255.255
100.64.0.0 100.127.255.255
127.0.0.0 127.255.255.255
168.63.129.16 168.63.129.16
169.254.0.0 169.254.255.255
172.16.0.0 172.31.255.255
192.0.0.0 192.0.0.255
192.0.2.0 192.0.2.255
192.31.196.0 192.31.196.255
192.52.193.0 192.52.193.255
192.88.99.0 192.88.99.255
192.168.0.0 192.168.255.255
192.175.48.0 192.175.48.255
198.18.0.0 198.19.255.255
198.51.100.0 198.51.100.255
203.0.113.0 203.0.113.255
224.0.0.0 255.255.255.255
:: 1fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff
2001:: 2001:1ff:ffff:ffff:ffff:ffff:ffff:ffff
2001:db8:: 2001:db8:ffff:ffff:ffff:ffff:ffff:ffff
2002:: 2002:ffff:ffff:ffff:ffff:ffff:ffff:ffff
2620:4f:8000:: 2620:4f:8000:ffff:ffff:ffff:ffff:ffff
3fff:: 3fff:fff:ffff:ffff:ffff:ffff:ffff:ffff
4000:: ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff
"""
ENDS = [line.split() for line in RANGES.strip().splitlines()]


@pytest.mark.parametrize(("first", "last"), ENDS)
def test_both_ends_of_a_range_are_refused_and_its_neighbours_are_not(first: str, last: str) -> None:
    kind: type[IPv4Address] | type[IPv6Address] = IPv6Address if ":" in first else IPv4Address
    low, high = int(kind(first)), int(kind(last))
    assert refusal(first)
    assert refusal(last)
    assert refusal(kind((low + high) // 2))
    starts = {int(kind(other)) for other, _ in ENDS if (":" in other) == (":" in first)}
    ends = {int(kind(other)) for _, other in ENDS if (":" in other) == (":" in first)}
    if low > 0 and low - 1 not in ends:
        assert refusal(kind(low - 1)) is None
    if high + 1 < 2 ** kind(0).max_prefixlen and high + 1 not in starts:
        assert refusal(kind(high + 1)) is None


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "2a00:1450::1"])
def test_public_addresses_are_not_refused(address: str) -> None:
    assert refusal(address) is None


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1", "loopback"),
        ("169.254.169.254", "link-local"),
        ("10.1.2.3", "private"),
        ("239.1.1.1", "multicast"),
        ("255.255.255.255", "broadcast"),
        ("0.0.0.0", "unspecified"),
        ("::", "unspecified"),
        ("::1", "loopback"),
        ("fd00:ec2::254", "private"),
        ("fe80::1", "link-local"),
        ("fec0::1", "site-local"),
        ("ff02::1", "multicast"),
        ("4000::1", "not public"),
        # IPv4 inside: what is inside is named, and the form alone is enough to refuse
        ("::ffff:127.0.0.1", "loopback (IPv4-mapped)"),
        ("::ffff:8.8.8.8", "IPv4-mapped"),
        ("::ffff:0:10.0.0.1", "private (IPv4-translated)"),
        ("::127.0.0.1", "loopback (IPv4-compatible)"),
        ("::8.8.8.8", "IPv4-compatible"),
        ("64:ff9b::a9fe:a9fe", "link-local (NAT64)"),
        ("64:ff9b::8.8.8.8", "NAT64"),
        ("64:ff9b:1::10.0.0.1", "private (NAT64)"),
        ("2002:7f00:1::", "loopback (6to4)"),
        ("2002:808:808::1", "6to4"),
        ("2001:0:4136:e378:8000:63bf:f5ff:fffe", "private (Teredo)"),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", "for documentation (Teredo)"),
    ],
)
def test_reasons(address: str, reason: str) -> None:
    assert refusal(address) == reason


@pytest.mark.parametrize(
    "text", ["", "localhost", "127.1", "2130706433", "0x7f.1", "0177.0.0.1", "1.2.3.4 ", "[::1]", "①.1.1.1"]
)
def test_what_is_no_address_is_refused_even_when_everything_is_allowed(text: str) -> None:
    assert refusal(text, [ip_network("0.0.0.0/0"), ip_network("::/0")]) == "unreadable"


def test_an_allowed_network_counts_for_the_address_as_written_only() -> None:
    allow = [ip_network("127.0.0.0/8"), ip_network("fd00::/8")]
    assert refusal("127.0.0.1", allow) is None
    assert refusal("fd12::1", allow) is None
    assert refusal("10.0.0.1", allow) == "private"
    assert refusal("fc00::1", allow) == "private"
    assert refusal("::ffff:127.0.0.1", allow) == "loopback (IPv4-mapped)"
    assert refusal("::ffff:127.0.0.1", [*allow, ip_network("::ffff:127.0.0.0/104")]) is None


def test_an_address_of_one_interface_is_refused_even_when_allowed() -> None:
    assert refusal("fe80::1%eth0", [ip_network("fe80::/10")]) == "bound to a network interface"
    assert refusal("2606:4700::1%1") == "bound to a network interface"
