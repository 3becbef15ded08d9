"""/sms: the same operations as /emails, in the same style."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from nightmail.ids import new_id
from nightmail.rules.addresses import BadAddress, normalise_number
from nightmail.rules.sms import measure_sms
from nightmail.store.accept import NewMessage
from nightmail.store.messages import MessageView, get_message
from nightmail.store.messages import list_messages as list_stored
from nightmail.web.api.fields import (
    MAX_TAGS,
    Accepted,
    BatchAccepted,
    EventItem,
    Release,
    Reschedule,
    ScheduleText,
    Tag,
    batch_reply,
    read_batch,
    read_batch_mode,
    read_schedule,
    read_tags,
)
from nightmail.web.api.message_actions import cancel, list_events, release, reschedule
from nightmail.web.idempotency import accept_once
from nightmail.web.operation import Call, Operation, PathKind, Reply, encode
from nightmail.web.paging import ListOf, Page
from nightmail.web.problems import Problem, invalid, missing_field, not_found

# AWS End User Messaging takes 1,600 characters a message.
MAX_TEXT = 1600
# A number, a short code, a sender id, or the id or ARN of a number or pool at the provider.
_SENDER = re.compile(r"[A-Za-z0-9_+:/. -]{1,256}")
Number = Annotated[str, Meta(min_length=1, max_length=32, description="E.164: + and country code.")]


class SendSms(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """An SMS to one number. `text` and `body` are the same; give one."""

    to: Number | Annotated[list[Number], Meta(min_length=1, max_length=1)]
    sender: Annotated[str, Meta(min_length=1, max_length=256)] | None = msgspec.field(name="from", default=None)
    text: Annotated[str, Meta(min_length=1, max_length=MAX_TEXT)] | None = None
    body: Annotated[str, Meta(min_length=1, max_length=MAX_TEXT)] | None = None
    scheduled_at: ScheduleText | None = None
    tags: Annotated[list[Tag], Meta(max_length=MAX_TAGS)] | None = None
    send_policy: Literal["at_least_once", "at_most_once"] | None = None


class SmsItem(msgspec.Struct, kw_only=True):
    """An SMS in a list."""

    id: str
    to: str
    sender: str | None = msgspec.field(name="from")
    segments: int
    created_at: datetime
    scheduled_at: datetime | None
    sent_at: datetime | None
    last_event: str
    state: str
    reason: str | None
    object: Literal["sms"] = "sms"


class SmsView(SmsItem, kw_only=True):
    """An SMS."""

    text: str
    tags: list[dict[str, str]]
    last_error: str | None
    provider_message_id: str | None


class SmsChanged(msgspec.Struct, kw_only=True):
    """The SMS that was changed."""

    id: str
    object: Literal["sms"] = "sms"


class SmsRescheduled(SmsChanged, kw_only=True):
    """The SMS and its new time."""

    scheduled_at: datetime


async def send_sms(call: Call[SendSms]) -> Reply:
    """Accept one SMS; with `scheduled_at` for later, else for now."""
    message = build_sms(call.body)
    return await accept_once(call, [message], encode(Accepted(str(message.id))))


async def send_sms_batch(call: Call[Any]) -> Reply:
    """Accept up to 100 SMS: all or none when strict, those that are right when permissive."""
    mode = read_batch_mode(call.headers)
    permissive = mode == "permissive"
    messages, errors = read_batch(call.raw, SendSms, build_sms, permissive=permissive)
    content = encode(batch_reply(messages, errors, permissive=permissive))
    if not messages:
        return Reply(content)
    return await accept_once(call, messages, content, mode=mode)


async def list_sms(call: Call[None]) -> Reply:
    """List SMS, newest first."""
    page: Page = call.query
    async with call.services.database.connection() as conn:
        views, has_more = await list_stored(
            conn,
            org_id=call.key.org_id,
            env=call.key.env,
            channel="sms",
            limit=page.limit,
            after=page.after,
            before=page.before,
        )
    return Reply(ListOf(data=[SmsItem(**_common(view)) for view in views], has_more=has_more))


async def get_sms(call: Call[None]) -> Reply:
    """Return one SMS."""
    async with call.services.database.connection() as conn:
        view = await get_message(
            conn, org_id=call.key.org_id, env=call.key.env, channel="sms", message_id=call.ids["id"]
        )
    if view is None:
        raise not_found("SMS")
    return Reply(
        SmsView(
            **_common(view),
            text=view.text or "",
            tags=view.tags,
            last_error=view.last_error,
            provider_message_id=view.provider_message_id,
        )
    )


async def reschedule_sms(call: Call[Reschedule]) -> Reply:
    """Move an SMS to another time, until its sending begins."""
    when = await reschedule(call, "sms")
    return Reply(SmsRescheduled(id=str(call.ids["id"]), scheduled_at=when))


async def cancel_sms(call: Call[None]) -> Reply:
    """Cancel an SMS, until its sending begins."""
    await cancel(call, "sms")
    return Reply(SmsChanged(id=str(call.ids["id"])))


async def release_sms(call: Call[Release]) -> Reply:
    """Decide an ambiguous SMS: send it again, call it sent, or cancel it."""
    await release(call, "sms")
    return Reply(SmsChanged(id=str(call.ids["id"])))


async def list_sms_events(call: Call[None]) -> Reply:
    """List what happened to an SMS, oldest first."""
    return Reply(ListOf(data=await list_events(call, "sms"), has_more=False))


def _common(view: MessageView) -> dict[str, Any]:
    return {
        "id": str(view.id),
        "to": view.to[0],
        "sender": view.sender or None,
        "segments": view.units,
        "created_at": view.created_at.astimezone(UTC),
        "scheduled_at": view.scheduled_at,
        "sent_at": view.sent_at,
        "last_event": view.last_event,
        "state": view.state,
        "reason": view.reason,
    }


def build_sms(sms: SendSms) -> NewMessage:
    """Return the SMS as it is stored. Raises Problem."""
    try:
        to = normalise_number(sms.to if isinstance(sms.to, str) else sms.to[0])
    except BadAddress as error:
        raise invalid(f"Invalid `to` field: {error}.") from None
    if sms.text is not None and sms.body is not None:
        raise invalid("Use either `text` or `body`, not both.")
    text = sms.text or sms.body
    if not text:
        raise missing_field("text")
    return NewMessage(
        id=new_id(),
        channel="sms",
        sender=_read_sender(sms.sender),
        subject=None,
        addresses=[to],
        to=[to],
        cc=[],
        bcc=[],
        reply_to=[],
        html=None,
        text=text,
        headers=[],
        tags=read_tags(sms.tags),
        attachments=(),
        units=measure_sms(text).segments,
        scheduled_at=read_schedule(sms.scheduled_at),
        send_policy=sms.send_policy,
    )


def _read_sender(sender: str | None) -> str:
    """Return the origination identity, '' to let the provider choose. Raises Problem."""
    if sender is None:
        return ""
    if _SENDER.fullmatch(sender) is None or sender != sender.strip():
        raise Problem(422, "invalid_from_address", "Invalid `from` field: not a number, short code or sender id.")
    if not sender.startswith("+"):
        return sender
    try:
        return normalise_number(sender)
    except BadAddress as error:
        raise Problem(422, "invalid_from_address", f"Invalid `from` field: {error}.") from None


_ID: dict[str, PathKind] = {"id": "uuid"}
_EXAMPLE = {"to": "+15005550006", "text": "Your code is 123456"}

OPERATIONS = (
    Operation(
        method="POST", path="/sms", handler=send_sms, summary="Send an SMS", access="sending", tag="SMS", body=SendSms,
        reply=Accepted, errors=(402, 409), headers=("Idempotency-Key",), example=_EXAMPLE,
    ),
    Operation(
        method="GET", path="/sms", handler=list_sms, summary="List SMS", access="full", tag="SMS", query=Page,
        reply=ListOf[SmsItem],
    ),
    Operation(
        method="POST", path="/sms/batch", handler=send_sms_batch, summary="Send up to 100 SMS", access="sending",
        tag="SMS", body=list[SendSms], convert_body=False, reply=BatchAccepted, errors=(402, 409),
        headers=("Idempotency-Key", "x-batch-validation"), example=[_EXAMPLE],
    ),
    Operation(
        method="GET", path="/sms/{id}", handler=get_sms, summary="Get an SMS", access="full", tag="SMS",
        path_kinds=_ID, reply=SmsView, errors=(404,),
    ),
    Operation(
        method="PATCH", path="/sms/{id}", handler=reschedule_sms, summary="Reschedule an SMS", access="full",
        tag="SMS", path_kinds=_ID, body=Reschedule, reply=SmsRescheduled, errors=(402, 404, 409),
        example={"scheduled_at": "in 2 hours"},
    ),
    Operation(
        method="POST", path="/sms/{id}/cancel", handler=cancel_sms, summary="Cancel an SMS", access="full", tag="SMS",
        path_kinds=_ID, reply=SmsChanged, errors=(404, 409),
    ),
    Operation(
        method="POST", path="/sms/{id}/release", handler=release_sms, summary="Decide an ambiguous SMS",
        access="full", tag="SMS", path_kinds=_ID, body=Release, reply=SmsChanged, errors=(404, 409),
        example={"action": "resend"},
    ),
    Operation(
        method="GET", path="/sms/{id}/events", handler=list_sms_events, summary="List the events of an SMS",
        access="full", tag="SMS", path_kinds=_ID, reply=ListOf[EventItem], errors=(404,),
    ),
)  # fmt: skip
