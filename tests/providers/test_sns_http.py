"""Amazon SNS as a host: what it may answer, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import pytest

from nightmail.errors import Retryable
from nightmail.fakes.webhook_receiver import Receiver
from nightmail.fakes.webhook_script import Behaviour, head
from nightmail.providers.sns_http import HttpSnsHost
from tests.providers.test_webhook_http import LOOPBACK, on_loopback

pytestmark = pytest.mark.anyio


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as receiver:
        yield receiver


@pytest.fixture
async def sns() -> AsyncIterator[HttpSnsHost]:
    host = HttpSnsHost(LOOPBACK, resolver=on_loopback, limit_s=0.4)
    yield host
    await host.close()
    await host.close()


async def test_sns_gives_certificates_and_confirms(receiver: Receiver, sns: HttpSnsHost) -> None:
    url = receiver.url("/ok/SimpleNotificationService-1.pem?body=PEM").replace("127.0.0.1", "sns.test")
    assert await sns.fetch_certificate(url) == b"PEM"
    await sns.confirm_subscription(receiver.url("/ok?Action=ConfirmSubscription&Token=a%2Bb"))
    assert [request.path for request in receiver.requests] == ["/ok/SimpleNotificationService-1.pem", "/ok"]


@pytest.mark.parametrize(
    "path", ["/status/404", "/status/204", "/redirect?to=/ok", "/endless", "/hang", "/drip-body", "/reset", "/cut"]
)
async def test_sns_that_misbehaves_is_tried_again(receiver: Receiver, sns: HttpSnsHost, path: str) -> None:
    with pytest.raises(Retryable):
        await sns.fetch_certificate(receiver.url(path))
    with pytest.raises(Retryable):
        await sns.confirm_subscription(receiver.url(path))
    # aiohttp repeats a GET whose connection broke; nothing else is asked for
    assert receiver.total == (4 if path == "/reset" else 2)
    assert {request.path for request in receiver.requests} == {path.partition("?")[0]}


async def test_sns_gives_no_more_than_32_kb(receiver: Receiver, sns: HttpSnsHost) -> None:
    sizes = (32 * 1024, 32 * 1024 + 1)
    receiver.behave(
        "/big", *(Behaviour("status", wire=head(200, [("content-length", str(n))]) + b"c" * n) for n in sizes)
    )
    assert await sns.fetch_certificate(receiver.url("/big")) == b"c" * sizes[0]
    with pytest.raises(Retryable, match="more than 32768 bytes"):
        await sns.fetch_certificate(receiver.url("/big"))


async def test_sns_is_not_looked_for_in_private_networks(receiver: Receiver) -> None:
    async def lie(_: str) -> Sequence[str]:
        return ["127.0.0.1"]

    sns = HttpSnsHost(resolver=lie)
    with pytest.raises(Retryable, match="address_refused"):
        await sns.fetch_certificate(f"http://sns.eu-central-1.amazonaws.com:{receiver.port}/ok")
    await sns.close()
    assert receiver.connections == 0
