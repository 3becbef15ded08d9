"""Amazon SNS over HTTP: the envelope, which hosts may be believed, and the signature.

Pure: the certificate comes from the caller. Versions 1 (SHA-1) and 2 (SHA-256) are RSA PKCS #1 v1.5 over some of the
fields, each as `Name\\nvalue\\n`. Source: Amazon SNS developer guide, "Verifying the signatures of Amazon SNS
messages".
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

Kind = Literal["Notification", "SubscriptionConfirmation", "UnsubscribeConfirmation"]

# The Timestamp is when the message was published. A delivery policy may have SNS try for up to an hour after that, and
# what then lies in a dead-letter queue is posted again by people: a bound of an hour would lose events just when we
# were away for long. Replay is no danger within it: sns_notifications remembers for two days.
MAX_AGE = timedelta(hours=24)
MAX_AHEAD = timedelta(minutes=15)

_NOTIFICATION_FIELDS = ("Message", "MessageId", "Subject", "Timestamp", "TopicArn", "Type")
_CONFIRMATION_FIELDS = ("Message", "MessageId", "SubscribeURL", "Timestamp", "Token", "TopicArn", "Type")
SIGNED_FIELDS: dict[Kind, tuple[str, ...]] = {
    "Notification": _NOTIFICATION_FIELDS,
    "SubscriptionConfirmation": _CONFIRMATION_FIELDS,
    "UnsubscribeConfirmation": _CONFIRMATION_FIELDS,
}
_HOST = re.compile(r"sns\.[a-z]{2}(?:-[a-z]+)+-[0-9]{1,2}\.amazonaws\.com(?:\.cn)?")
_MESSAGE_ID = re.compile(r"[A-Za-z0-9-]{1,200}")
_TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,6})?Z")
_PRINTABLE = re.compile(r"[!-~]{1,2048}")


class BadEnvelope(ValueError):
    """The body is no message of SNS; the text says why."""


class NotTrusted(ValueError):
    """The message is well formed and not to be believed; the text says why."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message of SNS, nothing of it believed yet; `subject` None when it has none, so that it is not signed."""

    kind: Kind
    message_id: str
    topic_arn: str
    message: str
    timestamp_text: str
    timestamp: datetime
    signature: bytes
    signature_version: str
    certificate_url: str
    subject: str | None = None
    token: str = ""
    subscribe_url: str = ""


def read_envelope(value: Any) -> Envelope:
    """Return the parsed JSON as an envelope. Raises BadEnvelope."""
    if not isinstance(value, dict):
        raise BadEnvelope("the body is not a JSON object")
    kind = _text(value, "Type")
    if kind not in SIGNED_FIELDS:
        raise BadEnvelope("Type is none of Notification, SubscriptionConfirmation and UnsubscribeConfirmation")
    message_id = _text(value, "MessageId")
    if _MESSAGE_ID.fullmatch(message_id) is None:
        raise BadEnvelope("MessageId is not an id")
    stamp = _text(value, "Timestamp")
    is_confirmation = kind != "Notification"
    return Envelope(
        kind=kind,
        message_id=message_id,
        topic_arn=_text(value, "TopicArn"),
        message=_text(value, "Message"),
        timestamp_text=stamp,
        timestamp=_read_timestamp(stamp),
        signature=_read_signature(_text(value, "Signature")),
        signature_version=_text(value, "SignatureVersion"),
        certificate_url=_text(value, "SigningCertURL"),
        subject=None if value.get("Subject") is None else _line(value, "Subject"),
        token=_line(value, "Token") if is_confirmation else "",
        subscribe_url=_text(value, "SubscribeURL") if is_confirmation else "",
    )


def _text(value: Mapping[str, Any], name: str) -> str:
    found = value.get(name)
    if not isinstance(found, str):
        raise BadEnvelope(f"{name} is missing or not a string")
    return found


def _line(value: Mapping[str, Any], name: str) -> str:
    """Return a text without line ends: with them, the text that is signed could be cut into other fields."""
    found = _text(value, name)
    if not found.isprintable():
        raise BadEnvelope(f"{name} holds characters that cannot be printed")
    return found


def _read_timestamp(text: str) -> datetime:
    if _TIMESTAMP.fullmatch(text) is None:
        raise BadEnvelope("Timestamp is not a time such as 2026-11-23T12:00:00.000Z")
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except ValueError:
        raise BadEnvelope("Timestamp is not a time such as 2026-11-23T12:00:00.000Z") from None


