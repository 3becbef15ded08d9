"""/plans and /purchases: what can be bought, and who bought it. Bearer ADMIN_TOKEN."""

from __future__ import annotations

import re
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from msgspec import Meta

from nightmail.rules.credits import MAX_AMOUNT, MOST_MONTHS_AT_ONCE
from nightmail.store import plans, purchases
from nightmail.store.credits import Wallet
from nightmail.store.plans import Plan
from nightmail.store.purchases import NewPurchase, PurchaseView
from nightmail.web.api.credit_fields import Owner, owner_of, read_reference, read_time, read_user
from nightmail.web.api.fields import read_name
from nightmail.web.operation import Call, Operation, PathKind, Reply
from nightmail.web.paging import ListOf, Page
from nightmail.web.problems import Problem, invalid, not_found

_PLAN = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
PlanId = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}\Z")]
Credits = Annotated[int, Meta(ge=0, le=MAX_AMOUNT)]

Quantity = Annotated[int, Meta(ge=1, le=9999, description="So many times the plan's credits.")]


class PutPlan(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A plan: of a subscription, `credits` for each month, also when it is billed yearly; of a pack, once."""

    name: Annotated[str, Meta(min_length=1, max_length=200)]
    kind: Literal["subscription", "pack"]
    credits: Credits
    interval_months: Literal[1, 3, 6, 12] = 1
    priority: Annotated[int, Meta(ge=0, le=1000)] = 100
    expires: Annotated[bool, Meta(description="A month's credits end when the next month begins.")] = True
    grace_days: Annotated[int, Meta(ge=0, le=366, description="So much later.")] = 0
    lifetime_days: Annotated[int, Meta(ge=1, le=36_600, description="Of a pack's credits.")] | None = None
    rollover_cap: Annotated[Credits, Meta(description="So much of what is left moves into the next month.")] = 0
    trial_credits: Credits = 0
    past_due_days: Annotated[int, Meta(ge=0, le=366, description="Months go on so long without payment.")] = 0


class PlanItem(PutPlan, kw_only=True):
    """A plan."""

    id: str
    object: Literal["plan"] = "plan"


class CreatePurchase(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Who bought which plan; months begin at `anchor` (now), and are given from the one that runs, or `grants_from`."""

    user_id: Annotated[str, Meta(min_length=1, max_length=200)]
    plan: PlanId
    quantity: Quantity = 1
    external_ref: Annotated[str, Meta(min_length=1, max_length=255)] | None = None
    anchor: Annotated[datetime, Meta(tz=True)] | None = None
    grants_from: Annotated[datetime, Meta(tz=True)] | None = None
    trial_ends_at: Annotated[datetime, Meta(tz=True)] | None = None


class ChangePurchase(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The new plan or quantity, or the new status; `canceled` at the end of the interval unless not `at_period_end`."""

    plan: PlanId | None = None
    quantity: Quantity | None = None
    status: Literal["active", "past_due", "canceled"] | None = None
    at_period_end: bool = True


class PurchasePage(Page, kw_only=True):
    """Which purchases."""

    org: Annotated[UUID | None, Meta(description="Of this org only.")] = None


class PurchaseItem(msgspec.Struct, kw_only=True):
    """A purchase; `next_grant_at` is when its next month begins, `holds_from` from when on months are not given."""

    id: str
    org_id: str
    env: str
    user_id: str
    plan: str
    quantity: int
    external_ref: str | None
    status: str
    anchor: datetime
    grants_from: datetime
    next_grant_at: datetime | None
    holds_from: datetime | None
    ends_at: datetime | None
    grant_error: str | None
    created_at: datetime
    object: Literal["purchase"] = "purchase"


async def list_plans(call: Call[None]) -> Reply:
    """List the plans."""
    async with call.services.database.connection() as conn:
        found = await plans.list_plans(conn)
    return Reply(ListOf(data=[PlanItem(**asdict(plan)) for plan in found], has_more=False))


async def put_plan(call: Call[PutPlan]) -> Reply:
    """Make or change a plan."""
    plan_id, body = call.ids["plan"], call.body
    if not _PLAN.fullmatch(plan_id):
        raise invalid("The `plan` must have 1 to 64 characters: a-z, 0-9, `_`, `.` and `-`.")
    if body.rollover_cap > 0 and not body.expires:
        raise invalid("Invalid `rollover_cap` field: credits that do not end need not roll over.")
    if body.kind == "pack" and body.credits == 0:
        raise invalid("Invalid `credits` field: a pack has some.")
    plan = Plan(plan_id, read_name(body.name), **{k: v for k, v in msgspec.structs.asdict(body).items() if k != "name"})
    if not await call.services.database.run(lambda conn: plans.put_plan(conn, plan, actor=call.actor)):
        raise Problem(409, "plan_kind", "A subscription cannot become a pack, nor a pack a subscription.")
    return Reply(PlanItem(**asdict(plan)))


async def create_purchase(call: Call[CreatePurchase]) -> Reply:
    """Make a purchase and give what is due at once."""
    body = call.body
    user_id = read_user(body.user_id, "user_id")
    new = NewPurchase(
        body.plan,
        read_reference(body.external_ref, "external_ref") if body.external_ref is not None else None,
        read_time(body.anchor, "anchor"),
        read_time(body.grants_from, "grants_from"),
        read_time(body.trial_ends_at, "trial_ends_at"),
        body.quantity,
    )
    if new.trial_ends_at is not None and new.anchor is not None:
        raise invalid("Use either `anchor` or `trial_ends_at`: the months begin when the trial ends.")
    wallet = Wallet(*await owner_of(call), user_id)
    try:
        made = await call.services.database.run(
            lambda conn: purchases.create_purchase(conn, wallet, new, actor=call.actor)
        )
    except OverflowError:
        raise invalid("Invalid `quantity` field: the balance would not fit.") from None
    if made == "unknown_plan":
        raise invalid(f"Invalid `plan` field: there is no plan `{body.plan}`.")
    if made == "too_long_ago":
        raise invalid(f"Invalid `grants_from` field: that is more than {MOST_MONTHS_AT_ONCE} months to give at once.")
    if made == "other_body":
        raise Problem(409, "external_ref_used", "This `external_ref` is of another user, plan or quantity.")
    assert isinstance(made, PurchaseView)
    return Reply(purchase_item(made), 201)


async def list_purchases(call: Call[None]) -> Reply:
    """List purchases, newest first."""
    page: PurchasePage = call.query
    async with call.services.database.connection() as conn:
        views, has_more = await purchases.list_purchases(
            conn, org_id=page.org, limit=page.limit, after=page.after, before=page.before
        )
    return Reply(ListOf(data=[purchase_item(view) for view in views], has_more=has_more))


async def get_purchase(call: Call[None]) -> Reply:
    """Return a purchase."""
    async with call.services.database.connection() as conn:
        view = await purchases.get_purchase(conn, call.ids["id"])
    if view is None:
        raise not_found("Purchase")
    return Reply(purchase_item(view))


async def change_purchase(call: Call[ChangePurchase]) -> Reply:
    """Change a subscription's plan or status."""
    body, purchase_id = call.body, call.ids["id"]
    if (body.plan is None and body.quantity is None) == (body.status is None):
        raise invalid("Give `plan`, `quantity` or both, or else `status`.")

    async def step(conn: Any) -> PurchaseView | str:
        if body.status is None:
            return await purchases.change_plan(conn, purchase_id, body.plan, actor=call.actor, quantity=body.quantity)
        return await purchases.set_status(
            conn, purchase_id, body.status, actor=call.actor, at_period_end=body.at_period_end
        )

    try:
        changed = await call.services.database.run(step)
    except OverflowError:
        raise invalid("Invalid `quantity` field: the balance would not fit.") from None
    if isinstance(changed, PurchaseView):
        return Reply(purchase_item(changed))
    if changed == "unknown_plan":
        raise invalid(f"Invalid `plan` field: there is no plan `{body.plan}`.")
    if changed == "not_a_subscription":
        raise Problem(409, "not_a_subscription", "Only a subscription can be changed, and only into another one.")
    raise not_found("Purchase")


def purchase_item(view: PurchaseView) -> PurchaseItem:
    """Return a purchase as clients see it."""

    def utc(at: datetime | None) -> datetime | None:
        return at and at.astimezone(UTC)

    return PurchaseItem(
        id=str(view.id),
        org_id=str(view.org_id),
        env=view.env,
        user_id=view.user_id,
        plan=view.plan_id,
        quantity=view.quantity,
        external_ref=view.external_ref,
        status=view.status,
        anchor=view.anchor.astimezone(UTC),
        grants_from=view.grants_from.astimezone(UTC),
        next_grant_at=utc(view.next_grant_at),
        holds_from=utc(view.holds_from),
        ends_at=utc(view.ends_at),
        grant_error=view.grant_error,
        created_at=view.created_at.astimezone(UTC),
    )


_ID: dict[str, PathKind] = {"id": "uuid"}
_PLAN_KIND: dict[str, PathKind] = {"plan": "text"}
_TAG = "Purchases (admin)"

OPERATIONS = (
    Operation(
        method="GET", path="/plans", handler=list_plans, summary="List plans", access="admin", tag=_TAG,
        reply=ListOf[PlanItem],
    ),
    Operation(
        method="PUT", path="/plans/{plan}", handler=put_plan, summary="Make or change a plan", access="admin", tag=_TAG,
        path_kinds=_PLAN_KIND, body=PutPlan, reply=PlanItem, errors=(409,),
        example={"name": "5,000 credits a month", "kind": "subscription", "credits": 5000, "rollover_cap": 1000},
    ),
    Operation(
        method="POST", path="/purchases", handler=create_purchase, summary="Make a purchase", access="admin", tag=_TAG,
        query=Owner, body=CreatePurchase, reply=PurchaseItem, status=201, errors=(404, 409),
        example={"user_id": "ada", "plan": "monthly"},
        description="A pack gives its credits at once, a subscription those of the month that runs; later months are "
        "given by the job credits-grant. The same `external_ref` again returns the purchase as it is.",
    ),
    Operation(
        method="GET", path="/purchases", handler=list_purchases, summary="List purchases", access="admin", tag=_TAG,
        query=PurchasePage, reply=ListOf[PurchaseItem],
    ),
    Operation(
        method="GET", path="/purchases/{id}", handler=get_purchase, summary="Get a purchase", access="admin", tag=_TAG,
        path_kinds=_ID, reply=PurchaseItem, errors=(404,),
    ),
    Operation(
        method="PATCH", path="/purchases/{id}", handler=change_purchase, summary="Change a subscription",
        access="admin", tag=_TAG, path_kinds=_ID, body=ChangePurchase, reply=PurchaseItem, errors=(404, 409),
        example={"plan": "yearly"},
    ),
)  # fmt: skip
