"""The official Resend SDK for Python, unmodified: every method of its webhooks against a real server."""

from __future__ import annotations

import base64
import time
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import resend
from resend.exceptions import MissingRequiredFieldsError, ResendError, ValidationError

from nightmail.webhooks.signature import signature_headers
from tests.web.facts import event_ids, finish, note_attempt, tell_fact
from tests.web.serving import Org, Server

# Its types would refuse the wrong values that are sent here.
sdk: Any = resend
URL = "https://hooks.example.com/resend"


@pytest.fixture
def server(module_server: Server) -> Server:
    return module_server


@pytest.fixture(autouse=True)
def configured(server: Server, org: Org, monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK as its users set it up: an address and a key."""
    monkeypatch.setattr(resend, "api_url", server.url)
    monkeypatch.setattr(resend, "api_key", org.live_key)


def create(*events: str) -> str:
    return str(sdk.Webhooks.create({"endpoint": URL, "events": list(events or ("email.bounced",))})["id"])


def test_an_endpoint_from_creation_to_removal(server: Server) -> None:
    made = sdk.Webhooks.create({"endpoint": URL, "events": ["email.sent", "email.bounced", "email.sent"]})
    assert set(made) >= {"object", "id", "signing_secret"}
    assert made["object"] == "webhook"
    assert len(base64.b64decode(made["signing_secret"].removeprefix("whsec_"))) == 32
    found = sdk.Webhooks.get(made["id"])
    for name, value in {
        "object": "webhook",
        "id": made["id"],
        "endpoint": URL,
        "events": ["email.sent", "email.bounced"],
        "status": "enabled",
        "signing_secret": made["signing_secret"],
    }.items():
        assert found[name] == value
    assert abs(datetime.fromisoformat(found["created_at"]) - datetime.now(UTC)) < timedelta(minutes=1)

    changed = sdk.Webhooks.update(
        {"webhook_id": made["id"], "endpoint": URL + "/2", "events": ["domain.updated"], "status": "disabled"}
    )
    assert (changed["object"], changed["id"]) == ("webhook", made["id"])
    found = sdk.Webhooks.get(made["id"])
    assert (found["endpoint"], found["events"], found["status"]) == (URL + "/2", ["domain.updated"], "disabled")
    topics = server.rows("SELECT topics FROM webhook_endpoints WHERE id = %s", made["id"])
    assert topics == [(["domain.failed", "domain.unverified", "domain.verified"],)]
    sdk.Webhooks.update({"webhook_id": made["id"], "status": "enabled"})
    assert sdk.Webhooks.get(made["id"])["status"] == "enabled"

    gone = sdk.Webhooks.remove(made["id"])
    assert (gone["object"], gone["id"], gone["deleted"]) == ("webhook", made["id"], True)
    for attempt in (
        sdk.Webhooks.get,
        sdk.Webhooks.remove,
        sdk.Webhooks.rotate_signing_secret,
        sdk.Webhooks.list_events,
    ):
        with pytest.raises(ResendError) as missing:
            attempt(made["id"])
        assert (missing.value.code, missing.value.error_type) == (404, "not_found")
    actions = [action for (action,) in server.rows("SELECT action FROM audit_logs WHERE target = %s", made["id"])]
    assert sorted(actions) == ["webhook.changed", "webhook.changed", "webhook.created", "webhook.deleted"]


def test_lists_are_paged_and_hold_no_secret() -> None:
    ids = [create() for _ in range(23)][::-1]
    everything = sdk.Webhooks.list()
    assert (everything["object"], everything["has_more"]) == ("list", False)
    assert [item["id"] for item in everything["data"]] == ids
    assert set(everything["data"][0]) >= {"object", "id", "endpoint", "events", "status", "created_at"}
    assert "signing_secret" not in everything["data"][0]
    first = sdk.Webhooks.list({"limit": 20})
    assert ([item["id"] for item in first["data"]], first["has_more"]) == (ids[:20], True)
    rest = sdk.Webhooks.list({"limit": 20, "after": ids[19]})
    assert ([item["id"] for item in rest["data"]], rest["has_more"]) == (ids[20:], False)
    back = sdk.Webhooks.list({"limit": 2, "before": ids[20]})
    assert ([item["id"] for item in back["data"]], back["has_more"]) == (ids[18:20], True)


def test_events_attempts_and_replays(server: Server, org: Org) -> None:
    mail = {"from": "Acme <a@example.com>", "to": ["ada@example.org"], "subject": "s", "html": "h"}
    sent = sdk.Emails.send({**mail, "tags": [{"name": "run", "value": "7"}], "scheduled_at": "in 1 day"})["id"]
    webhook = create()
    bounce = {"bounce": {"message": "no such box", "type": "Permanent", "subtype": "General"}}
    for _ in range(3):
        tell_fact(server, org, "email.bounced", message_id=uuid.UUID(sent), recipient="ada@example.org", data=bounce)
    events = event_ids(server, webhook)[::-1]

    listed = sdk.Webhooks.list_events(webhook)
    assert (listed["object"], listed["has_more"]) == ("list", False)
    assert [(e["id"], e["type"], e["status"]) for e in listed["data"]] == [
        (event, "email.bounced", "pending") for event in events
    ]
    page = sdk.Webhooks.list_events(webhook, {"limit": 1, "after": events[0]})
    assert ([event["id"] for event in page["data"]], page["has_more"]) == ([events[1]], True)

    event = sdk.Webhooks.get_event(webhook, events[0])
    assert (event["object"], event["id"], event["status"]) == ("webhook_event", events[0], "pending")
    assert datetime.fromisoformat(event["next_attempt_at"])
    payload = event["payload"]
    assert (payload["type"], sorted(payload)) == ("email.bounced", ["created_at", "data", "type"])
    data = payload["data"]
    assert (data["email_id"], data["to"], data["tags"]) == (sent, ["ada@example.org"], {"run": "7"})
    assert data["bounce"] == {"message": "no such box", "type": "Permanent", "subType": "General"}

    note_attempt(server, events[0], None, error="timeout")
    note_attempt(server, events[0], 500)
    note_attempt(server, events[0], 200)
    finish(server, events[0], "delivered")
    finish(server, events[1], "failed", "status 500")
    attempts = sdk.Webhooks.list_event_attempts(webhook, events[0])
    assert (attempts["object"], attempts["has_more"]) == ("list", False)
    assert [(a["http_status_code"], a["response"]) for a in attempts["data"]] == [
        (200, "thank you"), (500, "thank you"), (0, ""),
    ]  # fmt: skip
    assert datetime.fromisoformat(attempts["data"][0]["sent_at"])
    page = sdk.Webhooks.list_event_attempts(webhook, events[0], {"limit": 1, "after": attempts["data"][0]["id"]})
    assert ([a["id"] for a in page["data"]], page["has_more"]) == ([attempts["data"][1]["id"]], True)
    assert [e["status"] for e in sdk.Webhooks.list_events(webhook)["data"]] == ["success", "failed", "pending"]
    assert sdk.Webhooks.get_event(webhook, events[1])["next_attempt_at"] is None

    for replayed in events:
        answer = sdk.Webhooks.replay_event(webhook, replayed)
        assert (answer["object"], answer["id"]) == ("webhook_event", replayed)
    assert [e["status"] for e in sdk.Webhooks.list_events(webhook)["data"]] == ["pending"] * 3
    for attempt in (sdk.Webhooks.get_event, sdk.Webhooks.replay_event, sdk.Webhooks.list_event_attempts):
        with pytest.raises(ResendError) as missing:
            attempt(webhook, str(uuid.uuid4()))
        assert (missing.value.code, missing.value.error_type) == (404, "not_found")


def test_during_a_rotation_both_secrets_verify() -> None:
    made = sdk.Webhooks.create({"endpoint": URL, "events": ["email.sent"]})
    rotated = sdk.Webhooks.rotate_signing_secret(made["id"])
    assert (rotated["object"], rotated["id"]) == ("webhook", made["id"])
    old, new = made["signing_secret"], rotated["signing_secret"]
    assert old != new
    found = sdk.Webhooks.get(made["id"])
    assert found["signing_secret"] == new
    lasts = datetime.fromisoformat(found["previous_secret_expires_at"]) - datetime.now(UTC)
    assert timedelta(hours=23, minutes=59) < lasts <= timedelta(hours=24)
    body = '{"type":"email.sent"}'
    headers = signature_headers([new, old], webhook_id="evt", timestamp=int(time.time()), body=body.encode())
    given = {name: headers[f"svix-{name}"] for name in ("id", "timestamp", "signature")}
    for secret in (old, new):
        assert sdk.Webhooks.verify({"payload": body, "headers": given, "webhook_secret": secret})
    with pytest.raises(ValueError, match="no matching signature"):
        sdk.Webhooks.verify({"payload": body + " ", "headers": given, "webhook_secret": new})


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"endpoint": None}, MissingRequiredFieldsError, "endpoint"),
        ({"events": None}, MissingRequiredFieldsError, "events"),
        ({"events": []}, ValidationError, "events"),
        ({"events": ["email.nonsense"]}, ValidationError, "email.nonsense"),
        ({"events": ["contact.created"]}, ValidationError, "contact.created"),
        ({"events": ["email.sent", "message.sent"]}, ValidationError, "Resend"),
        ({"endpoint": "hooks.example.com"}, ValidationError, "https://"),
        ({"endpoint": "ftp://hooks.example.com"}, ValidationError, "URL"),
        ({"endpoint": "https://user:pass@hooks.example.com"}, ValidationError, "password"),
        ({"dialect": "svix"}, ValidationError, "dialect"),
        ({"dialect": "nightmail"}, ValidationError, "email.sent"),
        ({"schedule": "5"}, ValidationError, "schedule"),
        ({"schedule": "25h"}, ValidationError, "24h"),
        ({"description": "a\nb"}, ValidationError, "description"),
        ({"status": "enabled"}, ValidationError, "status"),
    ],
)
def test_refused_endpoints_raise_the_right_exception(
    server: Server, fields: dict[str, Any], error: type[ResendError], words: str
) -> None:
    wanted = {"endpoint": URL, "events": ["email.sent"], **fields}
    before = server.counts()
    with pytest.raises(ResendError) as refused:
        sdk.Webhooks.create({name: value for name, value in wanted.items() if value is not None})
    assert type(refused.value) is error
    assert refused.value.code == 422
    assert words in refused.value.message
    assert server.counts() == before
