"""/emails: Resend's operations, and release and events of our own."""

from __future__ import annotations

import base64
import binascii
import mimetypes
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from urllib.parse import quote

import msgspec
from msgspec import Meta

from nightmail.ids import new_id
from nightmail.ports import Attachment
from nightmail.rules.addresses import bare_address
from nightmail.store.accept import NewMessage
from nightmail.store.messages import AttachmentView, MessageView, get_attachment, get_message, list_attachments
from nightmail.store.messages import list_messages as list_stored
from nightmail.web.api.fields import (
    MAX_RECIPIENTS,
    MAX_TAGS,
    Accepted,
    BatchAccepted,
    EventItem,
    Mailboxes,
    Release,
    Reschedule,
    ScheduleText,
    Tag,
    batch_reply,
    read_batch,
    read_batch_mode,
    read_mailboxes,
    read_schedule,
    read_tags,
)
from nightmail.web.api.message_actions import cancel, list_events, release, reschedule
from nightmail.web.api.unsubscribe_links import UnsubscribeLinks, load_links, one_click_headers
from nightmail.web.bodies import ATTACHMENT_BYTES, EMAIL_BODY_BYTES, convert
from nightmail.web.idempotency import accept_once
from nightmail.web.operation import Call, Operation, PathKind, Reply, encode
from nightmail.web.paging import ListOf, Page
from nightmail.web.problems import Problem, invalid, missing_field, not_found, too_large

MAX_SUBJECT = 998
MAX_HEADER_VALUE = 2000
MAX_HEADERS = 50
MAX_ATTACHMENTS = 100

_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,126}")
_CONTENT_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,63}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}")
_CONTENT_ID = re.compile(r"[!-;=?-~]{1,128}")
# Ours to write, the provider's commands, or a signature's: a sender who sets them changes what we say or to whom.
RESERVED_HEADERS = frozenset(
    {
        "authentication-results", "bcc", "cc", "date", "delivered-to", "dkim-signature", "domainkey-signature",
        "errors-to", "from", "message-id", "mime-version", "received", "received-spf", "reply-to", "return-path",
        "sender", "subject", "to", "x-nightmail-message",
    }
)  # fmt: skip
RESERVED_PREFIXES = ("arc-", "content-", "resent-", "x-ses-", "x-nightmail-")

HeaderText = Annotated[str, Meta(max_length=MAX_HEADER_VALUE)]


class NodeBuffer(msgspec.Struct, forbid_unknown_fields=True):
    """What JSON.stringify makes of a Node Buffer."""

    type: Literal["Buffer"]
    data: list[Annotated[int, Meta(ge=0, le=255)]]


