"""The fake provider as a process of its own, and each real adapter pointed at it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from nightmail.fakes.script import Behaviour
from nightmail.ids import new_claim_id, new_id
from nightmail.ports import Accepted, OutgoingEmail, OutgoingSms
from nightmail.providers.aws_sms import AwsSmsSender
from nightmail.providers.ses import SesSender
from nightmail.providers.smtp import SmtpSender
from nightmail.providers.sns import SnsSender

REGION = "eu-central-1"
AWS_VARIABLES = {
    "AWS_ACCESS_KEY_ID": "AKIAFAKEFAKEFAKEFAKE",
    "AWS_SECRET_ACCESS_KEY": "not a secret",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}


@pytest.fixture(autouse=True)
def _aws_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in AWS_VARIABLES.items():
        monkeypatch.setenv(name, value)


@dataclass
class FakeProviderProcess:
    """A running fake provider."""

    process: subprocess.Popen[str]
    http_url: str
    smtp_url: str
    log: Path
    attempts_log: Path
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def attempts(self, recipient: str) -> list[dict[str, Any]]:
        """Requests that named the recipient, refused ones too."""
        lines = map(json.loads, self.attempts_log.read_text().splitlines())
        return [line for line in lines if recipient in line["recipients"]]

    def taken(self, recipient: str) -> list[dict[str, Any]]:
        """Messages taken for the recipient."""
        return [line for line in map(json.loads, self.log.read_text().splitlines()) if recipient in line["recipients"]]

    def get(self, path: str) -> Any:
        """GET a control path."""
        with urllib.request.urlopen(self.http_url + path, timeout=5) as answer:
            return json.load(answer)

    def kept(self, message_id: UUID) -> dict[str, Any]:
        """The newest kept message with this id."""
        messages: list[dict[str, Any]] = self.get(f"/_log/messages?id={message_id}")
        return messages[-1]

    def follow(self, **script: Any) -> None:
        """Replace the script."""
        body = json.dumps(script).encode()
        urllib.request.urlopen(f"{self.http_url}/_script", data=body, timeout=5).close()

    def stop(self) -> int:
        """End the process and return its exit code."""
        self.process.terminate()
        code = self.process.wait(timeout=5)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


def start_fake_provider(folder: Path, *arguments: str) -> FakeProviderProcess:
    """Start `python -m nightmail.fakes.provider_server` and wait until it is ready."""
    log, attempts_log = folder / "taken.jsonl", folder / "attempts.jsonl"
    command = [
        sys.executable,
        "-m",
        "nightmail.fakes.provider_server",
        "--log",
        str(log),
        "--exit-with-parent",
    ]
    command += ["--attempts-log", str(attempts_log), "--keep", "300", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    ready, http_url, smtp_url = process.stdout.readline().split()
    assert ready == "ready"
    return FakeProviderProcess(process, http_url, smtp_url, log, attempts_log)


@pytest.fixture(scope="session")
def fake_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeProviderProcess]:
    """One fake provider for all contract tests."""
    fake = start_fake_provider(tmp_path_factory.mktemp("fake_provider"))
    yield fake
    assert fake.stop() == 0


@pytest.fixture
def fake(fake_session: FakeProviderProcess) -> FakeProviderProcess:
    """The fake provider with the plain script, `slow` shortened to what tests need."""
    fake_session.follow(slow_ms=600)
    return fake_session


def make_email(**fields: Any) -> OutgoingEmail:
    """An email with everything filled in."""
    defaults: dict[str, Any] = {
        "message_id": new_id(),
        "org_id": new_id(),
        "claim_id": new_claim_id(),
        "sender": "Night Mail <post@sender.test>",
        "to": ["someone@recipient.test"],
        "cc": [],
        "bcc": [],
        "reply_to": [],
        "subject": "Crossing the border",
        "html": "<p>Bringing the cheque and the postal order</p>",
        "text": "Bringing the cheque and the postal order",
    }
    return OutgoingEmail(**{**defaults, **fields})


def make_sms(**fields: Any) -> OutgoingSms:
    """An SMS with everything filled in."""
    defaults: dict[str, Any] = {
        "message_id": new_id(),
        "org_id": new_id(),
        "claim_id": new_claim_id(),
        "sender": None,
        "to": "+15551230000",
        "body": "Letters for the rich, letters for the poor",
    }
    return OutgoingSms(**{**defaults, **fields})


Sender = SesSender | AwsSmsSender | SnsSender | SmtpSender


@dataclass
class Adapter:
    """One adapter behind one face, so that a single suite runs over all of them."""

    name: str
    fake: FakeProviderProcess
    sender: Sender
    recipient: str = ""
    message_id: UUID | None = None

    @property
    def is_email(self) -> bool:
        """True for SES and SMTP."""
        return self.name in ("ses", "smtp")

    def recipient_for(self, behaviour: str, *, once: bool = False) -> str:
        """A fresh recipient that makes the fake provider behave so."""
        number = next(self.fake.numbers)
        if self.is_email:
            return f"{behaviour}{'-once' if once else ''}+{number}@recipient.test"
        code = list(Behaviour).index(Behaviour(behaviour))
        return f"+1555{number % 1000:03}9{int(once)}{code:02}"

    async def send(self, behaviour: str = "ok", *, recipient: str | None = None, timeout_s: float = 5.0) -> Accepted:
        """Send to a recipient with that behaviour; remembers recipient and message id."""
        self.recipient = recipient or self.recipient_for(behaviour)
        self.message_id = new_id()
        if isinstance(self.sender, SesSender | SmtpSender):
            email = make_email(message_id=self.message_id, to=[self.recipient])
            return await self.sender.send_email(email, timeout_s=timeout_s)
        sms = make_sms(message_id=self.message_id, to=self.recipient)
        return await self.sender.send_sms(sms, timeout_s=timeout_s)


ADAPTERS = ("ses", "aws_sms", "sns", "smtp")


def make_sender(name: str, *, http_url: str, smtp_url: str, concurrency: int = 4) -> Sender:
    """Build a real adapter for these endpoints."""
    if name == "smtp":
        return SmtpSender(url=smtp_url, concurrency=concurrency)
    if name == "ses":
        return SesSender(region=REGION, endpoint_url=http_url, concurrency=concurrency)
    if name == "aws_sms":
        return AwsSmsSender(region=REGION, endpoint_url=http_url, concurrency=concurrency)
    return SnsSender(region=REGION, endpoint_url=http_url, concurrency=concurrency)


@pytest.fixture(params=ADAPTERS)
async def adapter(request: pytest.FixtureRequest, fake: FakeProviderProcess) -> AsyncIterator[Adapter]:
    """Each real adapter, with 4 concurrent calls."""
    sender = make_sender(request.param, http_url=fake.http_url, smtp_url=fake.smtp_url)
    yield Adapter(request.param, fake, sender)
    await sender.close()


@pytest.fixture
async def ses(fake: FakeProviderProcess) -> AsyncIterator[SesSender]:
    """SES alone, for what only email can do."""
    sender = SesSender(region=REGION, endpoint_url=fake.http_url, configuration_set="events", concurrency=4)
    yield sender
    await sender.close()


@pytest.fixture
async def smtp(fake: FakeProviderProcess) -> AsyncIterator[SmtpSender]:
    """SMTP alone."""
    sender = SmtpSender(url=fake.smtp_url, concurrency=2)
    yield sender
    await sender.close()
