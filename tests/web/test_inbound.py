"""/inbound/ses and /inbound/sms: who is believed, and that nobody else changes anything."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
import pytest
import requests

from nightmail import clock
from nightmail.embedded import EmbeddedServers
from nightmail.errors import Retryable
from nightmail.fakes.sns_signer import CERTIFICATE_URL, TOPIC, FakeSnsHost, SnsSigner, stamp
from nightmail.rules.sns import NotTrusted
from nightmail.web import bodies
from nightmail.web.inbound import (
    CERTIFICATE_LIFE_S,
    CERTIFICATE_STALE_S,
    GREETING,
    MAX_CERTIFICATES,
    REFETCH_S,
    Certificates,
)
from tests import provider_reports as said
from tests.conftest import _fresh_database
from tests.ports import make_ports
from tests.web.serving import Org, Server, serving

Shared = tuple[Server, FakeSnsHost]
TABLES = (
    "sns_notifications",
    "message_events",
    "recipient_outcomes",
    "suppressions",
    "webhook_deliveries",
    "inbound_sms",
    "messages",
)
MAIL = {"from": "a@example.com", "to": "ada@example.org", "subject": "s", "text": "t"}


@pytest.fixture(scope="module")
def signer() -> SnsSigner:
    return SnsSigner()


@pytest.fixture
def host(signer: SnsSigner) -> FakeSnsHost:
    return FakeSnsHost({CERTIFICATE_URL: signer.certificate})


@pytest.fixture
def server(database_url: str, host: FakeSnsHost) -> Iterator[Server]:
    with serving(database_url, ports=make_ports(sns=host), sns_topic_arns=f"arn:other,{TOPIC}") as running:
        yield running


@pytest.fixture(scope="module")
def shared(
    embedded_servers: EmbeddedServers,
    maintenance: psycopg.Connection[Any],
    template_database: str,
    worker_id: str,
    signer: SnsSigner,
) -> Iterator[Shared]:
    """One server for all that is refused and hence leaves nothing behind."""
    host = FakeSnsHost({CERTIFICATE_URL: signer.certificate})
    for url in _fresh_database(embedded_servers, maintenance, worker_id, template_database):
        with serving(url, ports=make_ports(sns=host), sns_topic_arns=f"arn:other,{TOPIC}") as running:
            yield running, host


def post(server: Server, body: Any, path: str = "/inbound/ses") -> requests.Response:
    """Post as SNS does: JSON that calls itself text."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return server.call("POST", path, data=data, headers={"Content-Type": "text/plain; charset=UTF-8"})


def contents(server: Server) -> dict[str, int]:
    counts = ", ".join(f"(SELECT count(*) FROM {table})" for table in TABLES)
    [row] = server.rows(f"SELECT {counts}")
    return dict(zip(TABLES, row, strict=True))


def sent_mail(server: Server, org: Org) -> Any:
    """Accept an email that is as good as sent."""
    sent = server.call("POST", "/emails", org.live_key, MAIL).json()["id"]
    server.rows("DELETE FROM message_queue")
    server.rows("UPDATE messages SET state = 'sent', sent_at = now()")
    return sent


def assert_refused(server: Server, answer: requests.Response, status: int, before: dict[str, int]) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error"]
    assert contents(server) == before


@pytest.mark.parametrize("version", ["1", "2"])
def test_a_bounce_is_believed_stored_and_told(server: Server, org: Org, signer: SnsSigner, version: str) -> None:
    message = sent_mail(server, org)
    endpoint = {"endpoint": "https://hooks.example.com/", "events": ["email.bounced"]}
    assert server.call("POST", "/webhooks", org.live_key, endpoint).status_code == 201
    body = signer.notify(
        said.bounce(message, "ada@example.org"), subject="Amazon SES Email Event Notification", SignatureVersion=version
    )
    assert post(server, body).json() == {"outcome": "applied"}
    assert post(server, body).json() == {"outcome": "repeated"}
    assert server.call("GET", f"/emails/{message}", org.live_key).json()["last_event"] == "bounced"
    assert server.call("GET", "/suppressions", org.live_key).json()["data"][0]["origin"] == "bounce"
    kinds = [event["type"] for event in server.call("GET", f"/emails/{message}/events", org.live_key).json()["data"]]
    assert kinds == ["bounced"]
    assert server.rows("SELECT topic, recipient FROM webhook_deliveries") == [("email.bounced", "ada@example.org")]


