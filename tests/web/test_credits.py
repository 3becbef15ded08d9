"""/credits, /credit-prices, /plans and /purchases over HTTP."""

from __future__ import annotations

from typing import Any

import pytest

from tests.web.examples import USER, make_credits
from tests.web.serving import ADMIN_TOKEN, Org, Server


@pytest.fixture
def server(module_server: Server) -> Server:
    return module_server


def give(
    server: Server, org: Org, amount: int, reference: str, user: str = "ada", env: str = "live", **fields: Any
) -> Any:
    body = {"amount": amount, "reference_id": reference, **fields}
    answer = server.call("POST", f"/credits/{user}/grant?org={org.id}&env={env}", ADMIN_TOKEN, body)
    assert answer.ok, answer.text
    return answer.json()


def spend(server: Server, org: Org, reference: str, verb: str = "consume", user: str = "ada", **fields: Any) -> Any:
    return server.call("POST", f"/credits/{user}/{verb}", org.live_key, {"reference_id": reference, **fields})


def test_spending_names_the_batches_and_the_balance_is_what_can_be_spent(server: Server, org: Org) -> None:
    late = give(server, org, 50, "late", expires_at="2150-01-01T00:00:00Z")
    soon = give(server, org, 30, "soon", expires_at="2099-01-01T00:00:00+01:00")
    assert soon["expires_at"] == "2098-12-31T23:00:00Z"
    answer = spend(server, org, "one", amount=40)
    assert answer.json() == {
        "object": "credit_spend", "reference_id": "one", "amount": 40, "service": "direct", "balance": 40,
        "batches": [{"id": soon["batch_id"], "amount": 30}, {"id": late["batch_id"], "amount": 10}],
    }  # fmt: skip
    shown = server.call("GET", "/credits/ada", org.live_key).json()
    assert (shown["balance"], shown["reserved"], shown["next_grant"]) == (40, 0, None)
    assert shown["next_expiry"] == {"at": "2150-01-01T00:00:00Z", "amount": 40}
    assert [(batch["id"], batch["remaining"]) for batch in shown["batches"]] == [(late["batch_id"], 40)]


def test_402_says_what_was_missing_and_nothing_has_changed(server: Server, org: Org) -> None:
    give(server, org, 30, "g")
    before = server.counts()
    answer = spend(server, org, "one", amount=40)
    assert (answer.status_code, answer.json()) == (402, {
        "statusCode": 402, "name": "insufficient_credits", "required": 40, "available": 30, "missing": 10,
        "message": "40 credits are needed and 30 can be spent: 10 missing.",
    })  # fmt: skip
    unknown = spend(server, org, "one", user="nobody", amount=1)
    assert (unknown.status_code, unknown.json()["missing"]) == (402, 1)
    assert server.counts() == before
    assert spend(server, org, "one", amount=30).ok, "a refused reference is free"


def test_the_same_reference_gets_the_first_answer_and_another_request_is_refused(server: Server, org: Org) -> None:
    give(server, org, 100, "g")
    first = spend(server, org, "one", amount=10)
    spend(server, org, "two", amount=10)
    again = spend(server, org, "one", amount=10)
    assert (again.json(), again.headers["idempotent-replayed"]) == (first.json(), "true")
    for other in (spend(server, org, "one", amount=11), spend(server, org, "one", "reserve", amount=10)):
        assert (other.status_code, other.json()["name"]) == (409, "reference_id_used")
    assert server.call("GET", "/credits/ada", org.live_key).json()["balance"] == 80


def test_services_have_prices_and_a_repeated_request_keeps_its_price(server: Server, org: Org) -> None:
    give(server, org, 100, "g")
    unset = spend(server, org, "one", service="render")
    assert (unset.status_code, "PUT /credit-prices/render" in unset.json()["message"]) == (422, True)
    assert server.call("PUT", "/credit-prices/render", org.live_key, {"credits": 7}).ok
    first = spend(server, org, "one", service="render", quantity=2)
    assert (first.json()["amount"], first.json()["service"]) == (14, "render")
    assert server.call("PUT", "/credit-prices/render", org.live_key, {"credits": 9}).ok
    assert spend(server, org, "one", service="render", quantity=2).json() == first.json()
    assert spend(server, org, "two", service="render").json()["amount"] == 9
    assert spend(server, org, "three", service="render", amount=1).json()["amount"] == 1
    listed = server.call("GET", "/credit-prices", org.live_key).json()["data"]
    assert [(item["service"], item["credits"]) for item in listed] == [("render", 9)]
    assert server.call("GET", "/credit-prices", org.test_key).json()["data"] == []
    assert server.call("DELETE", "/credit-prices/render", org.live_key).json()["deleted"] is True
    assert server.call("DELETE", "/credit-prices/render", org.live_key).status_code == 404
    gone = spend(server, org, "one", service="render", quantity=2)
    assert (gone.json(), gone.headers.get("idempotent-replayed")) == (first.json(), "true"), "it was spent all the same"
    assert spend(server, org, "one", "reserve", service="render", quantity=2).status_code == 422
    assert spend(server, org, "four", service="email", amount=1).status_code == 422


