"""The contract of a sender, run over every real adapter against the fake provider on loopback."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from nightmail.errors import InDoubt, Permanent, ProviderError, Retryable, Throttled
from nightmail.fakes.smtp_server import reset
from tests.providers.conftest import ADAPTERS, Adapter, FakeProviderProcess, make_sender

pytestmark = pytest.mark.anyio

# behaviour → class over HTTP, class over SMTP
OUTCOMES: dict[str, tuple[type[ProviderError], type[ProviderError]]] = {
    "throttle": (Throttled, Throttled),
    "quota": (Throttled, Throttled),
    "paused": (Throttled, Throttled),
    "credentials": (Throttled, Throttled),
    "reject": (Permanent, Permanent),
    "denied": (Permanent, Permanent),
    "tempfail": (InDoubt, Retryable),
    "fail5xx": (InDoubt, Retryable),
    "fail5xx-after-accept": (InDoubt, InDoubt),
    "reset-before": (InDoubt, Retryable),
    "reset-after": (InDoubt, InDoubt),
    "garbage": (InDoubt, InDoubt),
    "empty": (InDoubt, InDoubt),
}


async def test_an_accepted_message_is_taken_once_under_our_id(adapter: Adapter) -> None:
    accepted = await adapter.send()
    (taken,) = adapter.fake.taken(adapter.recipient)
    assert taken["message_id"] == str(adapter.message_id)
    assert taken["service"] == adapter.name
    assert taken["channel"] == ("email" if adapter.is_email else "sms")
    if adapter.name == "smtp":
        assert accepted.provider_message_id == f"{adapter.message_id}@sender.test"
    else:
        assert accepted.provider_message_id == taken["provider_message_id"]
    assert accepted.detail == {}


@pytest.mark.parametrize("behaviour", OUTCOMES)
async def test_each_answer_has_its_outcome_class_after_one_request(adapter: Adapter, behaviour: str) -> None:
    over_http, over_smtp = OUTCOMES[behaviour]
    with pytest.raises(ProviderError) as raised:
        await adapter.send(behaviour)
    assert type(raised.value) is (over_smtp if adapter.name == "smtp" else over_http)
    assert raised.value.code
    assert len(adapter.fake.attempts(adapter.recipient)) == 1


@pytest.mark.parametrize("behaviour", ["paused", "credentials"])
async def test_what_stops_the_account_parks_the_channel(adapter: Adapter, behaviour: str) -> None:
    with pytest.raises(Throttled) as raised:
        await adapter.send(behaviour)
    assert (raised.value.code, raised.value.retry_after_s) == ("channel_stopped", 600.0)


async def test_a_used_up_quota_waits_ten_minutes_and_a_rate_does_not(adapter: Adapter) -> None:
    with pytest.raises(Throttled) as raised:
        await adapter.send("quota")
    assert raised.value.retry_after_s == 600.0
    with pytest.raises(Throttled) as raised:
        await adapter.send("throttle")
    assert raised.value.code == "throttled"
    assert raised.value.retry_after_s is None


@pytest.mark.parametrize("behaviour", ["hang", "hang-after-accept", "slow", "drip"])
async def test_a_late_answer_is_in_doubt_within_the_timeout(adapter: Adapter, behaviour: str) -> None:
    started = time.monotonic()
    with pytest.raises(InDoubt):
        await adapter.send(behaviour, timeout_s=0.4)
    assert time.monotonic() - started < 1.0
    assert len(adapter.fake.attempts(adapter.recipient)) == 1


async def test_the_next_call_works_after_each_kind_of_failure(adapter: Adapter) -> None:
    for behaviour in ("reset-after", "garbage", "hang", "reject"):
        with pytest.raises(ProviderError):
            await adapter.send(behaviour, timeout_s=0.3)
        await adapter.send()


async def test_once_scripted_failures_pass(adapter: Adapter) -> None:
    recipient = adapter.recipient_for("throttle", once=True)
    with pytest.raises(Throttled):
        await adapter.send(recipient=recipient)
    await adapter.send(recipient=recipient)


async def test_no_more_calls_run_at_once_than_allowed(adapter: Adapter) -> None:
    adapter.fake.follow(latency_ms=150)
    begin = time.time()
    recipients = [adapter.recipient_for("ok") for _ in range(12)]
    await asyncio.gather(*(adapter.send(recipient=recipient) for recipient in recipients))
    starts = sorted(adapter.fake.attempts(recipient)[0]["at"] - begin for recipient in recipients)
    # Any 130 ms see at most 4 of the 12 begin, and 12 calls need three rounds.
    for index in range(len(starts) - 4):
        assert starts[index + 4] - starts[index] > 0.13
    assert time.time() - begin >= 0.45


async def test_a_call_that_never_got_its_turn_was_not_written(adapter: Adapter) -> None:
    adapter.fake.follow(slow_ms=1500)
    busy = [asyncio.create_task(adapter.send("slow")) for _ in range(4)]
    await asyncio.sleep(0.2)
    waiting = Adapter(adapter.name, adapter.fake, adapter.sender)
    with pytest.raises(Retryable):
        await waiting.send(timeout_s=0.2)
    assert adapter.fake.attempts(waiting.recipient) == []
    await asyncio.gather(*busy)


@pytest.mark.parametrize("name", ADAPTERS)
async def test_a_refused_connection_was_not_written(name: str) -> None:
    port = _closed_port()
    sender = make_sender(name, http_url=f"http://127.0.0.1:{port}", smtp_url=f"smtp://127.0.0.1:{port}")
    with pytest.raises(Retryable) as raised:
        await Adapter(name, _no_fake(), sender).send(recipient=_recipient(name))
    assert raised.value.code == "connect_failed"
    await sender.close()


@pytest.mark.parametrize("name", ADAPTERS)
async def test_an_unknown_host_was_not_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def unknown_too(*_: object, **__: object) -> None:
        unknown()

    sender = make_sender(name, http_url="http://nowhere.invalid", smtp_url="smtp://nowhere.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(asyncio.get_running_loop().__class__, "create_connection", unknown_too, raising=True)
    with pytest.raises(Retryable):
        await Adapter(name, _no_fake(), sender).send(recipient=_recipient(name))
    await sender.close()


@pytest.mark.parametrize("name", ADAPTERS)
async def test_a_server_without_tls_was_not_written_to(name: str, fake: FakeProviderProcess) -> None:
    sender = make_sender(
        name,
        http_url=fake.http_url.replace("http:", "https:"),
        smtp_url=fake.smtp_url.replace("smtp:", "smtps:"),
    )
    with pytest.raises(Retryable):
        await Adapter(name, fake, sender).send(recipient=_recipient(name), timeout_s=2.0)
    await sender.close()


@pytest.mark.parametrize("name", ADAPTERS)
async def test_a_reset_during_the_handshake_was_not_written_to(name: str) -> None:
    async with _resetting_server() as port:
        sender = make_sender(name, http_url=f"https://127.0.0.1:{port}", smtp_url=f"smtps://127.0.0.1:{port}")
        with pytest.raises(Retryable):
            await Adapter(name, _no_fake(), sender).send(recipient=_recipient(name))
        await sender.close()


@pytest.mark.parametrize("name", ["ses", "aws_sms", "sns"])
async def test_a_reset_without_tls_is_in_doubt_because_botocore_cannot_tell(name: str) -> None:
    async with _resetting_server() as port:
        sender = make_sender(name, http_url=f"http://127.0.0.1:{port}", smtp_url="")
        with pytest.raises(InDoubt):
            await Adapter(name, _no_fake(), sender).send(recipient=_recipient(name))
        await sender.close()


async def test_a_canceled_call_leaves_the_adapter_usable(adapter: Adapter) -> None:
    for _ in range(4):
        call = asyncio.create_task(adapter.send("slow"))
        await asyncio.sleep(0.1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    await asyncio.sleep(0.6)
    await adapter.send()


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _recipient(name: str) -> str:
    return "someone@recipient.test" if name in ("ses", "smtp") else "+15551230000"


def _no_fake() -> FakeProviderProcess:
    return None  # type: ignore[return-value]  # these tests never reach the fake


@asynccontextmanager
async def _resetting_server() -> AsyncIterator[int]:
    async def read_and_reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        reset(writer.transport)

    server = await asyncio.start_server(read_and_reset, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
