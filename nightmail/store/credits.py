"""credit_accounts: spending from a wallet, at once or by reservation.

Each call is one statement, hence one transaction unless the caller has one open; the functions of the schema take the
account's row first. A refusal has changed nothing. The same reference with the same request gets the first answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

from nightmail.rules.credits import UNNAMED_SERVICE, fingerprint
from nightmail.store.database import Connection
from nightmail.store.fan_out import Fact, fan_out


@dataclass(frozen=True, slots=True)
class Wallet:
    """Whose credits: `user_id` is the caller's own string."""

    org_id: UUID
    env: str
    user_id: str


@dataclass(frozen=True, slots=True)
class Done:
    """It is done, now or (`is_replay`) by the first request of this reference, whose answer this is."""

    answer: dict[str, Any]
    is_replay: bool = False


@dataclass(frozen=True, slots=True)
class Insufficient:
    """There is not enough to spend, all in credits."""

    required: int
    available: int
    missing: int


@dataclass(frozen=True, slots=True)
class TooMuch:
    """More was asked for than there is: reserved, or still to be refunded."""

    limit: int


@dataclass(frozen=True, slots=True)
class Settled:
    """The reservation was settled otherwise before; `answer` says how."""

    answer: dict[str, Any]


OtherBody = Literal["other_body"]
NotFound = Literal["not_found"]
DoesNotFit = Literal["does_not_fit"]

SPEND = """
SELECT outcome, answer, low_below
FROM nm_credit_spend(
    %(kind)s, %(org_id)s, %(env)s, %(user_id)s, %(reference)s, %(fingerprint)s, %(amount)s, %(service)s, %(may_cross)s
)
"""


async def consume(
    conn: Connection,
    wallet: Wallet,
    *,
    amount: int,
    reference: str,
    service: str = UNNAMED_SERVICE,
    request: bytes | None = None,
) -> Done | Insufficient | OtherBody:
    """Spend credits now. `request` is the fingerprint of what was asked, None for that of these arguments."""
    return await _spend(conn, "consume", wallet, amount, reference, service, request)


async def reserve(
    conn: Connection,
    wallet: Wallet,
    *,
    amount: int,
    reference: str,
    service: str = UNNAMED_SERVICE,
    request: bytes | None = None,
) -> Done | Insufficient | OtherBody:
    """Set credits aside, to be captured or released; they keep their right beyond their batch's expiry."""
    return await _spend(conn, "reserve", wallet, amount, reference, service, request)


async def _spend(
    conn: Connection, kind: str, wallet: Wallet, amount: int, reference: str, service: str, request: bytes | None
) -> Done | Insufficient | OtherBody:
    arguments = {
        "kind": kind,
        "org_id": wallet.org_id,
        "env": wallet.env,
        "user_id": wallet.user_id,
        "reference": reference,
        "fingerprint": request or fingerprint(amount, service),
        "amount": amount,
        "service": service,
        "may_cross": False,
    }
    outcome, answer, low_below = await _one(conn, SPEND, arguments)
    if outcome == "crosses_low":
        # Nothing was done: credits.low is told in the transaction of the spend, and most spends need no BEGIN for it.
        async with conn.transaction():
            outcome, answer, low_below = await _one(conn, SPEND, {**arguments, "may_cross": True})
            if outcome == "done" and low_below is not None:
                data = {"user_id": wallet.user_id, "balance": answer["balance"], "low_below": low_below}
                await fan_out(conn, [Fact(wallet.org_id, wallet.env, "credits.low", data=data)])
    if outcome == "insufficient":
        return Insufficient(**answer)
    if outcome == "other_body":
        return "other_body"
    return Done(answer, outcome == "replayed")


DONE_BEFORE = """
SELECT t.answer
FROM credit_transactions AS t
JOIN credit_accounts AS a ON a.id = t.account_id
WHERE a.org_id = %(org_id)s
  AND a.env = %(env)s
  AND a.user_id = %(user_id)s
  AND t.kind = %(kind)s
  AND t.reference = %(reference)s
  AND t.fingerprint = %(fingerprint)s
"""


async def find_spend(
    conn: Connection, wallet: Wallet, *, kind: Literal["consume", "reserve"], reference: str, request: bytes
) -> Done | None:
    """Return the answer that this very request got before, None when it is new."""
    cursor = await conn.execute(
        DONE_BEFORE,
        {
            "org_id": wallet.org_id,
            "env": wallet.env,
            "user_id": wallet.user_id,
            "kind": kind,
            "reference": reference,
            "fingerprint": request,
        },
    )
    row = await cursor.fetchone()
    return Done(row[0], is_replay=True) if row else None