def test_a_reservation_is_captured_in_part_and_settled_once(server: Server, org: Org) -> None:
    give(server, org, 100, "g")
    assert spend(server, org, "r", "reserve", amount=60).json()["balance"] == 40
    assert server.call("GET", "/credits/ada", org.live_key).json()["reserved"] == 60
    over = spend(server, org, "r", "capture", amount=61)
    assert (over.status_code, over.json()["message"]) == (409, "Only 60 credits are left for this.")
    done = spend(server, org, "r", "capture", amount=45)
    assert {key: done.json()[key] for key in ("captured", "released", "expired")} == {
        "captured": 45, "released": 15, "expired": 0,
    }  # fmt: skip
    assert spend(server, org, "r", "capture", amount=45).json() == done.json()
    late = spend(server, org, "r", "release")
    assert (late.status_code, late.json()["name"]) == (409, "reservation_settled")
    assert "45 captured, 15 released" in late.json()["message"]
    assert spend(server, org, "never", "capture").status_code == 404
    assert server.call("GET", "/credits/ada", org.live_key).json()["balance"] == 55


def test_refunds_add_up_to_what_was_spent(server: Server, org: Org) -> None:
    give(server, org, 100, "g", expires_at="2150-01-01T00:00:00Z")
    spend(server, org, "one", amount=60)
    first = spend(server, org, "back-1", "refund", of="one", amount=20)
    assert (first.json()["amount"], first.json()["source"], first.json()["expires_at"]) == (
        20, "refund", "2150-01-01T00:00:00Z",
    )  # fmt: skip
    assert spend(server, org, "back-2", "refund", of="one", amount=41).status_code == 409
    assert spend(server, org, "back-2", "refund", of="one").json()["amount"] == 40
    assert spend(server, org, "back-3", "refund", of="one").json()["message"] == "Only 0 credits are left for this."
    assert spend(server, org, "back-3", "refund", of="never").status_code == 404
    assert server.call("GET", "/credits/ada", org.live_key).json()["balance"] == 100


def test_what_nightmail_reserves_and_gives_itself_is_nobody_elses_to_name(server: Server, org: Org) -> None:
    """An org must not get back what its message holds, nor take the reference of what it will be given."""
    given = server.call("POST", f"/credits/billing/grant?org={org.id}", ADMIN_TOKEN, {"amount": 9, "reference_id": "g"})
    assert given.ok
    change = {"billing": "prepaid", "plan": "free"}
    assert server.call("PATCH", f"/orgs/{org.id}", ADMIN_TOKEN, change).ok
    server.rows(
        "INSERT INTO usage_quotas SELECT %s, 'email', to_char(nm_now() + make_interval(months => n), 'YYYY-MM'), 3000"
        " FROM generate_series(-1, 1) AS n",
        org.id,
    )
    email = {"from": "a@b.test", "to": "c@d.test", "subject": "s", "text": "t", "scheduled_at": "in 1 minute"}
    sent = server.call("POST", "/emails", org.live_key, email)
    name = f"message:{sent.json()['id']}"
    assert server.rows("SELECT amount::int FROM credit_reservations WHERE reference = %s", name) == [(1,)]
    for verb in ("consume", "reserve", "capture", "release"):
        fields = {"amount": 1} if verb in ("consume", "reserve") else {}
        assert spend(server, org, name, verb, user="billing", **fields).status_code == 422, verb
    # It is not captured yet, so that nothing says what it was for; a moment later it may be.
    assert spend(server, org, "back", "refund", user="billing", of=name).json()["name"] == "admin_only"
    for reference in ("upgrade:x", "trial:x", "purchase:x", "grant:x", "stripe:x", "registration"):
        body = {"amount": 1, "reference_id": reference}
        assert server.call("POST", f"/credits/ada/grant?org={org.id}", ADMIN_TOKEN, body).status_code == 422
        body = {"grant": "g", "reason": "r", "reference_id": reference}
        assert server.call("POST", f"/credits/ada/clawback?org={org.id}", ADMIN_TOKEN, body).status_code == 422


