"""One message of each kind, over HTTP and through the real jobs, told from accept to the line of the invoice."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from nightmail.fakes.stripe_api import FakeStripe
from nightmail.jobs.table import JOBS
from nightmail.store.audit import audit
from tests.engine.place import place
from tests.stripe.billing import EMAIL, SMS, billing, report
from tests.web.serving import ADMIN_TOKEN, Server, serving

pytestmark = pytest.mark.anyio

PLAN = "INSERT INTO message_plans VALUES ('tiny', 2, 1, 2, 3)"
LONG = "x" * 200  # two segments


def accept(server: Server, key: str, *recipients: str) -> str:
    """Send an email; return its id."""
    mail = {"from": "a@example.com", "to": list(recipients), "subject": "s", "text": "t"}
    answer = server.call("POST", "/emails", key, mail)
    assert answer.ok, answer.text
    return str(answer.json()["id"])


def accept_sms(server: Server, key: str, text: str) -> str:
    """Send an SMS; return its id."""
    answer = server.call("POST", "/sms", key, {"to": "+15005550006", "text": text})
    assert answer.ok, answer.text
    return str(answer.json()["id"])


async def test_one_message_of_each_kind(database_url: str, stripe_api: FakeStripe) -> None:
    with serving(database_url) as server:
        server.rows(PLAN)
        org = server.make_org(plan="tiny", billing="metered", stripe_customer_id="cus_1")
        gift = {"amount": 6, "reference_id": "gift"}
        assert server.call("POST", f"/credits/billing/grant?org={org.id}", ADMIN_TOKEN, gift).ok
        assert server.call("POST", "/suppressions", org.live_key, {"email": "gone@example.org"}).ok
        kinds = {
            "included": accept(server, org.live_key, "a@example.org"),
            "included and credits": accept(server, org.live_key, *(f"b{n}@example.org" for n in range(3))),
            "credits and metered": accept(server, org.live_key, "c@example.org", "d@example.org"),
            "metered, one suppressed": accept(server, org.live_key, "e@example.org", "gone@example.org"),
            "suppressed": accept(server, org.live_key, "gone@example.org"),
            "test": accept(server, org.test_key, "f@example.org"),
            "SMS included": accept_sms(server, org.live_key, "hello"),
            "SMS metered": accept_sms(server, org.live_key, LONG),
        }
        async with place(database_url, JOBS) as here:
            await here.engine.run("send-scheduled", trigger="test")

        month = datetime.now(UTC).replace(day=1, hour=6, minute=0, second=0, microsecond=0)
        first = (month + timedelta(days=32)).replace(day=1)
        async with billing(database_url, stripe_api, first) as here:
            assert (await report(here)).counts["events"] == 2
        line = {(event.event_name, event.customer): event for event in stripe_api.events}
        assert {names: event.value for names, event in line.items()} == {(EMAIL, "cus_1"): 2, (SMS, "cus_1"): 2}
        assert {f"{event.at:%Y-%m}" for event in stripe_api.events} == {f"{month:%Y-%m}"}

        told = {kind: explain(server, org.live_key, org.test_key, id) for kind, id in kinds.items()}
        email_line, sms_line = line[EMAIL, "cus_1"].identifier, line[SMS, "cus_1"].identifier
        for kind, parts in {
            "included": ["It counts as 1 recipient", "All of it fitted into the included quota"],
            "included and credits": [
                "1 included in the quota, 2 paid with 4 credits",
                "4 spent",
                "balance after it 2.",
            ],
            "credits and metered": ["1 paid with 2 credits, 1 metered", "balance after it 0.", email_line],
            "metered, one suppressed": ["2 metered for the invoice", "1 units used", email_line],
            "suppressed": ["1 metered for the invoice", "It was not sent, it is canceled (suppressed)"],
            "test": ["Test messages are always included"],
            "SMS included": ["It counts as 1 segment", "All of it fitted into the included quota"],
            "SMS metered": ["It counts as 2 segments", "2 metered for the invoice", sms_line],
        }.items():
            for part in parts:
                assert part in told[kind], (kind, part, told[kind])
    async with await psycopg.AsyncConnection[Any].connect(database_url, autocommit=True) as conn:
        assert [finding.name for finding in await audit(conn) if finding.violations] == []


def explain(server: Server, live_key: str, test_key: str, message_id: str) -> str:
    """Return the message's story, as its owner reads it."""
    answers = [server.call("GET", f"/explain/{message_id}", key) for key in (live_key, test_key)]
    [found] = [answer for answer in answers if answer.ok]
    return "\n".join(found.json()["sentences"])
