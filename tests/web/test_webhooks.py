"""Webhooks beyond Resend's: dialects, schedules, pause, test events, replays by range, and pull."""

from __future__ import annotations

import asyncio
import random
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from nightmail.store.fan_out import fan_out
from nightmail.store.webhook_deliveries import claim_deliveries
from nightmail.store.webhook_endpoints import MAX_ENDPOINTS
from nightmail.webhooks.stamp import keep_bodies
from tests.web.facts import domain_fact, event_ids, finish, note_attempt, tell_fact, tell_facts
from tests.web.serving import Org, Server

URL = "https://hooks.example.com/"
SUBSCRIBED = ["domain.failed", "domain.verified"]
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture
def server(module_server: Server) -> Server:
    return module_server


@pytest.fixture
def webhook(server: Server, org: Org) -> str:
    """An endpoint for what becomes of domains."""
    return create(server, org, events=SUBSCRIBED[::-1])


def create(server: Server, org: Org, **fields: Any) -> str:
    answer = server.call("POST", "/webhooks", org.live_key, {"endpoint": URL, "events": ["email.bounced"], **fields})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def get(server: Server, org: Org, path: str) -> Any:
    answer = server.call("GET", f"/webhooks/{path}", org.live_key)
    assert answer.status_code == 200, answer.text
    return answer.json()


def change(server: Server, org: Org, webhook: str, **fields: Any) -> tuple[int, str]:
    """Return the status and, of a refusal, the message."""
    answer = server.call("PATCH", f"/webhooks/{webhook}", org.live_key, fields)
    return answer.status_code, answer.json().get("message", "")


# ── endpoints ──


@pytest.mark.parametrize(
    ("fields", "dialect", "schedule"),
    [
        ({"events": ["email.sent", "domain.created"]}, "resend", "default"),
        ({"events": ["domain.created"]}, "resend", "default"),
        ({"events": ["domain.created"], "dialect": "nightmail", "schedule": "legacy"}, "nightmail", "legacy"),
        ({"events": ["message.sent", "credits.low"], "schedule": "1s 24h"}, "nightmail", "1s 24h"),
    ],
)
def test_dialect_and_schedule(server: Server, org: Org, fields: dict[str, Any], dialect: str, schedule: str) -> None:
    found = get(server, org, create(server, org, description="For the café", **fields))
    assert (found["dialect"], found["schedule"], found["events"]) == (dialect, schedule, fields["events"])
    assert found["description"] == "For the café"


@pytest.mark.parametrize(
    ("fields", "status", "dialect", "topics"),
    [
        ({"events": ["domain.failed"]}, 200, "nightmail", ["domain.failed"]),
        ({"events": ["domain.created"]}, 200, "nightmail", ["domain.created"]),
        ({"events": ["domain.created"], "dialect": "resend"}, 200, "resend", ["domain.created"]),
        ({"events": ["email.delivery_delayed"]}, 200, "resend", ["email.delayed"]),
        ({"events": ["email.sent"], "dialect": "nightmail"}, 422, "nightmail", SUBSCRIBED),
        ({"events": ["email.sent", "message.sent"]}, 422, "nightmail", SUBSCRIBED),
        ({"dialect": "resend"}, 422, "nightmail", SUBSCRIBED),
        ({"dialect": "nightmail"}, 200, "nightmail", SUBSCRIBED),
        ({}, 422, "nightmail", SUBSCRIBED),
        ({"webhook_id": str(uuid.UUID(int=1)), "status": "paused"}, 422, "nightmail", SUBSCRIBED),
        ({"endpoint": "http://[::1"}, 422, "nightmail", SUBSCRIBED),
        ({"schedule": "5s  5m"}, 422, "nightmail", SUBSCRIBED),
    ],
)  # fmt: skip
def test_changes_of_events_and_dialect(
    server: Server, org: Org, webhook: str, fields: dict[str, Any], status: int, dialect: str, topics: list[str]
) -> None:
    assert change(server, org, webhook, **fields)[0] == status
    stored = server.rows("SELECT dialect, topics, status FROM webhook_endpoints WHERE id = %s", webhook)
    assert stored == [(dialect, topics, "enabled")]