CLOSE = """
SELECT outcome, answer
FROM nm_credit_close(
    %(kind)s, %(org_id)s, %(env)s, %(user_id)s, %(reference)s, %(fingerprint)s, %(amount)s
)
"""


async def capture(
    conn: Connection, wallet: Wallet, *, reference: str, amount: int | None = None
) -> Done | TooMuch | Settled | OtherBody | NotFound:
    """Spend what a reservation holds (`amount` of it, None: all) and give back the rest."""
    return await _close(conn, "capture", wallet, reference, amount)


async def release(
    conn: Connection, wallet: Wallet, *, reference: str
) -> Done | TooMuch | Settled | OtherBody | NotFound:
    """Give back what a reservation holds; what came from a batch that has ended meanwhile goes to expiry."""
    return await _close(conn, "release", wallet, reference, None)


async def _close(
    conn: Connection, kind: str, wallet: Wallet, reference: str, amount: int | None
) -> Done | TooMuch | Settled | OtherBody | NotFound:
    async with conn.transaction():
        outcome, answer = await _one(
            conn,
            CLOSE,
            {
                "kind": kind,
                "org_id": wallet.org_id,
                "env": wallet.env,
                "user_id": wallet.user_id,
                "reference": reference,
                "fingerprint": fingerprint(kind, amount),
                "amount": amount,
            },
        )
        if outcome == "done" and answer["expired"]:
            await fan_out(conn, [expired_fact(wallet, answer["expired"])])
    if outcome == "too_much":
        return TooMuch(answer["reserved"])
    if outcome == "settled":
        return Settled(answer)
    if outcome in ("other_body", "not_found"):
        return "other_body" if outcome == "other_body" else "not_found"
    return Done(answer, outcome == "replayed")


@dataclass(frozen=True, slots=True, order=True)
class Settlement:
    """What becomes of a reservation: `captured` of it is spent, the rest goes back."""

    account_id: int
    reference: str
    captured: int


SETTLE = """
SELECT s.account_id, s.reference, s.captured, s.released, s.expired, a.org_id, a.env, a.user_id
FROM nm_credit_settle(%(account_ids)s::bigint[], %(references)s::text[], %(captured)s::bigint[], NULL) AS s
JOIN credit_accounts AS a ON a.id = s.account_id
"""


async def settle(conn: Connection, settlements: list[Settlement]) -> list[Settlement]:
    """Settle the reservations of many messages; part of the record step's transaction, after messages, before usage.

    Each reference at most once. Returns those that were open, with what was captured.
    """
    if not settlements:
        return []
    cursor = await conn.execute(
        SETTLE,
        {
            "account_ids": [s.account_id for s in settlements],
            "references": [s.reference for s in settlements],
            "captured": [s.captured for s in settlements],
        },
    )
    rows = await cursor.fetchall()
    facts = [expired_fact(Wallet(row[5], row[6], row[7]), row[4]) for row in rows if row[4]]
    await fan_out(conn, facts)
    return [Settlement(row[0], row[1], row[2]) for row in rows]


def expired_fact(wallet: Wallet, amount: int) -> Fact:
    """Return the fact that credits of a wallet have expired."""
    return Fact(wallet.org_id, wallet.env, "credits.expired", data={"user_id": wallet.user_id, "amount": amount})


LOW_BELOW = """
UPDATE credit_accounts
SET low_below = %(low_below)s
WHERE org_id = %(org_id)s
  AND env = %(env)s
  AND user_id = %(user_id)s
"""


async def set_low_below(conn: Connection, wallet: Wallet, low_below: int | None) -> bool:
    """Choose when credits.low is told (None: never); return whether there is such an account."""
    cursor = await conn.execute(
        LOW_BELOW,
        {"org_id": wallet.org_id, "env": wallet.env, "user_id": wallet.user_id, "low_below": low_below},
    )
    return cursor.rowcount > 0


async def _one(conn: Connection, statement: Any, arguments: dict[str, Any]) -> Any:
    row = await (await conn.execute(statement, arguments)).fetchone()
    assert row is not None, "the function returns one row"
    return row
