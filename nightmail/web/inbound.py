"""/inbound/ses and /inbound/sms: what Amazon SNS posts to us.

Nobody signs in here; a message is believed for its signature alone. In order, and nothing is fetched or written for
what fails a check: method → topics configured → body (counted, parsed) → envelope → topic, time and hosts →
certificate → signature → payload → one transaction. SNS repeats after a 5xx and gives up after a 4xx, so what may go
better another time is a 503, and what is signed is not refused for odd characters in the words of strangers.

| status | meaning |
| --- | --- |
| 200 | {"outcome": …}: applied, repeated (seen before), unknown (no message of ours), ignored, confirmed, received |
| 400, 413, 422 | {"error"}: not what SNS sends |
| 403 | {"error"}: not configured, or not to be believed |
| 405 | {"error":"Method Not Allowed"} |
| 503 | {"error"}: the certificate or the database cannot be reached now, or the body came too slowly; SNS tries again |
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import msgspec
import structlog
from cryptography import x509
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from nightmail import clock
from nightmail.errors import DatabaseAway, ProviderError
from nightmail.ports import SnsHost
from nightmail.rules import sns
from nightmail.rules.provider_events import BadEvent, Report, read_ses_event
from nightmail.rules.sms_events import read_sms_event
from nightmail.rules.sms_keywords import read_inbound_sms
from nightmail.rules.sns import BadEnvelope, Envelope, NotTrusted
from nightmail.store.inbound_sms import receive_sms
from nightmail.store.provider_events import apply_report
from nightmail.store.sns_notifications import is_known_notification, remember_notification
from nightmail.web.bodies import ONE_MIB, BodyBudget, parse_json, read_body
from nightmail.web.operation import Reply, send_reply
from nightmail.web.problems import Header, Problem
from nightmail.web.services import Services

Source = Literal["ses", "sms"]

# SNS changes its certificate about once a year and names it in every message.
CERTIFICATE_LIFE_S = 4 * 3600.0
# One that cannot be fetched again is used on for this long in all, and its next fetch tried after a while.
CERTIFICATE_STALE_S = 24 * 3600.0
REFETCH_S = 60.0
MAX_CERTIFICATES = 16
RETRY_AFTER: Header = (b"retry-after", b"30")
# What SES posts in plain text when somebody connects the topic.
GREETING = "Successfully validated SNS topic for Amazon SES event publishing."


class InboundAnswer(msgspec.Struct):
    """What came of a message of SNS."""

    outcome: str


class InboundRefusal(msgspec.Struct):
    """Why a message of SNS was refused."""

    error: str


class _Refused(Exception):
    """The request ends with this answer."""

    def __init__(self, status: int, error: str, headers: tuple[Header, ...] = ()) -> None:
        super().__init__(error)
        self.reply = Reply(InboundRefusal(error), status, headers)


@dataclass(slots=True)
class _Held:
    """A certificate, when it was fetched, and when it is to be fetched again."""

    certificate: x509.Certificate
    fetched_at: float
    due_at: float


class Certificates:
    """Certificates of SNS by their URL, few and for a few hours; each is fetched once, however many wait for it."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}
        self._fetches: dict[str, asyncio.Task[x509.Certificate]] = {}

    async def get(self, host: SnsHost, url: str) -> x509.Certificate:
        """Return the certificate at an URL that has been checked. Raises ProviderError or NotTrusted."""
        held = self._held.get(url)
        if held is not None and clock.monotonic() < held.due_at:
            return held.certificate
        fetch = self._fetches.get(url)
        if fetch is None:
            fetch = self._fetches[url] = asyncio.create_task(self._fetch(host, url))
            fetch.add_done_callback(partial(self._forget, url))
        return await asyncio.shield(fetch)  # who gives up waiting leaves it to the others

    async def _fetch(self, host: SnsHost, url: str) -> x509.Certificate:
        try:
            certificate = sns.load_certificate(await host.fetch_certificate(url))
        except (ProviderError, NotTrusted):
            held, now = self._held.get(url), clock.monotonic()
            if held is None or now - held.fetched_at >= CERTIFICATE_STALE_S:
                raise
            held.due_at = now + REFETCH_S
            return held.certificate
        now = clock.monotonic()
        self._held.pop(url, None)
        if len(self._held) >= MAX_CERTIFICATES:
            del self._held[next(iter(self._held))]
        self._held[url] = _Held(certificate, now, now + CERTIFICATE_LIFE_S)
        return certificate

    def _forget(self, url: str, fetch: asyncio.Task[x509.Certificate]) -> None:
        del self._fetches[url]
        if not fetch.cancelled():
            fetch.exception()  # seen, though nobody may wait any more


def inbound_routes(services: Services) -> list[BaseRoute]:
    """Return the routes that SNS posts to."""
    certificates, budget = Certificates(), BodyBudget()
    return [
        Route("/inbound/ses", InboundEndpoint(services, "ses", certificates, budget), include_in_schema=False),
        Route("/inbound/sms", InboundEndpoint(services, "sms", certificates, budget), include_in_schema=False),
    ]