def test_a_dialect_alone_changes_when_all_names_fit(server: Server, org: Org) -> None:
    webhook = create(server, org, events=["domain.created"])
    assert change(server, org, webhook, dialect="nightmail")[0] == 200
    assert get(server, org, webhook)["dialect"] == "nightmail"


def test_what_failed_is_forgotten_when_enabled_or_moved_elsewhere(server: Server, org: Org, webhook: str) -> None:
    failing = (
        "UPDATE webhook_endpoints SET status = 'disabled', disabled_reason = 'gone', failures = 12,"
        " first_failing_at = now(), blocked_until = now() + interval '1 hour' WHERE id = %s"
    )
    health = (
        "SELECT status, disabled_reason, failures, first_failing_at IS NULL, blocked_until IS NULL"
        " FROM webhook_endpoints WHERE id = %s"
    )
    for fields, after in (
        ({"description": "x"}, ("disabled", "gone", 12, False, False)),
        ({"endpoint": URL}, ("disabled", "gone", 12, False, False)),
        ({"endpoint": URL + "2"}, ("disabled", "gone", 0, True, True)),
        ({"status": "disabled"}, ("disabled", "gone", 12, False, False)),
        ({"status": "paused"}, ("paused", None, 12, False, False)),
        ({"status": "enabled"}, ("enabled", None, 0, True, True)),
    ):
        server.rows(failing, webhook)
        assert change(server, org, webhook, **fields)[0] == 200
        assert server.rows(health, webhook) == [after], fields
        server.rows("UPDATE webhook_endpoints SET url = %s WHERE id = %s", URL, webhook)
    assert change(server, org, webhook, status="disabled")[0] == 200
    assert get(server, org, webhook)["disabled_reason"] == "disabled by request"


def test_enabling_does_not_bring_failed_events_back(server: Server, org: Org, webhook: str) -> None:
    tell_facts(server, [domain_fact(org, "a.example")])
    finish(server, event_ids(server, webhook)[0], "failed", "endpoint disabled or removed")
    change(server, org, webhook, status="disabled")
    change(server, org, webhook, status="enabled")
    assert [event["status"] for event in get(server, org, f"{webhook}/events")["data"]] == ["failed"]


def test_no_more_than_the_limit(server: Server, org: Org) -> None:
    webhook = create(server, org)
    server.rows(
        "INSERT INTO webhook_endpoints (id, org_id, env, url, dialect, types, topics, secret)"
        " SELECT gen_random_uuid(), org_id, env, url, dialect, types, topics, secret"
        " FROM webhook_endpoints, generate_series(2, %s) WHERE id = %s",
        MAX_ENDPOINTS,
        webhook,
    )
    wanted = {"endpoint": URL, "events": ["email.sent"]}
    refused = server.call("POST", "/webhooks", org.live_key, wanted)
    assert (refused.status_code, refused.json()["name"]) == (422, "validation_error")
    assert str(MAX_ENDPOINTS) in refused.json()["message"]
    assert server.call("POST", "/webhooks", org.test_key, wanted).status_code == 201, "each env has its own limit"
    assert server.call("DELETE", f"/webhooks/{webhook}", org.live_key).ok
    assert server.call("POST", "/webhooks", org.live_key, wanted).status_code == 201


