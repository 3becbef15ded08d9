"""/webhooks: Resend's operations on endpoints, with dialect, schedule and pause on top.

An endpoint belongs to the caller's org and env: a test key makes, sees and changes endpoints for test events only.
What was told to them is in web.api.webhook_events.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from msgspec import Meta

from nightmail.rules.webhook_urls import MAX_LENGTH, check_webhook_url
from nightmail.rules.webhooks import (
    NIGHTMAIL_TYPES,
    RESEND_TYPES,
    SECRET_OVERLAP_HOURS,
    TYPES,
    Dialect,
    Status,
    dialect_of,
    parse_schedule,
    topics_of,
)
from nightmail.store import webhook_endpoints as store
from nightmail.store.database import Connection
from nightmail.store.webhook_endpoints import MAX_ENDPOINTS, EndpointChange, EndpointView, NewEndpoint
from nightmail.web.idempotency import read_idempotency_key
from nightmail.web.operation import Call, Operation, PathKind, Reply
from nightmail.web.paging import ListOf, Page
from nightmail.web.problems import invalid, not_found
from nightmail.webhooks.signature import new_secret

MAX_TYPES = 100
UrlText = Annotated[
    str,
    Meta(min_length=1, max_length=MAX_LENGTH, description="An https address; http too outside production."),
]
EventNames = Annotated[
    list[Annotated[str, Meta(min_length=1, max_length=100)]],
    Meta(min_length=1, max_length=MAX_TYPES, description="Names of events."),
]
Description = Annotated[str, Meta(max_length=500, description="For people; may be empty.")]
ScheduleText = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=200,
        description="`default` (8 attempts in 27 hours), `legacy` (5 attempts, 2 to 16 seconds apart), or the waits "
        "after each attempt: `5s 5m 2h`.",
    ),
]


class CreateWebhook(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A new endpoint; without `dialect` it is the one that the names of its events are in."""

    endpoint: UrlText
    events: EventNames
    description: Description | None = None
    dialect: Dialect | None = None
    schedule: ScheduleText | None = None


