"""The envelope of SNS: what is believed, and that every field of it is under the signature."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from nightmail.fakes.sns_signer import CERTIFICATE_URL, TOPIC, SnsSigner, stamp
from nightmail.rules import sns
from nightmail.rules.sns import BadEnvelope, NotTrusted

NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def signer() -> SnsSigner:
    return SnsSigner()


def believe(signer: SnsSigner, body: Any, *, now: datetime = NOW) -> sns.Envelope:
    """Do what the endpoint does."""
    envelope = sns.read_envelope(body)
    sns.check_envelope(envelope, topics=(TOPIC,), now=now)
    sns.check_signature(envelope, sns.load_certificate(signer.certificate), now=now)
    return envelope


@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize("kind", ["plain", "subject", "SubscriptionConfirmation", "UnsubscribeConfirmation"])
def test_what_sns_signs_is_believed(signer: SnsSigner, version: str, kind: str) -> None:
    if kind == "plain":
        body = signer.notify({"a": "ä\n"}, SignatureVersion=version)
    elif kind == "subject":
        body = signer.notify("text", subject="Amazon SES Email Event Notification", SignatureVersion=version)
    else:
        body = signer.confirm(kind=kind, SignatureVersion=version)
    envelope = believe(signer, body)
    assert (envelope.message, envelope.signature_version) == (body["Message"], version)


@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize("kind", ["Notification", "SubscriptionConfirmation"])
def test_every_signed_field_is_under_the_signature(signer: SnsSigner, version: str, kind: str) -> None:
    common = {
        "Message": "y",
        "MessageId": "00000000-0000-0000-0000-000000000000",
        "Timestamp": stamp(NOW - timedelta(minutes=1)),
        "SignatureVersion": "2" if version == "1" else "1",
    }
    if kind == "Notification":
        body = signer.notify("x", subject="s", SignatureVersion=version)
        changes = {**common, "Subject": "t"}
        added = {name: value for name, value in body.items() if name != "Subject"}
    else:
        body = signer.confirm(SignatureVersion=version)
        changes = {**common, "Token": "t", "SubscribeURL": CERTIFICATE_URL, "Type": "UnsubscribeConfirmation"}
        added = {**body, "Signature": SnsSigner().sign(body)}
    for altered in (*({**body, name: value} for name, value in changes.items()), added):
        with pytest.raises(NotTrusted, match="signature does not fit"):
            believe(signer, altered)
    with pytest.raises(NotTrusted, match="SNS_TOPIC_ARNS"):
        believe(signer, {**body, "TopicArn": TOPIC + "2"})
    assert believe(signer, body)


@pytest.mark.parametrize(
    "url",
    [
        "https://sns.evil.com/a.pem",
        "https://sns.eu-west-1.amazonaws.com.evil.com/a.pem",
        "https://evil.com/sns.eu-west-1.amazonaws.com/a.pem",
        "https://user@sns.eu-west-1.amazonaws.com/a.pem",
        "https://sns.eu-west-1.amazonaws.com/%61.pem",
        "https://sns.eu-west-1.amazonaws.com/x/../a.pem",
        "https://sns.eu-west-1.amazonaws.com@evil.com/a.pem",
        "https://sns.eu-west-1.amazonaws.com\\@evil.com/a.pem",
        "https://sns.eu-west-1.amazonaws.com:8443/a.pem",
        "https://sns.eu-west-1.amazonaws.com:/a.pem",
        "https://sns.eu-west-1.amazonaws.com:x/a.pem",
        "http://sns.eu-west-1.amazonaws.com/a.pem",
        "//sns.eu-west-1.amazonaws.com/a.pem",
        "https://sns.eu-west-1.amazonaws.com/a.txt",
        "https://sns.eu-west-1.amazonaws.com/a?x=.pem",
        "https://sns.eu-west-1.amazonaws.com/a.pem?x=1",
        "https://sns.eu-west-1.amazonaws.com.cn.evil.com/a.pem",
        "https://sns.eu-west-1.amazonaws.comx/a.pem",
        "https://xsns.eu-west-1.amazonaws.com/a.pem",
        "https://sns..amazonaws.com/a.pem",
        "https://sns.amazonaws.com/a.pem",
        "https://sns.eu-west-1.evil.amazonaws.com/a.pem",
        "https://s3.eu-west-1.amazonaws.com/a.pem",
        "https://sns.eu-west-2.amazonaws.com/a.pem",
        "https://sns.eu-west-1\n.amazonaws.com/a.pem",
        "https://sns.eu-west-1.amazonaws.com/a\t.pem",
        "https://SNS.eu-west-1.amazonaws.com/a.pem",
        "https://[::1]/a.pem",
        "https://[/a.pem",
        "",
    ],
)
def test_no_other_host_gives_certificates(signer: SnsSigner, url: str) -> None:
    assert not sns.is_certificate_url(url, region="eu-west-1")
    with pytest.raises(NotTrusted, match="SigningCertURL"):
        believe(signer, signer.notify("x", SigningCertURL=url))


@pytest.mark.parametrize(
    ("region", "host"),
    [
        ("us-east-1", "sns.us-east-1.amazonaws.com"),
        ("us-gov-west-1", "sns.us-gov-west-1.amazonaws.com:443"),
        ("cn-north-1", "sns.cn-north-1.amazonaws.com.cn"),
    ],
)
def test_sns_hosts_are_known(region: str, host: str) -> None:
    assert sns.is_certificate_url(f"https://{host}/SimpleNotificationService-a.pem", region=region)


def test_a_signed_message_cannot_be_cut_into_another(signer: SnsSigner) -> None:
    body = signer.notify('{"a":1}\nMessageId\nfake-id\nSubject\nZ')
    subject = f"Z\nMessageId\n{body['MessageId']}"
    forged = {**body, "Message": '{"a":1}', "MessageId": "fake-id", "Subject": subject}
    assert signer.sign(forged) == body["Signature"], "the same text is signed"
    with pytest.raises(BadEnvelope, match="Subject"):
        believe(signer, forged)
    with pytest.raises(BadEnvelope, match="Token"):
        believe(signer, signer.confirm(Token="a\nTopicArn\nb"))


def test_a_confirmation_leads_to_sns_only(signer: SnsSigner) -> None:
    with pytest.raises(NotTrusted, match="SubscribeURL"):
        believe(signer, signer.confirm(SubscribeURL="https://sns.eu-west-1.amazonaws.com.evil.com/?Token=x"))


@pytest.mark.parametrize(("age", "believed"), [(23.9, True), (24.1, False), (-0.2, True), (-0.3, False)])
def test_the_time_bounds(signer: SnsSigner, age: float, believed: bool) -> None:
    body = signer.notify("x", Timestamp=stamp(NOW - timedelta(hours=age)))
    if believed:
        believe(signer, body)
    else:
        with pytest.raises(NotTrusted, match="Timestamp"):
            believe(signer, body)


@pytest.mark.parametrize("start", [timedelta(days=-10), timedelta(days=1)])
def test_a_certificate_outside_its_time_is_refused(start: timedelta) -> None:
    signer = SnsSigner(valid_from=NOW + start, valid_days=5)
    with pytest.raises(NotTrusted, match="expired or not yet valid"):
        believe(signer, signer.notify("x"))


@pytest.mark.parametrize("pem", [b"", b"<html>", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_what_is_no_certificate_is_refused(pem: bytes) -> None:
    with pytest.raises(NotTrusted, match="not a certificate"):
        sns.load_certificate(pem)


@pytest.mark.parametrize(
    "name", sorted({*sns.SIGNED_FIELDS["SubscriptionConfirmation"], "Signature", "SigningCertURL"})
)
@pytest.mark.parametrize("value", [None, 1, [], {}, True])
def test_a_field_that_is_no_text_is_malformed(signer: SnsSigner, name: str, value: Any) -> None:
    with pytest.raises(BadEnvelope):
        sns.read_envelope({**signer.confirm(), name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Type", "Other"),
        ("MessageId", ""),
        ("MessageId", "a b"),
        ("MessageId", "x" * 201),
        ("Timestamp", "yesterday"),
        ("Timestamp", "2026-13-01T00:00:00.000Z"),
        ("Timestamp", "2026-01-01T00:00:00.000+02:00"),
        ("Signature", "no base64!"),
    ],
)
def test_unusable_fields_are_malformed(signer: SnsSigner, name: str, value: str) -> None:
    with pytest.raises(BadEnvelope):
        sns.read_envelope({**signer.confirm(), name: value})


@pytest.mark.parametrize("body", [None, [], "x", 1])
def test_what_is_no_object_is_malformed(body: Any) -> None:
    with pytest.raises(BadEnvelope):
        sns.read_envelope(body)
