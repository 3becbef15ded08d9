"""What the credit operations share: whose wallet is meant, references, and how refusals are said."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from msgspec import Meta

from nightmail.rules.credits import MAX_AMOUNT
from nightmail.store.credit_accounts import REGISTRATION
from nightmail.store.credits import DoesNotFit, NotFound, OtherBody, Settled, TooMuch, Wallet
from nightmail.store.orgs import get_org
from nightmail.web.operation import Call
from nightmail.web.problems import Problem, invalid, missing_field, not_found

# What messages are paid as: spent by Nightmail itself, and refunded by the operator only.
MESSAGE_SERVICES = frozenset({"email", "sms"})
# What a message reserves, and its end captures or releases: nobody else may.
MESSAGE_REFERENCES = "message:"
# Of what Nightmail gives and takes back by itself: taken by somebody else, it could not be given when its time comes.
OWN_REFERENCES = (MESSAGE_REFERENCES, "grant:", "purchase:", "trial:", "upgrade:", "stripe:")

Amount = Annotated[int, Meta(ge=1, le=MAX_AMOUNT, description="Credits.")]
Reference = Annotated[str, Meta(min_length=1, max_length=256, description="Your id for this; the same one again "
                                "with the same request gets the same answer.")]  # fmt: skip
Service = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}\Z")]
Reason = Annotated[str, Meta(min_length=1, max_length=500)]
YEARS = range(2000, 2200)


class Owner(msgspec.Struct, kw_only=True):
    """Whose wallet: an org key reaches those of its own org and env; the admin token names them."""

    org: Annotated[UUID | None, Meta(description="The org, with the admin token only.")] = None
    env: Annotated[Literal["live", "test"] | None, Meta(description="live when left out, with the admin token.")] = None


async def owner_of(call: Call[Any]) -> tuple[UUID, str]:
    """Return the org and env that the call is about. Raises Problem."""
    owner: Owner = call.query
    if call.caller is not None:
        if owner.org is not None or owner.env is not None:
            raise invalid("`org` and `env` are for the admin token: an API key has its own.")
        return call.caller.org_id, call.caller.env
    if owner.org is None:
        raise missing_field("org")
    org_id = owner.org
    async with call.services.database.connection() as conn:
        if await get_org(conn, org_id) is None:
            raise not_found("Org")
    return org_id, owner.env or "live"


async def wallet_of(call: Call[Any]) -> Wallet:
    """Return the wallet that the path names. Raises Problem."""
    user_id = read_user(call.ids["user"], "user")
    return Wallet(*await owner_of(call), user_id)


def read_user(text: str, name: str) -> str:
    """Return a user id: the caller's own string, which is part of paths. Raises Problem (422)."""
    if not 1 <= len(text) <= 200 or not text.isprintable() or text != text.strip() or "/" in text:
        raise invalid(
            f"Invalid `{name}` field: must have 1 to 200 visible characters, no `/`, and no spaces around them."
        )
    return text


def read_reference(text: str, name: str = "reference_id") -> str:
    """Return a reference. Raises Problem (422): it is shown, compared and part of an index entry."""
    if not text.isprintable() or text != text.strip() or not text:
        raise invalid(f"Invalid `{name}` field: must be visible characters without spaces around them.")
    return text


def read_own_reference(text: str) -> str:
    """Return a reference of the caller's own. Raises Problem (422): some are Nightmail's own."""
    if text == REGISTRATION:
        raise invalid(f"Invalid `reference_id` field: `{text}` is Nightmail's own.")
    for prefix in OWN_REFERENCES:
        if text.startswith(prefix):
            raise invalid(f"Invalid `reference_id` field: what begins with `{prefix}` is Nightmail's own.")
    return read_reference(text)


def read_reason(text: str | None) -> str | None:
    """Return a reason without the spaces around it. Raises Problem (422)."""
    if text is not None and (not text.isprintable() or not text.strip()):
        raise invalid("Invalid `reason` field: must not be blank or hold line ends and control characters.")
    return text.strip() if text is not None else None


def read_time(at: datetime | None, name: str) -> datetime | None:
    """Return a time that can be reckoned with. Raises Problem (422)."""
    if at is not None and at.year not in YEARS:
        raise invalid(f"Invalid `{name}` field: must lie between the years {YEARS[0]} and {YEARS[-1]}.")
    return at


def refusal(result: OtherBody | NotFound | DoesNotFit | TooMuch | Settled, what: str) -> Problem:
    """Return what a caller is told when the ledger refuses; `what` is the noun that was looked for."""
    match result:
        case TooMuch():
            return Problem(409, "too_many_credits", f"Only {result.limit} credits are left for this.")
        case Settled():
            answer = result.answer
            how = ", ".join(f"{answer[key]} {key}" for key in ("captured", "released", "expired") if answer[key])
            return Problem(409, "reservation_settled", f"The reservation was settled before: {how}.")
        case "other_body":
            return Problem(409, "reference_id_used", "This `reference_id` was used before with a different request.")
        case "does_not_fit":
            return invalid("The balance would not fit: give fewer credits.")
        case _:
            return not_found(what)