def test_history_and_explanation(server: Server, org: Org) -> None:
    give(server, org, 50, "g", reason="registration bonus")
    give(server, org, 30, "h", source="purchase")
    spend(server, org, "one", amount=60)
    page = server.call("GET", "/credits/ada/history?limit=3", org.live_key).json()
    seen = [
        (item["id"], item["kind"], item["amount"], item["balance_after"], item["reference_id"]) for item in page["data"]
    ]
    assert seen == [(4, "consume", -10, 20, "one"), (3, "consume", -50, 30, "one"), (2, "grant", 30, 80, "h")]
    assert page["has_more"] is True
    older = server.call("GET", "/credits/ada/history?after=2", org.live_key).json()
    assert ([item["id"] for item in older["data"]], older["has_more"]) == ([1], False)
    assert older["data"][0]["reason"] == "registration bonus"
    newer = server.call("GET", "/credits/ada/history?before=2&limit=1", org.live_key).json()
    assert ([item["id"] for item in newer["data"]], newer["has_more"]) == ([3], True)
    why = server.call("GET", "/credits/ada/entries/4", org.live_key).json()
    assert why["explanation"] == "ada spent 10 credits of this batch on service:direct."
    assert sum(line["amount"] for line in why["lines"]) == 0
    assert [(line["account"], line["entry"]) for line in why["lines"]] == [
        ("wallet:ada", 3), ("wallet:ada", 4), ("service:direct", None),
    ]  # fmt: skip
    paid = server.call("GET", "/credits/ada/entries/2", org.live_key).json()
    assert paid["explanation"] == "30 credits were given to ada from payment:h."
    for wrong, status in (("5", 404), ("0", 404), ("x", 422), ("9" * 19, 422)):
        assert server.call("GET", f"/credits/ada/entries/{wrong}", org.live_key).status_code == status


def test_purchases_give_credits_at_once_and_say_when_the_next_come(server: Server, org: Org) -> None:
    def buy(**body: Any) -> Any:
        return server.call("POST", f"/purchases?org={org.id}", ADMIN_TOKEN, body)

    pack = buy(user_id="ada", plan="pack-1000", external_ref="cs_1")
    assert (pack.status_code, pack.json()["status"]) == (201, "paid")
    assert buy(user_id="ada", plan="pack-1000", external_ref="cs_1").json() == pack.json()
    assert buy(user_id="bob", plan="pack-1000", external_ref="cs_1").status_code == 409
    bought = buy(user_id="ada", plan="monthly").json()
    shown = server.call("GET", "/credits/ada", org.live_key).json()
    assert (shown["balance"], shown["next_grant"]["at"]) == (2000, bought["next_grant_at"])
    assert [batch["source"] for batch in shown["batches"]] == ["subscription", "purchase"]
    larger = server.call("PATCH", f"/purchases/{bought['id']}", ADMIN_TOKEN, {"quantity": 3}).json()
    assert (larger["quantity"], server.call("GET", "/credits/ada", org.live_key).json()["balance"]) == (3, 4000)
    assert buy(user_id="ada", plan="pack-1000", external_ref="cs_1", quantity=2).status_code == 409
    trial = buy(user_id="eve", plan="monthly", trial_ends_at="2150-01-01T00:00:00Z").json()
    assert (trial["status"], server.call("GET", "/credits/eve", org.live_key).json()["balance"]) == ("trialing", 100)
    changed = server.call("PATCH", f"/purchases/{bought['id']}", ADMIN_TOKEN, {"status": "canceled"}).json()
    assert (changed["status"], changed["ends_at"]) == ("canceled", bought["next_grant_at"])
    assert server.call("GET", "/credits/ada", org.live_key).json()["next_grant"] is None
    for wrong in ({"plan": "none"}, {"plan": "monthly", "grants_from": "2001-01-01T00:00:00Z",
                                     "anchor": "2001-01-01T00:00:00Z"}):  # fmt: skip
        assert buy(user_id="ada", **wrong).status_code == 422
    listed = server.call("GET", f"/purchases?org={org.id}", ADMIN_TOKEN).json()["data"]
    assert {item["id"] for item in listed} == {pack.json()["id"], bought["id"], trial["id"]}