def test_an_sms_and_its_events_have_a_path_of_their_own(server: Server, org: Org, signer: SnsSigner) -> None:
    body = {"to": "+15005550006", "from": "+15005550001", "text": "hello"}
    sms = server.call("POST", "/sms", org.live_key, body).json()["id"]
    server.rows("UPDATE messages SET state = 'sent', sent_at = now()")
    delivered = signer.notify(said.text_event("DELIVERED", sms))
    assert post(server, delivered, "/inbound/sms").json() == {"outcome": "applied"}
    stop = signer.notify(said.inbound("STOP", inbound_id="i-1"))
    assert post(server, stop, "/inbound/sms").json() == {"outcome": "received"}
    again = signer.notify(said.inbound("STOP", inbound_id="i-1"))
    assert post(server, again, "/inbound/sms").json() == {"outcome": "repeated"}
    assert server.call("GET", f"/sms/{sms}", org.live_key).json()["state"] == "delivered"
    assert server.rows("SELECT address, origin FROM suppressions") == [("+15005550006", "stop")]
    assert server.rows("SELECT count(*) FROM messages WHERE purpose = 'keyword_reply'") == [(1,)]


def test_replies_can_be_switched_off(database_url: str, host: FakeSnsHost, signer: SnsSigner) -> None:
    options: dict[str, Any] = {"sns_topic_arns": TOPIC, "sms_keyword_replies": False, "sms_sender": "+15005550001"}
    with serving(database_url, ports=make_ports(sns=host), **options) as server:
        org = server.make_org()
        server.call("POST", "/sms", org.live_key, {"to": "+15005550006", "text": "hello"})
        server.rows("UPDATE messages SET state = 'sent', sent_at = now()")
        assert post(server, signer.notify(said.inbound("STOP", inbound_id="i")), "/inbound/sms").status_code == 200
        assert server.rows("SELECT count(*), count(reply_message_id) FROM inbound_sms") == [(1, 0)]
        assert server.rows("SELECT origin FROM suppressions") == [("stop",)]


@pytest.mark.parametrize("odd", ["\0", "\ud800", "\udfff\0"])
def test_no_odd_character_loses_what_is_signed(server: Server, org: Org, signer: SnsSigner, odd: str) -> None:
    """SNS does not repeat what was refused, and a remote SMTP server writes what it likes."""
    message = sent_mail(server, org)
    bounce = said.bounce(message, "ada@example.org", action="failed", diagnosticCode=f"550 no {odd} user")
    bounce["bounce"][odd] = {odd: [odd]}
    assert post(server, signer.notify(bounce)).json() == {"outcome": "applied"}
    assert server.call("GET", f"/emails/{message}", org.live_key).json()["last_event"] == "bounced"
    clean = "550 no " + "\N{REPLACEMENT CHARACTER}" * len(odd) + " user"
    assert server.rows("SELECT origin, reason FROM suppressions") == [("bounce", f"Permanent/General: {clean}")]
    stop = signer.notify(said.inbound(f"STOP{odd}", inbound_id="i-1"))
    assert post(server, stop, "/inbound/sms").json() == {"outcome": "received"}
    assert server.rows("SELECT action FROM inbound_sms") == [("stop",)]


