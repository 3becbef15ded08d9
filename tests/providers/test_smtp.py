"""What only SMTP has: an envelope, several answers per message, and connections that are kept."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from email import message_from_bytes, policy

import pytest

from nightmail.errors import InDoubt, Permanent, Retryable, SettingsError, Throttled
from nightmail.fakes.smtp_catcher import SmtpCatcher
from nightmail.ports import Attachment
from nightmail.providers.smtp import SmtpSender, SmtpTarget
from tests.providers.conftest import FakeProviderProcess, make_email

pytestmark = pytest.mark.anyio


async def test_envelope_and_content_arrive_as_built(fake: FakeProviderProcess, smtp: SmtpSender) -> None:
    attachment = Attachment("ä.bin", bytes(range(256)), "application/octet-stream")
    email = make_email(
        to=["Ünal <a@recipient.test>"],
        cc=["b@bücher.test"],
        bcc=["hidden@recipient.test"],
        subject="Grüße 😀",
        text=".one\n..two\n.",
        attachments=[attachment],
    )
    await smtp.send_email(email, timeout_s=5)
    kept = fake.kept(email.message_id)
    assert kept["recipients"] == ["a@recipient.test", "b@xn--bcher-kva.test", "hidden@recipient.test"]
    message = message_from_bytes(base64.b64decode(kept["content"]), policy=policy.default)
    assert message["subject"] == "Grüße 😀"
    assert "hidden" not in str(message)
    body = message.get_body(("plain",))
    assert body is not None
    assert body.get_content().splitlines() == [".one", "..two", "."]
    assert next(iter(message.iter_attachments())).get_content() == attachment.content


async def test_some_refused_recipients_are_named_and_the_rest_accepted(smtp: SmtpSender) -> None:
    email = make_email(to=["reject+a@recipient.test", "fine@recipient.test"], cc=["tempfail+a@recipient.test"])
    accepted = await smtp.send_email(email, timeout_s=5)
    assert accepted.detail == {"reject+a@recipient.test": "550", "tempfail+a@recipient.test": "451"}


@pytest.mark.parametrize(
    ("recipients", "outcome"),
    [
        (["reject+b@recipient.test", "denied+b@recipient.test"], Permanent),
        (["reject+b@recipient.test", "tempfail+b@recipient.test"], Retryable),
        (["tempfail+b@recipient.test", "throttle+b@recipient.test"], Throttled),
    ],
)
async def test_all_refused_recipients_give_the_most_hopeful_class(
    smtp: SmtpSender, recipients: list[str], outcome: type[Exception]
) -> None:
    with pytest.raises(outcome) as raised:
        await smtp.send_email(make_email(to=recipients), timeout_s=5)
    assert type(raised.value) is outcome


async def test_a_non_ascii_local_part_goes_as_smtputf8(fake: FakeProviderProcess, smtp: SmtpSender) -> None:
    email = make_email(to=["jürgen@bücher.test"])
    await smtp.send_email(email, timeout_s=5)
    kept = fake.kept(email.message_id)
    assert kept["recipients"] == ["jürgen@xn--bcher-kva.test"]
    assert "SMTPUTF8" in kept["tags"]["mail_options"]


Dialogue = Callable[[bytes], bytes | None]


@asynccontextmanager
async def server(dialogue: Dialogue, *, greeting: bytes = b"220 hi\r\n") -> AsyncIterator[tuple[str, list[bytes]]]:
    """A scripted SMTP server; yields its URL and the command lines seen, `<connect>` for each connection."""
    seen: list[bytes] = []
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(b"<connect>")
        writers.append(writer)
        writer.write(greeting)
        while line := await reader.readline():
            seen.append(line.strip())
            answer = dialogue(line.strip())
            if answer is None:
                break
            writer.write(answer)
            if answer.startswith(b"354"):
                await reader.readuntil(b"\r\n.\r\n")
                answer = dialogue(b".")
                if answer is None:
                    break
                writer.write(answer)
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"smtp://127.0.0.1:{listening.sockets[0].getsockname()[1]}", seen
    finally:
        listening.close()
        for writer in writers:
            writer.close()


def obliging(line: bytes) -> bytes | None:
    """Say yes to everything."""
    return {b"DATA": b"354 go\r\n", b"EHLO": b"250-hi\r\n250 SIZE 1000000\r\n"}.get(line[:4], b"250 OK\r\n")


@asynccontextmanager
async def sending(url: str, **options: float) -> AsyncIterator[SmtpSender]:
    """A sender that is closed at the end, whatever happens."""
    sender = SmtpSender(url=url, idle_s=options.get("idle_s", 15.0))
    try:
        yield sender
    finally:
        await sender.close()


def saying(command: bytes | tuple[bytes, ...], answer: bytes | None) -> Dialogue:
    """Say yes to everything but one command."""
    return lambda line: answer if line.startswith(command) else obliging(line)


@pytest.mark.parametrize(
    ("command", "answer", "outcome", "code"),
    [
        ((b"EHLO", b"HELO"), b"550 no\r\n", Retryable, "connect_refused"),
        (b"MAIL", b"421 4.7.0 too many messages, slow down\r\n", Throttled, "throttled"),
        (b"MAIL", b"421 shutting down\r\n", Retryable, "smtp_421"),
        (b"MAIL", b"530 5.7.0 Authentication required\r\n", Throttled, "channel_stopped"),
        (b"MAIL", b"553 sender not allowed\r\n", Permanent, "smtp_553"),
        (b"RCPT", b"452 4.5.3 quota of recipients\r\n", Throttled, "throttled"),
        (b"RCPT", b"450 greylisted\r\n", Retryable, "smtp_450"),
        (b"RCPT", None, Retryable, "connection_lost"),
        (b"DATA", b"451 not now\r\n", Retryable, "smtp_451"),
        (b"DATA", None, Retryable, "connection_lost"),
        (b".", b"554 spam\r\n", Permanent, "smtp_554"),
        (b".", b"451 disk full\r\n", Retryable, "smtp_451"),
        (b".", b"454 Throttling failure: Daily message quota exceeded\r\n", Throttled, "daily_quota"),
        (b".", b"welcome\r\n", InDoubt, "unreadable_answer"),
        (b".", None, InDoubt, "connection_lost"),
    ],
)
async def test_each_step_has_its_outcome(
    command: bytes | tuple[bytes, ...], answer: bytes | None, outcome: type[Exception], code: str
) -> None:
    async with server(saying(command, answer)) as (url, seen), sending(url) as sender:
        with pytest.raises(outcome) as raised:
            await sender.send_email(make_email(), timeout_s=2)
        assert type(raised.value) is outcome
        assert getattr(raised.value, "code", "") == code
        assert seen.count(b"<connect>") == 1


async def test_a_refusing_greeting_is_about_the_connection() -> None:
    async with server(obliging, greeting=b"554 go away\r\n") as (url, _), sending(url) as sender:
        with pytest.raises(Retryable):
            await sender.send_email(make_email(), timeout_s=2)


async def test_a_timeout_before_the_content_is_retryable() -> None:
    async with server(saying(b"RCPT", b"")) as (url, _), sending(url) as sender:
        with pytest.raises(Retryable):
            await sender.send_email(make_email(), timeout_s=0.2)


async def test_required_starttls_is_never_left_out() -> None:
    async with server(obliging) as (url, seen), sending(f"{url}?starttls=required") as sender:
        with pytest.raises(Retryable):
            await sender.send_email(make_email(), timeout_s=2)
        assert not any(line.startswith(b"MAIL") for line in seen)


async def test_one_connection_serves_many_messages_and_closes_when_idle() -> None:
    async with server(obliging) as (url, seen), sending(url, idle_s=0.1) as sender:
        for _ in range(3):
            await sender.send_email(make_email(), timeout_s=2)
        assert seen.count(b"<connect>") == 1
        await asyncio.sleep(0.25)
        await sender.send_email(make_email(), timeout_s=2)
        assert seen.count(b"<connect>") == 2


async def test_a_connection_the_server_closed_is_replaced_before_the_message() -> None:
    async with server(saying(b"RSET", None)) as (url, seen), sending(url) as sender:
        for _ in range(2):
            await sender.send_email(make_email(), timeout_s=2)
        assert seen.count(b"<connect>") == 2
        assert sum(line.startswith(b"MAIL") for line in seen) == 2


async def test_wrong_credentials_stop_the_channel() -> None:
    def dialogue(line: bytes) -> bytes | None:
        if line.startswith(b"EHLO"):
            return b"250-hi\r\n250 AUTH PLAIN\r\n"
        return b"535 5.7.8 no\r\n" if line.startswith(b"AUTH") else obliging(line)

    async with server(dialogue) as (url, _), sending(url.replace("smtp://", "smtp://user:secret@")) as sender:
        with pytest.raises(Throttled) as raised:
            await sender.send_email(make_email(), timeout_s=2)
        assert raised.value.code == "channel_stopped"
        assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "port", "start_tls"),
    [
        ("smtp://mail.test", 25, "auto"),
        ("smtp://u:p@mail.test", 587, "required"),
        ("smtp://u:p@localhost:2525", 2525, "auto"),
        ("smtp://u:p@mail.test?starttls=off", 587, "off"),
        ("smtp://mail.test?starttls=1", 25, "required"),
        ("smtps://u:p%40x@mail.test", 465, "off"),
    ],
)
def test_a_url_says_it_all(url: str, port: int, start_tls: str) -> None:
    target = SmtpTarget.parse(url)
    assert (target.port, target.start_tls) == (port, start_tls)


@pytest.mark.parametrize(
    "url", ["http://x.test", "smtp://", "smtp://x.test/path", "smtp://x.test?tls=1", "smtp://x.test:99999"]
)
def test_a_bad_url_is_a_settings_error_without_the_password(url: str) -> None:
    with pytest.raises(SettingsError) as raised:
        SmtpTarget.parse(url.replace("//", "//user:hidden@", 1))
    assert "hidden" not in str(raised.value)


async def test_the_catcher_keeps_the_last_messages_and_refuses_bounces() -> None:
    catcher = SmtpCatcher(keep=2)
    sender = SmtpSender(url=await catcher.start())
    emails = [make_email(subject=f"Nr. {number} é") for number in range(3)]
    for email in emails:
        await sender.send_email(email, timeout_s=5)
    with pytest.raises(Permanent):
        await sender.send_email(make_email(to=["bounce+1@recipient.test"]), timeout_s=5)
    assert (catcher.count, catcher.refused) == (3, 1)
    assert [caught.nightmail_message for caught in catcher.messages] == [str(e.message_id) for e in emails[1:]]
    assert catcher.messages[-1].message["subject"] == "Nr. 2 é"
    await sender.close()
    await catcher.stop()
