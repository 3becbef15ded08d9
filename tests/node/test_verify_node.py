"""The official verifiers for Node, unmodified, on deliveries as they arrive."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nightmail.fakes.webhook_receiver import Received
from nightmail.webhooks.signature import new_secret
from tests.webhooks.conftest import desk, receiver
from tests.webhooks.desk import Desk

__all__ = ["desk", "receiver"]

FOLDER = os.environ.get("NODE_RESEND", "")
SCRIPT = Path(__file__).parent / "verify.mjs"
VERIFIERS = {"svix", "svix, webhook headers", "standardwebhooks", "resend"}

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not FOLDER, reason="NODE_RESEND names no folder with the packages of `make test-node`"),
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed"),
]


def case(secret: str, request: Received, **changes: str) -> dict[str, Any]:
    """Return what a verifier is given; `changes` replace the body or a header in both families."""
    headers = dict(request.headers)
    for name, value in changes.items():
        headers |= {f"{family}-{name}": value for family in ("webhook", "svix") if name != "body"}
    return {"secret": secret, "headers": headers, "body": changes.get("body", request.body.decode())}


def verify(cases: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    ran = subprocess.run(
        ["node", str(SCRIPT), FOLDER], input=json.dumps(cases), capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)  # type: ignore[no-any-return]


async def test_live_deliveries_are_accepted_and_tampered_ones_refused(desk: Desk) -> None:
    old, new = new_secret(), new_secret()
    desk.add_endpoint("/ok/before", secret=old)
    desk.add_endpoint("/ok/resend", types=["domain.updated"], secret=old)
    await desk.tell(data={"name": "Zoë <mail.example.org> \N{PILE OF POO}"})
    assert (await desk.deliver())["delivered"] == 2
    rotating = desk.add_endpoint("/ok/rotating", secret=old)
    desk.execute(
        "UPDATE webhook_endpoints SET secret = %s, previous_secret = secret, previous_until = now() + interval '1 day'"
        " WHERE id = %s",
        [new, rotating],
    )
    await desk.tell()
    await desk.deliver()
    (before, *_), (resend, *_), (rotated,) = (
        desk.receiver.received(f"/ok/{path}") for path in ("before", "resend", "rotating")
    )
    good = [case(old, before), case(old, resend), case(old, rotated), case(new, rotated)]
    timestamp = before.headers["webhook-timestamp"]
    bad = [
        case(new, before),
        case(old, before, body=before.body.decode() + " "),
        case(old, before, id="01990000-0000-7000-8000-000000000000"),
        case(old, before, timestamp=str(int(timestamp) + 1)),
        case(old, before, timestamp=str(int(timestamp) - 301)),
        case(old, before, signature="v1," + "A" * 43 + "="),
    ]
    found = verify([*good, *bad])
    assert all(set(one) == VERIFIERS for one in found)
    assert [set(one.values()) for one in found[: len(good)]] == [{"accepted"}] * len(good)
    for one in found[len(good) :]:
        assert all(answer.startswith("refused") for answer in one.values()), one