# ── who is not believed ──


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("Message", '{"eventType": "Send", "mail": {"messageId": "other"}}'),
        ("MessageId", "00000000-0000-0000-0000-000000000000"),
        ("Subject", "added"),
        ("Timestamp", "a little earlier"),
        ("TopicArn", "arn:other"),
        ("TopicArn", TOPIC + "x"),
        ("SignatureVersion", "1"),
        ("SignatureVersion", "3"),
        ("Signature", "AAAA"),
        ("Signature", ""),
        ("SigningCertURL", "https://sns.evil.com/a.pem"),
        ("SigningCertURL", "https://sns.eu-west-1.amazonaws.com.evil.com/a.pem"),
        ("SigningCertURL", "https://user@sns.eu-west-1.amazonaws.com/a.pem"),
        ("SigningCertURL", "https://sns.eu-west-1.amazonaws.com:8443/a.pem"),
        ("SigningCertURL", "http://sns.eu-west-1.amazonaws.com/a.pem"),
        ("SigningCertURL", "https://sns.us-east-1.amazonaws.com/a.pem"),
        ("Type", "SubscriptionConfirmation"),
    ],
)
def test_an_altered_message_is_refused(shared: Shared, signer: SnsSigner, field: str, value: str) -> None:
    server, host = shared
    message = sent_mail(server, server.make_org())
    before = contents(server)
    if field == "Timestamp":
        value = stamp(datetime.now(UTC) - timedelta(seconds=90))
    body = {**signer.notify(said.bounce(message, "ada@example.org")), field: value}
    if field == "Type":
        body |= {"Token": "t", "SubscribeURL": CERTIFICATE_URL}
    assert_refused(server, post(server, body), 403, before)
    assert set(host.fetched) <= {CERTIFICATE_URL}
    assert host.visited == []


def test_a_rightly_signed_message_of_somebody_elses_topic_is_refused(shared: Shared, signer: SnsSigner) -> None:
    """Anybody can make a topic, and SNS signs for all of them with the same key."""
    server, host = shared
    message = sent_mail(server, server.make_org())
    before = contents(server)
    for foreign in ("arn:aws:sns:eu-west-1:999999999999:nightmail", TOPIC[:-1], TOPIC + "x", ""):
        for body in (
            signer.notify(said.bounce(message, "ada@example.org"), TopicArn=foreign),
            signer.confirm(TopicArn=foreign),
        ):
            assert_refused(server, post(server, body), 403, before)
    assert host.visited == []


@pytest.mark.parametrize("hours", [25, -0.5])
def test_an_old_or_future_message_is_refused(
    server: Server, signer: SnsSigner, host: FakeSnsHost, hours: float
) -> None:
    before = contents(server)
    body = signer.notify("x", Timestamp=stamp(datetime.now(UTC) - timedelta(hours=hours)))
    assert_refused(server, post(server, body), 403, before)
    assert host.fetched == [], "nothing is fetched for what is refused anyway"


def test_without_topics_nobody_is_believed(database_url: str, signer: SnsSigner, host: FakeSnsHost) -> None:
    with serving(database_url, ports=make_ports(sns=host)) as server:
        before = contents(server)
        for path in ("/inbound/ses", "/inbound/sms"):
            assert_refused(server, post(server, signer.notify("x"), path), 403, before)
    assert host.fetched == []


def test_another_key_or_an_expired_certificate_is_refused(server: Server, signer: SnsSigner, host: FakeSnsHost) -> None:
    before = contents(server)
    assert_refused(server, post(server, SnsSigner().notify("x")), 403, before)
    expired = SnsSigner(valid_from=datetime.now(UTC) - timedelta(days=9), valid_days=1)
    url = CERTIFICATE_URL.replace("fake", "expired")
    host.certificates[url] = expired.certificate
    assert_refused(server, post(server, expired.notify("x", SigningCertURL=url)), 403, before)
    host.certificates[url] = b"<html>"
    other = CERTIFICATE_URL.replace("fake", "html")
    host.certificates[other] = b"<html>"
    assert_refused(server, post(server, signer.notify("x", SigningCertURL=other)), 403, before)


def test_a_certificate_that_cannot_be_fetched_is_tried_again_later(
    server: Server, org: Org, signer: SnsSigner, host: FakeSnsHost
) -> None:
    message = sent_mail(server, org)
    before = contents(server)
    body = signer.notify(said.opened(message))
    host.is_away = True
    answer = post(server, body)
    assert_refused(server, answer, 503, before)
    assert answer.headers["retry-after"] == "30"
    host.is_away = False
    assert post(server, body).json() == {"outcome": "applied"}
    assert post(server, signer.notify(said.opened(message, 9))).json() == {"outcome": "applied"}
    assert len(host.fetched) == 2, "kept after the first success"