def test_secrets_stay_with_the_endpoint(server: Server, org: Org) -> None:
    wanted = {"endpoint": URL, "events": ["email.sent"]}
    first, second = (
        server.call("POST", "/webhooks", org.live_key, wanted, headers={"Idempotency-Key": "one"}).json()
        for _ in range(2)
    )
    assert first["id"] != second["id"]
    assert server.rows("SELECT count(*) FROM idempotency_keys WHERE org_id = %s", org.id) == [(0,)]
    secrets = [first["signing_secret"]]
    for _ in range(2):
        answer = server.call("POST", f"/webhooks/{first['id']}/signing-secret/rotate", org.live_key)
        secrets.append(answer.json()["signing_secret"])
    held = server.rows("SELECT previous_secret, secret FROM webhook_endpoints WHERE id = %s", first["id"])
    assert held == [(secrets[1], secrets[2])], "rotated twice, only the last two hold"
    log = "SELECT action FROM audit_logs WHERE target = %s AND detail::text NOT LIKE '%%whsec%%' ORDER BY id"
    assert server.rows(log, first["id"]) == [("webhook.created",)] + [("webhook.secret_rotated",)] * 2
    server.rows("UPDATE webhook_endpoints SET previous_until = now() WHERE id = %s", first["id"])
    assert get(server, org, first["id"])["previous_secret_expires_at"] is None


def test_the_query_of_a_url_stays_out_of_the_audit_log(server: Server, org: Org) -> None:
    wanted = {"endpoint": "https://hooks.example.com/in?token=SECRET1", "events": ["email.sent"]}
    webhook = server.call("POST", "/webhooks", org.live_key, wanted).json()["id"]
    change = {"endpoint": "https://hooks.example.com/other?token=SECRET2"}
    assert server.call("PATCH", f"/webhooks/{webhook}", org.live_key, change).ok
    assert get(server, org, webhook)["endpoint"] == change["endpoint"]
    assert server.call("DELETE", f"/webhooks/{webhook}", org.live_key).ok
    log = "SELECT detail ->> 'url' FROM audit_logs WHERE target = %s ORDER BY id"
    masked = [("https://hooks.example.com/in?…",)] + [("https://hooks.example.com/other?…",)] * 2
    assert server.rows(log, webhook) == masked


def test_a_test_key_hears_of_test_events_only(server: Server, org: Org, webhook: str) -> None:
    wanted = {"endpoint": URL, "events": ["domain.verified"]}
    other = server.call("POST", "/webhooks", org.test_key, wanted).json()["id"]
    tell_fact(server, org, "domain.verified", env="test")
    assert (len(event_ids(server, webhook)), len(event_ids(server, other))) == (0, 1)


# ── test events ──


@pytest.mark.parametrize(("events", "moment"), [(["message.sent"], "timestamp"), (["email.sent"], "created_at")])
def test_a_test_event_goes_to_one_endpoint_subscribed_or_not(
    server: Server, org: Org, events: list[str], moment: str
) -> None:
    one, other = create(server, org, events=events), create(server, org, events=events)
    made = server.call("POST", f"/webhooks/{one}/test", org.live_key)
    assert (made.status_code, made.json()["object"]) == (201, "webhook_event")
    assert (event_ids(server, one), event_ids(server, other)) == ([made.json()["id"]], [])
    event = get(server, org, f"{one}/events/{made.json()['id']}")
    assert (event["type"], event["status"], event["seq"]) == ("webhook.test", "pending", None)
    assert (event["payload"]["type"], event["payload"]["data"]["webhook_id"]) == ("webhook.test", one)
    assert moment in event["payload"]
    pulled = get(server, org, f"{one}/events?after=0")["data"]
    assert [item["payload"] for item in pulled] == [event["payload"]], "what is shown before is what is sent"


def test_a_disabled_endpoint_gets_neither_tests_nor_replays(server: Server, org: Org, webhook: str) -> None:
    tell_facts(server, [domain_fact(org, "a.example")])
    (event,) = event_ids(server, webhook)
    finish(server, event, "failed")
    change(server, org, webhook, status="disabled")
    for path, body in (("test", {}), (f"events/{event}/replay", {}), ("replay", {"status": "failed"})):
        refused = server.call("POST", f"/webhooks/{webhook}/{path}", org.live_key, body)
        assert (refused.status_code, refused.json()["name"]) == (409, "webhook_disabled")
        assert "enable" in refused.json()["message"]
    change(server, org, webhook, status="paused")
    assert server.call("POST", f"/webhooks/{webhook}/test", org.live_key).status_code == 201


# ── events and replays ──

