"""What senders are told when quota or credits do not suffice, and how the operator decides who pays."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
import resend
from resend.exceptions import RateLimitError, ResendError

from tests.web.serving import ADMIN_TOKEN, Org, Server

MAIL: dict[str, Any] = {"from": "a@example.com", "to": "b@example.org", "subject": "s", "text": "t"}
NO_SUCH_ORG = "/orgs/01a206aa-e4a1-734f-a2d1-eda46887c7d0"


@pytest.fixture
def server(module_server: Server) -> Server:
    """A server that knows a small plan: two emails and one SMS, then two credits each."""
    module_server.rows("INSERT INTO message_plans VALUES ('small', 2, 1, 2, 2) ON CONFLICT DO NOTHING")
    return module_server


def give(server: Server, org: Org, amount: int, user: str = "billing") -> None:
    """Give an org's user credits, as the operator does."""
    body = {"amount": amount, "reference_id": f"given-{amount}"}
    assert server.call("POST", f"/credits/{user}/grant?org={org.id}", ADMIN_TOKEN, body).ok


def reset_text() -> str:
    now = datetime.now(UTC)
    return f"{now.year + now.month // 12}-{now.month % 12 + 1:02}-01T00:00:00Z"


def test_a_used_up_quota_is_429_and_says_when_it_resets(server: Server) -> None:
    org = server.make_org("Quota", plan="small")
    batch = [MAIL, MAIL, MAIL]
    before = server.counts()
    for mode in ("strict", "permissive"):
        headers = {"x-batch-validation": mode, "Idempotency-Key": f"batch-{mode}"}
        answer = server.call("POST", "/emails/batch", org.live_key, batch, headers=headers)
        problem = answer.json()
        assert (answer.status_code, problem["statusCode"], problem["name"]) == (429, 429, "monthly_quota_exceeded")
        for part in ("2 emails", f"{datetime.now(UTC):%Y-%m}", "0 are used", "3 more", reset_text()):
            assert part in problem["message"]
    after = server.counts()
    assert {**after, "usage_quotas": 0} == {**before, "usage_quotas": 0}, "all or nothing, also when permissive"
    assert server.call("POST", "/emails/batch", org.live_key, batch[:2]).ok
    assert server.call("POST", "/emails", org.live_key, MAIL).status_code == 429
    sms = {"to": "+15005550006", "text": "x" * 161}
    assert (
        server.call("POST", "/sms", org.live_key, sms).json()["message"].startswith("The plan includes 1 SMS segments")
    )
    assert server.call("POST", "/sms/batch", org.live_key, [sms, sms]).status_code == 429
    assert server.call("POST", "/emails/batch", org.test_key, batch).ok, "the test env has no limits"
    usage = server.call("GET", "/usage", org.live_key).json()
    assert {**usage["emails"]["monthly"], "resets_at": ""} == {
        "used": 2, "limit": 2, "sent": 0, "received": 0, "resets_at": ""
    }  # fmt: skip
    assert (usage["credits"], usage["metered"]) == (None, {"emails": 0, "sms": 0})
    assert server.call("GET", "/usage", org.test_key).json()["emails"]["monthly"]["limit"] is None


def test_the_same_request_succeeds_once_after_credits_were_bought(server: Server) -> None:
    org = server.make_org("Prepaid", plan="small", billing="prepaid", billing_user="treasurer")
    give(server, org, 3, "treasurer")
    give(server, org, 100)  # somebody else's
    mail = {**MAIL, "to": ["b@example.org", "c@example.org", "d@example.org", "e@example.org"]}
    headers = {"Idempotency-Key": "invoice-7"}
    for _ in range(2):
        answer = server.call("POST", "/emails", org.live_key, mail, headers=headers)
        assert (answer.status_code, answer.json()["name"]) == (402, "insufficient_credits")
        assert "4 required, 3 available, 1 missing" in answer.json()["message"]
    give(server, org, 1, "treasurer")
    first, again = (server.call("POST", "/emails", org.live_key, mail, headers=headers) for _ in range(2))
    assert first.ok
    assert (again.json(), again.headers["idempotent-replayed"]) == (first.json(), "true")
    assert server.call("GET", "/usage", org.live_key).json()["credits"] == {"available": 0, "reserved": 4}
    reference = f"message:{first.json()['id']}"
    for action in ("capture", "release", "reserve", "consume"):
        body = {"reference_id": reference, **({"amount": 1} if action in ("reserve", "consume") else {})}
        answer = server.call("POST", f"/credits/treasurer/{action}", org.live_key, body)
        assert answer.status_code == 422, "what a message holds is settled by its end"