class ChangeWebhook(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What to change; the `webhook_id` that the Python SDK repeats here must be that of the path."""

    endpoint: UrlText | None = None
    events: EventNames | None = None
    status: Status | None = None
    description: Description | None = None
    dialect: Dialect | None = None
    schedule: ScheduleText | None = None
    webhook_id: UUID | None = None


class WebhookPage(Page, kw_only=True):
    """Which part of the endpoints: all of them unless asked otherwise, as there are never more than fit."""

    limit: Annotated[int, Meta(ge=1, le=100, description="How many, 1 to 100.")] = 100


class WebhookSecret(msgspec.Struct):
    """An endpoint and its signing secret."""

    id: str
    signing_secret: str
    object: Literal["webhook"] = "webhook"


class WebhookChanged(msgspec.Struct):
    """The endpoint that was changed."""

    id: str
    object: Literal["webhook"] = "webhook"


class WebhookDeleted(msgspec.Struct):
    """The endpoint that was removed."""

    id: str
    deleted: bool
    object: Literal["webhook"] = "webhook"


class WebhookItem(msgspec.Struct, kw_only=True):
    """An endpoint as lists show it; `disabled_reason` is set when its status is `disabled`."""

    id: str
    endpoint: str
    events: list[str]
    status: Status
    created_at: datetime
    description: str
    dialect: Dialect
    schedule: str
    disabled_reason: str | None
    object: Literal["webhook"] = "webhook"


class WebhookWithSecret(WebhookItem, kw_only=True):
    """An endpoint; after a rotation the secret before signs too until `previous_secret_expires_at`."""

    signing_secret: str
    previous_secret_expires_at: datetime | None


async def create_webhook(call: Call[CreateWebhook]) -> Reply:
    """Make an endpoint for events of the caller's env."""
    read_idempotency_key(call.headers)
    body = call.body
    dialect, types = _read_events(body.events, body.dialect)
    endpoint = NewEndpoint(
        url=_read_url(call, body.endpoint),
        description=_read_description(body.description or ""),
        dialect=dialect,
        types=types,
        topics=topics_of(dialect, types),
        schedule=_read_schedule(body.schedule or "default"),
        secret=new_secret(),
    )
    endpoint_id = await call.services.database.run(
        lambda conn: store.insert_endpoint(
            conn, org_id=call.key.org_id, env=call.key.env, endpoint=endpoint, actor=call.actor
        )
    )
    if endpoint_id is None:
        raise invalid(f"An org has at most {MAX_ENDPOINTS} webhooks per env; remove one first.")
    return Reply(WebhookSecret(str(endpoint_id), endpoint.secret), 201)


async def list_webhooks(call: Call[None]) -> Reply:
    """List endpoints, newest first, without their secrets."""
    page: WebhookPage = call.query
    async with call.services.database.connection() as conn:
        views, has_more = await store.list_endpoints(
            conn,
            org_id=call.key.org_id,
            env=call.key.env,
            limit=page.limit,
            after=page.after,
            before=page.before,
        )
    items = [WebhookItem(**_shown(view)) for view in views]
    return Reply(ListOf(data=items, has_more=has_more))


async def get_webhook(call: Call[None]) -> Reply:
    """Return one endpoint with its secret."""
    async with call.services.database.connection() as conn:
        view = await find_endpoint(call, conn)
    return Reply(
        WebhookWithSecret(
            **_shown(view),
            signing_secret=view.secret,
            previous_secret_expires_at=view.previous_until.astimezone(UTC) if view.previous_until else None,
        )
    )


async def change_webhook(call: Call[ChangeWebhook]) -> Reply:
    """Change an endpoint."""
    body = call.body
    if body.webhook_id not in (None, call.ids["id"]):
        raise invalid("Invalid `webhook_id` field: must be the id in the path, or be left out.")
    url = _read_url(call, body.endpoint) if body.endpoint is not None else None

    async def change(conn: Connection) -> None:
        async with conn.transaction():
            endpoint = await lock_endpoint(call, conn)
            change = _read_change(body, url, endpoint)
            await store.change_endpoint(
                conn, org_id=call.key.org_id, endpoint=endpoint, change=change, actor=call.actor
            )

    await call.services.database.run(change)
    return Reply(WebhookChanged(str(call.ids["id"])))


async def delete_webhook(call: Call[None]) -> Reply:
    """Remove an endpoint."""
    found = await call.services.database.run(
        lambda conn: store.delete_endpoint(
            conn, org_id=call.key.org_id, env=call.key.env, endpoint_id=call.ids["id"], actor=call.actor
        )
    )
    if not found:
        raise not_found("Webhook")
    return Reply(WebhookDeleted(str(call.ids["id"]), True))


async def rotate_webhook_secret(call: Call[None]) -> Reply:
    """Give an endpoint a new secret."""
    secret = new_secret()
    until = await call.services.database.run(
        lambda conn: store.rotate_secret(
            conn,
            org_id=call.key.org_id,
            env=call.key.env,
            endpoint_id=call.ids["id"],
            secret=secret,
            actor=call.actor,
        )
    )
    if until is None:
        raise not_found("Webhook")
    return Reply(WebhookSecret(str(call.ids["id"]), secret))


async def find_endpoint(call: Call[Any], conn: Connection) -> EndpointView:
    """Return the caller's endpoint named in the path. Raises Problem (404)."""
    view = await store.get_endpoint(conn, org_id=call.key.org_id, env=call.key.env, endpoint_id=call.ids["id"])
    if view is None:
        raise not_found("Webhook")
    return view


async def lock_endpoint(call: Call[Any], conn: Connection) -> EndpointView:
    """Return the same and keep it as it is until the transaction ends. Raises Problem (404)."""
    view = await store.lock_endpoint(conn, org_id=call.key.org_id, env=call.key.env, endpoint_id=call.ids["id"])
    if view is None:
        raise not_found("Webhook")
    return view


def _read_change(body: ChangeWebhook, url: str | None, endpoint: EndpointView) -> EndpointChange:
    """Return the checked change. Raises Problem (422).

    Names of the other dialect change the dialect with them; a dialect alone must know the names there are.
    """
    dialect, types = body.dialect, None
    if body.events is not None:
        if dialect is None and all(name in TYPES[endpoint.dialect] for name in body.events):
            dialect = endpoint.dialect
        dialect, types = _read_events(body.events, dialect)
    elif dialect is not None:
        dialect, types = _read_events(endpoint.types, dialect)
    change = EndpointChange(
        url=url,
        description=_read_description(body.description) if body.description is not None else None,
        dialect=dialect,
        types=types,
        topics=topics_of(dialect, types) if dialect is not None and types is not None else None,
        status=body.status,
        schedule=_read_schedule(body.schedule) if body.schedule is not None else None,
    )
    if change == EndpointChange():
        raise invalid("Nothing to change: give `endpoint`, `events`, `status`, `description`, `dialect` or `schedule`.")
    return change


def _read_events(names: Sequence[str], dialect: Dialect | None) -> tuple[Dialect, list[str]]:
    """Return the dialect and the names, each once. Raises Problem (422)."""
    types = list(dict.fromkeys(names))
    if dialect is None:
        try:
            return dialect_of(types), types
        except ValueError as error:
            raise invalid(f"Invalid `events` field: {error}.") from None
    unknown = [name for name in types if name not in TYPES[dialect]]
    if unknown:
        raise invalid(f"Invalid `events` field: the dialect {dialect} has no event {', '.join(unknown)}.")
    return dialect, types


def _read_url(call: Call[Any], text: str) -> str:
    try:
        return check_webhook_url(text, allow_http=call.services.settings.nightmail_env != "production")
    except ValueError as error:
        raise invalid(f"Invalid `endpoint` field: {error}.") from None


def _read_description(text: str) -> str:
    """Return the text. Raises Problem: it is shown in pages and terminals."""
    if not text.isprintable() or (text and not text.strip()):
        raise invalid("Invalid `description` field: must not be blank or hold line ends and control characters.")
    return text.strip()


def _read_schedule(text: str) -> str:
    if text not in ("default", "legacy"):
        try:
            parse_schedule(text)
        except ValueError as error:
            raise invalid(f"Invalid `schedule` field: {error}.") from None
    return text


def _shown(view: EndpointView) -> dict[str, Any]:
    """Return the fields that lists show."""
    return {
        "id": str(view.id),
        "endpoint": view.url,
        "events": view.types,
        "status": view.status,
        "created_at": view.created_at.astimezone(UTC),
        "description": view.description,
        "dialect": view.dialect,
        "schedule": view.schedule,
        "disabled_reason": view.disabled_reason,
    }


WEBHOOK_ID: dict[str, PathKind] = {"id": "uuid"}
_NAMES = (
    f"Names in Nightmail's dialect: {', '.join(NIGHTMAIL_TYPES)}. In Resend's dialect, whose envelope and data then "
    f"come with them: {', '.join(RESEND_TYPES)}. Names that both have mean Resend's unless `dialect` says otherwise."
)

OPERATIONS = (
    Operation(
        method="POST", path="/webhooks", handler=create_webhook, summary="Create a webhook", access="full",
        tag="Webhooks", body=CreateWebhook, reply=WebhookSecret, status=201, headers=("Idempotency-Key",),
        example={"endpoint": "https://example.com/hooks", "events": ["email.sent", "email.bounced"]},
        description=f"At most {MAX_ENDPOINTS} per env. {_NAMES} An Idempotency-Key is checked and otherwise ignored: "
        "a reply that holds a secret is never stored.",
    ),
    Operation(
        method="GET", path="/webhooks", handler=list_webhooks, summary="List webhooks", access="full", tag="Webhooks",
        query=WebhookPage, reply=ListOf[WebhookItem],
    ),
    Operation(
        method="GET", path="/webhooks/{id}", handler=get_webhook, summary="Get a webhook with its signing secret",
        access="full", tag="Webhooks", path_kinds=WEBHOOK_ID, reply=WebhookWithSecret, errors=(404,),
    ),
    Operation(
        method="PATCH", path="/webhooks/{id}", handler=change_webhook, summary="Change a webhook", access="full",
        tag="Webhooks", path_kinds=WEBHOOK_ID, body=ChangeWebhook, reply=WebhookChanged, errors=(404,),
        example={"events": ["email.delivered"], "status": "enabled"},
        description="`paused` holds events back until the webhook is enabled again; `disabled` gets none, and fails "
        "what is pending. Enabling does not bring back what failed: replay it. Events that have their number keep "
        "the body they have when the dialect changes.",
    ),
    Operation(
        method="DELETE", path="/webhooks/{id}", handler=delete_webhook, summary="Remove a webhook", access="full",
        tag="Webhooks", path_kinds=WEBHOOK_ID, reply=WebhookDeleted, errors=(404,),
    ),
    Operation(
        method="POST", path="/webhooks/{id}/signing-secret/rotate", handler=rotate_webhook_secret, access="full",
        tag="Webhooks", summary="Rotate the signing secret", path_kinds=WEBHOOK_ID, reply=WebhookSecret, errors=(404,),
        description=f"For {SECRET_OVERLAP_HOURS} hours attempts are signed with the secret before too. Rotated again "
        "in that time, only the last two hold.",
    ),
)  # fmt: skip
