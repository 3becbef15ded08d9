"""No webhook reaches an address that is not public, however it is spelled and whatever its name means by then.

Each case goes the way of a real endpoint: the URL is checked, and if it passes, posted to by the real sender, whose
look-ups are ours. Listeners on loopback count connections. Public addresses are judged at the guard, not dialled.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from ipaddress import ip_network

import pytest

from nightmail.errors import Permanent
from nightmail.fakes.webhook_receiver import Receiver
from nightmail.ports import WebhookReply
from nightmail.providers.guarded_http import Guard
from nightmail.providers.webhook_http import HttpWebhookSender
from nightmail.rules.webhook_urls import check_webhook_url

pytestmark = pytest.mark.anyio


def _listed(text: str) -> list[str]:
    return text.split()


# Addresses as a URL or a resolver may give them: first and last of each range, and well-known ones between.
V4 = _listed("""
0.0.0.0 0.0.0.1 0.255.255.255 10.0.0.0 10.0.0.1 10.255.255.255 100.64.0.0 100.100.100.200 100.127.255.255
127.0.0.0 127.0.0.1 127.0.0.2 127.127.127.127 127.255.255.255 168.63.129.16 169.254.0.0 169.254.169.254
169.254.170.2 169.254.255.255 172.16.0.0 172.17.0.1 172.31.255.255 192.0.0.0 192.0.0.1 192.0.0.192 192.0.0.255
192.0.2.0 192.0.2.255 192.31.196.1 192.52.193.1 192.88.99.0 192.88.99.1 192.88.99.255 192.168.0.0 192.168.1.1
192.168.255.255 192.175.48.1 198.18.0.0 198.18.0.1 198.19.255.255 198.51.100.0 198.51.100.255 203.0.113.0
203.0.113.255 224.0.0.0 224.0.0.1 239.255.255.255 240.0.0.0 255.255.255.254 255.255.255.255
""")
V6 = _listed("""
:: ::1 ::2 0:0:0:0:0:0:0:1 0000:0000:0000:0000:0000:0000:0000:0001 ::127.0.0.1 ::7f00:1 ::169.254.169.254 ::8.8.8.8
::ffff:127.0.0.1 ::ffff:7f00:1 ::FFFF:7F00:0001 0:0:0:0:0:ffff:127.0.0.1 ::ffff:0.0.0.0 ::ffff:10.0.0.1
::ffff:169.254.169.254 ::ffff:8.8.8.8 ::ffff:0:127.0.0.1 64:ff9b::127.0.0.1 64:ff9b::a9fe:a9fe 64:ff9b::8.8.8.8
64:ff9b:1::127.0.0.1 64:ff9b:1:ffff::a9fe:a9fe 100:: 100::1 100:0:0:1::1 200::1 400::1 2001:: 2001:0:7f00:1::80ff:fffe
2001:2::1 2001:3::1 2001:10::1 2001:20::1 2001:1ff:ffff:ffff:ffff:ffff:ffff:ffff 2001:db8:: 2001:db8::1
2002:7f00:1:: 2002:7f00:1::1 2002:a9fe:a9fe::1 2002:a00:1::1 2002:808:808::1 2620:4f:8000::1 3fff::1 4000::1 5f00::1
fc00:: fc00::1 fd00::1 fd00:ec2::254 fd20:ce::254 fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff fe00::1 fe80:: fe80::1
fe80::a9fe:a9fe febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff fec0:: fec0::1 ff00:: ff02::1 ff0e::1
ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff
""")

# Hosts that some parser or resolver takes for loopback, a private network or a metadata service.
SPELLINGS = _listed("""
127.1 127.0.1 127.0.0.01 0127.0.0.1 0177.0.0.1 00177.0.0.01 0177.0.1 017700000001 0x7f.0.0.1 0x7f.0x0.0x0.0x1 0x7f.1
0X7F.0.0.1 0x7f000001 0x7F000001 2130706433 02130706433 127.0.0.1. 127.0.0.1.. 127.1. 2130706433. 0 00 0x0 0. 0.0
4294967295 2852039166 0xa9fea9fe 025177524776 169.16689662 167772161 3232235777 127.0.0.256 127.0.0.-1 127.0.0
①②⑦.⓪.⓪.① ⑯⑨.②⑤④.⑯⑨.②⑤④ １２７.０.０.１ 127。0。0。1 127．0．0．1 ⓛocalhost. ٠.٠.٠.٠
%31%32%37.0.0.1 127.0.0.1%00.example.com 127.0.0.1%20 localhost. LOCALHOST. [::1%25lo] [::1%lo] [::ffff:127.1]
[::127.0.0.1.] [::] [0:0:0:0:0:0:0:0] [::0001] [[::1]] [::1 ::1] user@127.0.0.1 example.com@127.0.0.1
example.com:80@127.0.0.1 example.com#@127.0.0.1 127.0.0.1#.example.com example.com\\@127.0.0.1
127.0.0.1\\.example.com
""")

# Names, and what our resolver says they mean.
NAMES: dict[str, list[str]] = {
    "localhost": ["127.0.0.1"],
    "ip6-localhost": ["::1"],
    "metadata.google.internal": ["169.254.169.254"],
    "127.0.0.1.nip.example": ["127.0.0.1"],
    "private.example": ["10.0.0.5"],
    "carrier.example": ["100.64.0.1"],
    "v6.example": ["::1"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "mapped-public.example": ["::ffff:93.184.216.34"],
    "nat64.example": ["64:ff9b::7f00:1"],
    "scoped.example": ["fe80::1%lo"],
    "unspecified.example": ["0.0.0.0"],
    "public-and-private.example": ["93.184.216.34", "10.0.0.1"],
    "private-and-public.example": ["127.0.0.1", "93.184.216.34"],
    "both-families.example": ["2606:4700:4700::1111", "93.184.216.34", "::1"],
    "many.example": [*(f"93.184.216.{n}" for n in range(40)), "127.0.0.1"],
    "spelled.example": ["0x7f.1"],
    "words.example": ["localhost"],
    "bücher.example": ["127.0.0.1"],
    "ⓛocalhost": ["127.0.0.1"],
    "LOCALHOST": ["127.0.0.1"],
}
KNOWN = {**NAMES, "xn--bcher-kva.example": ["127.0.0.1"]}

HOSTS = [*V4, *(f"[{address}]" for address in V6), *SPELLINGS, *NAMES]
# These pass the check of the URL with another port or none: the listeners are out of reach, the guard is not.
WHOLE_URLS = [
    "http://127.0.0.1",
    "http://127.0.0.1:80/",
    "http://127.0.0.1:6379/",
    "http://127.0.0.1:22/",
    "http://169.254.169.254/latest/meta-data/iam/security-credentials/",
    "http://[fd00:ec2::254]/latest/meta-data/",
    "http://metadata.google.internal/computeMetadata/v1/",
    "gopher://127.0.0.1:6379/_FLUSHALL",
    "file:///etc/passwd",
    "ws://127.0.0.1/",
    "tcp://127.0.0.1/",
    "//127.0.0.1/",
    "http:127.0.0.1",
    "http:/127.0.0.1/",
    "http:///127.0.0.1/",
    "http://127.0.0.1:80\r\nHost: example.com/",
    "http://\t127.0.0.1/",
    " http://127.0.0.1/",
]


async def say(host: str) -> Sequence[str]:
    """Look a name up in KNOWN, as aiohttp asks for it; a literal that comes here at all means itself."""
    return KNOWN.get(host, [host])


class Listeners:
    """Listeners on both families with one port, which count connections."""

    def __init__(self) -> None:
        self.connections = 0
        self.port = 0
        self._servers: list[asyncio.Server] = []

    async def start(self) -> None:
        """Listen on every address of this machine."""
        v4 = socket.create_server(("0.0.0.0", 0))
        self.port = v4.getsockname()[1]
        v6 = socket.create_server(("::", self.port), family=socket.AF_INET6)
        self._servers = [await asyncio.start_server(self._count, sock=sock) for sock in (v4, v6)]

    async def stop(self) -> None:
        """End."""
        for server in self._servers:
            server.close()
            await server.wait_closed()

    async def _count(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        writer.close()


@pytest.fixture
async def listeners() -> AsyncIterator[Listeners]:
    listeners = Listeners()
    await listeners.start()
    yield listeners
    await listeners.stop()


async def verdict(sender: HttpWebhookSender, url: str) -> str:
    """Return at which of the two checks a URL ended."""
    try:
        checked = check_webhook_url(url, allow_http=True)
    except ValueError:
        return "check"
    try:
        reply = await sender.post(checked, body=b"{}", headers={}, timeout_s=2.0)
    except Permanent as error:
        return "guard" if error.code == "address_refused" else repr(error)
    except Exception as error:  # whatever else: it was not refused
        return repr(error)
    return repr(reply)


async def test_the_corpus(listeners: Listeners) -> None:
    sender = HttpWebhookSender(resolver=say, allow_http=True)
    urls = [*(f"http://{host}:{listeners.port}/hook" for host in HOSTS), *WHOLE_URLS]
    urls += [url.replace("http://", "https://", 1) for url in urls if url.startswith("http://")]
    verdicts = {url: await verdict(sender, url) for url in urls}
    await sender.close()
    assert {url: end for url, end in verdicts.items() if end not in ("check", "guard")} == {}
    assert listeners.connections == 0
    assert len({*HOSTS}) > 190
    literals = [f"http://{host}:{listeners.port}/hook" for host in [*V4, *(f"[{address}]" for address in V6), *NAMES]]
    assert {url for url in literals if verdicts[url] != "guard"} == set()


async def test_the_listeners_would_have_noticed(listeners: Listeners) -> None:
    everything = [ip_network("0.0.0.0/0"), ip_network("::/0")]
    sender = HttpWebhookSender(everything, resolver=say, allow_http=True)
    hosts = ["127.0.0.1", "127.0.0.2", "[::1]", "localhost", "0.0.0.0", "[::ffff:127.0.0.1]", "bücher.example"]
    for host in hosts[:4]:
        assert "Retryable" in await verdict(sender, f"http://{host}:{listeners.port}/hook")
    await sender.close()
    assert listeners.connections == 4


@pytest.mark.parametrize("host", ["1.1.1.1", "93.184.216.34", "2606:4700:4700::1111"])
async def test_public_addresses_pass_the_guard(host: str) -> None:
    guard = Guard(say, [])
    assert [answer["host"] for answer in await guard.resolve(host)] == [host]
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with guard.make_socket((family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, 443))) as made:
        assert made.family == family


async def test_the_address_of_the_socket_is_judged_whatever_the_name_meant() -> None:
    guard = Guard(say, [])
    for host in [*V4, *V6]:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with pytest.raises(Permanent, match="address_refused"):
            guard.make_socket((family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, 443)))


async def test_a_name_that_means_something_else_a_moment_later_gains_nothing() -> None:
    asked: list[str] = []

    async def rebind(host: str) -> Sequence[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    async with Receiver() as receiver:
        elsewhere = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.2", receiver.port)
        sender = HttpWebhookSender([ip_network("127.0.0.1/32")], resolver=rebind, allow_http=True)
        url = receiver.url("/ok").replace("127.0.0.1", "rebound.example")
        reply = await sender.post(url, body=b"{}", headers={}, timeout_s=2)
        assert (reply.status, receiver.total, asked) == (200, 1, ["rebound.example"])
        await sender.close()
        # a connection made later asks anew, and is judged anew
        assert await verdict(sender, url) == "guard"
        assert (receiver.total, len(asked)) == (1, 2)
        await sender.close()
        elsewhere.close()
        await elsewhere.wait_closed()


async def test_rebinding_from_public_to_loopback_is_refused_at_the_second_look_up() -> None:
    answers = [["93.184.216.34"], ["127.0.0.1"]]

    async def rebind(_: str) -> Sequence[str]:
        return answers.pop(0)

    guard = Guard(rebind, [])
    assert [answer["host"] for answer in await guard.resolve("rebound.example", 443)] == ["93.184.216.34"]
    with pytest.raises(Permanent, match="loopback") as raised:
        await guard.resolve("rebound.example", 443)
    assert "127.0.0.1" not in str(raised.value)  # what a name means in our network is not told


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_answers(status: int, listeners: Listeners) -> None:
    async with Receiver() as receiver:
        inside = f"http://127.0.0.1:{listeners.port}/"
        sender = HttpWebhookSender([ip_network("127.0.0.0/8")], allow_http=True)
        receiver.behave("/moved", f"redirect to={inside} status={status}")
        reply = await sender.post(receiver.url("/moved"), body=b"{}", headers={}, timeout_s=2)
        await sender.close()
    assert reply == WebhookReply(status, "ok")
    assert listeners.connections == 0


async def test_no_proxy_and_no_netrc(monkeypatch: pytest.MonkeyPatch, listeners: Listeners) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{listeners.port}")
    monkeypatch.delenv("no_proxy", raising=False)
    async with Receiver() as receiver:
        sender = HttpWebhookSender([ip_network("127.0.0.0/8")], allow_http=True)
        await sender.post(receiver.url(), body=b"{}", headers={}, timeout_s=2)
        await sender.close()
        assert "authorization" not in receiver.requests[0].headers
        # and a refused address stays refused
        sender = HttpWebhookSender(resolver=say, allow_http=True)
        assert await verdict(sender, receiver.url()) == "guard"
        await sender.close()
    assert listeners.connections == 0
