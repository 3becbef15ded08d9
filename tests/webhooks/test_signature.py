"""Signatures, judged by the verifiers that customers run, and by vectors known from elsewhere."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping

import pytest
import resend
import standardwebhooks
import svix

from nightmail.webhooks.signature import SECRET_BYTES, new_secret, sign, signature_headers

BODY = '{"type":"message.sent","timestamp":"2026-11-23T12:00:00Z","data":{"subject":"Grüße 😀"}}'.encode()
WEBHOOK_ID = "0198c0de-0000-7000-8000-00000000cafe"

Verify = Callable[[str, bytes, Mapping[str, str]], object]


def _svix(secret: str, body: bytes, headers: Mapping[str, str]) -> object:
    svix.Webhook(secret).verify(body, dict(headers))
    return None


def _standard(secret: str, body: bytes, headers: Mapping[str, str]) -> object:
    return standardwebhooks.Webhook(secret).verify(body, dict(headers))


def _resend(secret: str, body: bytes, headers: Mapping[str, str]) -> object:
    names: dict[str, str] = {name: headers.get(f"svix-{name}", "") for name in ("id", "timestamp", "signature")}
    return resend.Webhooks.verify(
        {
            "payload": body.decode(),
            "headers": {"id": names["id"], "timestamp": names["timestamp"], "signature": names["signature"]},
            "webhook_secret": secret,
        }
    )


def _only(family: str, verify: Verify) -> Verify:
    """Judge by one family of headers, as a receiver sees that knows no other."""
    return lambda secret, body, headers: verify(
        secret, body, {name: value for name, value in headers.items() if name.startswith(family)}
    )


VERIFIERS: dict[str, Verify] = {
    "svix, svix-*": _only("svix-", _svix),
    "svix, webhook-*": _only("webhook-", _svix),
    "standardwebhooks": _standard,
    "resend": _resend,
}
ALL = pytest.mark.parametrize("verify", VERIFIERS.values(), ids=VERIFIERS)


def signed(*secrets: str, offset_s: int = 0, body: bytes = BODY) -> dict[str, str]:
    """Return the headers of an attempt now."""
    return signature_headers(secrets, webhook_id=WEBHOOK_ID, timestamp=int(time.time()) + offset_s, body=body)


@ALL
def test_one_secret(verify: Verify) -> None:
    secret = new_secret()
    verify(secret, BODY, signed(secret))


@ALL
def test_during_a_rotation_each_secret_alone_verifies(verify: Verify) -> None:
    new, old = new_secret(), new_secret()
    headers = signed(new, old)
    verify(new, BODY, headers)
    verify(old, BODY, headers)
    with pytest.raises(Exception, match=r"(?i)signature"):
        verify(new_secret(), BODY, headers)
    with pytest.raises(Exception, match=r"(?i)signature"):
        verify(old, BODY, signed(new))


@ALL
@pytest.mark.parametrize("tampered", ["body", "id", "timestamp", "signature"])
def test_what_was_changed_under_way_is_refused(verify: Verify, tampered: str) -> None:
    secret = new_secret()
    headers = signed(secret)
    body = BODY
    if tampered == "body":
        body = BODY.replace(b"sent", b"went")
    for family in ("webhook", "svix"):
        name = f"{family}-{tampered}"
        if tampered == "id":
            headers[name] += "0"
        elif tampered == "timestamp":
            headers[name] = str(int(headers[name]) + 1)
        elif tampered == "signature":
            headers[name] = "v1," + base64.b64encode(bytes(32)).decode()
    with pytest.raises(Exception, match=r"(?i)signature"):
        verify(secret, body, headers)


@ALL
@pytest.mark.parametrize("offset_s", [-301, 302])
def test_too_old_and_too_new_is_refused(verify: Verify, offset_s: int) -> None:
    secret = new_secret()
    with pytest.raises(Exception, match=r"(?i)timestamp"):
        verify(secret, BODY, signed(secret, offset_s=offset_s))


@ALL
@pytest.mark.parametrize("offset_s", [-290, 290])
def test_five_minutes_either_way_are_accepted(verify: Verify, offset_s: int) -> None:
    secret = new_secret()
    verify(secret, BODY, signed(secret, offset_s=offset_s))


@pytest.mark.parametrize(
    ("secret", "webhook_id", "timestamp", "body", "signature"),
    [
        # the example of Svix's documentation, "verifying payloads manually"
        (
            "whsec_plJ3nmyCDGBKInavdOK15jsl",
            "msg_loFOjxBNrRLzqYUf",
            1731705121,
            b'{"event_type":"ping","data":{"success":true}}',
            "v1,rAvfW3dJ/X/qxhsaXPOyyCGmRKsaKWcsNccKXlIktD0=",
        ),
        # the "sign function works" test that the libraries of Standard Webhooks share
        (
            "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            1614265330,
            b'{"test": 2432232314}',
            "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
        ),
    ],
)
def test_known_answers(secret: str, webhook_id: str, timestamp: int, body: bytes, signature: str) -> None:
    assert sign(secret, webhook_id=webhook_id, timestamp=timestamp, body=body) == signature
    headers = signature_headers([secret, secret], webhook_id=webhook_id, timestamp=timestamp, body=body)
    values = {"id": webhook_id, "timestamp": str(timestamp), "signature": f"{signature} {signature}"}
    assert headers == {f"{family}-{name}": value for family in ("svix", "webhook") for name, value in values.items()}


def test_secrets_are_whsec_and_32_bytes_and_fresh() -> None:
    secrets = {new_secret() for _ in range(100)}
    assert len(secrets) == 100
    for secret in secrets:
        prefix, encoded = secret[:6], secret[6:]
        assert prefix == "whsec_"
        assert len(base64.b64decode(encoded, validate=True)) == SECRET_BYTES == 32
