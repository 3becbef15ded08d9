"""/inbound/stripe: what Stripe posts to us.

Nobody signs in here; a body is believed for its signature alone. In order, and nothing is fetched or written for what
fails a check: method → secret configured → body (counted) → signature and its time → JSON → event → one transaction.
Stripe repeats for three days whatever is not a 2xx, so an event that cannot be applied is a 200 that says `failed` and
why: it is kept, opens an alert, and is tried again when somebody presses Resend.

| status | meaning |
| --- | --- |
| 200 | {"outcome": …}: applied, repeated (seen before), stale (a newer state is known), ignored, failed (`reason`) |
| 400, 413, 422 | {"error"}: not what Stripe sends, or not to be believed |
| 405 | {"error":"Method Not Allowed"} |
| 501 | {"error":"Not Implemented","missing":["STRIPE_WEBHOOK_SECRET"]} |
| 503 | {"error"}: the database is away, Stripe cannot be asked now, or the body came too slowly; Stripe tries again |
"""

from __future__ import annotations

import re
from functools import partial

import msgspec
import stripe
import structlog
from pydantic import SecretStr
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from nightmail import clock
from nightmail.errors import DatabaseAway, NotConfigured, ProviderError
from nightmail.rules.stripe_objects import BadStripeEvent, MeterErrors, StripeEvent, read_event, read_meter_errors
from nightmail.store.stripe_events import METER_TYPES, Received, receive_event
from nightmail.web.bodies import ONE_MIB, BodyBudget, parse_json, read_body
from nightmail.web.inbound import InboundRefusal
from nightmail.web.operation import Reply, send_reply
from nightmail.web.problems import Header, Problem
from nightmail.web.services import Services

# Stripe's own tolerance, here both ways: the SDK would believe a signature of any time to come.
TOLERANCE_S = 300
MAX_HEADER = 4096
RETRY_AFTER: Header = (b"retry-after", b"30")


class StripeAnswer(msgspec.Struct, omit_defaults=True):
    """What came of an event."""

    outcome: str
    reason: str | None = None


class _Refused(Exception):
    """The request ends with this answer."""

    def __init__(self, status: int, error: str, headers: tuple[Header, ...] = ()) -> None:
        super().__init__(error)
        self.reply = Reply(InboundRefusal(error), status, headers)


def stripe_routes(services: Services) -> list[BaseRoute]:
    """Return the route that Stripe posts to."""
    return [Route("/inbound/stripe", StripeEndpoint(services), include_in_schema=False)]


class StripeEndpoint:
    """The ASGI app of the path."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._budget = BodyBudget()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        log = structlog.get_logger()
        try:
            received = await self._answer(scope, receive)
            reply = Reply(StripeAnswer(received.outcome, received.error))
        except _Refused as refused:
            reply = refused.reply
        except NotConfigured as error:
            reply = Reply({"error": "Not Implemented", "missing": error.missing}, 501)
        except Problem as problem:
            status, headers = (503, [RETRY_AFTER]) if problem.status == 408 else (problem.status, problem.headers)
            reply = Reply(InboundRefusal(problem.message), status, headers)
        except DatabaseAway:
            reply = Reply(InboundRefusal("Service Unavailable"), 503, [RETRY_AFTER])
        if reply.status >= 400:
            why = getattr(reply.content, "error", "") or "STRIPE_WEBHOOK_SECRET is not set"
            log.warning("inbound.refused", source="stripe", status=reply.status, why=why)
        await send_reply(send, reply)

    async def _answer(self, scope: Scope, receive: Receive) -> Received:
        if scope["method"] != "POST":
            raise _Refused(405, "Method Not Allowed", ((b"allow", b"POST"),))
        secrets = self._services.settings.stripe_webhook_secret
        if not secrets:
            raise NotConfigured(["STRIPE_WEBHOOK_SECRET"])
        headers = dict(scope["headers"])
        body = await read_body(receive, declared=headers.get(b"content-length"), limit=ONE_MIB, budget=self._budget)
        check_signature(body, headers.get(b"stripe-signature", b""), secrets)
        try:
            event = read_event(await parse_json(body, clean=True))
        except BadStripeEvent as error:
            raise _Refused(400, f"This is no event of Stripe: {error}.") from None
        errors = await self._look_up(event) if event.type in METER_TYPES else None
        received = await self._services.database.run(partial(receive_event, event=event, errors=errors))
        structlog.get_logger().info(
            "inbound.stripe", event_id=event.id, type=event.type, outcome=received.outcome, why=received.error
        )
        return received

    async def _look_up(self, event: StripeEvent) -> MeterErrors:
        """Return the errors of a meter: a thin event only says that there are some. No connection is held meanwhile."""
        if event.data is not None or not event.is_thin:
            return read_meter_errors(event.data or event.object)
        try:
            errors: MeterErrors = await self._services.ports.meter.fetch_errors(
                event.id, timeout_s=self._services.settings.provider_call_s
            )
        except NotConfigured:
            return MeterErrors(1, {}, "set STRIPE_API_KEY, so that they can be looked up")
        except ProviderError:
            raise _Refused(503, "Stripe cannot be asked what this event is about now.", (RETRY_AFTER,)) from None
        return errors


def check_signature(body: bytes, header: bytes, secrets: tuple[SecretStr, ...]) -> None:
    """Check that Stripe signed the body with one of the secrets, within 300 s of now. Raises _Refused."""
    try:
        # The SDK compares text, and cannot compare any other than ASCII.
        text = header.decode("ascii")
        body.decode("utf-8")
    except UnicodeDecodeError:
        raise _Refused(400, "This is not believed: body or Stripe-Signature is not text.") from None
    if len(text) > MAX_HEADER:
        raise _Refused(400, "This is not believed: Stripe-Signature is too long.")
    for secret in secrets:
        try:
            stripe.WebhookSignature.verify_header(body, text, secret.get_secret_value(), TOLERANCE_S)
        except stripe.SignatureVerificationError as error:
            is_old = "tolerance" in str(error)
            if is_old:
                raise _Refused(400, "This is not believed: it was signed over 300 s ago.") from None
            continue
        signed_at = re.search(r"(?:^|,)t=([^,=]*)", text)
        if signed_at is None or int(signed_at[1]) > clock.now().timestamp() + TOLERANCE_S:
            raise _Refused(400, "This is not believed: it is signed for a time over 300 s ahead.")
        return
    raise _Refused(400, "This is not believed: Stripe-Signature does not fit STRIPE_WEBHOOK_SECRET.")
