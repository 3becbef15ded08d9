"""/credits: an org's wallets; registering a user, who is given the bonus once; and what that bonus is."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from nightmail.rules.credits import MAX_AMOUNT
from nightmail.store import credit_accounts as store
from nightmail.store.credit_accounts import Bonus
from nightmail.store.credit_history import get_balance
from nightmail.store.credits import Wallet
from nightmail.store.database import Connection
from nightmail.web.api.credit_fields import Owner, owner_of, read_user, wallet_of
from nightmail.web.api.credit_items import Balance, balance_item
from nightmail.web.operation import Call, Operation, PathKind, Reply
from nightmail.web.paging import ListOf
from nightmail.web.problems import invalid, not_found

UserId = Annotated[str, Meta(min_length=1, max_length=200)]


class AccountPage(Owner, kw_only=True):
    """Which part of the list."""

    limit: Annotated[int, Meta(ge=1, le=100, description="How many, 1 to 100.")] = 20
    after: Annotated[UserId | None, Meta(description="Continue after this user.")] = None
    before: Annotated[UserId | None, Meta(description="Continue before this user.")] = None

    def __post_init__(self) -> None:
        """Refuse two directions at once."""
        if self.after is not None and self.before is not None:
            raise invalid("Use either `after` or `before`, not both.")


class AccountItem(msgspec.Struct, kw_only=True):
    """A wallet: what its user can spend now, and what is set aside."""

    user_id: str
    balance: int
    reserved: int
    low_below: int | None
    created_at: datetime
    object: Literal["credit_account"] = "credit_account"


class PutBonus(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What new users are given from now on, 0 for nothing; without `lifetime_days` it does not end."""

    credits: Annotated[int, Meta(ge=0, le=MAX_AMOUNT)]
    lifetime_days: Annotated[int, Meta(ge=1, le=36_600)] | None = None


class BonusItem(msgspec.Struct, kw_only=True):
    """What new users are given."""

    credits: int
    lifetime_days: int | None
    object: Literal["registration_bonus"] = "registration_bonus"


async def list_accounts(call: Call[None]) -> Reply:
    """List the org's users that have a wallet."""
    page: AccountPage = call.query
    after = read_user(page.after, "after") if page.after is not None else None
    before = read_user(page.before, "before") if page.before is not None else None
    org_id, env = await owner_of(call)
    async with call.services.database.connection() as conn:
        views, has_more = await store.list_accounts(
            conn, org_id=org_id, env=env, limit=page.limit, after=after, before=before
        )
    data = [
        AccountItem(
            user_id=view.user_id,
            balance=view.balance,
            reserved=view.reserved,
            low_below=view.low_below,
            created_at=view.created_at.astimezone(UTC),
        )
        for view in views
    ]
    return Reply(ListOf(data=data, has_more=has_more))


async def register_user(call: Call[None]) -> Reply:
    """Register a user."""
    wallet: Wallet = await wallet_of(call)

    async def step(conn: Connection) -> None:
        await store.register(conn, wallet)

    await call.services.database.run(step)
    async with call.services.database.connection() as conn:
        view = await get_balance(conn, wallet)
    if view is None:
        raise not_found("Credit account")
    return Reply(balance_item(view))


async def get_bonus(call: Call[None]) -> Reply:
    """Return what new users are given."""
    org_id, env = await owner_of(call)
    async with call.services.database.connection() as conn:
        bonus = await store.get_bonus(conn, org_id=org_id, env=env) or Bonus(0, None)
    return Reply(BonusItem(credits=bonus.credits, lifetime_days=bonus.lifetime_days))


async def put_bonus(call: Call[PutBonus]) -> Reply:
    """Set what new users are given."""
    bonus = Bonus(call.body.credits, call.body.lifetime_days)
    org_id, env = await owner_of(call)
    await call.services.database.run(
        lambda conn: store.put_bonus(conn, org_id=org_id, env=env, bonus=bonus, actor=call.actor)
    )
    return Reply(BonusItem(credits=bonus.credits, lifetime_days=bonus.lifetime_days))


_USER: dict[str, PathKind] = {"user": "text"}

OPERATIONS = (
    Operation(
        method="GET", path="/credits", handler=list_accounts, summary="List users that have a wallet",
        access="full_or_admin", tag="Credits", query=AccountPage, reply=ListOf[AccountItem], errors=(404,),
        description="In the order of their ids, which is that of the bytes.",
    ),
    Operation(
        method="POST", path="/credits/{user}", handler=register_user, summary="Register a user",
        access="full_or_admin", tag="Credits", path_kinds=_USER, query=Owner, reply=Balance, errors=(404,),
        description="Makes the user's wallet, and gives the registration bonus if there is one and the user has not "
        "had it. Call it as often as you like.",
    ),
    Operation(
        method="GET", path="/registration-bonus", handler=get_bonus, summary="Get what new users are given",
        access="full_or_admin", tag="Credits", query=Owner, reply=BonusItem, errors=(404,),
    ),
    Operation(
        method="PUT", path="/registration-bonus", handler=put_bonus, summary="Set what new users are given",
        access="admin", tag="Credits (admin)", query=Owner, body=PutBonus, reply=BonusItem, errors=(404,),
        example={"credits": 50, "lifetime_days": 30},
    ),
)  # fmt: skip