def test_what_was_given_by_mistake_is_taken_back(server: Server, org: Org) -> None:
    give(server, org, 50, "twice")
    spend(server, org, "one", amount=20)
    body = {"reference_id": "mistake", "grant": "twice", "reason": "given twice"}
    taken = server.call("POST", f"/credits/ada/clawback?org={org.id}", ADMIN_TOKEN, body).json()
    assert (taken["amount"], taken["gone"]) == (30, 20)
    assert server.call("GET", "/credits/ada", org.live_key).json()["balance"] == 0
    entry = server.call("GET", "/credits/ada/history", org.live_key).json()["data"][0]
    assert (entry["kind"], entry["reason"]) == ("clawback", "given twice")


def test_credits_low_is_told_when_a_spend_crosses_the_line(server: Server, org: Org) -> None:
    give(server, org, 50, "g")
    assert server.call("PATCH", "/credits/ada", org.live_key, {"low_below": 20}).json()["low_below"] == 20
    server.rows(
        "INSERT INTO webhook_endpoints (id, org_id, env, url, dialect, types, topics, secret) VALUES (nm_uuid7(), %s,"
        " 'live', 'https://example.com/', 'nightmail', '{credits.low}', '{credits.low}', 'whsec_x') RETURNING 1",
        org.id,
    )
    for reference, amount in (("one", 30), ("two", 1), ("two", 1), ("three", 1)):
        assert spend(server, org, reference, amount=amount).ok
    told = server.rows("SELECT data FROM webhook_deliveries WHERE org_id = %s", org.id)
    assert told == [({"user_id": "ada", "balance": 19, "low_below": 20},)]


def test_a_key_reaches_its_own_org_and_env_and_the_admin_token_all(server: Server, org: Org) -> None:
    other = server.make_org("Other")
    make_credits(server, other, other.live_key)
    theirs = server.call("GET", f"/credits/{USER}", other.live_key).json()["balance"]
    for key in (org.live_key, org.test_key, other.test_key):
        for path in ("", "/history", "/entries/1"):
            answer = server.call("GET", f"/credits/{USER}{path}", key)
            assert (answer.status_code, answer.json()["name"]) == (404, "not_found")
        for verb, body in (("consume", {"amount": 1}), ("reserve", {"amount": 1})):
            refused = server.call("POST", f"/credits/{USER}/{verb}", key, {"reference_id": "x", **body})
            assert refused.status_code == 402
        for verb, wanted in (("capture", {"reference_id": "render-1"}), ("release", {"reference_id": "render-1"}),
                           ("refund", {"reference_id": "x", "of": "render-3"})):  # fmt: skip
            assert server.call("POST", f"/credits/{USER}/{verb}", key, wanted).status_code == 404
        assert server.call("GET", f"/credits/{USER}?org={other.id}", key).status_code == 422
        give_path = f"/credits/{USER}/grant?org={org.id}"
        assert server.call("POST", give_path, key, {"amount": 1, "reference_id": "x"}).status_code in (401, 403)
    assert server.call("GET", f"/credits/{USER}", other.live_key).json()["balance"] == theirs
    admins = server.call("GET", f"/credits/{USER}?org={other.id}", ADMIN_TOKEN).json()
    assert admins["balance"] == theirs
    assert server.call("GET", f"/credits/{USER}", ADMIN_TOKEN).json()["message"] == "Missing `org` field."
    assert server.call("GET", f"/credits/{USER}?org={other.id}", "not-the-admin-token").status_code == 403


@pytest.mark.parametrize("user", ["a%0ab", "%20x", "x%20", "y" * 201, "a%00b", "%E2%80%A8"])
def test_users_that_cannot_be_shown_are_refused(server: Server, org: Org, user: str) -> None:
    for method, path, body in (("GET", "", None), ("POST", "/consume", {"amount": 1, "reference_id": "r"})):
        assert server.call(method, f"/credits/{user}{path}", org.live_key, body).status_code in (400, 422)
    granted = server.call(
        "POST", f"/credits/{user}/grant?org={org.id}", ADMIN_TOKEN, {"amount": 1, "reference_id": "r"}
    )
    assert granted.status_code in (400, 422)


@pytest.mark.parametrize("user", ["auth0%7C5f7c8ec7c33c6c004bbafe82", "ada@example.org", "%F0%9F%9A%82", "'; DROP"])
def test_users_are_any_string_of_yours(server: Server, org: Org, user: str) -> None:
    give(server, org, 5, "g", user=user)
    assert server.call("GET", f"/credits/{user}", org.live_key).json()["balance"] == 5