def test_few_certificates_are_kept(server: Server, signer: SnsSigner, host: FakeSnsHost) -> None:
    urls = [CERTIFICATE_URL.replace("fake", str(number)) for number in range(MAX_CERTIFICATES + 1)]
    host.certificates |= dict.fromkeys(urls, signer.certificate)
    for url in (*urls, urls[-1], urls[0]):
        assert post(server, signer.notify(GREETING, SigningCertURL=url)).json() == {"outcome": "ignored"}
    assert host.fetched == [*urls, urls[0]]


@pytest.mark.anyio
async def test_a_certificate_is_fetched_once_for_all_who_wait(signer: SnsSigner) -> None:
    class Slow(FakeSnsHost):
        async def fetch_certificate(self, url: str) -> bytes:
            await asyncio.sleep(0)
            return await super().fetch_certificate(url)

    host, certificates = Slow({CERTIFICATE_URL: signer.certificate}), Certificates()
    host.is_away = True
    waiting = [asyncio.create_task(certificates.get(host, CERTIFICATE_URL)) for _ in range(5)]
    assert all(isinstance(end, Retryable) for end in await asyncio.gather(*waiting, return_exceptions=True))
    assert len(host.fetched) == 1
    host.is_away = False
    first, *others = [asyncio.create_task(certificates.get(host, CERTIFICATE_URL)) for _ in range(5)]
    await asyncio.sleep(0)
    first.cancel()
    assert len(set(await asyncio.gather(*others))) == 1
    assert first.cancelled(), "who gives up does not take the others along"
    assert len(host.fetched) == 2


@pytest.mark.anyio
async def test_a_certificate_that_cannot_be_fetched_again_is_used_for_a_day(
    signer: SnsSigner, host: FakeSnsHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(clock, "monotonic", lambda: now)
    certificates = Certificates()
    fresh = await certificates.get(host, CERTIFICATE_URL)
    host.is_away = True
    for later, fetches in ((CERTIFICATE_LIFE_S - 1, 1), (2, 2), (REFETCH_S - 1, 2), (2, 3)):
        now += later
        assert await certificates.get(host, CERTIFICATE_URL) is fresh
        assert len(host.fetched) == fetches, "tried again now and then, not for every message"
    host.certificates[CERTIFICATE_URL], host.is_away = b"<html>", False
    now = 1000.0 + CERTIFICATE_STALE_S - 1
    assert await certificates.get(host, CERTIFICATE_URL) is fresh
    now += REFETCH_S
    with pytest.raises(NotTrusted):
        await certificates.get(host, CERTIFICATE_URL)
    host.certificates[CERTIFICATE_URL] = signer.certificate
    renewed = await certificates.get(host, CERTIFICATE_URL)
    now += CERTIFICATE_LIFE_S - 1
    assert await certificates.get(host, CERTIFICATE_URL) is renewed
    assert len(host.fetched) == 6


# ── subscriptions ──


@pytest.mark.parametrize("path", ["/inbound/ses", "/inbound/sms"])
def test_a_subscription_to_a_configured_topic_is_confirmed_once(
    server: Server, signer: SnsSigner, host: FakeSnsHost, path: str
) -> None:
    body = signer.confirm()
    host.is_away = True
    assert post(server, body, path).status_code == 503
    host.is_away = False
    assert post(server, body, path).json() == {"outcome": "confirmed"}
    assert post(server, body, path).json() == {"outcome": "repeated"}
    assert host.visited == [body["SubscribeURL"]]
    assert post(server, signer.confirm(kind="UnsubscribeConfirmation"), path).json() == {"outcome": "ignored"}
    assert len(host.visited) == 1


@pytest.mark.parametrize(
    "url", ["https://evil.com/?Action=ConfirmSubscription", "http://sns.eu-west-1.amazonaws.com/", "https://127.0.0.1/"]
)
def test_a_confirmation_leads_nowhere_else(shared: Shared, signer: SnsSigner, url: str) -> None:
    server, host = shared
    before = contents(server)
    assert_refused(server, post(server, signer.confirm(SubscribeURL=url)), 403, before)
    assert_refused(server, post(server, SnsSigner(topic="arn:mine").confirm()), 403, before)
    assert_refused(server, post(server, SnsSigner().confirm()), 403, before)
    assert host.visited == []


# ── hostile bodies ──

DEEP = b"[" * 5000 + b"]" * 5000


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b'{"Type": NaN}',
        b'{"Type": 1' + b"0" * 5000 + b"}",
        b'{"Type": 1e999}',
        b'{"Type": "Notification", "Type": "Notification"}',
        b'{"Type": "Notification\\u0000"}',
        b'{"Type": "\\ud800"}',
        b'{"\\ud800": 1}',
        DEEP,
        b'{"Type": ' + DEEP + b"}",
        b'{"Type": "Notification"}',
        b'{"Type": ["Notification"]}',
    ],
    ids=range(18),
)
def test_hostile_bodies_are_refused(shared: Shared, body: bytes) -> None:
    server, host = shared
    host.fetched.clear()
    before = contents(server)
    for path in ("/inbound/ses", "/inbound/sms"):
        answer = post(server, body, path)
        assert answer.status_code in (400, 422), answer.text
        assert_refused(server, answer, answer.status_code, before)
    assert host.fetched == []


