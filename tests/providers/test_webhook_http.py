"""Webhooks by HTTP against a receiver that misbehaves: one attempt, a bounded end, and our errors only."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from ipaddress import ip_network
from types import MappingProxyType
from typing import Any

import pytest

from nightmail.errors import Permanent, Retryable
from nightmail.fakes.webhook_receiver import Receiver
from nightmail.fakes.webhook_script import Behaviour, head
from nightmail.main import Servers, open_application
from nightmail.ports import WebhookReply
from nightmail.providers.guarded_http import SystemLookup
from nightmail.providers.webhook_http import HttpWebhookSender, retry_after_s
from nightmail.settings import load

pytestmark = pytest.mark.anyio

LOOPBACK = [ip_network("127.0.0.0/8")]
NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


async def on_loopback(host: str) -> Sequence[str]:
    """Every name is this machine, but for those of the domain `gone`."""
    if host.endswith(".gone"):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return ["127.0.0.1"]


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as receiver:
        yield receiver


@pytest.fixture
def made_without_a_loop() -> HttpWebhookSender:
    return HttpWebhookSender(LOOPBACK, allow_http=True, resolver=on_loopback)


@pytest.fixture
async def sender(made_without_a_loop: HttpWebhookSender) -> AsyncIterator[HttpWebhookSender]:
    yield made_without_a_loop
    await made_without_a_loop.close()


async def post(
    sender: HttpWebhookSender, url: str, *, timeout_s: float = 5.0, headers: Mapping[str, str] = MappingProxyType({})
) -> WebhookReply:
    """Post a small event."""
    return await sender.post(url, body=b'{"type":"message.sent"}', headers=headers, timeout_s=timeout_s)


async def failure(sender: HttpWebhookSender, url: str, *, timeout_s: float = 5.0) -> str:
    """Return the code with which a post fails for now."""
    with pytest.raises(Retryable) as raised:
        await post(sender, url, timeout_s=timeout_s)
    return raised.value.code


async def test_the_request_is_ours_to_the_byte(receiver: Receiver, sender: HttpWebhookSender) -> None:
    path = "/ok/a%2Fb/../c?sp=%2Ftriggers&sig=A%2Bb%3d~"
    targets: list[str] = []
    receiver_take = receiver.take
    receiver.take = lambda target, *rest: targets.append(target) or receiver_take(target, *rest)  # type: ignore[method-assign, func-returns-value]
    reply = await post(sender, receiver.url(path).replace("127.0.0.1", "hooks.test"), headers={"webhook-id": "msg_1"})
    assert reply == WebhookReply(200, "ok")
    assert targets == [path]
    assert receiver.requests[0].body == b'{"type":"message.sent"}'
    assert receiver.requests[0].headers == {
        "host": f"hooks.test:{receiver.port}",
        "user-agent": "Nightmail-Webhooks/1",
        "content-type": "application/json",
        "accept": "*/*",
        "accept-encoding": "identity",
        "content-length": "23",
        "webhook-id": "msg_1",
    }


@pytest.mark.parametrize(
    ("path", "reply"),
    [
        ("/status/204", WebhookReply(204, "")),
        ("/status/500?body=oh+no", WebhookReply(500, "oh no")),
        ("/gone", WebhookReply(410, "ok")),
        ("/status/429?retry_after=7", WebhookReply(429, "ok", 7.0)),
        ("/status/503?retry_after=soon", WebhookReply(503, "ok", None)),
        ("/status/599", WebhookReply(599, "ok")),
        ("/delay/0.01", WebhookReply(200, "ok")),
        # the head has come, so it is a reply, whatever becomes of the body
        ("/cut", WebhookReply(200, "less")),
        ("/endless", WebhookReply(200, "endless " * 128)),
    ],
)
async def test_any_answer_is_a_reply(
    receiver: Receiver, sender: HttpWebhookSender, path: str, reply: WebhookReply
) -> None:
    assert await post(sender, receiver.url(path)) == reply


async def test_a_body_that_drips_ends_with_the_time(receiver: Receiver, sender: HttpWebhookSender) -> None:
    reply = await post(sender, receiver.url("/drip-body"), timeout_s=0.4)
    assert reply.status == 200
    assert 1 <= len(reply.body) < 20
    assert set(reply.body) == {"d"}


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/hang", "timeout"),
        ("/drip", "timeout"),
        ("/interim", "timeout"),
        ("/reset", "reset"),
        ("/close", "reset"),
        ("/garbage", "bad_reply"),
        ("/huge-headers", "bad_reply"),
        ("/upgrade", "bad_reply"),
        ("/status/999", "bad_reply"),
    ],
)
async def test_no_answer_has_a_code_and_is_not_asked_for_twice(
    receiver: Receiver, sender: HttpWebhookSender, path: str, code: str
) -> None:
    assert await failure(sender, receiver.url(path), timeout_s=0.4 if code == "timeout" else 5.0) == code
    assert receiver.total == 1


@pytest.mark.parametrize(
    "wire",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        b"HTTP/1.1 2OO OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nname\x00: value\r\n\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 5000 + b"\r\n",
        b"\r\n" * 100_000,
    ],
)
async def test_malformed_answers_are_bad_replies(receiver: Receiver, sender: HttpWebhookSender, wire: bytes) -> None:
    receiver.behave("/raw", Behaviour("garbage", wire=wire))
    assert await failure(sender, receiver.url("/raw")) in ("bad_reply", "reset")


async def test_a_stale_connection_is_not_used_twice_for_one_post(receiver: Receiver, sender: HttpWebhookSender) -> None:
    await post(sender, receiver.url("/ok"))
    assert await failure(sender, receiver.url("/reset")) == "reset"
    assert (receiver.total, receiver.connections) == (2, 1)


async def test_a_refused_connection(sender: HttpWebhookSender) -> None:
    with socket.socket() as bound:  # bound and not listening
        bound.bind(("127.0.0.1", 0))
        assert await failure(sender, f"http://127.0.0.1:{bound.getsockname()[1]}/") == "refused"


async def test_a_name_without_an_address(sender: HttpWebhookSender) -> None:
    assert await failure(sender, "https://hooks.gone/") == "dns"


async def test_what_is_no_url_of_a_webhook_is_permanent(sender: HttpWebhookSender) -> None:
    for url in ("", "http://a b/", "ftp://127.0.0.1/", "http://127.0.0.1/\r\nx: y", "http://127.1/", "unix:///run/x"):
        with pytest.raises(Permanent) as raised:
            await post(sender, url)
        assert raised.value.code == "address_refused"


async def test_without_leave_nothing_is_posted_in_the_clear(receiver: Receiver) -> None:
    sender = HttpWebhookSender(LOOPBACK, resolver=on_loopback)
    with pytest.raises(Permanent, match="must begin with https://") as raised:
        await post(sender, receiver.url("/made/before/production"))
    assert (raised.value.code, receiver.total) == ("address_refused", 0)
    await sender.close()


@pytest.mark.parametrize("env", ["production", "test"])
async def test_production_posts_nothing_in_the_clear(receiver: Receiver, database_url: str, env: str) -> None:
    settings = load(
        {"nightmail_env": env, "cron_secret": "k3-Jq8-Zr1-Xw6-Pt9-Vb4-Ln7", "webhook_allow_cidrs": "127.0.0.0/8"}
    )
    async with open_application(settings, Servers(database_url, None)) as application:
        webhooks = application.ports.webhooks
        if env == "test":
            assert (await webhooks.post(receiver.url(), body=b"{}", headers={}, timeout_s=5)).status == 200
        else:
            with pytest.raises(Permanent, match="address_refused"):
                await webhooks.post(receiver.url(), body=b"{}", headers={}, timeout_s=5)
    assert receiver.total == (env == "test")


async def test_errors_do_not_repeat_the_secret_in_the_url(receiver: Receiver, sender: HttpWebhookSender) -> None:
    for url in (
        receiver.url("/garbage?token=secret"),
        "http://hooks.gone/?token=secret",
        receiver.url("/hang?token=secret"),
    ):
        with pytest.raises(Retryable) as raised:
            await post(sender, url, timeout_s=0.3)
        assert "secret" not in str(raised.value)


async def test_what_is_kept_of_a_body_is_text(receiver: Receiver, sender: HttpWebhookSender) -> None:
    def answer(body: bytes) -> Behaviour:
        return Behaviour("status", wire=head(200, [("content-length", str(len(body)))]) + body)

    cut_in_a_character = b"a" + "é".encode() * 600
    receiver.behave("/text", answer(b"a\x00b\xff"), answer("é".encode() * 512), answer(cut_in_a_character))
    bodies = [(await post(sender, receiver.url("/text"))).body for _ in range(3)]
    assert bodies == ["a\ufffdb\ufffd", "é" * 512, "a" + "é" * 511]


async def test_nothing_is_unpacked(receiver: Receiver, sender: HttpWebhookSender) -> None:
    reply = await post(sender, receiver.url("/bomb"))
    assert reply.status == 200
    assert "\x00" not in reply.body
    assert len(reply.body) <= 1024
    assert reply.body.startswith("\x1f\ufffd")  # gzip's magic number


async def test_connections_are_reused_unless_an_answer_was_left_unread(
    receiver: Receiver, sender: HttpWebhookSender
) -> None:
    for path in ("/ok", "/status/500", "/endless", "/ok"):
        await post(sender, receiver.url(path))
    assert [request.connection for request in receiver.requests] == [1, 1, 1, 2]


async def test_cookies_are_not_kept(receiver: Receiver, sender: HttpWebhookSender) -> None:
    receiver.behave("/cookie", Behaviour("status", wire=head(204, [("set-cookie", "a=b; path=/")])))
    for _ in range(2):
        await post(sender, receiver.url("/cookie").replace("127.0.0.1", "hooks.test"))
    assert "cookie" not in receiver.requests[1].headers


async def test_a_post_never_waits_for_anothers_connection(receiver: Receiver, sender: HttpWebhookSender) -> None:
    """The runs bound their posts; a wait here would look like an endpoint that does not answer."""
    hanging = [asyncio.create_task(post(sender, receiver.url("/hang"))) for _ in range(150)]
    await receiver.wait_for(150)
    await post(sender, receiver.url("/ok"))
    receiver.release()
    assert {reply.status for reply in await asyncio.gather(*hanging)} == {200}


async def test_closing_twice_and_posting_again(receiver: Receiver, made_without_a_loop: HttpWebhookSender) -> None:
    sender = made_without_a_loop
    await sender.close()
    await post(sender, receiver.url())
    await sender.close()
    await sender.close()
    assert (await post(sender, receiver.url())).status == 200
    await sender.close()


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("120", 120.0),
        (" 5 ", 5.0),
        ("9" * 400, 1e9),
        ("Mon, 23 Nov 2026 12:01:40 GMT", 100.0),
        ("Monday, 23-Nov-26 12:01:40 GMT", 100.0),
        ("Mon, 23 Nov 2026 11:00:00 GMT", 0.0),
        ("Mon, 23 Nov 2026 12:01:40", None),
        ("-1", None),
        ("1.5", None),
        ("٣", None),
        ("soon", None),
        ("", None),
        ("Mon, 99 Nov 2026 12:00:00 GMT", None),
        ("Mon, 23 Nov 99999999999999999999 12:00:00 GMT", None),
    ],
)
def test_retry_after(value: str, seconds: float | None) -> None:
    assert retry_after_s(value, now=NOW) == seconds


async def test_the_system_s_resolver_knows_this_machine() -> None:
    assert set(await SystemLookup()("localhost")) <= {"127.0.0.1", "::1"}


class HangingDns:
    """Stands in for getaddrinfo: a name that begins with `hang` has no answer until it is let go."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._go_on = threading.Event()

    def __call__(self, host: str, *_: Any, **__: Any) -> list[Any]:
        self.asked.append(host)
        if host.startswith("hang"):
            self._go_on.wait(30)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]

    def let_go(self) -> None:
        """Answer what hangs."""
        self._go_on.set()