def _read_signature(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise BadEnvelope("Signature is not base64") from None


def is_sns_url(url: str) -> bool:
    """Return whether the URL leads to SNS itself: https, its host exactly, no other port, no user."""
    if _PRINTABLE.fullmatch(url) is None or "\\" in url:
        return False
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    return (
        parts.scheme == "https"
        and port in (None, 443)
        and "@" not in parts.netloc
        and _HOST.fullmatch(parts.netloc.removesuffix(":443")) is not None
    )


# No other spelling of one certificate: each would be fetched and kept as one more.
_CERTIFICATE_PATH = re.compile(r"/[A-Za-z0-9._-]+\.pem")


def is_certificate_url(url: str, *, region: str) -> bool:
    """Return whether a certificate of SNS in the region may be fetched from the URL."""
    if not is_sns_url(url):
        return False
    parts = urlsplit(url)
    return (
        parts.netloc.split(".")[1] == region and _CERTIFICATE_PATH.fullmatch(parts.path) is not None and not parts.query
    )


def _region(topic_arn: str) -> str:
    """Return the region of arn:partition:sns:region:account:name, '' when there is none."""
    return (topic_arn.split(":") + [""] * 4)[3]


def check_envelope(envelope: Envelope, *, topics: tuple[str, ...], now: datetime) -> None:
    """Refuse what can be refused without a certificate: nothing is fetched for a stranger. Raises NotTrusted."""
    if envelope.topic_arn not in topics:
        raise NotTrusted("the topic is not one of SNS_TOPIC_ARNS")
    if not now - MAX_AGE <= envelope.timestamp <= now + MAX_AHEAD:
        raise NotTrusted("the Timestamp is more than 24 hours old or more than 15 minutes ahead")
    if envelope.signature_version not in ("1", "2"):
        raise NotTrusted("the SignatureVersion is neither 1 nor 2")
    if not is_certificate_url(envelope.certificate_url, region=_region(envelope.topic_arn)):
        raise NotTrusted("the SigningCertURL is not one of Amazon SNS in the topic's region")
    if envelope.kind == "SubscriptionConfirmation" and not is_sns_url(envelope.subscribe_url):
        raise NotTrusted("the SubscribeURL is not one of Amazon SNS")


def load_certificate(pem: bytes) -> x509.Certificate:
    """Return the certificate. Raises NotTrusted when it is none, or not for an RSA key."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        key = certificate.public_key()
    except ValueError:
        raise NotTrusted("what lies at SigningCertURL is not a certificate") from None
    if not isinstance(key, RSAPublicKey):
        raise NotTrusted("the certificate at SigningCertURL is not for an RSA key")
    return certificate


def check_signature(envelope: Envelope, certificate: x509.Certificate, *, now: datetime) -> None:
    """Refuse a signature that is not the certificate's, or a certificate outside its time. Raises NotTrusted."""
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise NotTrusted("the certificate at SigningCertURL is expired or not yet valid")
    key = certificate.public_key()
    assert isinstance(key, RSAPublicKey), "load_certificate takes no other"
    # Version 1 is what topics have unless told otherwise; SHA-1 is SNS's choice here, not ours.
    digest = hashes.SHA1() if envelope.signature_version == "1" else hashes.SHA256()  # noqa: S303 - SNS signs so
    try:
        key.verify(envelope.signature, signed_text(envelope), PKCS1v15(), digest)
    except InvalidSignature:
        raise NotTrusted("the signature does not fit the message") from None


def signed_text(envelope: Envelope) -> bytes:
    """Return what SNS signs: the fields of the type in their order, Subject only when there is one."""
    values = {
        "Message": envelope.message,
        "MessageId": envelope.message_id,
        "Subject": envelope.subject,
        "SubscribeURL": envelope.subscribe_url,
        "Timestamp": envelope.timestamp_text,
        "Token": envelope.token,
        "TopicArn": envelope.topic_arn,
        "Type": envelope.kind,
    }
    lines = [f"{name}\n{values[name]}\n" for name in SIGNED_FIELDS[envelope.kind] if values[name] is not None]
    return "".join(lines).encode("utf-8", "surrogatepass")
