"""/api-keys: keys of the caller's own org and env. A test key makes, sees and revokes test keys only."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from msgspec import Meta

from nightmail import clock
from nightmail.store import api_keys as store
from nightmail.store.api_keys import ApiKeyView, NewApiKey
from nightmail.web.api.fields import read_name
from nightmail.web.idempotency import read_idempotency_key
from nightmail.web.operation import Call, Operation, PathKind, Reply
from nightmail.web.paging import ListOf, Page
from nightmail.web.problems import invalid, not_found

MAX_RATE = 100_000
MAX_CIDRS = 50
KeyName = Annotated[str, Meta(min_length=1, max_length=200)]


class CreateApiKey(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A new key; without CIDRs it may be used from anywhere, without `rate_per_s` the default limit holds."""

    name: KeyName
    permission: Literal["full_access", "sending_access"] = "full_access"
    domain_id: Annotated[UUID | None, Meta(description="Not supported yet.")] = None
    rate_per_s: Annotated[int, Meta(ge=1, le=MAX_RATE)] | None = None
    cidrs: Annotated[list[Annotated[str, Meta(max_length=64)]], Meta(max_length=MAX_CIDRS)] | None = None
    expires_at: Annotated[datetime, Meta(tz=True)] | None = None


class RenameApiKey(msgspec.Struct, forbid_unknown_fields=True):
    """The new name."""

    name: KeyName


class ApiKeyCreated(msgspec.Struct):
    """The key's id and its token, which is shown here and never again."""

    id: str
    token: str


class ApiKeyChanged(msgspec.Struct):
    """The key that was changed."""

    id: str
    object: Literal["api_key"] = "api_key"


class ApiKeyDeleted(msgspec.Struct):
    """The key that was revoked."""

    id: str
    deleted: bool
    object: Literal["api_key"] = "api_key"


class ApiKeyItem(msgspec.Struct, kw_only=True):
    """A key without its token. When a key was last used is not recorded."""

    id: str
    name: str
    env: str
    permission: str
    last_four: str
    rate_per_s: int | None
    cidrs: list[str]
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None = None


async def create_api_key(call: Call[CreateApiKey]) -> Reply:
    """Make a key of the same env as the caller's."""
    read_idempotency_key(call.headers)
    return await make_key(call, call.key.org_id, read_new_key(call.body, call.key.env))


async def list_api_keys(call: Call[None]) -> Reply:
    """List keys, newest first."""
    page: Page = call.query
    async with call.services.database.connection() as conn:
        views, has_more = await store.list_api_keys(
            conn,
            org_id=call.key.org_id,
            env=call.key.env,
            limit=page.limit,
            after=page.after,
            before=page.before,
        )
    return Reply(ListOf(data=[_item(view) for view in views], has_more=has_more))


async def rename_api_key(call: Call[RenameApiKey]) -> Reply:
    """Give a key another name."""
    name = read_name(call.body.name)
    found = await call.services.database.run(
        lambda conn: store.rename_api_key(
            conn,
            org_id=call.key.org_id,
            env=call.key.env,
            key_id=call.ids["id"],
            name=name,
            actor=call.actor,
        )
    )
    if not found:
        raise not_found("API key")
    return Reply(ApiKeyChanged(str(call.ids["id"])))


async def delete_api_key(call: Call[None]) -> Reply:
    """Revoke a key; other processes may honour it for 5 seconds more."""
    found = await call.services.database.run(
        lambda conn: store.revoke_api_key(
            conn, org_id=call.key.org_id, env=call.key.env, key_id=call.ids["id"], actor=call.actor
        )
    )
    if not found:
        raise not_found("API key")
    call.state.keys.forget(call.ids["id"])
    return Reply(ApiKeyDeleted(str(call.ids["id"]), True))


async def make_key(call: Call[Any], org_id: UUID, key: NewApiKey) -> Reply:
    """Store a key and reply its token."""
    view, token = await call.services.database.run(
        lambda conn: store.insert_api_key(conn, org_id=org_id, key=key, actor=call.actor)
    )
    return Reply(ApiKeyCreated(str(view.id), token), 201)


def read_new_key(body: CreateApiKey, env: str) -> NewApiKey:
    """Return the checked key. Raises Problem (422)."""
    if body.domain_id is not None:
        raise invalid("`domain_id` is not supported yet.")
    now = clock.now()
    if body.expires_at is not None and not now < body.expires_at < now + timedelta(days=3660):
        raise invalid("Invalid `expires_at` field: must be in the future, at most ten years ahead.")
    return NewApiKey(
        name=read_name(body.name),
        env=env,
        permission=body.permission,
        rate_per_s=body.rate_per_s,
        cidrs=[_read_cidr(text) for text in body.cidrs or ()],
        expires_at=body.expires_at,
    )


def _read_cidr(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text, strict=False))
    except ValueError:
        raise invalid("Invalid `cidrs` field: must be networks such as 192.0.2.0/24 or 2001:db8::/32.") from None


def _item(view: ApiKeyView) -> ApiKeyItem:
    return ApiKeyItem(
        id=str(view.id),
        name=view.name,
        env=view.env,
        permission=view.permission,
        last_four=view.last_four,
        rate_per_s=view.rate_per_s,
        cidrs=view.cidrs,
        created_at=view.created_at.astimezone(UTC),
        expires_at=view.expires_at,
    )


_ID: dict[str, PathKind] = {"id": "uuid"}

OPERATIONS = (
    Operation(
        method="POST", path="/api-keys", handler=create_api_key, summary="Create an API key", access="full",
        tag="API keys", body=CreateApiKey, reply=ApiKeyCreated, status=201, headers=("Idempotency-Key",),
        example={"name": "production"},
        description="The token is shown once. An Idempotency-Key is checked and otherwise ignored: a reply that "
        "holds a secret is never stored.",
    ),
    Operation(
        method="GET", path="/api-keys", handler=list_api_keys, summary="List API keys", access="full", tag="API keys",
        query=Page, reply=ListOf[ApiKeyItem],
    ),
    Operation(
        method="PATCH", path="/api-keys/{id}", handler=rename_api_key, summary="Rename an API key", access="full",
        tag="API keys", path_kinds=_ID, body=RenameApiKey, reply=ApiKeyChanged, errors=(404,),
        example={"name": "staging"},
    ),
    Operation(
        method="DELETE", path="/api-keys/{id}", handler=delete_api_key, summary="Revoke an API key", access="full",
        tag="API keys", path_kinds=_ID, reply=ApiKeyDeleted, errors=(404,),
    ),
)  # fmt: skip
