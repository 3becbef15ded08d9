"""/credit-prices: what services cost in credits. An org sets its own, each env apart."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from nightmail.store import credit_prices as store
from nightmail.store.credit_prices import MAX_PRICES, Price
from nightmail.web.api.credit_fields import MESSAGE_SERVICES, Amount, Owner, owner_of
from nightmail.web.operation import Call, Operation, PathKind, Reply
from nightmail.web.paging import ListOf
from nightmail.web.problems import invalid, not_found

_SERVICE = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


class SetPrice(msgspec.Struct, forbid_unknown_fields=True):
    """Credits for one unit."""

    credits: Amount


class PriceItem(msgspec.Struct, kw_only=True):
    """What one unit of a service costs."""

    service: str
    credits: int
    object: Literal["credit_price"] = "credit_price"


class PriceDeleted(msgspec.Struct, kw_only=True):
    """The service that has no price any more."""

    service: str
    deleted: bool = True
    object: Literal["credit_price"] = "credit_price"


async def list_prices(call: Call[None]) -> Reply:
    """List the org's prices."""
    org_id, env = await owner_of(call)
    async with call.services.database.connection() as conn:
        prices = await store.list_prices(conn, org_id=org_id, env=env)
    data = [PriceItem(service=price.service, credits=price.credits) for price in prices]
    return Reply(ListOf(data=data, has_more=False))


async def set_price(call: Call[SetPrice]) -> Reply:
    """Set what a service costs."""
    price = Price(_read_service(call.ids["service"]), call.body.credits)
    if price.service in MESSAGE_SERVICES:
        raise invalid("What an email or an SMS costs is not set here.")
    org_id, env = await owner_of(call)
    is_set = await call.services.database.run(
        lambda conn: store.put_price(conn, org_id=org_id, env=env, price=price, actor=call.actor)
    )
    if not is_set:
        raise invalid(f"There are {MAX_PRICES} prices already: delete one first.")
    return Reply(PriceItem(service=price.service, credits=price.credits))


async def delete_price(call: Call[None]) -> Reply:
    """Remove a price."""
    service = _read_service(call.ids["service"])
    org_id, env = await owner_of(call)
    is_gone = await call.services.database.run(
        lambda conn: store.delete_price(conn, org_id=org_id, env=env, service=service, actor=call.actor)
    )
    if not is_gone:
        raise not_found("Price")
    return Reply(PriceDeleted(service=service))


def _read_service(text: str) -> str:
    if not _SERVICE.fullmatch(text):
        raise invalid("The `service` must have 1 to 64 characters: a-z, 0-9, `_`, `.` and `-`.")
    return text


_SERVICE_KIND: dict[str, PathKind] = {"service": "text"}

OPERATIONS = (
    Operation(
        method="GET", path="/credit-prices", handler=list_prices, summary="List what services cost",
        access="full_or_admin", tag="Credits", query=Owner, reply=ListOf[PriceItem], errors=(404,),
    ),
    Operation(
        method="PUT", path="/credit-prices/{service}", handler=set_price, summary="Set what a service costs",
        access="full_or_admin", tag="Credits", path_kinds=_SERVICE_KIND, query=Owner, body=SetPrice, reply=PriceItem,
        errors=(404,), example={"credits": 5},
    ),
    Operation(
        method="DELETE", path="/credit-prices/{service}", handler=delete_price, summary="Remove a price",
        access="full_or_admin", tag="Credits", path_kinds=_SERVICE_KIND, query=Owner, reply=PriceDeleted,
        errors=(404,),
    ),
)  # fmt: skip