# Column values of a numbered delivery, its status, whether a next attempt has a time, and what a replay of it answers.
STATES = {
    "not tried yet": ("attempts = 0", "pending", True, 200),
    "waiting for a retry": ("attempts = 2, reason = 'status 500'", "pending", True, 200),
    "claimed": ("claim_id = gen_random_uuid(), due_at = now() + interval '1 minute'", "attempting", False, 409),
    "held by a dead one": ("claim_id = gen_random_uuid(), due_at = now() - interval '1 second'", "pending", True, 200),
    "delivered": ("state = 'delivered', attempts = 1, finished_at = now()", "success", False, 200),
    "failed": ("state = 'failed', attempts = 8, finished_at = now(), reason = 'timeout'", "failed", False, 200),
}


@pytest.mark.parametrize("state", STATES)
def test_states_of_an_event_and_what_a_replay_does(server: Server, org: Org, webhook: str, state: str) -> None:
    columns, status, has_next, answered = STATES[state]
    tell_facts(server, [domain_fact(org, "a.example")])
    (event,) = event_ids(server, webhook)
    numbered = "UPDATE webhook_deliveries SET seq = 7, body = '{\"kept\": 1}'"
    server.rows(f"{numbered}, {columns} WHERE event_id = %s", event)
    found = get(server, org, f"{webhook}/events/{event}")
    assert (found["status"], found["next_attempt_at"] is not None) == (status, has_next)
    assert found["payload"] == {"kept": 1}
    whole = "SELECT * FROM webhook_deliveries WHERE event_id = %s"
    before = server.rows(whole, event)
    answer = server.call("POST", f"/webhooks/{webhook}/events/{event}/replay", org.live_key)
    assert answer.status_code == answered, answer.text
    if answered == 409:
        assert "an attempt is being made" in answer.json()["message"].lower()
        assert server.rows(whole, event) == before
        return
    now = server.rows(
        "SELECT state, attempts, claim_id, reason, finished_at, body, due_at <= now(), seq"
        " FROM webhook_deliveries WHERE event_id = %s",
        event,
    )
    assert now == [("pending", 0, None, None, None, '{"kept": 1}', True, 7)]
    logged = "SELECT detail->>'event' FROM audit_logs WHERE target = %s AND action = 'webhook.replayed'"
    assert server.rows(logged, webhook) == [(event,)]


def test_the_next_attempt_waits_for_the_endpoint(server: Server, org: Org, webhook: str) -> None:
    tell_facts(server, [domain_fact(org, "a.example")])
    path = f"{webhook}/events/{event_ids(server, webhook)[0]}"
    server.rows("UPDATE webhook_endpoints SET blocked_until = now() + interval '1 hour' WHERE id = %s", webhook)
    wait = datetime.fromisoformat(get(server, org, path)["next_attempt_at"]) - datetime.now(UTC)
    assert timedelta(minutes=59) < wait <= timedelta(hours=1)
    change(server, org, webhook, status="paused")
    assert get(server, org, path)["next_attempt_at"] is None


def test_events_are_paged_both_ways(server: Server, org: Org, webhook: str) -> None:
    tell_facts(server, [domain_fact(org, f"{number}.example") for number in range(5)])
    ids = event_ids(server, webhook)[::-1]

    def page(query: str) -> tuple[list[str], bool]:
        answer = get(server, org, f"{webhook}/events?{query}")
        return [event["id"] for event in answer["data"]], answer["has_more"]

    assert page("limit=2") == (ids[:2], True)
    assert page(f"limit=2&after={ids[1]}") == (ids[2:4], True)
    assert page(f"limit=2&after={ids[3]}") == (ids[4:], False)
    assert page(f"limit=2&before={ids[3]}") == (ids[1:3], True)
    note_attempt(server, ids[0], None, error="dns")
    (attempt,) = get(server, org, f"{webhook}/events/{ids[0]}/attempts")["data"]
    assert (attempt["http_status_code"], attempt["response"], attempt["error"]) == (0, "", "dns")
    for path in (f"events/{uuid.uuid4()}", f"events/{uuid.uuid4()}/attempts"):
        assert server.call("GET", f"/webhooks/{webhook}/{path}", org.live_key).status_code == 404
    for wrong in ("x", "%00", "{event_id}", ids[0][:-1], "..%2f"):
        for method, path in (("GET", ""), ("GET", "/attempts"), ("POST", "/replay")):
            answer = server.call(method, f"/webhooks/{webhook}/events/{wrong}{path}", org.live_key)
            assert answer.status_code in (404, 422), wrong
    for wrong in ("-1", "1.5", "1" + "0" * 18, f"{ids[0]}%0a", "7%0a", "%D9%A3", f"1&before={ids[0]}", f"{{{ids[0]}}}"):
        refused = server.call("GET", f"/webhooks/{webhook}/events?after={wrong}", org.live_key)
        assert (refused.status_code, refused.json()["name"]) == (422, "validation_error"), wrong