class InboundEndpoint:
    """The ASGI app of one of the two paths."""

    def __init__(self, services: Services, source: Source, certificates: Certificates, budget: BodyBudget) -> None:
        self._services = services
        self._source = source
        self._certificates = certificates
        self._budget = budget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        try:
            reply = Reply(InboundAnswer(await self._answer(scope, receive)))
        except _Refused as refused:
            reply = refused.reply
        except Problem as problem:
            if problem.status == 408:
                reply = Reply(InboundRefusal(problem.message), 503, [RETRY_AFTER])
            else:
                reply = Reply(InboundRefusal(problem.message), problem.status, problem.headers)
        except DatabaseAway:
            reply = Reply(InboundRefusal("Service Unavailable"), 503, [RETRY_AFTER])
        if reply.status >= 400:
            structlog.get_logger().warning(
                "inbound.refused", source=self._source, status=reply.status, why=getattr(reply.content, "error", "")
            )
        await send_reply(send, reply)

    async def _answer(self, scope: Scope, receive: Receive) -> str:
        if scope["method"] != "POST":
            raise _Refused(405, "Method Not Allowed", ((b"allow", b"POST"),))
        topics = self._services.settings.sns_topic_arns
        if not topics:
            raise _Refused(403, "No topic is believed here: set SNS_TOPIC_ARNS.")
        declared = dict(scope["headers"]).get(b"content-length")
        value = await parse_json(await read_body(receive, declared=declared, limit=ONE_MIB, budget=self._budget))
        envelope = await self._believe(value, topics)
        if envelope.kind == "Notification":
            return await self._take(envelope)
        if envelope.kind == "SubscriptionConfirmation":
            return await self._confirm(envelope)
        structlog.get_logger().warning("inbound.unsubscribed", source=self._source, topic=envelope.topic_arn)
        return "ignored"

    async def _believe(self, value: Any, topics: tuple[str, ...]) -> Envelope:
        """Return the message of SNS that the body is, its signature checked."""
        now = clock.now()
        try:
            envelope = sns.read_envelope(value)
            sns.check_envelope(envelope, topics=topics, now=now)
            certificate = await self._certificates.get(self._host, envelope.certificate_url)
            sns.check_signature(envelope, certificate, now=now)
        except BadEnvelope as error:
            raise _Refused(400, f"This is no message of Amazon SNS ({error}); raw delivery must be off.") from None
        except NotTrusted as error:
            raise _Refused(403, f"This message is not believed: {error}.") from None
        except ProviderError:
            raise _Refused(503, "The certificate of Amazon SNS cannot be fetched now.", (RETRY_AFTER,)) from None
        return envelope

    @property
    def _host(self) -> SnsHost:
        host: SnsHost = self._services.ports.sns
        return host

    async def _confirm(self, envelope: Envelope) -> str:
        """Visit the link that makes SNS post here; a confirmation that was answered before is not answered again."""
        database = self._services.database
        if await database.run(partial(is_known_notification, message_id=envelope.message_id)):
            return "repeated"
        try:
            await self._host.confirm_subscription(envelope.subscribe_url)
        except ProviderError:
            raise _Refused(503, "The subscription cannot be confirmed now.", (RETRY_AFTER,)) from None
        note = partial(remember_notification, message_id=envelope.message_id, topic_arn=envelope.topic_arn)
        await database.run(note)
        structlog.get_logger().info("inbound.confirmed", source=self._source, topic=envelope.topic_arn)
        return "confirmed"

    async def _take(self, envelope: Envelope) -> str:
        if self._source == "ses" and envelope.message.startswith(GREETING):
            return "ignored"
        try:
            payload = await parse_json(envelope.message.encode(), clean=True)
        except Problem as problem:
            raise _Refused(problem.status, f"The Message: {problem.message}") from None
        try:
            if self._source == "ses":
                return await self._apply(envelope, read_ses_event(payload, told_at=envelope.timestamp))
            if isinstance(payload, dict) and "eventType" in payload:
                return await self._apply(envelope, read_sms_event(payload, told_at=envelope.timestamp))
            return await self._receive(envelope, payload)
        except BadEvent as error:
            raise _Refused(400, f"The Message cannot be read: {error}.") from None

    async def _apply(self, envelope: Envelope, report: Report) -> str:
        applied = await self._services.database.run(
            partial(apply_report, report=report, notification_id=envelope.message_id, topic_arn=envelope.topic_arn)
        )
        structlog.get_logger().info(
            "inbound.event",
            source=self._source,
            outcome=applied.outcome,
            report=report.name,
            message_id=str(report.message_id),
            new=applied.events,
            suppressed=applied.suppressed,
        )
        return applied.outcome

    async def _receive(self, envelope: Envelope, payload: Any) -> str:
        settings = self._services.settings
        received = await self._services.database.run(
            partial(
                receive_sms,
                sms=read_inbound_sms(payload),
                notification_id=envelope.message_id,
                topic_arn=envelope.topic_arn,
                default_sender=settings.sms_sender,
                with_replies=settings.sms_keyword_replies,
            )
        )
        structlog.get_logger().info(
            "inbound.sms",
            outcome=received.outcome,
            org_id=received.org_id and str(received.org_id),
            has_reply=received.reply_id is not None,
        )
        return received.outcome
