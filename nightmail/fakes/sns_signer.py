"""A stand-in for Amazon SNS: its own key and certificate, and messages signed as SNS signs them.

Written from the description and not from nightmail.rules.sns, so that a mistake there does not agree with itself.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID

from nightmail.errors import Retryable

TOPIC = "arn:aws:sns:eu-west-1:123456789012:nightmail"
CERTIFICATE_URL = "https://sns.eu-west-1.amazonaws.com/SimpleNotificationService-fake.pem"
SUBSCRIBE_URL = "https://sns.eu-west-1.amazonaws.com/?Action=ConfirmSubscription&TopicArn={topic}&Token={token}"


class SnsSigner:
    """Signs for one topic; the certificate is valid from `valid_from` for `valid_days` days."""

    def __init__(
        self, *, topic: str = TOPIC, valid_from: datetime | None = None, valid_days: float = 365, version: str = "2"
    ) -> None:
        self.topic = topic
        self.version = version
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sns.amazonaws.com")])
        start = valid_from or datetime.now(UTC) - timedelta(days=1)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + timedelta(days=valid_days))
            .sign(self._key, hashes.SHA256())
        )
        self.certificate = certificate.public_bytes(serialization.Encoding.PEM)

    def notify(self, message: Any, *, subject: str | None = None, **fields: Any) -> dict[str, Any]:
        """Return a Notification; what is not text is sent as JSON. `fields` replace those of the envelope."""
        text = message if isinstance(message, str) else json.dumps(message)
        extra = {} if subject is None else {"Subject": subject}
        unsubscribe = "https://sns.eu-west-1.amazonaws.com/?Action=Unsubscribe"
        return self._seal({"Type": "Notification", "Message": text, **extra, **fields}, {"UnsubscribeURL": unsubscribe})

    def confirm(self, *, kind: str = "SubscriptionConfirmation", **fields: Any) -> dict[str, Any]:
        """Return a SubscriptionConfirmation, or an UnsubscribeConfirmation."""
        token = uuid4().hex * 4
        body = {
            "Type": kind,
            "Message": f"You have chosen to subscribe to the topic {self.topic}.",
            "Token": token,
            "SubscribeURL": SUBSCRIBE_URL.format(topic=self.topic, token=token),
        }
        return self._seal({**body, **fields}, {})

    def sign(self, envelope: Mapping[str, Any]) -> str:
        """Return the signature that SNS would put on the envelope."""
        names = ["Message", "MessageId"]
        if envelope["Type"] == "Notification":
            names += ["Subject"] if "Subject" in envelope else []
            names += ["Timestamp", "TopicArn", "Type"]
        else:
            names += ["SubscribeURL", "Timestamp", "Token", "TopicArn", "Type"]
        text = "".join(f"{name}\n{envelope[name]}\n" for name in names)
        digest = hashes.SHA1() if envelope["SignatureVersion"] == "1" else hashes.SHA256()  # noqa: S303 - SNS signs so
        return base64.b64encode(self._key.sign(text.encode(), padding.PKCS1v15(), digest)).decode()

    def _seal(self, fields: Mapping[str, Any], unsigned: Mapping[str, Any]) -> dict[str, Any]:
        envelope: dict[str, Any] = {
            "MessageId": str(uuid4()),
            "TopicArn": self.topic,
            "Timestamp": stamp(datetime.now(UTC)),
            "SignatureVersion": self.version,
            "SigningCertURL": CERTIFICATE_URL,
            **fields,
        }
        return {**envelope, "Signature": self.sign(envelope), **unsigned}


class FakeSnsHost:
    """Hands out certificates by URL and notes what was visited; implements ports.SnsHost."""

    def __init__(self, certificates: Mapping[str, bytes]) -> None:
        self.certificates = dict(certificates)
        self.fetched: list[str] = []
        self.visited: list[str] = []
        self.is_away = False

    async def fetch_certificate(self, url: str) -> bytes:
        """Return the certificate. Raises Retryable while it is away, and for an URL it does not have."""
        self.fetched.append(url)
        if self.is_away or url not in self.certificates:
            raise Retryable("connection_failed", "nothing answers there")
        return self.certificates[url]

    async def confirm_subscription(self, url: str) -> None:
        """Note the visit. Raises Retryable while it is away."""
        if self.is_away:
            raise Retryable("connection_failed", "nothing answers there")
        self.visited.append(url)

    async def close(self) -> None:
        """Nothing is open."""


def stamp(moment: datetime) -> str:
    """Return a time as SNS writes it."""
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03}Z"