@pytest.mark.parametrize(
    ("body", "replayed"),
    [
        ({"status": "failed"}, "bdf"),
        ({"status": "delivered"}, "ace"),
        ({"from": "2026-03-01T12:00:00Z"}, "bdf"),
        ({"from": "2026-03-01T13:00:01Z"}, "df"),
        ({"from": "2026-03-01T13:00:00Z", "to": "2026-03-01T15:00:00Z"}, "b"),
        ({"from": "2026-03-01T14:00:00+01:00", "to": "2026-03-01T17:30:00+01:00", "status": "delivered"}, "ce"),
        ({"to": "2026-03-01T12:00:00Z"}, ""),
        ({"from": "0001-01-01T00:00:00+14:00", "to": "9999-12-31T23:59:59-14:00"}, "bdf"),
        ({"types": ["domain.failed"]}, "f"),
        ({"types": ["domain.updated"]}, "bdf"),
        ({"types": ["domain.verified", "webhook.test"], "status": "delivered"}, "ac"),
        ({"types": ["message.sent"]}, ""),
    ],
)
def test_replays_by_range_and_filter(
    server: Server, org: Org, webhook: str, body: dict[str, Any], replayed: str
) -> None:
    for hour, name in enumerate("abcdefg"):
        topic = "domain.failed" if name in "ef" else "domain.verified"
        tell_fact(server, org, topic, data={"name": name}, occurred_at=NOON + timedelta(hours=hour))
    for event, name in zip(event_ids(server, webhook), "abcdefg", strict=True):
        if name != "g":
            finish(server, event, "delivered" if name in "ace" else "failed", "timeout")
    server.rows("UPDATE webhook_deliveries SET due_at = now() + interval '1 hour' WHERE endpoint_id = %s", webhook)
    answer = server.call("POST", f"/webhooks/{webhook}/replay", org.live_key, body).json()
    assert answer == {
        "object": "webhook_replay", "id": webhook, "replayed": len(replayed), "has_more": False, "next_after": None,
    }  # fmt: skip
    due = server.rows(
        "SELECT coalesce(string_agg(data->>'name', '' ORDER BY event_id), '') FROM webhook_deliveries"
        " WHERE endpoint_id = %s AND state = 'pending' AND attempts = 0 AND finished_at IS NULL AND due_at <= now()",
        webhook,
    )
    assert due == [(replayed,)]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"after": str(uuid.UUID(int=1))},
        {"from": "2026-03-01T12:00:00"},
        {"from": "2026-03-01T12:00:00Z", "to": "2026-03-01T13:00:00+01:00"},
        {"types": ["email.nonsense"]},
        {"types": []},
        {"status": "pending"},
    ],
)
def test_unclear_replays_are_refused(server: Server, org: Org, webhook: str, body: dict[str, Any]) -> None:
    answer = server.call("POST", f"/webhooks/{webhook}/replay", org.live_key, body)
    assert (answer.status_code, answer.json()["name"]) == (422, "validation_error")


# ── pull ──


