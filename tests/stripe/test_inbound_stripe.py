"""/inbound/stripe: who is believed, each event once, and that no event is answered with an error for ever."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
import stripe

from nightmail.fakes.stripe_api import FakeStripe
from nightmail.fakes.stripe_webhooks import event, sign, subscription
from nightmail.providers.stripe_meter import StripeMeter
from tests.engine.place import content_of
from tests.ports import make_ports
from tests.stripe.billing import EMAIL, metered_org
from tests.web.serving import ADMIN_TOKEN, Org, Server, serving

SECRET, OTHER_SECRET = "whsec_of_the_tests_0001", "whsec_of_the_tests_0002"


@pytest.fixture
def server(database_url: str, stripe_api: FakeStripe) -> Iterator[Server]:
    ports = make_ports(meter=StripeMeter(api_key=stripe_api.api_key, api_base=stripe_api.url))
    with serving(database_url, ports=ports, stripe_webhook_secret=f"{OTHER_SECRET}, {SECRET}") as running:
        yield running


@pytest.fixture
def org(server: Server) -> Org:
    return server.make_org()


def post(server: Server, body: Any, *, header: str | None = None, secret: str = SECRET) -> requests.Response:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    header = sign(data, secret) if header is None else header
    return requests.post(server.url + "/inbound/stripe", data=data, headers={"Stripe-Signature": header}, timeout=30)


def pack(org: Org, **fields: Any) -> dict[str, Any]:
    """Return a completed checkout of a pack."""
    metadata = {"nightmail_org": org.id, "nightmail_user": "ada", "nightmail_plan": "pack-1000"}
    metadata.update(fields.pop("metadata", {}))
    return {
        "id": "cs_1", "object": "checkout.session", "mode": "payment", "payment_status": "paid",
        "payment_intent": "pi_1", "subscription": None, "metadata": metadata, **fields,
    }  # fmt: skip


def charge(refunded: int, paid: int = 2000) -> dict[str, Any]:
    return {
        "id": "ch_1", "object": "charge", "amount": paid, "amount_captured": paid, "amount_refunded": refunded,
        "refunded": refunded == paid, "payment_intent": "pi_1",
    }  # fmt: skip


def balance(server: Server) -> list[int]:
    return [row[0] for row in server.rows("SELECT balance FROM credit_accounts ORDER BY id")]


def test_a_pack_is_given_once_however_often_it_is_told(server: Server, org: Org) -> None:
    told = event("checkout.session.completed", pack(org, metadata={"nightmail_quantity": "3"}))
    body = json.dumps(told).encode()
    header = stripe.WebhookSignature.generate_signature_header(body.decode(), SECRET)
    with ThreadPoolExecutor(64) as crowd:
        answers = list(crowd.map(lambda _: post(server, body, header=header), range(64)))
    assert {answer.status_code for answer in answers} == {200}
    outcomes = sorted(answer.json()["outcome"] for answer in answers)
    assert outcomes == ["applied"] + ["repeated"] * 63
    assert balance(server) == [3000]
    again = event("checkout.session.async_payment_succeeded", pack(org, metadata={"nightmail_quantity": "3"}))
    assert post(server, again, secret=OTHER_SECRET).json() == {"outcome": "applied"}
    assert (balance(server), server.counts()["purchases"]) == ([3000], 1)


def test_what_is_not_signed_now_and_by_stripe_changes_nothing(server: Server, org: Org) -> None:
    body = json.dumps(event("checkout.session.completed", pack(org))).encode()
    good, now = sign(body, SECRET), time.time()
    before = content_of(server.conninfo)
    for header in (
        "", "t=,v1=", "v1=00", good.replace("v1=", "v0="), sign(body, "whsec_somebody_elses"),
        sign(body + b" ", SECRET), sign(body, SECRET, at=now - 320), sign(body, SECRET, at=now + 320),
        f"t={10**30},v1={'0' * 64}", good.replace("t=", "t=x"), "x" * 5000, f"{good[:-1]}\xe9",
        sign(body, SECRET, at=now - 320) + ",t=" + str(int(now)),
    ):  # fmt: skip
        answer = post(server, body, header=header)
        assert (answer.status_code, list(answer.json())) == (400, ["error"]), header
    for odd in (b"\xff\xfe", b"{", b"[]", b'{"object":"event"}', b'{"id":1,"object":"event"}', b"[" * 5000, b"null"):
        assert post(server, odd).status_code in (400, 422), odd
    assert post(server, b" " * 1_048_577).status_code == 413
    for method in ("GET", "PUT", "DELETE"):
        assert server.call(method, "/inbound/stripe").status_code == 405
    assert content_of(server.conninfo) == before
    assert post(server, body, header=sign(body, SECRET, at=now - 280)).json() == {"outcome": "applied"}


def test_without_a_secret_it_is_501(database_url: str) -> None:
    with serving(database_url) as running:
        answer = post(running, {})
    assert answer.status_code == 501
    assert answer.json() == {"error": "Not Implemented", "missing": ["STRIPE_WEBHOOK_SECRET"]}


def test_what_cannot_be_applied_says_why_and_is_applied_when_it_is_resent(server: Server, org: Org) -> None:
    told = event("checkout.session.completed", pack(org, metadata={"nightmail_plan": "pack-5"}))
    answer = post(server, told)
    assert (answer.status_code, answer.json()["outcome"]) == (200, "failed")
    assert "pack-5 is no pack of ours" in answer.json()["reason"]
    [(preset, summary)] = server.rows("SELECT preset, summary FROM nm_stripe_alerts()")
    assert preset == "stripe_event_failed"
    assert told["id"] in summary
    listed = server.call("GET", "/stripe/events?outcome=failed", ADMIN_TOKEN).json()["data"]
    assert [(item["id"], item["reason"]) for item in listed] == [(told["id"], answer.json()["reason"])]
    made = {"name": "Five", "kind": "pack", "credits": 5}
    assert server.call("PUT", "/plans/pack-5", ADMIN_TOKEN, made).ok
    assert post(server, told).json() == {"outcome": "applied"}
    assert post(server, told).json() == {"outcome": "repeated"}
    assert balance(server) == [5]
    assert server.rows("SELECT preset FROM nm_stripe_alerts()") == []


ODD_EVENTS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("customer.created", {}, "ignored"),
    ("checkout.session.completed", {"metadata": {"nightmail_org": ""}}, "ignored"),
    ("checkout.session.completed", {"payment_status": "unpaid"}, "ignored"),
    ("checkout.session.completed", {"metadata": {"nightmail_org": "acme"}}, "failed"),
    ("checkout.session.completed", {"metadata": {"nightmail_org": "0" * 32}}, "failed"),
    ("checkout.session.completed", {"metadata": {"nightmail_user": "x\0" * 150}}, "failed"),
    ("checkout.session.completed", {"metadata": {"nightmail_plan": "monthly"}}, "failed"),
    ("checkout.session.completed", {"metadata": {"nightmail_quantity": "0"}}, "failed"),
    ("checkout.session.completed", {"metadata": ["odd"]}, "ignored"),
    ("checkout.session.completed", {"id": None}, "failed"),
    ("customer.subscription.updated", {"status": 7}, "failed"),
    ("invoice.paid", {"lines": {"data": [{"period": {"start": "x"}}]}}, "failed"),
    ("charge.refunded", {"amount": 5, "amount_refunded": 7}, "failed"),
    ("invoice_payment.paid", {"invoice": {"id": 5}}, "failed"),
    ("v1.billing.meter.no_meter_found", {"reason": [1]}, "applied"),
)


def test_no_event_is_answered_with_an_error(server: Server, org: Org) -> None:
    for kind, fields, outcome in ODD_EVENTS:
        thing = {**pack(org), **fields}
        if isinstance(fields.get("metadata"), dict):
            thing["metadata"] = {**pack(org)["metadata"], **fields["metadata"]}
        told = event(kind, thing)
        answer = post(server, told)
        assert (answer.status_code, answer.json()["outcome"]) == (200, outcome), (kind, fields, answer.text)
        noted = server.rows("SELECT outcome, error IS NULL FROM stripe_events WHERE id = %s", told["id"])
        assert noted == [(outcome, outcome == "applied")], (kind, fields)
    assert server.counts()["purchases"] == 0


def test_refunds_take_back_their_share_of_what_is_left_once(server: Server, org: Org) -> None:
    post(server, event("checkout.session.completed", pack(org)))
    spent = {"amount": 400, "reference_id": "r"}
    assert server.call("POST", "/credits/ada/consume", org.live_key, spent).ok
    for refunded, left in ((500, 350), (1000, 100)):
        assert post(server, event("charge.refunded", charge(refunded))).json() == {"outcome": "applied"}
        assert balance(server) == [left]
    assert post(server, event("charge.refunded", charge(1000))).json()["outcome"] == "ignored"
    assert balance(server) == [100]
    assert post(server, event("charge.refunded", charge(2000))).json() == {"outcome": "applied"}
    assert balance(server) == [0]
    assert post(server, event("charge.refunded", charge(1500))).json()["outcome"] == "stale"
    assert server.rows("SELECT granted, remaining, consumed, expires_at <= now() FROM credit_batches") == [
        (1000, 0, 1000, True)
    ]


def test_what_was_spent_of_a_pack_that_is_paid_back_does_not_come_back(server: Server, org: Org) -> None:
    post(server, event("checkout.session.completed", pack(org)))
    assert server.call("POST", "/credits/ada/consume", org.live_key, {"amount": 1000, "reference_id": "r"}).ok

    def refund(amount: int) -> int:
        body = {"of": "r", "amount": amount, "reference_id": f"back-{amount}"}
        assert server.call("POST", "/credits/ada/refund", org.live_key, body).ok
        return int(server.call("GET", "/credits/ada", org.live_key).json()["balance"])

    assert refund(300) == 300
    assert post(server, event("charge.refunded", charge(2000))).json() == {"outcome": "applied"}
    assert server.call("GET", "/credits/ada", org.live_key).json()["balance"] == 0
    assert refund(700) == 0


def test_a_refund_that_is_told_before_its_purchase_is_not_lost(server: Server, org: Org) -> None:
    assert post(server, event("charge.refunded", charge(500))).json()["outcome"] == "ignored"
    assert post(server, event("checkout.session.completed", pack(org))).json() == {"outcome": "applied"}
    assert balance(server) == [750]


def test_what_a_meter_could_not_count_is_looked_up_and_marks_its_report(server: Server, stripe_api: FakeStripe) -> None:
    org = metered_org(server.conninfo)
    for number in (1, 2):
        server.rows(
            "INSERT INTO overage_reports (org_id, channel, period, revision, units, total, identifier, event_name,"
            " stripe_customer_id, event_at, state) VALUES (%s, 'email', '2030-10', %s, 5, %s, %s, %s, 'cus_1', now(),"
            " 'reported')", org, number, 5 * number, f"one-{number}", EMAIL,
        )  # fmt: skip
        stripe_api.events.append(
            stripe_api.check({"event_name": EMAIL, "payload[stripe_customer_id]": "cus_1", "payload[value]": "5",
                              "identifier": f"one-{number}"})
        )  # fmt: skip
    assert post(server, stripe_api.error_report(stripe_api.events[0])).json() == {"outcome": "applied"}
    assert post(server, stripe_api.error_report(stripe_api.events[1], with_data=True)).json() == {"outcome": "applied"}
    rows = server.rows("SELECT state, error FROM overage_reports")
    assert rows == [("failed", "meter_event_customer_not_found: There is no such customer.")] * 2
    unknown = stripe_api.error_report(*stripe_api.events, with_data=True)
    assert post(server, unknown).json()["outcome"] == "failed"


ODD: tuple[Any, ...] = (
    None, True, 0, -1, 2**63, 1e308, "", "x" * 300, "\ud800", "\0", [], {}, [None], [[1]], {"id": None}, {"data": 5},
    {"data": [5]}, {"data": [{"price": 5}]}, "0" * 32,
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to everything inside a value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in entries:
        yield (*path, name)
        yield from places(inner, (*path, name))


def spoil(value: Any, path: tuple[Any, ...], odd: Any) -> Any:
    """Return a copy with something odd in one place."""
    copy = json.loads(json.dumps(value))
    holder = copy
    for name in path[:-1]:
        holder = holder[name]
    holder[path[-1]] = odd
    return copy


def test_whatever_stands_in_an_event_is_no_error_of_ours(server: Server, org: Org) -> None:
    """Signed, and odd in one place: each kind of event, each place, and one of the odd things in turn."""
    owner = {"nightmail_org": org.id, "nightmail_user": "ada", "nightmail_plan": "monthly", "nightmail_org_plan": "pro"}
    invoice = {
        "id": "in_1", "subscription": "sub_1", "payment_intent": "pi_2", "lines": {"data": [{"period": {"start": 1}}]},
        "parent": {"subscription_details": {"subscription": "sub_1"}},
        "payments": {"data": [{"payment": {"payment_intent": "pi_3"}}]},
    }  # fmt: skip
    report = {"error_count": 1, "error_types": [{"code": "x", "sample_errors": [{"request": {"identifier": "i"}}]}]}
    stories = [
        event("checkout.session.completed", pack(org)),
        event("customer.subscription.updated", subscription("sub_1", start=1_900_000_000, metadata=owner)),
        event("invoice.paid", invoice),
        event("invoice_payment.paid", {"id": "ip_1", "invoice": "in_1", "payment": {"payment_intent": "pi_1"}}),
        event("charge.refunded", charge(7)),
        event("v1.billing.meter.error_report_triggered", {"reason": report, "developer_message_summary": "x"}),
    ]
    turns = itertools.cycle(ODD)
    told = [spoil(story, path, next(turns)) for story in stories for path in places(story) for _ in range(3)]
    for number, body in enumerate(told):
        if isinstance(body.get("id"), str) and body["id"].startswith("evt_"):
            body["id"] = f"evt_{number}"
    with ThreadPoolExecutor(4) as crowd:
        answers = list(crowd.map(lambda body: (post(server, body), body), told))
    assert len(answers) > 200
    assert [(a.status_code, a.text, body) for a, body in answers if a.status_code not in (200, 400, 422)] == []
