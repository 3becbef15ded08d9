"""/orgs: the operator makes tenants and their keys. Bearer ADMIN_TOKEN."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from nightmail.errors import UnknownPlan
from nightmail.store import orgs as store
from nightmail.store.orgs import NewOrg, OrgChange, OrgView
from nightmail.web.api.api_keys import ApiKeyCreated, CreateApiKey, make_key, read_new_key
from nightmail.web.api.credit_fields import read_user
from nightmail.web.api.fields import read_name
from nightmail.web.idempotency import read_idempotency_key
from nightmail.web.operation import Call, Operation, PathKind, Reply
from nightmail.web.paging import ListOf, Page
from nightmail.web.problems import invalid, not_found

PlanName = Annotated[
    str, Meta(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}\Z", description="Of the message plans: free, pro …")
]
Billing = Annotated[
    Literal["quota", "prepaid", "metered"],
    Meta(
        description="Beyond the plan's quota: refused, paid with credits, or with what credits there are and metered."
    ),
]
BillingUser = Annotated[
    str, Meta(min_length=1, max_length=200, description="Whose credits pay for the org's live messages.")
]
StripeCustomer = Annotated[str, Meta(max_length=255, pattern="^[A-Za-z0-9_]+$")]


class CreateOrg(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A new tenant."""

    name: Annotated[str, Meta(min_length=1, max_length=200)]
    plan: PlanName = "free"
    billing: Billing = "quota"
    stripe_customer_id: StripeCustomer | None = None
    send_policy: Literal["at_least_once", "at_most_once"] = "at_least_once"
    billing_user: BillingUser = "billing"


class ChangeOrg(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """How a tenant pays from now on; what is accepted already keeps its price. What is left out stays as it is."""

    plan: PlanName | None = None
    billing: Billing | None = None
    billing_user: BillingUser | None = None
    stripe_customer_id: Annotated[
        StripeCustomer | UnsetType | None, Meta(description="null takes the customer away.")
    ] = UNSET


class CreateOrgApiKey(CreateApiKey, forbid_unknown_fields=True, kw_only=True):
    """A new key of a tenant."""

    env: Literal["live", "test"] = "live"


class OrgItem(msgspec.Struct, kw_only=True):
    """A tenant."""

    id: str
    name: str
    plan: str
    billing: str
    stripe_customer_id: str | None
    send_policy: str
    billing_user: str
    created_at: datetime
    object: Literal["org"] = "org"


class OrgCreated(OrgItem, kw_only=True):
    """The tenant and its first keys, which are shown here and never again."""

    live_key: str
    test_key: str


async def create_org(call: Call[CreateOrg]) -> Reply:
    """Make a tenant with a live and a test key."""
    read_idempotency_key(call.headers)
    body = call.body
    org = NewOrg(
        read_name(body.name),
        body.plan,
        body.billing,
        _read_customer(body.stripe_customer_id),
        body.send_policy,
        read_user(body.billing_user, "billing_user"),
    )
    try:
        view, live, test = await call.services.database.run(lambda conn: store.create_org(conn, org, actor=call.actor))
    except UnknownPlan as error:
        raise invalid(f"Invalid `plan` field: {error}.") from None
    return Reply(OrgCreated(**_fields(view), live_key=live, test_key=test), 201)


async def change_org(call: Call[ChangeOrg]) -> Reply:
    """Change a tenant's plan and how it pays."""
    body = call.body
    sets_customer = body.stripe_customer_id is not UNSET
    change = OrgChange(
        body.plan,
        body.billing,
        None if body.billing_user is None else read_user(body.billing_user, "billing_user"),
        sets_customer,
        None if body.stripe_customer_id is UNSET else _read_customer(body.stripe_customer_id),
    )
    if change == OrgChange():
        raise invalid("Name what to change: `plan`, `billing`, `billing_user` or `stripe_customer_id`.")
    try:
        view = await call.services.database.run(
            lambda conn: store.change_org(conn, call.ids["id"], change, actor=call.actor)
        )
    except UnknownPlan as error:
        raise invalid(f"Invalid `plan` field: {error}.") from None
    if view is None:
        raise not_found("Org")
    return Reply(OrgItem(**_fields(view)))


def _read_customer(customer: str | None) -> str | None:
    """Return the Stripe customer. Raises Problem (422)."""
    if customer is not None and not customer.isidentifier():
        raise invalid("Invalid `stripe_customer_id` field: must look like cus_ABC123.")
    return customer


async def list_orgs(call: Call[None]) -> Reply:
    """List tenants, newest first."""
    page: Page = call.query
    async with call.services.database.connection() as conn:
        views, has_more = await store.list_orgs(conn, limit=page.limit, after=page.after, before=page.before)
    return Reply(ListOf(data=[OrgItem(**_fields(view)) for view in views], has_more=has_more))


async def create_org_api_key(call: Call[CreateOrgApiKey]) -> Reply:
    """Make a key of a tenant, in either env."""
    read_idempotency_key(call.headers)
    key = read_new_key(call.body, call.body.env)
    async with call.services.database.connection() as conn:
        org = await store.get_org(conn, call.ids["id"])
    if org is None:
        raise not_found("Org")
    return await make_key(call, org.id, key)


def _fields(view: OrgView) -> dict[str, Any]:
    return {
        "id": str(view.id),
        "name": view.name,
        "plan": view.plan,
        "billing": view.billing,
        "stripe_customer_id": view.stripe_customer_id,
        "send_policy": view.send_policy,
        "billing_user": view.billing_user,
        "created_at": view.created_at.astimezone(UTC),
    }


_ID: dict[str, PathKind] = {"id": "uuid"}

OPERATIONS = (
    Operation(
        method="POST", path="/orgs", handler=create_org, summary="Create an org", access="admin", tag="Orgs (admin)",
        body=CreateOrg, reply=OrgCreated, status=201, headers=("Idempotency-Key",), example={"name": "Acme"},
    ),
    Operation(
        method="GET", path="/orgs", handler=list_orgs, summary="List orgs", access="admin", tag="Orgs (admin)",
        query=Page, reply=ListOf[OrgItem],
    ),
    Operation(
        method="PATCH", path="/orgs/{id}", handler=change_org, summary="Change an org's plan and billing",
        access="admin", tag="Orgs (admin)", path_kinds=_ID, body=ChangeOrg, reply=OrgItem, errors=(404,),
        example={"plan": "pro", "billing": "metered", "stripe_customer_id": "cus_ABC123"},
        description="For what is accepted from now on: scheduled messages keep the price they were accepted with.",
    ),
    Operation(
        method="POST", path="/orgs/{id}/api-keys", handler=create_org_api_key, summary="Create an API key of an org",
        access="admin", tag="Orgs (admin)", path_kinds=_ID, body=CreateOrgApiKey, reply=ApiKeyCreated, status=201,
        errors=(404,), headers=("Idempotency-Key",), example={"name": "production", "env": "live"},
    ),
)  # fmt: skip