def test_pull_numbers_what_it_gives(server: Server, org: Org, webhook: str) -> None:
    tell_facts(server, [domain_fact(org, f"{number}.example") for number in range(5)])

    def pull(after: int, limit: int = 2) -> Any:
        return get(server, org, f"{webhook}/events?after={after}&limit={limit}")

    assert "last_seq" not in get(server, org, f"{webhook}/events")
    first = pull(0)
    assert [event["seq"] for event in first["data"]] == [1, 2]
    assert (first["has_more"], first["oldest_seq"], first["last_seq"]) == (True, 1, 2)
    stamped = "SELECT count(seq), count(body) FROM webhook_deliveries WHERE endpoint_id = %s"
    assert server.rows(stamped, webhook) == [(3, 3)], "no more than a page and its end are numbered"
    rest = [*pull(2)["data"], *pull(4)["data"]]
    assert [event["seq"] for event in rest] == [3, 4, 5]
    names = [event["payload"]["data"]["name"] for event in first["data"] + rest]
    assert sorted(names) == [f"{number}.example" for number in range(5)]
    assert pull(1)["data"][0] == first["data"][1], "the same again when asked again"
    end = pull(5)
    assert (end["data"], end["has_more"], end["last_seq"]) == ([], False, 5)
    server.rows("DELETE FROM webhook_deliveries WHERE endpoint_id = %s AND seq < 4", webhook)
    assert (pull(0)["oldest_seq"], [event["seq"] for event in pull(0)["data"]]) == (4, [4, 5])


def test_pull_of_nothing(server: Server, org: Org, webhook: str) -> None:
    empty = get(server, org, f"{webhook}/events?after=0")
    assert empty == {"object": "list", "data": [], "has_more": False, "oldest_seq": None, "last_seq": 0}


@pytest.mark.anyio
async def test_pull_misses_nothing_whatever_the_order_of_commits(server: Server, org: Org, webhook: str) -> None:
    """Six writers hold their transactions open for random times; pullers and a deliverer number what they find."""
    dice = random.Random(7)
    told: set[str] = set()
    writers_done = asyncio.Event()

    async def write(writer: int) -> None:
        async with await psycopg.AsyncConnection.connect(server.conninfo, autocommit=True) as conn:
            for number in range(25):
                names = [f"{writer}-{number}-{part}.example" for part in range(dice.randint(1, 4))]
                async with conn.transaction() as transaction:
                    await fan_out(conn, [domain_fact(org, name) for name in names])
                    await asyncio.sleep(dice.random() * 0.02)
                    if dice.random() < 0.1:
                        raise psycopg.Rollback(transaction)
                    told.update(names)

    async def claim() -> None:
        async with await psycopg.AsyncConnection.connect(server.conninfo, autocommit=True) as conn:
            while not writers_done.is_set():
                async with conn.transaction():
                    claimed = await claim_deliveries(conn, limit=5, per_endpoint=5, lease_s=60, busy={})
                    fresh = [one.fresh for one in claimed if one.fresh is not None]
                    await keep_bodies(conn, fresh, ["nightmail"] * len(fresh))
                    await asyncio.sleep(dice.random() * 0.01)

    async def pull() -> list[tuple[int, str]]:
        seen: list[tuple[int, str]] = []
        last, is_final = 0, False
        while True:
            path = f"{webhook}/events?after={last}&limit={dice.randint(1, 9)}"
            page = await asyncio.to_thread(get, server, org, path)
            seen += [(event["seq"], event["payload"]["data"]["name"]) for event in page["data"]]
            last = page["last_seq"]
            if not page["has_more"]:
                if is_final:
                    return seen
                is_final = writers_done.is_set()

    async def write_all() -> None:
        await asyncio.gather(*(write(number) for number in range(6)))
        writers_done.set()

    _, _, *pulled = await asyncio.gather(write_all(), claim(), pull(), pull(), pull())
    for seen in pulled:
        assert [seq for seq, _ in seen] == list(range(1, len(told) + 1))
        assert {name for _, name in seen} == told
    assert pulled[0] == pulled[1] == pulled[2]