class AttachmentIn(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A file: `content` is base64, an array of bytes, or a Node Buffer. `content_id` makes it inline."""

    content: str | list[Annotated[int, Meta(ge=0, le=255)]] | NodeBuffer | None = None
    filename: Annotated[str, Meta(max_length=255)] | Literal[False] | None = None
    content_type: Annotated[str, Meta(max_length=192)] | None = None
    content_id: Annotated[str, Meta(max_length=128)] | None = None
    inline_content_id: Annotated[str, Meta(max_length=128)] | None = None
    path: Annotated[str | None, Meta(description="Not supported: remote files are not fetched.")] = None


class TemplateIn(msgspec.Struct):
    """Not supported yet."""

    id: str


class SendEmail(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """An email. `html` or `text` is needed; to, cc and bcc together hold at most 50 addresses."""

    sender: Annotated[str, Meta(min_length=1, max_length=1000)] = msgspec.field(name="from")
    to: Mailboxes
    subject: Annotated[str, Meta(max_length=MAX_SUBJECT)]
    cc: Mailboxes | None = None
    bcc: Mailboxes | None = None
    reply_to: Mailboxes | None = None
    html: str | None = None
    text: str | None = None
    headers: Annotated[dict[str, HeaderText], Meta(max_length=MAX_HEADERS)] | None = None
    attachments: Annotated[list[AttachmentIn], Meta(max_length=MAX_ATTACHMENTS)] | None = None
    tags: Annotated[list[Tag], Meta(max_length=MAX_TAGS)] | None = None
    scheduled_at: ScheduleText | None = None
    send_policy: Annotated[
        Literal["at_least_once", "at_most_once"] | None,
        Meta(description="What to do when it cannot be known whether the provider took it; default: the org's."),
    ] = None
    one_click_unsubscribe: Annotated[
        bool,
        Meta(
            description="Add List-Unsubscribe headers (RFC 8058), so that mail programs show a button. One recipient "
            "in all; the click suppresses that address. Needs PUBLIC_URL."
        ),
    ] = False
    template: Annotated[TemplateIn | None, Meta(description="Not supported yet.")] = None
    topic_id: Annotated[str | None, Meta(description="Not supported yet.")] = None


class EmailItem(msgspec.Struct, kw_only=True):
    """An email in a list."""

    id: str
    message_id: str
    to: list[str]
    sender: str = msgspec.field(name="from")
    created_at: datetime
    subject: str
    cc: list[str]
    bcc: list[str]
    reply_to: list[str]
    last_event: str
    scheduled_at: datetime | None
    object: Literal["email"] = "email"


class EmailView(EmailItem, kw_only=True):
    """An email, with what Nightmail knows beyond Resend: state, reason, sent_at, last_error, provider_message_id."""

    html: str | None
    text: str | None
    tags: list[dict[str, str]]
    state: str
    reason: str | None
    sent_at: datetime | None
    last_error: str | None
    provider_message_id: str | None


class EmailChanged(msgspec.Struct, kw_only=True):
    """The email that was changed."""

    id: str
    object: Literal["email"] = "email"


class EmailRescheduled(EmailChanged, kw_only=True):
    """The email and its new time."""

    scheduled_at: datetime


class AttachmentItem(msgspec.Struct, kw_only=True):
    """An attachment of a sent email; its id is its place. The content is at `download_url`, with the API key."""

    id: str
    filename: str
    content_type: str
    content_id: str | None
    content_disposition: Literal["inline", "attachment"]
    size: int
    download_url: str
    expires_at: datetime | None = None


class AttachmentDetail(AttachmentItem, kw_only=True):
    """An attachment of a sent email."""

    object: Literal["attachment"] = "attachment"


async def send_email(call: Call[SendEmail]) -> Reply:
    """Accept one email; with `scheduled_at` for later, else for now."""
    links = await load_links(call, [call.raw])
    message = build_email(convert_email(call.raw), links=links)
    return await accept_once(call, [message], encode(Accepted(str(message.id))))


async def send_email_batch(call: Call[Any]) -> Reply:
    """Accept up to 100 emails: all or none when strict, those that are right when permissive."""
    mode = read_batch_mode(call.headers)
    permissive = mode == "permissive"
    room = AttachmentRoom()
    links = await load_links(call, call.raw)
    messages, errors = read_batch(
        call.raw, Any, lambda item: build_email(convert_email(item), room, links), permissive=permissive
    )
    content = encode(batch_reply(messages, errors, permissive=permissive))
    if not messages:
        return Reply(content)
    return await accept_once(call, messages, content, mode=mode)


async def list_emails(call: Call[None]) -> Reply:
    """List emails, newest first."""
    page: Page = call.query
    async with call.services.database.connection() as conn:
        views, has_more = await list_stored(
            conn,
            org_id=call.key.org_id,
            env=call.key.env,
            channel="email",
            limit=page.limit,
            after=page.after,
            before=page.before,
        )
    return Reply(ListOf(data=[EmailItem(**_common(view)) for view in views], has_more=has_more))


async def get_email(call: Call[None]) -> Reply:
    """Return one email."""
    view = await _find(call)
    return Reply(
        EmailView(
            **_common(view),
            html=view.html,
            text=view.text,
            tags=view.tags,
            state=view.state,
            reason=view.reason,
            sent_at=view.sent_at,
            last_error=view.last_error,
            provider_message_id=view.provider_message_id,
        )
    )


async def reschedule_email(call: Call[Reschedule]) -> Reply:
    """Move an email to another time, until its sending begins."""
    when = await reschedule(call, "email")
    return Reply(EmailRescheduled(id=str(call.ids["id"]), scheduled_at=when))


async def cancel_email(call: Call[None]) -> Reply:
    """Cancel an email, until its sending begins."""
    await cancel(call, "email")
    return Reply(EmailChanged(id=str(call.ids["id"])))


async def release_email(call: Call[Release]) -> Reply:
    """Decide an ambiguous email: send it again, call it sent, or cancel it."""
    await release(call, "email")
    return Reply(EmailChanged(id=str(call.ids["id"])))


async def list_email_events(call: Call[None]) -> Reply:
    """List what happened to an email, oldest first."""
    return Reply(ListOf(data=await list_events(call, "email"), has_more=False))


async def list_email_attachments(call: Call[None]) -> Reply:
    """List the attachments of an email."""
    await _find(call)
    return Reply(ListOf(data=[AttachmentItem(**_file(call, view)) for view in await _files(call)], has_more=False))


async def get_email_attachment(call: Call[None]) -> Reply:
    """Return one attachment, without its content."""
    return Reply(AttachmentDetail(**_file(call, await _find_file(call))))


async def download_email_attachment(call: Call[None]) -> Reply:
    """Return the bytes of one attachment; always as a download, whatever its type claims."""
    view = await _find_file(call)
    async with call.services.database.connection() as conn:
        content = await get_attachment(
            conn, org_id=call.key.org_id, env=call.key.env, message_id=call.ids["id"], position=view.position
        )
    if content is None:
        raise not_found("Attachment")
    name = quote(view.filename, safe="")
    headers = [(b"content-disposition", f"attachment; filename*=utf-8''{name}".encode())]
    return Reply(content, headers=headers, media="application/octet-stream")


async def _find_file(call: Call[Any]) -> AttachmentView:
    await _find(call)
    for view in await _files(call):
        if view.position == call.ids["attachment_id"]:
            return view
    raise not_found("Attachment")


async def _find(call: Call[Any]) -> MessageView:
    async with call.services.database.connection() as conn:
        view = await get_message(
            conn, org_id=call.key.org_id, env=call.key.env, channel="email", message_id=call.ids["id"]
        )
    if view is None:
        raise not_found("Email")
    return view


async def _files(call: Call[Any]) -> list[AttachmentView]:
    async with call.services.database.connection() as conn:
        return await list_attachments(conn, org_id=call.key.org_id, env=call.key.env, message_id=call.ids["id"])


def _file(call: Call[Any], view: AttachmentView) -> dict[str, Any]:
    base = call.services.settings.public_url or ""
    return {
        "id": str(view.position),
        "filename": view.filename,
        "content_type": view.content_type,
        "content_id": view.content_id,
        "content_disposition": "inline" if view.content_id else "attachment",
        "size": view.size,
        "download_url": f"{base}/emails/{call.ids['id']}/attachments/{view.position}/content",
    }


def _common(view: MessageView) -> dict[str, Any]:
    domain = bare_address(view.sender).rpartition("@")[2]
    return {
        "id": str(view.id),
        "message_id": f"<{view.id}@{domain}>",
        "to": view.to,
        "sender": view.sender,
        "created_at": view.created_at.astimezone(UTC),
        "subject": view.subject or "",
        "cc": view.cc,
        "bcc": view.bcc,
        "reply_to": view.reply_to,
        "last_event": view.last_event,
        "scheduled_at": view.scheduled_at,
    }


class AttachmentRoom:
    """What one request's attachments may still decode to, in bytes."""

    def __init__(self, size: int = ATTACHMENT_BYTES) -> None:
        self.left = size

    def take(self, size: int) -> None:
        """Count decoded bytes. Raises Problem (413)."""
        self.left -= size
        if self.left < 0:
            raise too_large(f"Attachments must not be larger than {ATTACHMENT_BYTES} bytes in all.")


def convert_email(raw: Any) -> SendEmail:
    """Return the body as an email. Raises Problem; what is not supported yet is named before what is missing."""
    try:
        email: SendEmail = convert(raw, SendEmail)
    except Problem:
        if isinstance(raw, dict) and (raw.get("template") or raw.get("topic_id")):
            raise _unsupported() from None
        raise
    if email.template is not None or email.topic_id is not None:
        raise _unsupported()
    return email


def _unsupported() -> Problem:
    return invalid("`template` and `topic_id` are not supported yet: send `subject` and `html` or `text`.")


def build_email(
    email: SendEmail, room: AttachmentRoom | None = None, links: UnsubscribeLinks | None = None
) -> NewMessage:
    """Return the email as it is stored; `links` are needed for one-click unsubscribe. Raises Problem."""
    try:
        sender = read_mailboxes(email.sender, "from", None)[0]
    except Problem as problem:
        raise Problem(422, "invalid_from_address", problem.message) from None
    addresses: dict[str, None] = {}
    to = read_mailboxes(email.to, "to", addresses)
    cc = read_mailboxes(email.cc, "cc", addresses)
    bcc = read_mailboxes(email.bcc, "bcc", addresses)
    if not to:
        raise missing_field("to")
    if len(addresses) > MAX_RECIPIENTS:
        raise invalid(f"`to`, `cc` and `bcc` must not hold more than {MAX_RECIPIENTS} addresses in all.")
    if not email.html and not email.text:
        raise Problem(422, "missing_required_field", "Missing `html` or `text` field.")
    if _CONTROL.search(email.subject):
        raise invalid("Invalid `subject` field: line ends and control characters are not allowed.")
    message_id = new_id()
    headers = read_headers(email.headers) if email.headers else []
    if email.one_click_unsubscribe:
        headers += one_click_headers(message_id, headers, len(addresses), links)
    return NewMessage(
        id=message_id,
        channel="email",
        sender=sender,
        subject=email.subject,
        addresses=list(addresses),
        to=to,
        cc=cc,
        bcc=bcc,
        reply_to=read_mailboxes(email.reply_to, "reply_to", None),
        html=email.html,
        text=email.text,
        headers=headers,
        tags=read_tags(email.tags),
        attachments=read_attachments(email.attachments, room or AttachmentRoom()) if email.attachments else (),
        units=len(addresses),
        scheduled_at=read_schedule(email.scheduled_at),
        send_policy=email.send_policy,
    )


def read_headers(headers: dict[str, str]) -> list[tuple[str, str]]:
    """Return custom headers. Raises Problem for a name that is ours or no name, and for a value with a line end."""
    seen = set()
    for name, value in headers.items():
        lower = name.lower()
        if _HEADER_NAME.fullmatch(name) is None:
            raise invalid("Invalid `headers` field: a name may hold visible ASCII without separators only.")
        if lower in RESERVED_HEADERS or lower.startswith(RESERVED_PREFIXES):
            raise invalid(f"Invalid `headers` field: `{name}` cannot be set here.")
        if lower in seen:
            raise invalid(f"Invalid `headers` field: `{name}` occurs twice.")
        if _CONTROL.search(value):
            raise invalid(f"Invalid `headers` field: the value of `{name}` holds a line end or control character.")
        seen.add(lower)
    return list(headers.items())


def read_attachments(given: Sequence[AttachmentIn], room: AttachmentRoom) -> list[Attachment]:
    """Return decoded attachments. Raises Problem: 422 `invalid_attachment`, 413 when they are too large."""
    return [_read_attachment(item, index, room) for index, item in enumerate(given)]


def _read_attachment(item: AttachmentIn, index: int, room: AttachmentRoom) -> Attachment:
    if item.path is not None:
        raise _bad(index, "`path` is not supported, remote files are not fetched: send `content`")
    if item.content is None:
        raise _bad(index, "`content` is missing")
    content = _decode(item.content, index, room)
    filename = item.filename or ""
    if _CONTROL.search(filename) or "\t" in filename:
        raise _bad(index, "`filename` holds a control character")
    content_id = item.content_id or item.inline_content_id or None
    if content_id is not None and _CONTENT_ID.fullmatch(content_id) is None:
        raise _bad(index, "`content_id` may hold visible ASCII without < and > only")
    kind = item.content_type or mimetypes.guess_type(filename)[0] or "application/octet-stream"
    if _CONTENT_TYPE.fullmatch(kind) is None:
        raise _bad(index, "`content_type` is not a media type such as application/pdf")
    return Attachment(filename or f"attachment-{index + 1}", content, kind, content_id)


def _decode(content: str | list[int] | NodeBuffer, index: int, room: AttachmentRoom) -> bytes:
    if isinstance(content, NodeBuffer):
        content = content.data
    if isinstance(content, list):
        room.take(len(content))
        return bytes(content)
    text = content if "\n" not in content else content.replace("\n", "").replace("\r", "")
    room.take(len(text) // 4 * 3 - text[-2:].count("="))
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _bad(index, "`content` is neither base64 nor an array of bytes") from None


def _bad(index: int, why: str) -> Problem:
    return Problem(422, "invalid_attachment", f"Invalid `attachments[{index}]` field: {why}.")


_ID: dict[str, PathKind] = {"id": "uuid"}
_ID_AND_POSITION: dict[str, PathKind] = {"id": "uuid", "attachment_id": "position"}
_EXAMPLE = {
    "from": "Acme <hello@example.com>",
    "to": ["ada@example.org"],
    "subject": "Hello",
    "text": "The night mail crossing the border.",
}

OPERATIONS = (
    Operation(
        method="POST", path="/emails", handler=send_email, summary="Send an email", access="sending", tag="Emails",
        body=SendEmail, convert_body=False, body_limit=EMAIL_BODY_BYTES, reply=Accepted, errors=(402, 409),
        headers=("Idempotency-Key",), example=_EXAMPLE,
        description="Accepted means stored: it is sent at once, or at `scheduled_at`. Recipients that are "
        "suppressed are dropped when it is sent; when none is left the email ends as `suppressed`.",
    ),
    Operation(
        method="GET", path="/emails", handler=list_emails, summary="List emails", access="full", tag="Emails",
        query=Page, reply=ListOf[EmailItem],
    ),
    Operation(
        method="POST", path="/emails/batch", handler=send_email_batch, summary="Send up to 100 emails",
        access="sending", tag="Emails", body=list[SendEmail], convert_body=False, body_limit=EMAIL_BODY_BYTES,
        reply=BatchAccepted, errors=(402, 409), headers=("Idempotency-Key", "x-batch-validation"), example=[_EXAMPLE],
    ),
    Operation(
        method="GET", path="/emails/{id}", handler=get_email, summary="Get an email", access="full", tag="Emails",
        path_kinds=_ID, reply=EmailView, errors=(404,),
    ),
    Operation(
        method="PATCH", path="/emails/{id}", handler=reschedule_email, summary="Reschedule an email", access="full",
        tag="Emails", path_kinds=_ID, body=Reschedule, reply=EmailRescheduled, errors=(402, 404, 409),
        example={"scheduled_at": "in 2 hours"},
    ),
    Operation(
        method="POST", path="/emails/{id}/cancel", handler=cancel_email, summary="Cancel an email", access="full",
        tag="Emails", path_kinds=_ID, reply=EmailChanged, errors=(404, 409),
    ),
    Operation(
        method="POST", path="/emails/{id}/release", handler=release_email, summary="Decide an ambiguous email",
        access="full", tag="Emails", path_kinds=_ID, body=Release, reply=EmailChanged, errors=(404, 409),
        example={"action": "resend"},
    ),
    Operation(
        method="GET", path="/emails/{id}/events", handler=list_email_events, summary="List the events of an email",
        access="full", tag="Emails", path_kinds=_ID, reply=ListOf[EventItem], errors=(404,),
    ),
    Operation(
        method="GET", path="/emails/{id}/attachments", handler=list_email_attachments,
        summary="List the attachments of an email", access="full", tag="Emails", path_kinds=_ID,
        reply=ListOf[AttachmentItem], errors=(404,),
    ),
    Operation(
        method="GET", path="/emails/{id}/attachments/{attachment_id}", handler=get_email_attachment,
        summary="Get an attachment of an email", access="full", tag="Emails",
        path_kinds=_ID_AND_POSITION, reply=AttachmentDetail, errors=(404,),
    ),
    Operation(
        method="GET", path="/emails/{id}/attachments/{attachment_id}/content", handler=download_email_attachment,
        summary="Download an attachment of an email", access="full", tag="Emails", path_kinds=_ID_AND_POSITION,
        reply=bytes, media="application/octet-stream", errors=(404,),
    ),
)  # fmt: skip
