"""/suppressions: Resend's operations for email, and the same for phone numbers."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from msgspec import Meta

from nightmail.rules.addresses import BadAddress, normalise_address, normalise_number
from nightmail.store import suppressions as store
from nightmail.store.suppressions import Origin, SuppressionView
from nightmail.web.operation import Call, Operation, PathKind, Reply
from nightmail.web.paging import ListOf, Page
from nightmail.web.problems import Problem, invalid, missing_field, not_found

MAX_BATCH = 100
EmailText = Annotated[str, Meta(min_length=1, max_length=320)]
PhoneText = Annotated[str, Meta(min_length=1, max_length=32)]


class AddSuppression(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """An address or a number (E.164) to suppress; give one."""

    email: EmailText | None = None
    phone: PhoneText | None = None


class AddSuppressions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Addresses or numbers to suppress; give one list."""

    emails: Annotated[list[EmailText], Meta(min_length=1, max_length=MAX_BATCH)] | None = None
    phones: Annotated[list[PhoneText], Meta(min_length=1, max_length=MAX_BATCH)] | None = None


class RemoveSuppressions(AddSuppressions, forbid_unknown_fields=True, kw_only=True):
    """Addresses, numbers or ids to lift; give one list."""

    ids: Annotated[list[UUID], Meta(min_length=1, max_length=MAX_BATCH)] | None = None


class SuppressionPage(Page, kw_only=True):
    """Which part of which suppressions."""

    origin: Origin | None = None
    channel: Annotated[Literal["email", "sms"], Meta(description="Addresses or numbers.")] = "email"


class SuppressionAdded(msgspec.Struct):
    """The suppression that holds now."""

    id: str
    object: Literal["suppression"] = "suppression"


class SuppressionRemoved(msgspec.Struct):
    """The suppression that was lifted."""

    id: str
    deleted: bool
    object: Literal["suppression"] = "suppression"


class Added(msgspec.Struct):
    """The suppressions that hold now, each once; not in the order of the request."""

    data: list[SuppressionAdded]


class Removed(msgspec.Struct):
    """The suppressions that were lifted; what was not suppressed is left out."""

    data: list[SuppressionRemoved]


class SuppressionItem(msgspec.Struct, kw_only=True):
    """A recipient that gets nothing; `email` or `phone` is set."""

    id: str
    email: str | None
    phone: str | None
    channel: str
    origin: str
    source_id: str | None
    reason: str | None
    created_at: datetime
    object: Literal["suppression"] = "suppression"


async def add_suppression(call: Call[AddSuppression]) -> Reply:
    """Suppress one recipient; one that is suppressed already is returned."""
    body = call.body
    channel, addresses = _read(
        [body.email] if body.email is not None else None, [body.phone] if body.phone is not None else None, "email"
    )
    views = await _add(call, channel, addresses)
    return Reply(SuppressionAdded(str(views[0].id)), 201)


async def add_suppressions(call: Call[AddSuppressions]) -> Reply:
    """Suppress up to 100 recipients."""
    channel, addresses = _read(call.body.emails, call.body.phones, "emails")
    return Reply(Added([SuppressionAdded(str(view.id)) for view in await _add(call, channel, addresses)]))


async def list_suppressions(call: Call[None]) -> Reply:
    """List suppressions, newest first."""
    page: SuppressionPage = call.query
    async with call.services.database.connection() as conn:
        views, has_more = await store.list_suppressions(
            conn,
            org_id=call.key.org_id,
            env=call.key.env,
            channel=page.channel,
            origin=page.origin,
            limit=page.limit,
            after=page.after,
            before=page.before,
        )
    return Reply(ListOf(data=[_item(view) for view in views], has_more=has_more))


async def get_suppression(call: Call[None]) -> Reply:
    """Return one suppression, by id, address or number."""
    suppression_id, channel, address = _identify(call.ids["id"])
    async with call.services.database.connection() as conn:
        view = await store.get_suppression(
            conn,
            org_id=call.key.org_id,
            env=call.key.env,
            suppression_id=suppression_id,
            channel=channel,
            address=address,
        )
    if view is None:
        raise not_found("Suppression")
    return Reply(_item(view))


async def remove_suppression(call: Call[None]) -> Reply:
    """Lift one suppression, by id, address or number."""
    suppression_id, channel, address = _identify(call.ids["id"])
    views = await _remove(
        call,
        ids=[suppression_id] if suppression_id else [],
        channel=channel,
        addresses=[address] if address else [],
    )
    if not views:
        raise not_found("Suppression")
    return Reply(SuppressionRemoved(str(views[0].id), True))


