"""The official Resend SDK for Python, unmodified, against a real server."""

from __future__ import annotations

import base64
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
import resend
from resend.exceptions import (
    InvalidApiKeyError,
    MissingApiKeyError,
    MissingRequiredFieldsError,
    RateLimitError,
    ResendError,
    ValidationError,
)

from nightmail.ids import sha256
from tests.web.serving import Org, Server, serving

# Its types would refuse the wrong values that are sent here.
sdk: Any = resend

MAIL: dict[str, Any] = {
    "from": "Acme <hello@example.com>",
    "to": ["ada@example.org"],
    "subject": "The night mail",
    "html": "<p>crossing the border</p>",
}


@pytest.fixture(autouse=True)
def configured(server: Server, org: Org, monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK as its users set it up: an address and a key."""
    monkeypatch.setattr(resend, "api_url", server.url)
    monkeypatch.setattr(resend, "api_key", org.live_key)


def send(**fields: Any) -> str:
    return str(sdk.Emails.send({**MAIL, **fields})["id"])


def test_a_sent_email_is_stored_and_comes_back(server: Server, org: Org) -> None:
    sent = send(
        to=["Ada <ada@EXAMPLE.org>", "ada@example.org"],
        cc="bob@example.org",
        bcc=["eve@exämple.org"],
        reply_to="desk@example.com",
        text="crossing the border",
        tags=[{"name": "category", "value": "night_mail"}],
        headers={"X-Entity-Ref-ID": "42"},
    )
    found = sdk.Emails.get(sent)
    assert found["id"] == sent
    assert found["object"] == "email"
    assert found["from"] == "Acme <hello@example.com>"
    assert found["to"] == ["Ada <ada@example.org>"]
    assert found["cc"] == ["bob@example.org"]
    assert found["bcc"] == ["eve@xn--exmple-cua.org"]
    assert found["reply_to"] == ["desk@example.com"]
    assert found["subject"] == "The night mail"
    assert found["html"] == "<p>crossing the border</p>"
    assert found["text"] == "crossing the border"
    assert found["last_event"] == "queued"
    assert found["message_id"] == f"<{sent}@example.com>"
    assert datetime.fromisoformat(found["created_at"]) > datetime.now(UTC) - timedelta(minutes=1)
    stored = server.rows("SELECT org_id::text, env, channel, state, units, addresses FROM messages")
    recipients = ["ada@example.org", "bob@example.org", "eve@xn--exmple-cua.org"]
    assert stored == [(org.id, "live", "email", "scheduled", 3, recipients)]
    assert server.rows("SELECT headers, tags FROM message_bodies") == [
        ([["X-Entity-Ref-ID", "42"]], [{"name": "category", "value": "night_mail"}])
    ]
    assert server.rows("SELECT lane, due_at <= now() FROM message_queue") == [("live:email", True)]
    assert server.rows("SELECT sum(reserved)::int FROM usage_records") == [(3,)]


def test_a_scheduled_email_waits_moves_and_is_canceled(server: Server) -> None:
    sent = send(scheduled_at="in 1 hour")
    assert sdk.Emails.get(sent)["last_event"] == "scheduled"
    [(due,)] = server.rows("SELECT due_at FROM message_queue")
    assert abs(due - datetime.now(UTC) - timedelta(hours=1)) < timedelta(minutes=1)

    later = (datetime.now(UTC) + timedelta(days=2)).replace(microsecond=858000)
    moved = sdk.Emails.update({"id": sent, "scheduled_at": later.isoformat()})
    assert (moved["object"], moved["id"]) == ("email", sent)
    assert server.rows("SELECT due_at FROM message_queue") == [(later,)]

    canceled = sdk.Emails.cancel(sent)
    assert (canceled["object"], canceled["id"]) == ("email", sent)
    assert sdk.Emails.get(sent)["last_event"] == "canceled"
    assert server.rows("SELECT count(*) FROM message_queue") == [(0,)]
    with pytest.raises(ResendError) as refused:
        sdk.Emails.update({"id": sent, "scheduled_at": "in 1 hour"})
    assert (refused.value.code, refused.value.error_type) == (409, "already_finished")


def test_an_email_whose_call_began_cannot_be_taken_back(server: Server) -> None:
    sent = send(scheduled_at="in 1 hour")
    server.rows("UPDATE message_queue SET intent_at = now(), claim_id = gen_random_uuid() RETURNING 1")
    for attempt in (sdk.Emails.cancel, lambda id: sdk.Emails.update({"id": id, "scheduled_at": "in 2 hours"})):
        with pytest.raises(ResendError, match="already sending") as refused:
            attempt(sent)
        assert (refused.value.code, refused.value.error_type) == (409, "already_sending")


def test_attachments_as_the_sdk_sends_them(server: Server) -> None:
    pdf = bytes(range(256)) * 40
    sent = send(
        attachments=[
            {"filename": "bytes.pdf", "content": list(pdf)},
            {"filename": "text.csv", "content": base64.b64encode(pdf).decode()},
            {"filename": "in.png", "content": list(b"png"), "content_type": "image/png", "content_id": "logo"},
            {"filename": "in2.png", "content": list(b"png2"), "inline_content_id": "logo2"},
        ]
    )
    stored = server.rows(
        "SELECT filename, content_type, content_id, content FROM message_attachments ORDER BY position"
    )
    assert [(*row[:3], bytes(row[3])) for row in stored] == [
        ("bytes.pdf", "application/pdf", None, pdf),
        ("text.csv", "text/csv", None, pdf),
        ("in.png", "image/png", "logo", b"png"),
        ("in2.png", "image/png", "logo2", b"png2"),
    ]
    listed = sdk.Emails.Attachments.list(email_id=sent)
    assert [item["id"] for item in listed["data"]] == ["0", "1", "2", "3"]
    one = sdk.Emails.Attachments.get(email_id=sent, attachment_id="2")
    assert (one["object"], one["filename"], one["size"]) == ("attachment", "in.png", 3)
    assert one["content_disposition"] == "inline"
    downloaded = server.call("GET", one["download_url"], sdk.api_key)
    assert downloaded.content == b"png"
    assert downloaded.headers["content-type"] == "application/octet-stream"
    assert downloaded.headers["content-disposition"] == "attachment; filename*=utf-8''in.png"


@pytest.mark.parametrize(
    "attachment",
    [
        {"filename": "a", "path": "https://example.com/a"},
        {"filename": "a", "content": "not base64!"},
        {"filename": "a", "content": "abc"},
        {"filename": "a\r\nX: y", "content": "YQ=="},
        {"filename": "a", "content": "YQ==", "content_type": "text/plain\r\nX: y"},
        {"filename": "a", "content": "YQ==", "content_id": "<x>"},
        {"filename": "a"},
    ],
)
def test_unusable_attachments_are_refused(server: Server, attachment: dict[str, Any]) -> None:
    with pytest.raises(ResendError) as refused:
        send(attachments=[attachment])
    assert (refused.value.code, refused.value.error_type) == (422, "invalid_attachment")
    assert server.rows("SELECT count(*) FROM messages") == [(0,)]


def test_a_strict_batch_is_all_or_nothing(server: Server) -> None:
    sent = sdk.Batch.send([{**MAIL, "subject": str(n)} for n in range(100)])
    assert [sdk.Emails.get(item["id"])["subject"] for item in sent["data"][::33]] == ["0", "33", "66", "99"]
    assert "errors" not in sent
    with pytest.raises(ValidationError, match=r"Message 1 of the batch: .*`to`"):
        sdk.Batch.send([MAIL, {**MAIL, "to": "nobody"}], options={"batch_validation": "strict"})
    with pytest.raises(ValidationError, match="1 to 100"):
        sdk.Batch.send([MAIL] * 101)
    with pytest.raises(ValidationError, match="1 to 100"):
        sdk.Batch.send([])
    assert server.rows("SELECT count(*) FROM messages") == [(100,)]


def test_a_permissive_batch_names_what_it_refused(server: Server) -> None:
    sent = sdk.Batch.send(
        [MAIL, {**MAIL, "to": "nobody"}, {**MAIL, "scheduled_at": "in 1 day"}, {"to": "a@example.org"}],
        options={"batch_validation": "permissive"},
    )
    assert len(sent["data"]) == 2
    assert [error["index"] for error in sent["errors"]] == [1, 3]
    assert "`to`" in sent["errors"][0]["message"]
    assert "`from`" in sent["errors"][1]["message"]
    assert server.rows("SELECT count(*) FROM messages") == [(2,)]
    nothing = sdk.Batch.send([{**MAIL, "to": "nobody"}], options={"batch_validation": "permissive"})
    assert (nothing["data"], len(nothing["errors"])) == ([], 1)
    everything = sdk.Batch.send([MAIL], options={"batch_validation": "permissive"})
    assert (len(everything["data"]), everything["errors"]) == (1, [])


def test_lists_are_paged_in_both_directions() -> None:
    sent = [send(subject=str(n)) for n in range(7)][::-1]
    first = sdk.Emails.list({"limit": 3})
    assert (first["object"], first["has_more"]) == ("list", True)
    assert [item["id"] for item in first["data"]] == sent[:3]
    second = sdk.Emails.list({"limit": 3, "after": sent[2]})
    assert ([item["id"] for item in second["data"]], second["has_more"]) == (sent[3:6], True)
    last = sdk.Emails.list({"limit": 3, "after": sent[5]})
    assert ([item["id"] for item in last["data"]], last["has_more"]) == (sent[6:], False)
    back = sdk.Emails.list({"limit": 3, "before": sent[5]})
    assert ([item["id"] for item in back["data"]], back["has_more"]) == (sent[2:5], True)
    assert len(sdk.Emails.list()["data"]) == 7
    for wrong in ({"limit": 0}, {"limit": 101}, {"after": sent[0], "before": sent[1]}, {"after": "x"}):
        with pytest.raises(ValidationError):
            sdk.Emails.list(wrong)


def test_the_same_request_again_gets_the_same_answer(server: Server) -> None:
    options: Any = {"idempotency_key": "order-42"}
    first = sdk.Emails.send(dict(MAIL), options)
    again = sdk.Emails.send(dict(reversed(MAIL.items())), options)
    assert again["id"] == first["id"]
    assert again["http_headers"]["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first["http_headers"]
    assert server.rows("SELECT count(*) FROM messages") == [(1,)]
    batch = [sdk.Batch.send([MAIL, MAIL], {"idempotency_key": "batch-1"}) for _ in range(2)]
    assert batch[0]["data"] == batch[1]["data"]
    assert server.rows("SELECT count(*) FROM messages") == [(3,)]


def test_the_key_of_another_request_is_refused(server: Server) -> None:
    options: Any = {"idempotency_key": "order-42"}
    sdk.Emails.send(dict(MAIL), options)
    with pytest.raises(ResendError) as other_body:
        sdk.Emails.send({**MAIL, "subject": "another"}, options)
    assert (other_body.value.code, other_body.value.error_type) == (409, "invalid_idempotent_request")
    with pytest.raises(ResendError) as other_path:
        sdk.Batch.send([MAIL], options)
    assert (other_path.value.code, other_path.value.error_type) == (409, "invalid_idempotent_request")
    assert server.rows("SELECT count(*) FROM messages") == [(1,)]


def test_a_request_that_still_runs_is_refused(server: Server, org: Org) -> None:
    # the lock that store.accept takes, held as by a request on another machine
    number = int.from_bytes(sha256(f"{org.id}/live/order-42")[:8], "big", signed=True)
    with psycopg.connect(server.conninfo) as other:
        other.execute("SELECT pg_advisory_xact_lock(%s)", [number])
        with pytest.raises(ResendError) as refused:
            sdk.Emails.send(dict(MAIL), {"idempotency_key": "order-42"})
        assert (refused.value.code, refused.value.error_type) == (409, "concurrent_idempotent_requests")
    assert server.rows("SELECT count(*) FROM messages") == [(0,)]
    assert sdk.Emails.send(dict(MAIL), {"idempotency_key": "order-42"})["id"]


def test_many_at_once_with_one_key_accept_one_message(server: Server, org: Org) -> None:
    answers: list[tuple[int, Any]] = []

    def ask() -> None:
        answer = server.call("POST", "/emails", org.live_key, MAIL, headers={"Idempotency-Key": "race"})
        answers.append((answer.status_code, answer.json().get("id") or answer.json()["name"]))

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids = {body for status, body in answers if status == 200}
    assert len(answers) == 16
    assert len(ids) == 1
    assert {body for status, body in answers if status != 200} <= {"concurrent_idempotent_requests"}
    assert server.rows("SELECT count(*) FROM messages") == [(1,)]


@pytest.mark.parametrize("key", ["", "a b", "ü", "x" * 257, "tab\there"])
def test_unusable_idempotency_keys_are_refused(server: Server, org: Org, key: str) -> None:
    answer = server.call("POST", "/emails", org.live_key, MAIL, headers={"Idempotency-Key": key.encode("latin-1")})
    assert (answer.status_code, answer.json()["name"]) == (400, "invalid_idempotency_key")
    assert server.rows("SELECT count(*) FROM messages") == [(0,)]


def test_a_key_of_256_characters_is_usable() -> None:
    assert sdk.Emails.send(dict(MAIL), {"idempotency_key": "x" * 256})["id"]


def without(name: str) -> Any:
    return {key: value for key, value in MAIL.items() if key != name}


@pytest.mark.parametrize(
    ("mail", "error", "name"),
    [
        (without("from"), MissingRequiredFieldsError, "missing_required_field"),
        (without("to"), MissingRequiredFieldsError, "missing_required_field"),
        (without("subject"), MissingRequiredFieldsError, "missing_required_field"),
        (without("html"), MissingRequiredFieldsError, "missing_required_field"),
        ({**MAIL, "to": []}, MissingRequiredFieldsError, "missing_required_field"),
        ({**MAIL, "from": "nobody"}, ResendError, "invalid_from_address"),
        ({**MAIL, "to": "nobody"}, ValidationError, "validation_error"),
        ({**MAIL, "to": "a@b@c"}, ValidationError, "validation_error"),
        ({**MAIL, "to": ["a@example.com\r\nBcc: x@example.com"]}, ValidationError, "validation_error"),
        ({**MAIL, "subject": "x\r\nBcc: y@example.com"}, ValidationError, "validation_error"),
        ({**MAIL, "headers": {"X-A": "x\nB: y"}}, ValidationError, "validation_error"),
        ({**MAIL, "headers": {"X A": "x"}}, ValidationError, "validation_error"),
        ({**MAIL, "headers": {"bCc": "x@example.com"}}, ValidationError, "validation_error"),
        ({**MAIL, "headers": {"Content-Type": "text/plain"}}, ValidationError, "validation_error"),
        ({**MAIL, "headers": {"DKIM-Signature": "x"}}, ValidationError, "validation_error"),
        ({**MAIL, "headers": {"X-SES-CONFIGURATION-SET": "x"}}, ValidationError, "validation_error"),
        ({**MAIL, "headers": {"X-A": "1", "x-a": "2"}}, ValidationError, "validation_error"),
        ({**MAIL, "tags": [{"name": "a b", "value": "c"}]}, ValidationError, "validation_error"),
        ({**MAIL, "tags": [{"name": "a", "value": "b\n"}]}, ValidationError, "validation_error"),
        ({**MAIL, "tags": [{"name": "a"}, {"name": "a"}]}, ValidationError, "validation_error"),
        ({**MAIL, "scheduled_at": "2030-01-01T00:00:00"}, ValidationError, "validation_error"),
        ({**MAIL, "scheduled_at": "2020-01-01T00:00:00Z"}, ValidationError, "validation_error"),
        ({**MAIL, "to": [f"a{n}@example.com" for n in range(51)]}, ValidationError, "validation_error"),
        (
            {**MAIL, "to": [f"a{n}@example.com" for n in range(30)], "bcc": [f"b{n}@example.com" for n in range(21)]},
            ValidationError,
            "validation_error",
        ),
        ({"to": "a@example.com", "template": {"id": "x"}}, ValidationError, "validation_error"),
        ({**MAIL, "topic_id": "x"}, ValidationError, "validation_error"),
        ({**MAIL, "scheduledAt": "in 1 hour"}, ValidationError, "validation_error"),
    ],
)
def test_refused_emails_raise_the_right_exception(
    server: Server, mail: Any, error: type[ResendError], name: str
) -> None:
    before = server.counts()
    with pytest.raises(ResendError) as refused:
        sdk.Emails.send(mail)
    assert type(refused.value) is error
    assert (refused.value.code, refused.value.error_type) == (422, name)
    assert server.counts() == before


def test_fifty_recipients_are_taken() -> None:
    assert send(to=[f"a{n}@example.com" for n in range(50)])


def unset(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setattr(resend, "api_key", key)


def test_keys_that_are_refused(server: Server, org: Org, monkeypatch: pytest.MonkeyPatch) -> None:
    unset(monkeypatch, "")
    with pytest.raises(MissingApiKeyError):
        send()
    for wrong in ("re_123", "nm_live_" + "x" * 43, org.live_key + "x", org.live_key[:-1]):
        unset(monkeypatch, wrong)
        with pytest.raises(InvalidApiKeyError):
            send()
    unset(monkeypatch, org.live_key)
    restricted = sdk.ApiKeys.create({"name": "sender", "permission": "sending_access"})["token"]
    unset(monkeypatch, restricted)
    sent = send()
    assert sdk.Batch.send([MAIL])["data"]
    attempts: list[Callable[[], Any]] = [
        lambda: sdk.Emails.get(sent),
        sdk.Emails.list,
        lambda: sdk.Emails.cancel(sent),
        sdk.ApiKeys.list,
        lambda: sdk.Suppressions.add({"email": "a@example.com"}),
        sdk.Domains.list,
    ]
    for attempt in attempts:
        with pytest.raises(ResendError) as refused:
            attempt()
        assert (refused.value.code, refused.value.error_type) == (401, "restricted_api_key")


def test_unknown_emails_and_unusable_ids() -> None:
    with pytest.raises(ResendError) as missing:
        sdk.Emails.get(str(uuid.uuid4()))
    assert (missing.value.code, missing.value.error_type) == (404, "not_found")
    with pytest.raises(ValidationError, match="UUID"):
        sdk.Emails.get("nonsense")


def test_what_is_not_built_says_so_in_json() -> None:
    attempts: list[Callable[[], Any]] = [
        sdk.Domains.list,
        sdk.Broadcasts.list,
        sdk.Templates.list,
        sdk.Topics.list,
        sdk.Segments.list,
        sdk.Emails.Receiving.list,
        sdk.Emails.metrics,
    ]
    for attempt in attempts:
        with pytest.raises(ResendError) as refused:
            attempt()
        assert (refused.value.code, refused.value.error_type) == (501, "not_implemented")


def test_suppressions(server: Server) -> None:
    added = sdk.Suppressions.add({"email": "Bob@EXAMPLE.org"})
    assert added["object"] == "suppression"
    assert sdk.Suppressions.add({"email": "Bob@example.org"})["id"] == added["id"]
    found = sdk.Suppressions.get("Bob@Example.org")
    assert (found["id"], found["email"], found["origin"]) == (added["id"], "Bob@example.org", "manual")
    assert sdk.Suppressions.get(added["id"])["email"] == "Bob@example.org"
    batch = sdk.Suppressions.Batch.add({"emails": ["c@example.org", "d@example.org", "c@EXAMPLE.org"]})
    assert len(batch["data"]) == 2
    listed = sdk.Suppressions.list({"limit": 2})
    assert (len(listed["data"]), listed["has_more"]) == (2, True)
    assert sdk.Suppressions.list({"origin": "bounce"})["data"] == []
    assert len(sdk.Suppressions.list({"origin": "manual"})["data"]) == 3
    removed = sdk.Suppressions.Batch.remove({"emails": ["c@example.org", "nobody@example.org"]})
    assert [item["deleted"] for item in removed["data"]] == [True]
    by_id = sdk.Suppressions.Batch.remove({"ids": [added["id"], str(uuid.uuid4())]})
    assert [item["id"] for item in by_id["data"]] == [added["id"]]
    gone = sdk.Suppressions.remove("d@example.org")
    assert gone["deleted"] is True
    for attempt in (sdk.Suppressions.get, sdk.Suppressions.remove):
        with pytest.raises(ResendError) as missing:
            attempt("d@example.org")
        assert (missing.value.code, missing.value.error_type) == (404, "not_found")
    assert server.rows("SELECT count(*) FROM suppressions") == [(0,)]


def test_api_keys(server: Server, org: Org, monkeypatch: pytest.MonkeyPatch) -> None:
    made = sdk.ApiKeys.create({"name": "ci"})
    assert made["token"].startswith("nm_live_")
    assert server.rows("SELECT count(*) FROM api_keys WHERE last_four = %s", made["token"][-4:]) == [(1,)]
    listed = sdk.ApiKeys.list()
    assert [key["name"] for key in listed["data"]] == ["ci", "first live key"]
    assert "token" not in listed["data"][0]
    sdk.ApiKeys.update({"id": made["id"], "name": "cd"})
    assert sdk.ApiKeys.list()["data"][0]["name"] == "cd"
    unset(monkeypatch, made["token"])
    assert sdk.Emails.list()["data"] == []
    unset(monkeypatch, org.live_key)
    assert sdk.ApiKeys.remove(made["id"])["deleted"] is True
    unset(monkeypatch, made["token"])
    with pytest.raises(InvalidApiKeyError):
        sdk.Emails.list()
    actions = [action for (action,) in server.rows("SELECT action FROM audit_logs ORDER BY id")]
    assert actions[-3:] == ["api_key.created", "api_key.renamed", "api_key.revoked"]


def test_usage_counts_recipients(org: Org) -> None:
    send(to=["a@example.org", "b@example.org"])
    usage = sdk.Usage.get()
    assert usage["object"] == "usage"
    assert usage["emails"]["monthly"]["used"] == 2
    assert usage["emails"]["daily"]["used"] == 2
    assert usage["emails"]["monthly"]["sent"] == 0
    assert usage["rate_limit"] == {"limit": 100_000, "duration": "1000ms"}


@pytest.fixture
def slow_server(database_url: str, server: Server) -> Iterator[Server]:
    """A second server on the same database with a rate limit of 3."""
    with serving(database_url, api_rate_per_s=3) as running:
        yield running


def test_too_many_requests_raise_the_right_exception(slow_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resend, "api_url", slow_server.url)

    def hammer() -> None:
        for _ in range(20):
            sdk.Emails.list()

    with pytest.raises(RateLimitError) as refused:
        hammer()
    assert (refused.value.code, refused.value.error_type) == (429, "rate_limit_exceeded")
    assert refused.value.headers["retry-after"] == "1"
    assert refused.value.headers["ratelimit-limit"] == "3"
    assert refused.value.headers["ratelimit-remaining"] == "0"