@pytest.fixture
def dns(monkeypatch: pytest.MonkeyPatch) -> Iterator[HangingDns]:
    hanging = HangingDns()
    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    yield hanging
    hanging.let_go()


async def test_all_who_ask_for_a_name_at_once_share_one_look_up(dns: HangingDns) -> None:
    lookup = SystemLookup(threads=1)
    waiting = [asyncio.ensure_future(lookup("hang.test")) for _ in range(3)]
    while not dns.asked:
        await asyncio.sleep(0)
    waiting[0].cancel()
    dns.let_go()
    assert await asyncio.gather(*waiting[1:]) == [["127.0.0.1"]] * 2
    assert dns.asked == ["hang.test"]
    assert await lookup("hang.test") == ["127.0.0.1"]
    assert dns.asked == ["hang.test"] * 2, "an answer is not kept: names move"


async def test_a_name_that_hangs_fails_at_once_and_takes_no_other_thread(dns: HangingDns) -> None:
    lookup = SystemLookup(limit_s=0.2, threads=2)
    with pytest.raises(OSError, match="no answer from DNS within"):
        await lookup("hang.test")
    for _ in range(5):
        with pytest.raises(OSError, match="still hangs"):
            await lookup("hang.test")
        assert await lookup("healthy.test") == ["127.0.0.1"]
    assert dns.asked.count("hang.test") == 1
    dns.let_go()
    async with asyncio.timeout(20):
        while dns.asked.count("hang.test") == 1:
            try:
                assert await lookup("hang.test") == ["127.0.0.1"]
            except OSError:
                await asyncio.sleep(0.01)  # the thread has not ended yet


