"""What only the AWS adapters have: threads, tags, configuration from the environment."""

from __future__ import annotations

import asyncio
import base64
import time
from email import message_from_bytes, policy
from typing import Any

import pytest
from botocore.exceptions import ClientError, NoCredentialsError, ReadTimeoutError

from nightmail.errors import InDoubt, NotConfigured, Permanent, ProviderError, Retryable, Throttled
from nightmail.ids import new_id
from nightmail.ports import Attachment
from nightmail.providers.aws import BoundedCalls, aws_session, outcome_of
from nightmail.providers.aws_sms import AwsSmsSender
from nightmail.providers.capture import CaptureSender
from nightmail.providers.ses import SesSender
from nightmail.providers.sns import SnsSender
from tests.providers.conftest import REGION, FakeProviderProcess, make_email, make_sms

pytestmark = pytest.mark.anyio


async def test_ses_sends_the_built_message_and_tags(fake: FakeProviderProcess, ses: SesSender) -> None:
    image = Attachment("logo.png", b"\x89PNG", "image/png", content_id="logo")
    email = make_email(
        to=["Ünal <tagged@recipient.test>"],
        bcc=["hidden@bücher.test"],
        subject="Grüße 😀",
        headers=[("List-Unsubscribe", "<https://x.test/u>")],
        attachments=[image],
        tags=[("campaign", "märz 1"), ("nightmail_message", "forged"), ("empty", "")],
    )
    await ses.send_email(email, timeout_s=5)
    kept = fake.kept(email.message_id)
    assert kept["recipients"] == ["tagged@recipient.test", "hidden@xn--bcher-kva.test"]
    assert kept["tags"] == {"nightmail_message": str(email.message_id), "campaign": "m_rz_1"}
    message = message_from_bytes(base64.b64decode(kept["content"]), policy=policy.default)
    assert message["subject"] == "Grüße 😀"
    assert message["x-nightmail-message"] == str(email.message_id)
    assert message["list-unsubscribe"] == "<https://x.test/u>"
    assert "hidden" not in str(message)
    (taken,) = fake.taken("tagged@recipient.test")
    assert taken["subject"] == "Grüße 😀"


async def test_ses_takes_no_non_ascii_local_part(ses: SesSender) -> None:
    with pytest.raises(Permanent):
        await ses.send_email(make_email(to=["jürgen@recipient.test"]), timeout_s=5)


async def test_a_bad_header_never_reaches_the_provider(fake: FakeProviderProcess, ses: SesSender) -> None:
    before = fake.get("/_log/summary")["requests"]
    with pytest.raises(Permanent):
        await ses.send_email(make_email(subject="a\r\nBcc: evil@evil.test"), timeout_s=5)
    assert fake.get("/_log/summary")["requests"] == before


async def test_sms_carries_origination_and_context(fake: FakeProviderProcess) -> None:
    sender = AwsSmsSender(region=REGION, endpoint_url=fake.http_url, origination_identity="+15550001111")
    sms = make_sms(body="Grüße", tags=[("flow", " login "), ("with space", "x"), *((f"t{n}", "v") for n in range(9))])
    await sender.send_sms(sms, timeout_s=5)
    kept = fake.kept(sms.message_id)
    assert base64.b64decode(kept["content"]).decode() == "Grüße"
    assert kept["tags"]["origination_identity"] == "+15550001111"
    assert kept["tags"]["nightmail_message"] == str(sms.message_id)
    assert (kept["tags"]["flow"], kept["tags"]["with_space"]) == ("login", "x")
    await sender.close()


@pytest.mark.parametrize(
    ("sender_id", "attribute"),
    [("NightMail", "AWS.SNS.SMS.SenderID"), ("+15550001111", "AWS.MM.SMS.OriginationNumber")],
)
async def test_sns_names_the_sender(fake: FakeProviderProcess, sender_id: str, attribute: str) -> None:
    sender = SnsSender(region=REGION, endpoint_url=fake.http_url)
    sms = make_sms(sender=sender_id)
    await sender.send_sms(sms, timeout_s=5)
    tags = fake.kept(sms.message_id)["tags"]
    assert tags == {"AWS.SNS.SMS.SMSType": "Transactional", attribute: sender_id}
    await sender.close()


@pytest.mark.parametrize("kind", [SesSender, AwsSmsSender, SnsSender])
def test_a_missing_region_or_key_is_not_configured(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotConfigured) as raised:
        kind(region=None)
    assert raised.value.missing == ["AWS_REGION"]
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(NotConfigured) as raised:
        kind(region=REGION)
    assert raised.value.missing == ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]


@pytest.mark.parametrize("variable", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_the_region_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "eu-north-1")
    session, region = aws_session(None)
    assert (session.region_name, region) == ("eu-north-1", "eu-north-1")


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_SESV2"])
async def test_the_endpoint_comes_from_the_environment(
    fake: FakeProviderProcess, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, fake.http_url)
    sender = SesSender(region=REGION)
    assert (await sender.send_email(make_email(), timeout_s=5)).provider_message_id
    await sender.close()


