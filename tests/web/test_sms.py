"""SMS: the same operations, numbers and segments."""

from __future__ import annotations

from typing import Any

import pytest

from tests.web.serving import Org, Server

SMS = {"to": "+15005550006", "text": "Your code is 123456"}


def test_an_sms_is_stored_listed_moved_and_canceled(server: Server, org: Org) -> None:
    body = {"to": "+1 (500) 555-0006", "from": "NIGHTMAIL", "body": "я" * 71, "scheduled_at": "in 1 hour"}
    sent = server.call("POST", "/sms", org.live_key, body).json()["id"]
    found = server.call("GET", f"/sms/{sent}", org.live_key).json()
    assert (found["object"], found["to"], found["from"], found["text"]) == (
        "sms",
        "+15005550006",
        "NIGHTMAIL",
        "я" * 71,
    )
    assert (found["segments"], found["last_event"]) == (2, "scheduled")
    assert server.rows("SELECT channel, units, addresses FROM messages") == [("sms", 2, ["+15005550006"])]
    assert server.rows("SELECT lane FROM message_queue") == [("live:sms",)]
    assert [item["id"] for item in server.call("GET", "/sms", org.live_key).json()["data"]] == [sent]
    moved = server.call("PATCH", f"/sms/{sent}", org.live_key, {"scheduled_at": "in 2 hours"}).json()
    assert (moved["object"], moved["id"]) == ("sms", sent)
    events = server.call("GET", f"/sms/{sent}/events", org.live_key).json()["data"]
    assert [event["type"] for event in events] == ["scheduled"]
    assert server.call("POST", f"/sms/{sent}/cancel", org.live_key).json()["id"] == sent
    assert server.call("GET", f"/sms/{sent}", org.live_key).json()["last_event"] == "canceled"
    assert server.rows("SELECT sum(reserved)::int FROM usage_records") == [(0,)]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"to": "15005550006"}, "validation_error"),
        ({"to": "+1"}, "validation_error"),
        ({"to": "ada@example.org"}, "validation_error"),
        ({"to": ["+15005550006", "+15005550007"]}, "validation_error"),
        ({"text": ""}, "validation_error"),
        ({"text": "x" * 1601}, "validation_error"),
        ({"text": None}, "missing_required_field"),
        ({"body": "and a text"}, "validation_error"),
        ({"from": "+1"}, "invalid_from_address"),
        ({"from": "<script>"}, "invalid_from_address"),
        ({"subject": "x"}, "validation_error"),
        ({"scheduled_at": "tomorrow"}, "validation_error"),
    ],
)
def test_refused_sms(server: Server, org: Org, fields: dict[str, Any], name: str) -> None:
    before = server.counts()
    answer = server.call("POST", "/sms", org.live_key, {**SMS, **fields})
    assert (answer.status_code, answer.json()["name"]) == (422, name)
    assert server.counts() == before


def test_batches_and_replays(server: Server, org: Org) -> None:
    headers = {"Idempotency-Key": "one"}
    first = server.call("POST", "/sms/batch", org.live_key, [SMS, {**SMS, "to": ["+15005550007"]}], headers=headers)
    again = server.call("POST", "/sms/batch", org.live_key, [SMS, {**SMS, "to": ["+15005550007"]}], headers=headers)
    assert first.json() == again.json()
    assert again.headers["idempotent-replayed"] == "true"
    strict = server.call("POST", "/sms/batch", org.live_key, [SMS, {**SMS, "to": "x"}])
    assert strict.status_code == 422
    mixed = server.call(
        "POST", "/sms/batch", org.live_key, [{**SMS, "to": "x"}, SMS], headers={"x-batch-validation": "permissive"}
    ).json()
    assert (len(mixed["data"]), [error["index"] for error in mixed["errors"]]) == (1, [0])
    assert server.rows("SELECT count(*) FROM messages") == [(3,)]


def test_numbers_are_suppressed_like_addresses(server: Server, org: Org) -> None:
    added = server.call("POST", "/suppressions", org.live_key, {"phone": "+1 500 555 0006"})
    assert added.status_code == 201
    found = server.call("GET", "/suppressions/%2B15005550006", org.live_key).json()
    assert (found["id"], found["phone"], found["email"], found["channel"]) == (
        added.json()["id"], "+15005550006", None, "sms",
    )  # fmt: skip
    assert server.call("GET", "/suppressions", org.live_key).json()["data"] == [], "addresses only unless asked"
    assert len(server.call("GET", "/suppressions?channel=sms", org.live_key).json()["data"]) == 1
    assert (
        server.call("POST", "/suppressions", org.live_key, {"phone": "+15005550006", "email": "a@b.com"}).status_code
        == 422
    )
    removed = server.call("POST", "/suppressions/batch/remove", org.live_key, {"phones": ["+15005550006"]}).json()
    assert [item["deleted"] for item in removed["data"]] == [True]


@pytest.mark.parametrize("channel", ["emails", "sms"])
@pytest.mark.parametrize(("action", "state"), [("resend", "scheduled"), ("mark_sent", "sent"), ("cancel", "canceled")])
def test_an_ambiguous_message_is_released(server: Server, org: Org, channel: str, action: str, state: str) -> None:
    mail = {"from": "a@example.com", "to": "b@example.org", "subject": "s", "text": "t"}
    sent = server.call("POST", f"/{channel}", org.live_key, mail if channel == "emails" else SMS).json()["id"]
    path = f"/{channel}/{sent}/release"
    early = server.call("POST", path, org.live_key, {"action": action})
    assert (early.status_code, early.json()["name"]) == (409, "not_ambiguous")
    server.rows("DELETE FROM message_queue RETURNING 1")
    server.rows("UPDATE messages SET state = 'ambiguous' RETURNING 1")
    assert server.call("POST", path, org.live_key, {"action": action}).json()["id"] == sent
    assert server.rows("SELECT state FROM messages") == [(state,)]
    assert server.rows("SELECT count(*) FROM message_queue") == [(1 if action == "resend" else 0,)]
    logged = "SELECT actor LIKE 'key:%%', detail FROM audit_logs WHERE action = 'message.released'"
    assert server.rows(logged) == [(True, {"action": action})]
    assert server.call("POST", path, org.live_key, {"action": action}).status_code == 409