async def test_as_many_hanging_names_as_an_org_may_have_stop_nobody_else(dns: HangingDns) -> None:
    lookup = SystemLookup()
    hanging = [asyncio.ensure_future(lookup(f"hang-{n}.test")) for n in range(100)]
    while len(dns.asked) < 100 and not any(one.done() for one in hanging):
        await asyncio.sleep(0.01)
    assert await lookup("healthy.test") == ["127.0.0.1"]
    dns.let_go()
    assert await asyncio.gather(*hanging) == [["127.0.0.1"]] * 100


async def test_a_system_without_threads_left_is_a_failed_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    lookup = SystemLookup(threads=1)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        for _ in range(2):
            with pytest.raises(OSError, match="can't start new thread"):
                await lookup("one.test")
    assert set(await lookup("localhost")) <= {"127.0.0.1", "::1"}, "its slot is free again"


async def test_look_ups_that_hang_end_in_time_and_hold_no_more_than_their_threads(
    dns: HangingDns,
) -> None:
    lookup = SystemLookup(limit_s=0.1, threads=1)
    for host in ("hang-one.test", "hang-two.test"):
        with pytest.raises(OSError, match="no answer from DNS within"):
            await lookup(host)
    assert dns.asked == ["hang-one.test"]
    dns.let_go()
    while not dns.asked[1:]:
        try:
            assert await lookup("three.test") == ["127.0.0.1"]
        except OSError:
            continue  # the first thread has not ended yet
