"""/credits/{user}: giving credits and taking them back. Bearer ADMIN_TOKEN, as an org's messages may be paid with them.

A refund is for org keys too, of what they spent themselves.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from msgspec import Meta

from nightmail import clock
from nightmail.store import credit_grants as store
from nightmail.store.credit_grants import NewGrant
from nightmail.store.credits import Done
from nightmail.store.database import Connection
from nightmail.web.api.credit_fields import (
    MESSAGE_REFERENCES,
    MESSAGE_SERVICES,
    Amount,
    Owner,
    Reason,
    Reference,
    read_own_reference,
    read_reason,
    read_reference,
    read_time,
    refusal,
    wallet_of,
)
from nightmail.web.operation import Call, Operation, PathKind, Reply
from nightmail.web.problems import Problem, invalid, missing_field


class GrantCredits(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Credits to give; without `expires_at` they do not end. Batches of a smaller priority are spent first."""

    reference_id: Reference
    amount: Amount
    source: Literal["bonus", "purchase"] = "bonus"
    priority: Annotated[int, Meta(ge=0, le=1000)] = 100
    expires_at: Annotated[datetime, Meta(tz=True)] | None = None
    reason: Reason | None = None


class RefundCredits(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What to give back: `of` is the reference_id of the spend; all that is left of it without an amount."""

    reference_id: Reference
    of: Reference
    amount: Amount | None = None
    reason: Reason | None = None


class ClawBack(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which credits to take back: those of a batch, or of the grant with a reference_id."""

    reference_id: Reference
    reason: Reason
    batch_id: UUID | None = None
    grant: Reference | None = None
    amount: Amount | None = None


class Granted(msgspec.Struct, kw_only=True):
    """The batch that was made; of a refund that made several the first one, with the amount of all."""

    reference_id: str
    batch_id: str
    amount: int
    source: str
    priority: int
    expires_at: datetime | None
    object: Literal["credit_grant"] = "credit_grant"


class ClawedBack(msgspec.Struct, kw_only=True):
    """What was taken back; `reserved` keeps its right, `gone` was spent or had expired."""

    reference_id: str
    batch_id: str
    amount: int
    reserved: int
    gone: int
    object: Literal["credit_clawback"] = "credit_clawback"


async def grant_credits(call: Call[GrantCredits]) -> Reply:
    """Give credits to a user."""
    body = call.body
    reference, reason = read_own_reference(body.reference_id), read_reason(body.reason)
    ends = read_time(body.expires_at, "expires_at")
    if ends is not None and ends <= clock.now():
        raise invalid("Invalid `expires_at` field: must lie in the future.")
    wallet = await wallet_of(call)
    counter = "system:grant" if body.source == "bonus" else f"payment:{reference}"
    new = NewGrant(body.amount, reference, body.source, body.priority, ends, counter, reason)
    return _reply(await call.services.database.run(lambda conn: store.grant(conn, wallet, new)), Granted)


async def refund_credits(call: Call[RefundCredits]) -> Reply:
    """Give back what a spend took."""
    body = call.body
    reference, of, reason = (
        read_own_reference(body.reference_id),
        read_reference(body.of, "of"),
        read_reason(body.reason),
    )
    wallet = await wallet_of(call)

    async def step(conn: Connection) -> Any:
        # By its name too: a message that is only reserved now may be captured, and refunded, a moment later.
        is_message = of.startswith(MESSAGE_REFERENCES) or await store.service_of(conn, wallet, of) in MESSAGE_SERVICES
        if call.caller is not None and is_message:
            raise Problem(403, "admin_only", "What a message cost is refunded by the operator only.")
        return await store.refund(conn, wallet, reference=reference, of=of, amount=body.amount, reason=reason)

    return _reply(await call.services.database.run(step), Granted, "Spend")


async def claw_back_credits(call: Call[ClawBack]) -> Reply:
    """Take back what is left of a batch."""
    body = call.body
    reference, reason = read_own_reference(body.reference_id), read_reason(body.reason)
    if (body.batch_id is None) == (body.grant is None):
        raise missing_field("batch_id") if body.batch_id is None else invalid("Use either `batch_id` or `grant`.")
    grant = read_reference(body.grant, "grant") if body.grant is not None else None
    wallet = await wallet_of(call)

    async def step(conn: Connection) -> Any:
        batch_id = body.batch_id or await store.find_batch(conn, wallet, grant or "")
        if batch_id is None:
            return "not_found"
        return await store.claw_back(
            conn, wallet, reference=reference, batch_id=batch_id, reason=reason or "", amount=body.amount
        )

    return _reply(await call.services.database.run(step), ClawedBack, "Batch")


def _reply(result: Any, kind: type[msgspec.Struct], what: str = "Credit account") -> Reply:
    if not isinstance(result, Done):
        raise refusal(result, what)
    return Reply(
        msgspec.convert(result.answer, kind), 200, [(b"idempotent-replayed", b"true")] if result.is_replay else []
    )


_USER: dict[str, PathKind] = {"user": "text"}

OPERATIONS = (
    Operation(
        method="POST", path="/credits/{user}/grant", handler=grant_credits, summary="Give credits to a user",
        access="admin", tag="Credits (admin)", path_kinds=_USER, query=Owner, body=GrantCredits, reply=Granted,
        errors=(404, 409), example={"amount": 100, "reference_id": "welcome-ada", "reason": "registration bonus"},
    ),
    Operation(
        method="POST", path="/credits/{user}/refund", handler=refund_credits, summary="Give back what a spend took",
        access="full_or_admin", tag="Credits", path_kinds=_USER, query=Owner, body=RefundCredits, reply=Granted,
        errors=(404, 409), example={"reference_id": "refund-3", "of": "render-3"},
        description="Several refunds may add up to what was spent. The credits end with the batches they came from, "
        "though not within 30 days.",
    ),
    Operation(
        method="POST", path="/credits/{user}/clawback", handler=claw_back_credits, summary="Take credits back",
        access="admin", tag="Credits (admin)", path_kinds=_USER, query=Owner, body=ClawBack, reply=ClawedBack,
        errors=(404, 409), example={"reference_id": "mistake-1", "grant": "welcome", "reason": "given twice"},
    ),
)  # fmt: skip