@pytest.mark.parametrize(
    "message",
    [
        "",
        "hello",
        "null",
        "[]",
        "{}",
        "1" + "0" * 5000,
        "{" * 3000,
        '{"eventType": "Send", "mail": []}',
        '{"eventType": "Bounce", "mail": {"messageId": "x"}, "bounce": {"bouncedRecipients": "x"}}',
        '{"eventType": "TEXT_SENT", "messageId": 5}',
        '{"eventType": 5, "messageId": "x"}',
        '{"originationNumber": "+15005550006", "destinationNumber": "", "inboundMessageId": "i"}',
        '{"originationNumber": {}, "destinationNumber": [], "inboundMessageId": 1e400}',
        '{"eventType": "Send", "mail": ' + "[" * 200 + "]" * 200 + "}",
    ],
    ids=range(14),
)
def test_a_signed_message_that_cannot_be_read_is_refused(shared: Shared, signer: SnsSigner, message: str) -> None:
    server, _ = shared
    before = contents(server)
    for path in ("/inbound/ses", "/inbound/sms"):
        answer = post(server, signer.notify(message), path)
        assert answer.status_code in (400, 422), answer.text
        assert_refused(server, answer, answer.status_code, before)


def test_what_is_too_large_or_no_post_is_refused(shared: Shared) -> None:
    server, _ = shared
    before = contents(server)
    assert_refused(server, post(server, b'"' + b"x" * 1_048_576 + b'"'), 413, before)
    for method in ("GET", "PUT", "DELETE"):
        assert_refused(server, server.call(method, "/inbound/sms"), 405, before)


def test_a_body_that_comes_too_slowly_is_asked_for_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "READ_TIMEOUT_S", 0.05)
    before = contents(server)
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=10) as slow:
        slow.sendall(b"POST /inbound/ses HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        answer = slow.recv(65536).decode()
    assert answer.startswith("HTTP/1.1 503 ")
    assert "retry-after: 30" in answer
    assert contents(server) == before


def test_events_of_strangers_and_new_kinds_change_nothing(server: Server, org: Org, signer: SnsSigner) -> None:
    message = sent_mail(server, org)
    before = contents(server)
    bodies = [
        said.bounce(uuid4(), "ada@example.org"),
        said.ses("Subscription", message, {}),
        said.ses("SomethingNew", message, {}),
    ]
    outcomes = [post(server, signer.notify(body)).json()["outcome"] for body in bodies]
    assert outcomes == ["unknown", "ignored", "ignored"]
    assert contents(server) == {**before, "sns_notifications": 3}
    assert post(server, signer.notify(GREETING + "\n")).json() == {"outcome": "ignored"}