async def test_dead_threads_are_bounded_and_then_calls_are_refused(fake: FakeProviderProcess) -> None:
    fake.follow(drip_ms=100)
    sender = SesSender(region=REGION, endpoint_url=fake.http_url, concurrency=2)
    for number in range(2):
        with pytest.raises(InDoubt):
            await sender.send_email(make_email(to=[f"drip+dead{number}@recipient.test"]), timeout_s=0.2)
    with pytest.raises(Retryable) as raised:
        await sender.send_email(make_email(), timeout_s=1)
    assert raised.value.code == "threads_busy"
    await sender.close()


async def test_a_hanging_answer_frees_its_thread_by_the_read_timeout_of_the_call(
    fake: FakeProviderProcess,
) -> None:
    sender = SesSender(region=REGION, endpoint_url=fake.http_url, concurrency=1, timeout_s=10)
    with pytest.raises(InDoubt):
        await sender.send_email(make_email(to=["hang+freed@recipient.test"]), timeout_s=0.3)
    async with asyncio.timeout(2):
        while sender._calls.overrunning:
            await asyncio.sleep(0.01)
    await sender.send_email(make_email(), timeout_s=5)
    await sender.close()


async def test_a_call_given_up_before_it_was_written_is_never_written() -> None:
    calls = BoundedCalls(provider="test", concurrency=1)
    written: list[str] = []

    def slow_to_begin() -> dict[str, Any]:
        time.sleep(0.3)
        calls._before_send()
        written.append("written")
        return {}

    with pytest.raises(Retryable):
        await calls.run(slow_to_begin, message_id=new_id(), timeout_s=0.1)
    assert calls.overrunning == 1
    await asyncio.sleep(0.4)
    assert (calls.overrunning, written) == (0, [])
    await calls.close()


def client_error(status: int, code: str, message: str = "", **more: Any) -> ClientError:
    metadata = {"HTTPStatusCode": status, "HTTPHeaders": more.pop("headers", {})}
    answer: Any = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": metadata, **more}
    return ClientError(answer, "SendEmail")


@pytest.mark.parametrize(
    ("error", "outcome", "code"),
    [
        (client_error(400, "Throttling"), Throttled, "throttled"),
        (client_error(400, "LimitExceededException"), Throttled, "throttled"),
        (client_error(429, "429"), Throttled, "throttled"),
        (client_error(400, "Whatever", "Maximum sending rate exceeded"), Throttled, "throttled"),
        (client_error(400, "ThrottlingException", "Daily message quota exceeded"), Throttled, "daily_quota"),
        (client_error(400, "AccountSuspendedException"), Throttled, "channel_stopped"),
        (client_error(403, "ExpiredTokenException"), Throttled, "channel_stopped"),
        (client_error(400, "AccessDeniedException", Reason="ACCOUNT_DISABLED"), Throttled, "channel_stopped"),
        (client_error(403, "AccessDeniedException"), Permanent, "AccessDeniedException"),
        (
            client_error(400, "MailFromDomainNotVerifiedException"),
            Permanent,
            "MailFromDomainNotVerifiedException",
        ),
        (client_error(400, "ConflictException", Reason="OPTED_OUT"), Permanent, "OPTED_OUT"),
        (client_error(404, "404"), Permanent, "http_404"),
        (client_error(408, "RequestTimeout"), InDoubt, "http_408"),
        (client_error(503, "ServiceUnavailable"), InDoubt, "http_503"),
        (client_error(307, "307"), Retryable, "http_307"),
        (NoCredentialsError(), Throttled, "channel_stopped"),
        (ReadTimeoutError(endpoint_url="x"), InDoubt, "read_timeout"),
        (RuntimeError("what?"), InDoubt, "unreadable_answer"),
    ],
)
def test_each_botocore_error_has_its_outcome(error: Exception, outcome: type[ProviderError], code: str) -> None:
    mapped = outcome_of(error, is_sent=True)
    assert (type(mapped), mapped.code) == (outcome, code)


def test_retry_after_is_taken_over_and_bounded() -> None:
    for header, expected in (("7", 7.0), ("999999", 3600.0), ("Mon, 23 Nov 2026 04:00:00 GMT", None)):
        mapped = outcome_of(client_error(429, "429", headers={"retry-after": header}), is_sent=True)
        assert isinstance(mapped, Throttled)
        assert mapped.retry_after_s == expected


async def test_capture_takes_everything_and_sends_nothing() -> None:
    sender, email, sms = CaptureSender(), make_email(), make_sms()
    assert (await sender.send_email(email, timeout_s=1)).provider_message_id == f"capture_{email.message_id}"
    assert (await sender.send_sms(sms, timeout_s=1)).provider_message_id == f"capture_{sms.message_id}"
    await sender.close()
