"""What Nightmail needs from the outside world: protocols of one to four methods, our types only.

An adapter makes at most ONE attempt per call and raises one of `nightmail.errors.ProviderError`'s
subclasses; nothing foreign escapes. Retries belong to the claim loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Protocol
from uuid import UUID

from nightmail.rules.stripe_objects import MeterErrors


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file in an email; `content_id` makes it inline (without angle brackets), None an ordinary attachment."""

    filename: str
    content: bytes
    content_type: str
    content_id: str | None = None


@dataclass(frozen=True, slots=True)
class OutgoingEmail:
    """One email as a provider needs it. Addresses are normalised; display names stay in `sender` and the lists."""

    message_id: UUID
    org_id: UUID
    claim_id: UUID
    sender: str
    to: Sequence[str]
    cc: Sequence[str]
    bcc: Sequence[str]
    reply_to: Sequence[str]
    subject: str
    html: str | None
    text: str | None
    headers: Sequence[tuple[str, str]] = ()
    attachments: Sequence[Attachment] = ()
    tags: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True)
class OutgoingSms:
    """One SMS; `sender` is an origination number or sender id, None lets the provider choose."""

    message_id: UUID
    org_id: UUID
    claim_id: UUID
    sender: str | None
    to: str
    body: str
    tags: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True)
class Accepted:
    """The provider took the message; `provider_message_id` is its name for it."""

    provider_message_id: str
    detail: dict[str, str] = field(default_factory=dict)


class EmailSender(Protocol):
    """Sends one email, once."""

    name: str

    async def send_email(self, email: OutgoingEmail, *, timeout_s: float) -> Accepted:
        """Make one attempt within `timeout_s` seconds for the whole call.

        Raises Throttled, Retryable, Permanent or InDoubt.
        """
        ...

    async def close(self) -> None:
        """Release connections and threads."""
        ...


class SmsSender(Protocol):
    """Sends one SMS, once."""

    name: str

    async def send_sms(self, sms: OutgoingSms, *, timeout_s: float) -> Accepted:
        """Make one attempt within `timeout_s` seconds for the whole call.

        Raises Throttled, Retryable, Permanent or InDoubt.
        """
        ...

    async def close(self) -> None:
        """Release connections and threads."""
        ...


class SendRate(Protocol):
    """A send rate per provider account that all runners on all machines honour."""

    async def take(self, account: str, wanted: int) -> int:
        """Return how many of `wanted` calls may start now, 0 to `wanted`; unused ones are not given back."""
        ...


@dataclass(frozen=True, slots=True)
class WebhookReply:
    """What an endpoint answered: `body` is its beginning, up to 1 KB of text."""

    status: int
    body: str
    retry_after_s: float | None = None


class WebhookSender(Protocol):
    """Posts one delivery, once, to an address that a stranger chose."""

    async def post(self, url: str, *, body: bytes, headers: Mapping[str, str], timeout_s: float) -> WebhookReply:
        """Make one attempt within `timeout_s` seconds, from the look-up of the name to the end of what is read.

        Any answer is a reply, redirects too: they are not followed. Raises Retryable when there was none, and
        Permanent("address_refused") when the address is one we never connect to.
        """
        ...

    async def close(self) -> None:
        """Release connections."""
        ...


class SnsHost(Protocol):
    """Amazon SNS as a source of notifications: its certificates, and the confirmation of a subscription."""

    async def fetch_certificate(self, url: str) -> bytes:
        """Return the PEM certificate at `url`, which the caller has checked to be on an SNS host.

        Raises Retryable.
        """
        ...

    async def confirm_subscription(self, url: str) -> None:
        """Visit the confirmation link, which the caller has checked to be on an SNS host. Raises Retryable."""
        ...

    async def close(self) -> None:
        """Release connections."""
        ...


@dataclass(frozen=True, slots=True)
class MeterEvent:
    """Usage of a customer of Stripe: `value` units at a moment. Stripe counts an `identifier` once within 24 hours."""

    event_name: str
    identifier: str
    stripe_customer_id: str
    value: int
    at: datetime


class BillingMeter(Protocol):
    """Stripe's meters: usage that its invoices will hold."""

    async def report(self, event: MeterEvent, *, timeout_s: float) -> Literal["accepted", "duplicate"]:
        """Report usage in one attempt within `timeout_s`; "duplicate" means that Stripe had the identifier already.

        Raises Throttled, Retryable, Permanent or InDoubt, and NotConfigured without a key.
        """
        ...

    async def sum_of(
        self, *, event_name: str, stripe_customer_id: str, start: datetime, end: datetime, timeout_s: float
    ) -> int:
        """Return what the meter counted from `start` to before `end`, both on a full minute.

        Raises as `report`; Permanent also when no active meter has the event name.
        """
        ...

    async def fetch_errors(self, event_id: str, *, timeout_s: float) -> MeterErrors:
        """Return what a thin event about errors of a meter only points to. Raises as `report`."""
        ...

    async def close(self) -> None:
        """Release connections and threads."""
        ...


@dataclass(frozen=True, slots=True)
class Ports:
    """The outside world as one run sees it."""

    email: EmailSender
    sms: SmsSender
    send_rate: SendRate
    webhooks: WebhookSender
    sns: SnsHost
    meter: BillingMeter
