"""Events as Stripe posts them, and their signature: for tests, the demo and curl.

    python -m nightmail.fakes.stripe_webhooks whsec_… < event.json     prints the header Stripe-Signature

Written from the description (t=<seconds>,v1=<hex HMAC-SHA256 of "<seconds>.<body>">), not from the SDK.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import sys
import time
from typing import Any
from uuid import uuid4

__all__ = ["event", "sign", "subscription"]


def sign(body: bytes, secret: str, *, at: float | None = None) -> str:
    """Return the value of Stripe-Signature for a body that is posted at a time (now)."""
    seconds = int(time.time() if at is None else at)
    mac = hmac.new(secret.encode(), f"{seconds}.".encode() + body, hashlib.sha256)
    return f"t={seconds},v1={mac.hexdigest()}"


def event(kind: str, thing: dict[str, Any], *, created: int | None = None, **fields: Any) -> dict[str, Any]:
    """Return a snapshot event of a type about an object."""
    return {
        "id": f"evt_{uuid4().hex}", "object": "event", "type": kind, "api_version": "2026-10-28", "livemode": False,
        "created": int(time.time()) if created is None else created, "data": {"object": thing}, **fields,
    }  # fmt: skip


def subscription(subscription_id: str, *, start: int, status: str = "active", **fields: Any) -> dict[str, Any]:
    """Return a subscription of one price; `price`, `lookup_key`, `quantity`, `period_end` are of its item."""
    price = {"id": fields.pop("price", "price_1"), "object": "price", "lookup_key": fields.pop("lookup_key", None)}
    item = {
        "id": f"si_{subscription_id}", "object": "subscription_item", "price": price,
        "quantity": fields.pop("quantity", 1), "current_period_start": start,
        "current_period_end": fields.pop("period_end", start + 30 * 86_400),
    }  # fmt: skip
    return {
        "id": subscription_id, "object": "subscription", "status": status, "customer": "cus_1", "created": start,
        "start_date": start, "billing_cycle_anchor": start, "cancel_at_period_end": False, "cancel_at": None,
        "canceled_at": None, "ended_at": None, "trial_end": None, "latest_invoice": None, "metadata": {},
        "items": {"object": "list", "data": [item]}, **fields,
    }  # fmt: skip


def main() -> None:
    """Sign what stands on standard input with the secret that is the argument."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m nightmail.fakes.stripe_webhooks SECRET < event.json")
    body = sys.stdin.buffer.read()
    json.loads(body)
    print(f"Stripe-Signature: {sign(body, sys.argv[1])}")


if __name__ == "__main__":
    main()
