"""Webhooks by HTTPS: certificates are verified, and the name stays the name although the address was pinned."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from nightmail.fakes.webhook_receiver import Receiver
from nightmail.providers.webhook_http import HttpWebhookSender
from tests.providers.test_webhook_http import LOOPBACK, failure, on_loopback, post

pytestmark = pytest.mark.anyio

KEY_USAGES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip


class Authority:
    """A certificate authority of our own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Night Mail CA")])
        self.certificate = self._sign(self._name, self._key.public_key(), is_authority=True)

    def trusted(self) -> ssl.SSLContext:
        """Return what a client that trusts this authority alone uses."""
        pem = self.certificate.public_bytes(serialization.Encoding.PEM).decode()
        return ssl.create_default_context(cadata=pem)

    def serving(self, host: str, *, days: int = 1) -> ssl.SSLContext:
        """Return what a server of `host` uses, valid until in `days`."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
        certificate = self._sign(name, key.public_key(), host=host, days=days)
        path = self._folder / f"{host}-{days}.pem"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context

    def _sign(
        self, name: x509.Name, key: Any, *, host: str | None = None, days: int = 1, is_authority: bool = False
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=10))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            # Python 3.13 and later refuse certificates that do not name their keys, and authorities without a usage.
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if is_authority:
            usage = dict.fromkeys(KEY_USAGES, False) | {"key_cert_sign": True}
            builder = builder.add_extension(x509.KeyUsage(**usage), critical=True)
        if host is not None:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        return builder.sign(self._key, hashes.SHA256())


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


async def test_https_to_the_right_name(authority: Authority) -> None:
    sender = HttpWebhookSender(LOOPBACK, resolver=on_loopback, tls=authority.trusted())
    asked: list[str | None] = []
    context = authority.serving("hooks.test")
    context.sni_callback = lambda _, name, __: asked.append(name)
    async with Receiver(tls=context) as receiver:
        url = receiver.url().replace("127.0.0.1", "hooks.test")
        assert (await post(sender, url)).status == 200
        assert receiver.requests[0].headers["host"] == f"hooks.test:{receiver.port}"
        await sender.close()
    assert asked == ["hooks.test"]


@pytest.mark.parametrize("fault", ["other name", "unknown authority", "expired", "no TLS at all", "address"])
async def test_https_that_cannot_be_trusted(authority: Authority, fault: str) -> None:
    tls = None if fault == "unknown authority" else authority.trusted()
    sender = HttpWebhookSender(LOOPBACK, resolver=on_loopback, tls=tls)
    serving = authority.serving(
        "other.test" if fault == "other name" else "hooks.test", days=-1 if fault == "expired" else 1
    )
    async with Receiver(tls=None if fault == "no TLS at all" else serving) as receiver:
        host = "127.0.0.1" if fault == "address" else "hooks.test"
        assert await failure(sender, f"https://{host}:{receiver.port}/ok") == "tls"
        assert receiver.total == 0
        await sender.close()