async def remove_suppressions(call: Call[RemoveSuppressions]) -> Reply:
    """Lift up to 100 suppressions."""
    body = call.body
    if body.ids is not None:
        if body.emails is not None or body.phones is not None:
            raise invalid("Use one of `emails`, `phones` and `ids`.")
        views = await _remove(call, ids=body.ids)
    else:
        channel, addresses = _read(body.emails, body.phones, "emails")
        views = await _remove(call, channel=channel, addresses=addresses)
    return Reply(Removed([SuppressionRemoved(str(view.id), True) for view in views]))


async def _add(call: Call[Any], channel: str, addresses: Sequence[str]) -> list[SuppressionView]:
    return await call.services.database.run(
        lambda conn: store.add_suppressions(
            conn,
            org_id=call.key.org_id,
            env=call.key.env,
            channel=channel,
            addresses=addresses,
            origin="manual",
            actor=call.actor,
        )
    )


async def _remove(
    call: Call[Any], *, ids: Sequence[UUID] = (), channel: str | None = None, addresses: Sequence[str] = ()
) -> list[SuppressionView]:
    return await call.services.database.run(
        lambda conn: store.remove_suppressions(
            conn,
            org_id=call.key.org_id,
            env=call.key.env,
            actor=call.actor,
            ids=ids,
            channel=channel,
            addresses=addresses,
        )
    )


def _item(view: SuppressionView) -> SuppressionItem:
    return SuppressionItem(
        id=str(view.id),
        email=view.address if view.channel == "email" else None,
        phone=view.address if view.channel == "sms" else None,
        channel=view.channel,
        origin=view.origin,
        source_id=None,
        reason=view.reason,
        created_at=view.created_at.astimezone(UTC),
    )


def _read(emails: Sequence[str] | None, phones: Sequence[str] | None, name: str) -> tuple[str, list[str]]:
    """Return the channel and its normalised addresses. Raises Problem (422)."""
    if emails is not None and phones is not None:
        raise invalid(f"Use either `{name}` or `{name.replace('email', 'phone')}`, not both.")
    if emails is not None:
        return "email", [_normalise("email", text) for text in emails]
    if phones is not None:
        return "sms", [_normalise("sms", text) for text in phones]
    raise missing_field(name)


def _normalise(channel: str, text: str) -> str:
    try:
        return normalise_address(text.strip()) if channel == "email" else normalise_number(text.strip())
    except BadAddress as error:
        raise invalid(f"Invalid address: {error}.") from None


def _identify(text: str) -> tuple[UUID | None, str | None, str | None]:
    """Return (id, channel, address) of what the path names. Raises Problem: 404 when it can name nothing."""
    try:
        if "@" in text:
            return None, "email", _normalise("email", text)
        if text.startswith("+"):
            return None, "sms", _normalise("sms", text)
    except Problem:
        raise not_found("Suppression") from None
    try:
        return UUID(text), None, None
    except ValueError:
        raise not_found("Suppression") from None


_ID: dict[str, PathKind] = {"id": "text"}

OPERATIONS = (
    Operation(
        method="POST", path="/suppressions", handler=add_suppression, summary="Suppress a recipient", access="full",
        tag="Suppressions", body=AddSuppression, reply=SuppressionAdded, status=201,
        example={"email": "ada@example.org"},
        description="Suppressions hold for the org's live and test messages. They are looked at just before "
        "sending, so messages that are scheduled already are stopped too.",
    ),
    Operation(
        method="GET", path="/suppressions", handler=list_suppressions, summary="List suppressions", access="full",
        tag="Suppressions", query=SuppressionPage, reply=ListOf[SuppressionItem],
    ),
    Operation(
        method="POST", path="/suppressions/batch/add", handler=add_suppressions, access="full", tag="Suppressions",
        summary="Suppress up to 100 recipients", body=AddSuppressions, reply=Added,
        example={"emails": ["ada@example.org"]},
    ),
    Operation(
        method="POST", path="/suppressions/batch/remove", handler=remove_suppressions, access="full",
        tag="Suppressions", summary="Lift up to 100 suppressions", body=RemoveSuppressions, reply=Removed,
        example={"emails": ["ada@example.org"]},
    ),
    Operation(
        method="GET", path="/suppressions/{id}", handler=get_suppression, summary="Get a suppression by id or address",
        access="full", tag="Suppressions", path_kinds=_ID, reply=SuppressionItem, errors=(404,),
    ),
    Operation(
        method="DELETE", path="/suppressions/{id}", handler=remove_suppression, access="full", tag="Suppressions",
        summary="Lift a suppression by id or address", path_kinds=_ID, reply=SuppressionRemoved, errors=(404,),
    ),
)  # fmt: skip