def test_a_move_to_another_month_is_refused_like_a_message(server: Server) -> None:
    org = server.make_org("Mover", plan="small", billing="prepaid")
    now = datetime.now(UTC)
    soon, later = (f"{now.year + 1}-{month:02}-10T12:00:00Z" for month in (1, 2))
    assert server.call("POST", "/emails/batch", org.live_key, [{**MAIL, "scheduled_at": soon}] * 2).ok
    made = server.call("POST", "/emails", org.live_key, {**MAIL, "scheduled_at": later}).json()
    answer = server.call("PATCH", f"/emails/{made['id']}", org.live_key, {"scheduled_at": soon})
    assert (answer.status_code, answer.json()["name"]) == (402, "insufficient_credits")
    assert server.call("GET", f"/emails/{made['id']}", org.live_key).json()["scheduled_at"] == later
    give(server, org, 2)
    assert server.call("PATCH", f"/emails/{made['id']}", org.live_key, {"scheduled_at": soon}).ok


def test_the_sdk_raises_its_own_errors(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    sdk: Any = resend
    monkeypatch.setattr(resend, "api_url", server.url)
    monkeypatch.setattr(resend, "api_key", server.make_org("SDK", plan="small").live_key)
    with pytest.raises(RateLimitError) as quota:
        sdk.Batch.send([MAIL] * 3)
    assert (quota.value.error_type, "resets at" in quota.value.message) == ("monthly_quota_exceeded", True)
    prepaid = server.make_org("SDK", plan="small", billing="prepaid")
    monkeypatch.setattr(resend, "api_key", prepaid.live_key)
    with pytest.raises(ResendError) as credits:
        sdk.Batch.send([MAIL] * 3)
    assert (str(credits.value.code), credits.value.error_type) == ("402", "insufficient_credits")


def test_the_operator_decides_who_pays_from_now_on(server: Server) -> None:
    org = server.make_org("Grows", plan="small")
    assert server.call("POST", "/emails/batch", org.live_key, [MAIL] * 2).ok
    assert server.call("POST", "/emails", org.live_key, MAIL).status_code == 429
    change = {"plan": "pro", "billing": "metered", "billing_user": "ada", "stripe_customer_id": "cus_1"}
    answer = server.call("PATCH", f"/orgs/{org.id}", ADMIN_TOKEN, change)
    assert answer.ok
    assert {name: answer.json()[name] for name in change} == change
    assert server.call("POST", "/emails", org.live_key, MAIL).ok
    answer = server.call("PATCH", f"/orgs/{org.id}", ADMIN_TOKEN, {"plan": "small", "stripe_customer_id": None})
    assert (answer.json()["billing"], answer.json()["stripe_customer_id"]) == ("metered", None)
    assert server.call("POST", "/emails", org.live_key, MAIL).ok
    assert server.call("GET", "/usage", org.live_key).json()["metered"] == {"emails": 1, "sms": 0}
    assert server.rows("SELECT taken::int FROM usage_quotas WHERE org_id = %s", org.id) == [(3,)]
    actions = server.rows("SELECT action FROM audit_logs WHERE org_id = %s AND action = 'org.changed'", org.id)
    assert len(actions) == 2


@pytest.mark.parametrize(("method", "path"), [("POST", "/orgs"), ("PATCH", "/orgs/{id}")])
def test_an_unknown_plan_is_refused_with_those_there_are(server: Server, org: Org, method: str, path: str) -> None:
    body = {"plan": "gold"} if method == "PATCH" else {"name": "x", "plan": "gold"}
    answer = server.call(method, path.replace("{id}", org.id), ADMIN_TOKEN, body)
    assert answer.status_code == 422
    assert "there are free, pro, small" in answer.json()["message"]


def test_an_org_that_is_not_there_is_not_found(server: Server, org: Org) -> None:
    assert server.call("PATCH", NO_SUCH_ORG, ADMIN_TOKEN, {"plan": "pro"}).status_code == 404
    assert server.call("PATCH", f"/orgs/{org.id}", org.live_key, {"plan": "pro"}).status_code in (401, 403)
