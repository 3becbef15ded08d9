"""Webhook URLs: one canonical spelling, and words for each that is refused."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from nightmail.rules.webhook_urls import MAX_LENGTH, check_webhook_url, mask_url


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("https://example.com", "https://example.com/"),
        ("HTTPS://Example.COM:443/Hooks", "https://example.com/Hooks"),
        ("https://example.com:8443", "https://example.com:8443/"),
        ("https://example.com:80/", "https://example.com:80/"),
        ("https://example.com?a=1", "https://example.com/?a=1"),
        ("https://bücher.example/ä?ö=ü", "https://xn--bcher-kva.example/%C3%A4?%C3%B6=%C3%BC"),
        ("https://BÜCHER.example/", "https://xn--bcher-kva.example/"),
        ("https://ⓔxample.com/", "https://example.com/"),
        ("https://XN--BCHER-KVA.example/", "https://xn--bcher-kva.example/"),
        # a signed query stays as it is, byte for byte
        (
            "https://example.com/a%2Fb/../c?sp=%2Ftriggers&sig=A%2Bb%3d~",
            "https://example.com/a%2Fb/../c?sp=%2Ftriggers&sig=A%2Bb%3d~",
        ),
        ('https://example.com/a|b{c}"<>^`', "https://example.com/a%7Cb%7Bc%7D%22%3C%3E%5E%60"),
        ("https://my_service:8080/", "https://my_service:8080/"),
        ("https://192.0.2.1/", "https://192.0.2.1/"),
        ("https://127.0.0.1:3000/", "https://127.0.0.1:3000/"),
        ("https://[2001:DB8:0::1]:8443/", "https://[2001:db8::1]:8443/"),
        ("https://1e100.example/", "https://1e100.example/"),
    ],
)
def test_canonical_form(text: str, canonical: str) -> None:
    assert check_webhook_url(text, allow_http=False) == canonical
    assert check_webhook_url(canonical, allow_http=False) == canonical


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must be a URL"),
        ("https://example.com/" + "a" * MAX_LENGTH, "at most 2048 characters"),
        ("https://example.com/" + "ä" * 1000, "once non-ASCII characters are percent-encoded"),
        ("example.com/hooks", "absolute URL"),
        ("//example.com/hooks", "absolute URL"),
        ("https:example.com", "absolute URL"),
        ("https:/example.com", "absolute URL"),
        ("ftp://example.com/", "absolute URL"),
        ("gopher://127.0.0.1:6379/_x", "absolute URL"),
        ("file:///etc/passwd", "absolute URL"),
        ("javascript:alert(1)", "absolute URL"),
        ("http://example.com/", "must begin with https://"),
        ("https://", "host name"),
        ("https:///hooks", "host name"),
        ("https://:443/", "host name"),
        ("https://user@example.com/", "user name or password"),
        ("https://user:word@example.com/", "user name or password"),
        ("https://example.com@127.0.0.1/", "user name or password"),
        ("https://example.com:443@127.0.0.1/", "user name or password"),
        ("https://example.com/#top", "fragment"),
        ("https://example.com#@127.0.0.1/", "fragment"),
        (" https://example.com/", "spaces"),
        ("https://example.com/ ", "spaces"),
        ("https://example.com/a b", "spaces"),
        ("https://example.com/\r\nHost: evil.test", "line ends"),
        ("https://example.com/\x00", "control characters"),
        ("https://exam\tple.com/", "control characters"),
        ("https://example.com/\x7f", "control characters"),
        ("https://example.com/\u2028", "control characters"),
        ("https://exam\u200bple.com/", "control characters"),
        ("https://example.com\\@127.0.0.1/", "backslashes"),
        ("https:\\\\example.com\\", "backslashes"),
        ("https://example.com/\ud800", "control characters"),
        ("https://example.com:/", "port"),
        ("https://example.com:0/", "port"),
        ("https://example.com:22/", "port"),
        ("https://example.com:1023/", "port"),
        ("https://example.com:65536/", "port"),
        ("https://example.com:0443/", "port"),
        ("https://example.com:+443/", "port"),
        ("https://example.com:٤٤٣/", "port"),
        ("https://example.com:443:443/", "port"),
        ("https://example.com./", "dot at the end"),
        ("https://example.com../", "dot at the end"),
        ("https://localhost./", "dot at the end"),
        ("https://.example.com/", "letters, digits and hyphens"),
        ("https://exam..ple.com/", "letters, digits and hyphens"),
        ("https://-example.com/", "letters, digits and hyphens"),
        ("https://example.com-/", "letters, digits and hyphens"),
        ("https://" + "a" * 64 + ".example/", "letters, digits and hyphens"),
        ("https://" + "a." * 126 + "toolong/", "letters, digits and hyphens"),
        ("https://exam!ple.com/", "letters, digits and hyphens"),
        ("https://127.0.0.1%2f.example.com/", "percent-encoding"),
        ("https://%31%32%37.0.0.1/", "percent-encoding"),
        ("https://xn--a/", "IDNA"),
        ("https://\u0640\u0640.example/", "IDNA"),
        ("https://example.com/%zz", "two hexadecimal digits"),
        ("https://example.com/100%", "two hexadecimal digits"),
        ("https://127.1/", "four decimal numbers"),
        ("https://127.0.1/", "four decimal numbers"),
        ("https://2130706433/", "four decimal numbers"),
        ("https://0x7f.1/", "four decimal numbers"),
        ("https://0x7f000001/", "four decimal numbers"),
        ("https://0x7f.0.0.0x1/", "four decimal numbers"),
        ("https://0177.0.0.1/", "four decimal numbers"),
        ("https://017700000001/", "four decimal numbers"),
        ("https://127.0.0.01/", "four decimal numbers"),
        ("https://256.0.0.1/", "four decimal numbers"),
        ("https://1.2.3.4.5/", "four decimal numbers"),
        ("https://127.0.0.1./", "four decimal numbers"),
        ("https://evil.test.0x7f/", "four decimal numbers"),
        ("https://0X7F.1/", "plain digits"),
        ("https://①②⑦.⓪.⓪.①/", "plain digits"),
        ("https://１２７.０.０.１/", "plain digits"),
        ("https://127。0。0。1/", "plain digits"),
        ("https://[::1/", "host name or address"),
        ("https://::1/", "host name"),
        ("https://[::1]a/", "host name or address"),
        ("https://[]/", "IPv6 address"),
        ("https://[1.2.3.4]/", "IPv6 address"),
        ("https://[::g]/", "IPv6 address"),
        ("https://[v1.a]/", "IPv6 address"),
        ("https://[fe80::1%25eth0]/", "scope"),
        ("https://[fe80::1%eth0]/", "scope"),
    ],
)
def test_refused_with_words(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"^(must|has) ") as raised:
        check_webhook_url(text, allow_http=False)
    assert words in str(raised.value)


def test_http_where_it_is_allowed() -> None:
    assert check_webhook_url("http://localhost:3000/a", allow_http=True) == "http://localhost:3000/a"
    assert check_webhook_url("http://example.com:80/", allow_http=True) == "http://example.com/"


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("https://example.com/hooks?token=SECRET&a=://b/?", "https://example.com/hooks?…"),
        ("https://example.com/hooks", "https://example.com/hooks"),
        ("https://example.com/?", "https://example.com/?…"),
        ("https://SECRET:SECRET@example.com:8443/a@b", "https://…@example.com:8443/a@b"),
        ("https://SECRET@SECRET@example.com?SECRET@x", "https://…@example.com?…"),
        ("SECRETless", "SECRETless"),
        ("", ""),
    ],
)
def test_lists_and_logs_show_no_query_and_no_password(url: str, masked: str) -> None:
    assert mask_url(url) == masked


_PIECES = st.sampled_from(
    [
        *(
            "http",
            "https",
            ":",
            "//",
            "/",
            "@",
            "[",
            "]",
            ".",
            "..",
            "%",
            "%41",
            "?",
            "#",
            "\\",
            " ",
            "\t",
            "\r\n",
            "\x00",
        ),
        *("127.0.0.1", "0x7f", "::1", "localhost", "example.com", "xn--", "xn--bcher-kva", "①", "。", "ß", "\u200d"),
        *("80", ":443", ":8080", "user", "-", "_", "ä", "٣", "١٢٧", "א", "a" * 63, "\u0301", "😀", "\ud800"),
    ]
)


@settings(max_examples=1500, deadline=None)
@given(
    st.one_of(
        st.text(), st.lists(_PIECES).map("".join), st.lists(_PIECES).map(lambda parts: "https://" + "".join(parts))
    )
)
def test_whatever_is_asked_every_reader_of_the_answer_sees_the_same_host(text: str) -> None:
    try:
        url = check_webhook_url(text, allow_http=True)
    except ValueError:
        return
    assert url.isascii()
    assert url.isprintable()
    assert check_webhook_url(url, allow_http=True) == url
    ours, theirs = urlsplit(url), URL(url, encoded=True)
    assert ours.hostname == theirs.raw_host
    assert (ours.port or {"http": 80, "https": 443}[ours.scheme]) == theirs.port
    assert ours.hostname
    assert (ours.username, ours.password, ours.fragment, theirs.user, theirs.fragment) == (None, None, "", None, "")
    if ours.hostname.rpartition(".")[2].isdigit() or ":" in ours.hostname:
        assert str(ip_address(ours.hostname)) == ours.hostname
