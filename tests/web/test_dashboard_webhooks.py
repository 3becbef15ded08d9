"""The operator's pages about webhooks: what they show, what their buttons do, what stays hidden, what they cost."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from html import unescape
from typing import Any
from uuid import UUID

import psycopg
import pytest

from nightmail.clock import now
from nightmail.ids import new_id
from nightmail.store import webhook_overview as store
from nightmail.store.webhook_overview import AttemptCounts, Caps
from nightmail.web import charts
from tests.web.facts import domain_fact, event_ids, finish, note_attempt, tell_fact, tell_facts
from tests.web.serving import Org, Server
from tests.web.test_dashboard import HOSTILE, OURS, dashboard, get, log_in, post, send

URL = "https://hooks.example.com/in"
DOMAINS = ["domain.verified", "domain.failed"]
MESSAGES = ["message.scheduled", "message.sent", "message.bounced", "message.canceled"]


@pytest.fixture
def site(database_url: str) -> Iterator[Server]:
    """A server with the pages, the operator logged in."""
    with dashboard(database_url) as server:
        assert log_in(server).status_code == 303
        yield server


@pytest.fixture
def org(site: Server) -> Org:
    """A tenant."""
    return site.make_org("Crossing")


def create(site: Server, org: Org, **fields: Any) -> str:
    """Make an endpoint through the API and return its id."""
    body = {"endpoint": URL, "events": DOMAINS, "dialect": "nightmail", **fields}
    answer = site.call("POST", "/webhooks", org.live_key, body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def read(site: Server, path: str = "", **query: str) -> str:
    """Return the visible words of a page below /dashboard/webhooks."""
    page = get(site, f"/dashboard/webhooks{path}", params=query)
    assert page.status_code == 200, page.text
    words = re.sub(r"<[^>]+>", " ", page.text.partition("<main")[2])
    return re.sub(r"\s+", " ", unescape(words))


def state_of(site: Server, event: str) -> tuple[Any, ...]:
    """Return state, attempts and reason of an event's delivery."""
    [row] = site.rows("SELECT state, attempts, reason FROM webhook_deliveries WHERE event_id = %s", event)
    return row


# ── what they show ──


def test_the_list_says_how_each_endpoint_fares(site: Server, org: Org) -> None:
    webhook = create(site, org)
    tell_facts(site, [domain_fact(org, f"{n}.example") for n in range(5)])
    events = event_ids(site, webhook)
    finish(site, events[0], "delivered")
    finish(site, events[1], "failed", "status 500")
    for event, status in zip(events, (200, 500, 204), strict=False):
        note_attempt(site, event, status)
    note_attempt(site, events[3], None, error="timeout: no answer within 15 s")
    site.rows(
        "UPDATE webhook_endpoints SET failures = 12, first_failing_at = now() - interval '3 hours',"
        " blocked_until = now() + interval '10 minutes'"
    )
    text = read(site)
    assert f"failing {URL} Crossing · live · nightmail · 2 types 12 failures in a row, since 3 h ago" in text
    assert re.search(r"50\.0 % 50\.0 % 3 oldest (now|\d+ s ago) 1 in (9|10) min", text), text
    page = get(site, "/dashboard/webhooks").text
    assert '2 of 4 attempts">50.0 %' in page
    assert "2 delivered, 2 failed</title>" in page

    site.rows("UPDATE webhook_endpoints SET status = 'disabled', disabled_reason = 'the endpoint answered 410 Gone'")
    text = read(site)
    assert "the endpoint answered 410 Gone" in text
    assert "in 9 min" not in text


def test_without_endpoints_the_page_says_how_to_make_one(site: Server) -> None:
    text = read(site)
    assert "No webhook yet. POST" in text
    assert "No webhook matches" in read(site, q="nothing")


def test_endpoints_are_found_by_url_status_org_and_id(site: Server, org: Org) -> None:
    other = site.make_org("Other")
    one = create(site, org, endpoint="https://one.example.com/Hook")
    two = create(site, org, endpoint="https://two.example.com/")
    three = create(site, other, endpoint="https://three.example.com/")
    site.call("PATCH", f"/webhooks/{two}", org.live_key, {"status": "paused"})
    site.rows("UPDATE webhook_endpoints SET failures = 1 WHERE id = %s", three)

    def found(**query: str) -> set[str]:
        return set(
            re.findall(r"/dashboard/webhooks/([0-9a-f-]{36})\"", get(site, "/dashboard/webhooks", params=query).text)
        )

    assert found() == {one, two, three}
    assert found(q="/HOOK") == {one}
    assert found(status="paused") == {two}
    assert found(status="failing") == {three}
    assert found(status="enabled") == {one}
    assert found(org=org.id) == {one, two}
    assert found(org=org.id, status="failing") == set()
    assert found(q="%") == set()
    assert get(site, "/dashboard/webhooks", params={"q": one}).headers["location"] == f"/dashboard/webhooks/{one}"


def test_an_endpoint_page_lists_its_deliveries_by_state_and_page(site: Server, org: Org) -> None:
    webhook = create(site, org)
    create(site, org, endpoint="https://other.example.com/")
    tell_facts(site, [domain_fact(org, f"{n}.example") for n in range(120)])
    events = event_ids(site, webhook)
    finish(site, events[7], "failed", "status 503")
    finish(site, events[90], "failed", "status 502")

    def walk(path: str) -> list[str]:
        seen: list[str] = []
        while path:
            text = get(site, path).text
            seen += re.findall(rf"/dashboard/webhooks/{webhook}/([0-9a-f-]{{36}})\"", text)
            older = re.search(r'href="([^"]+before=[^"]+)"', text)
            path = unescape(older[1]) if older else ""
        return seen

    assert walk(f"/dashboard/webhooks/{webhook}") == events[::-1]
    assert walk(f"/dashboard/webhooks/{webhook}?state=failed") == [events[90], events[7]]
    assert "status 503" in read(site, f"/{webhook}", state="failed")
    assert "No delivered delivery" in read(site, f"/{webhook}", state="delivered")


def test_a_rare_state_is_looked_for_in_steps(site: Server, org: Org, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nightmail.store.webhook_overview.SCAN", 10)
    webhook = create(site, org)
    tell_facts(site, [domain_fact(org, f"{n}.example") for n in range(15)])
    [first, *_] = event_ids(site, webhook)
    finish(site, first, "failed", "status 500")
    text = get(site, f"/dashboard/webhooks/{webhook}?state=failed").text
    assert first not in text
    further = re.search(r'href="([^"]+before=[^"]+)">Look further', text)
    assert further is not None
    assert first in get(site, unescape(further[1])).text


def test_a_delivery_page_shows_body_and_attempts(site: Server, org: Org) -> None:
    webhook = create(site, org)
    tell_fact(site, org, "domain.failed", data={"name": "a.example", "records": ["x"]})
    [event] = event_ids(site, webhook)
    fresh = read(site, f"/{webhook}/{event}")
    assert "as it would be sent now" in fresh
    assert "None yet." in fresh
    assert '"type": "domain.failed"' in fresh

    site.rows("UPDATE webhook_deliveries SET seq = 7, body = %s", '{"type":"domain.failed","kept":[1,{"a":"é"}]}')
    note_attempt(site, event, 503)
    note_attempt(site, event, None, error="refused: nobody listens")
    finish(site, event, "failed", "status 503")
    text = read(site, f"/{webhook}/{event}")
    assert '{ "type": "domain.failed", "kept": [ 1, { "a": "é" } ] }' in text
    assert "refused: nobody listens" in text
    assert re.search(r"503 20\d\d-\d\d-\d\d [\d:.]{12} UTC 12 ms thank you", text), text
    assert "Number 7" in text


def test_a_message_shows_provider_events_by_recipient_and_its_deliveries(site: Server, org: Org) -> None:
    webhook = create(site, org, events=MESSAGES)
    mail = send(site, org, to=["ada@example.com", "bob@example.com"], scheduled_at="in 1 hour")
    other = send(site, org, scheduled_at="in 1 hour")
    site.call("POST", f"/emails/{mail}/cancel", org.live_key)
    bounce = {"bounce": {"type": "Permanent", "subtype": "General", "message": "gone", "diagnostic_code": "550 5.1.1"}}
    site.rows(
        "INSERT INTO message_events (message_id, org_id, recipient, kind, provider_ref, occurred_at, data)"
        " VALUES (%s, %s, 'bob@example.com', 'bounced', 'r', now(), %s)",
        mail, org.id, json.dumps(bounce),
    )  # fmt: skip
    tell_fact(site, org, "email.bounced", message_id=UUID(mail), recipient="bob@example.com", data=bounce)
    page = get(site, f"/dashboard/messages/{mail}").text
    text = re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", page)))
    assert "bounced bob@example.com" in text
    assert "bounce diagnostic code 550 5.1.1" in text
    linked = re.findall(rf"/dashboard/webhooks/{webhook}/([0-9a-f-]{{36}})\"", page)
    told = site.rows(
        "SELECT event_id::text, topic FROM webhook_deliveries WHERE message_id = %s ORDER BY event_id", mail
    )
    assert linked == [event for event, _ in told]
    assert [topic for _, topic in told] == ["email.scheduled", "email.canceled", "email.bounced"]
    assert mail not in get(site, f"/dashboard/messages/{other}").text.partition(">Webhooks</h2>")[2]


def _event_at(site: Server, org: Org, webhook: str, mail: str | UUID | None, moment: datetime) -> UUID:
    """Let a fact have been told to an endpoint at that time."""
    event = _id_at(moment)
    site.rows(
        "INSERT INTO webhook_deliveries (endpoint_id, event_id, org_id, topic, message_id, occurred_at, due_at)"
        " VALUES (%s, %s, %s, 'email.opened', %s, %s, %s)",
        webhook, event, org.id, mail, moment, moment,
    )  # fmt: skip
    return event


def _recorded_at(site: Server, org: Org, mail: str, moments: list[datetime]) -> None:
    """Let only these times be known of a message's events."""
    site.rows("DELETE FROM message_events")
    for n, moment in enumerate(moments):
        site.rows(
            "INSERT INTO message_events (message_id, org_id, kind, provider_ref, occurred_at, recorded_at)"
            " VALUES (%s, %s, 'opened', %s, %s, %s)",
            mail, org.id, str(n), moment, moment,
        )  # fmt: skip


def test_events_near_each_other_are_looked_through_once(
    site: Server, org: Org, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SPANS_MAX", 30)
    webhook = create(site, org, events=MESSAGES)
    mail = send(site, org, scheduled_at="in 1 hour")
    site.rows("DELETE FROM webhook_deliveries")
    start = (now() - timedelta(hours=2)).replace(microsecond=0)
    moments = [start + timedelta(seconds=3 * n) for n in range(20)] + [start + timedelta(hours=1)]
    _recorded_at(site, org, mail, moments)
    told = [_event_at(site, org, webhook, mail, moment + timedelta(seconds=1.5)) for moment in moments]
    for n in range(80):
        _event_at(site, org, webhook, None, start + timedelta(seconds=n))
    arguments = {"message_id": UUID(mail), "spans": 30, "scan": 10_000, "limit": 200}
    with psycopg.connect(site.conninfo, autocommit=True) as conn:
        row = conn.execute(f"EXPLAIN (FORMAT JSON, ANALYZE) {store.OF_MESSAGE}", arguments).fetchone()
    assert row is not None
    read = [node for node in _nodes(row[0][0]["Plan"]) if node.get("Relation Name") == "webhook_deliveries"]
    assert sum(node["Actual Rows"] * node["Actual Loops"] for node in read) <= 21 + 80
    found = _ask(site.conninfo, lambda conn: store.deliveries_of_message(conn, UUID(mail)))
    assert ([one.row.event_id for one in found.rows], found.is_cut) == (told, False)
    assert "may be more deliveries" not in get(site, f"/dashboard/messages/{mail}").text


@pytest.mark.parametrize("bound", ["OF_MESSAGE_SCAN", "SPANS_MAX", "OF_MESSAGE_LIMIT"])
def test_a_message_page_says_when_it_did_not_look_at_everything(
    site: Server, org: Org, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    webhook = create(site, org, events=MESSAGES)
    mail = send(site, org, scheduled_at="in 1 hour")
    site.rows("DELETE FROM webhook_deliveries")
    start = (now() - timedelta(hours=2)).replace(microsecond=0)
    _recorded_at(site, org, mail, [start, start + timedelta(minutes=1)])
    # Some are found, and of what lies behind them nothing is known.
    told = [_event_at(site, org, webhook, mail, start + timedelta(milliseconds=10 * n)) for n in range(8)]
    monkeypatch.setattr(store, bound, {"OF_MESSAGE_SCAN": 10, "SPANS_MAX": 1, "OF_MESSAGE_LIMIT": 5}[bound])
    found = _ask(site.conninfo, lambda conn: store.deliveries_of_message(conn, UUID(mail)))
    expected = {"OF_MESSAGE_SCAN": 6, "SPANS_MAX": 8, "OF_MESSAGE_LIMIT": 5}[bound]
    assert ([one.row.event_id for one in found.rows], found.is_cut) == (told[:expected], True)
    assert "may be more deliveries" in get(site, f"/dashboard/messages/{mail}").text


# ── what stays hidden, and what may not act ──


def test_lists_show_no_query_of_a_url(site: Server, org: Org) -> None:
    url = "https://hooks.example.com/in?token=SECRET1"
    webhook = create(site, org, events=MESSAGES, endpoint=url)
    mail = send(site, org, scheduled_at="in 1 hour")
    [event] = event_ids(site, webhook)
    for path in ("webhooks", f"messages/{mail}", f"webhooks/{webhook}/{event}"):
        text = get(site, f"/dashboard/{path}").text
        assert "https://hooks.example.com/in?…" in text, path
        assert "SECRET1" not in text, path
    assert url in get(site, f"/dashboard/webhooks/{webhook}").text


def test_nothing_from_outside_acts_and_no_page_shows_a_secret(site: Server, org: Org) -> None:
    webhook = create(site, org, events=MESSAGES)
    mail = send(site, org, scheduled_at="in 1 hour")
    [event] = event_ids(site, webhook)
    site.rows("UPDATE orgs SET name = %s", HOSTILE)
    site.rows(
        "UPDATE webhook_endpoints SET url = %(h)s, description = %(h)s, types = ARRAY[%(h)s], failures = 3,"
        " status = 'disabled', disabled_reason = %(h)s, first_failing_at = now(), previous_secret = secret,"
        " previous_until = now() + interval '1 hour'".replace("%(h)s", "%s"),
        HOSTILE, HOSTILE, HOSTILE, HOSTILE,
    )  # fmt: skip
    finish(site, event, "failed", HOSTILE)
    site.rows(
        "UPDATE webhook_deliveries SET topic = %s, recipient = %s, seq = 1, body = %s",
        HOSTILE, HOSTILE, json.dumps({HOSTILE: HOSTILE}),
    )  # fmt: skip
    note_attempt(site, event, 500, error=HOSTILE)
    site.rows("UPDATE webhook_attempts SET response = %s", HOSTILE)
    [(secret,)] = site.rows("SELECT secret FROM webhook_endpoints")
    for path in ("", f"/{webhook}", f"/{webhook}/{event}", f"/{webhook}?state=failed"):
        page = get(site, f"/dashboard/webhooks{path}")
        assert page.status_code == 200, path
        assert "{{7*7}}" in page.text
        assert re.search(r"<script(?! src=\"/dashboard/static/live\.js\")", page.text) is None, path
        assert "<img src=x" not in page.text, path
        assert re.search(r"<[^>]+\s(style|on\w+)=", page.text.replace("onerror=alert(2)", "")) is None, path
        assert re.search(r"(src|href)=\"(?!/(dashboard|docs))", page.text) is None, path
        assert secret.removeprefix("whsec_")[:-4] not in page.text
        assert "script-src 'self';" in page.headers["content-security-policy"]
    assert f"whsec_…{secret[-4:]}" in get(site, f"/dashboard/webhooks/{webhook}").text
    assert "<img src=x" not in get(site, f"/dashboard/messages/{mail}").text


def test_unknown_ids_are_not_found_and_odd_parameters_ignored(site: Server, org: Org) -> None:
    webhook = create(site, org)
    for path in ("none", "%00", str(new_id()), f"{webhook}/none", f"{webhook}/{new_id()}", f"{new_id()}/{new_id()}"):
        assert get(site, f"/dashboard/webhooks/{path}").status_code == 404, path
        assert post(site, f"/dashboard/webhooks/{path}/replay", headers=OURS).status_code == 404, path
    for query in ("state=x", "before=%00", "q=%FF%00", "status=%27", "org=x", "replayed=-1", "replayed=²", "done=x",
                  "after=x", "replayed=9999999999999", f"before={new_id()}"):  # fmt: skip
        for path in ("", f"/{webhook}"):
            assert get(site, f"/dashboard/webhooks{path}?{query}").status_code == 200, (path, query)


# ── what their buttons do ──


def test_a_button_works_only_from_a_page_of_ours_with_a_session(site: Server, org: Org) -> None:
    webhook = create(site, org)
    tell_fact(site, org, "domain.failed")
    [event] = event_ids(site, webhook)
    finish(site, event, "failed", "status 500")
    here = f"/dashboard/webhooks/{webhook}"
    forms = {
        f"{here}/status": {"status": "paused"},
        f"{here}/test": {},
        f"{here}/replay": {},
        f"{here}/{event}/replay": {},
    }
    audit = "SELECT count(*) FROM audit_logs"
    before = site.rows(audit)
    for path, form in forms.items():
        foreign: tuple[dict[str, str], ...] = ({}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.test"})
        for headers in foreign:
            assert post(site, path, headers=headers, data=form).status_code == 403, path
    site.session.cookies.clear()
    for path, form in forms.items():
        assert post(site, path, headers=OURS, data=form).headers["location"] == "/dashboard/login"
    assert site.rows(audit) == before
    assert site.rows("SELECT status FROM webhook_endpoints") == [("enabled",)]
    assert [state for _, state in site.rows("SELECT event_id, state FROM webhook_deliveries")] == ["failed"]


def test_pause_and_enable(site: Server, org: Org) -> None:
    webhook = create(site, org)
    here = f"/dashboard/webhooks/{webhook}"
    landed = post(site, f"{here}/status", headers=OURS, data={"status": "paused"}).headers["location"]
    assert "Paused: events are kept" in get(site, landed).text
    site.rows(
        "UPDATE webhook_endpoints SET status = 'disabled', disabled_reason = 'x', failures = 9, blocked_until = now()"
    )
    for path in (f"{here}/test", f"{here}/replay"):
        refused = post(site, path, headers=OURS)
        assert refused.status_code == 409
        assert "enable it first" in refused.text
    assert post(site, f"{here}/status", headers=OURS, data={"status": "enabled"}).status_code == 303
    assert site.rows("SELECT status, disabled_reason, failures, blocked_until FROM webhook_endpoints") == [
        ("enabled", None, 0, None)
    ]
    assert post(site, f"{here}/status", headers=OURS, data={"status": "gone"}).status_code == 422
    log = "SELECT actor, detail ->> 'status' FROM audit_logs WHERE action = 'webhook.changed' ORDER BY id"
    assert site.rows(log) == [("admin", "paused"), ("admin", "enabled")]


def test_a_test_event_is_queued_and_shown(site: Server, org: Org) -> None:
    webhook = create(site, org)
    landed = post(site, f"/dashboard/webhooks/{webhook}/test", headers=OURS).headers["location"]
    [event] = event_ids(site, webhook)
    assert landed == f"/dashboard/webhooks/{webhook}/{event}"
    assert '"type": "webhook.test"' in unescape(get(site, landed).text)


def test_replays_of_one_and_of_what_failed(site: Server, org: Org, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nightmail.store.webhook_events.replay_events.__kwdefaults__", {"limit": 2, "scan": 3})
    monkeypatch.setattr("nightmail.store.webhook_events.REPLAY_LIMIT", 4)
    webhook = create(site, org)
    tell_facts(site, [domain_fact(org, f"{n}.example") for n in range(9)])
    events = event_ids(site, webhook)
    for number, event in enumerate(events[:8], start=1):
        site.rows("UPDATE webhook_deliveries SET seq = %s WHERE event_id = %s", number, event)
    for event in events[:7]:
        finish(site, event, "failed", "status 500")
    finish(site, events[7], "delivered")
    here = f"/dashboard/webhooks/{webhook}"

    landed = post(site, f"{here}/replay", headers=OURS).headers["location"]
    assert [state_of(site, event)[0] for event in events] == ["pending"] * 4 + ["failed"] * 3 + ["delivered", "pending"]
    page = get(site, landed).text
    assert "4 failed events will be delivered again; there may be more" in page
    after = re.search(r'name="after" value="([^"]+)"', page)
    assert after is not None
    landed = post(site, f"{here}/replay", headers=OURS, data={"after": after[1]}).headers["location"]
    assert "3 failed events will be delivered again." in get(site, landed).text
    assert [state_of(site, event) for event in events[:7]] == [("pending", 0, None)] * 7

    assert post(site, f"{here}/{events[7]}/replay", headers=OURS).headers["location"] == f"{here}/{events[7]}"
    assert state_of(site, events[7]) == ("pending", 0, None)
    site.rows(
        "UPDATE webhook_deliveries SET claim_id = gen_random_uuid(), due_at = now() + interval '1 minute'"
        " WHERE event_id = %s",
        events[7],
    )
    refused = post(site, f"{here}/{events[7]}/replay", headers=OURS)
    assert refused.status_code == 409
    assert "attempt is being made" in refused.text
    assert "attempting" in read(site, f"/{webhook}/{events[7]}")


# ── what they cost ──


def test_ten_thousand_endpoints_are_paged(site: Server, org: Org) -> None:
    site.rows(
        "INSERT INTO webhook_endpoints (id, org_id, env, url, dialect, types, topics, secret, failures)"
        " SELECT nm_uuid7(), %s, 'live', 'https://h.example/' || n, 'nightmail', '{message.sent}', '{email.sent}',"
        " 'whsec_x', (n = 1)::int FROM generate_series(1, 10000) AS n",
        org.id,
    )
    seen: list[str] = []
    path = "/dashboard/webhooks"
    for _ in range(3):
        text = get(site, path).text
        seen += re.findall(r"https://h\.example/(\d+)\"", text)
        older = re.search(r'href="([^"]+before=[^"]+)"', text)
        assert older is not None
        path = unescape(older[1])
    assert len(seen) == len(set(seen)) == 3 * store.ENDPOINTS_PAGE
    text = read(site, status="failing")
    assert "9,999 enabled 1 failing" in text
    assert "https://h.example/1 " in text


def _id_at(moment: datetime) -> UUID:
    """Return an event id of that time."""
    return UUID(int=(int(moment.timestamp() * 1000) << 80) | 7 << 76 | 2 << 62 | secrets.randbits(62))


def _ask(conninfo: str, step: Callable[[psycopg.AsyncConnection[Any]], Any]) -> Any:
    async def ask() -> Any:
        async with await psycopg.AsyncConnection.connect(conninfo, autocommit=True) as conn:
            return await step(conn)

    return asyncio.run(ask())


def test_attempts_count_in_their_own_hour_and_busy_hours_are_sampled(database_url: str) -> None:
    endpoint, idle = new_id(), new_id()
    moment = now()
    made: list[tuple[datetime, datetime, int | None]] = [(moment - timedelta(days=6), moment, None)]
    made += [(moment - timedelta(hours=50), moment - timedelta(hours=50), 204)] * 2
    made += [(moment - timedelta(days=9), moment - timedelta(days=9), 200)]
    made += [(moment - timedelta(hours=3), moment - timedelta(hours=3), 200 if n else 500) for n in range(12)]
    with psycopg.connect(database_url, autocommit=True) as conn:
        for told_at, sent_at, status in made:
            conn.execute(
                "INSERT INTO webhook_attempts (endpoint_id, event_id, sent_at, duration_ms, http_status)"
                " VALUES (%s, %s, %s, 5, %s)",
                [endpoint, _id_at(told_at), sent_at, status],
            )
    counts = _ask(database_url, lambda conn: store.count_attempts(conn, [endpoint, idle], Caps(1, 1, 20)))
    hour = moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    assert counts[endpoint].by_hour == {
        hour: (0, 1),
        hour - timedelta(hours=3): (11, 1),
        hour - timedelta(hours=50): (2, 0),
    }
    assert not counts[endpoint].is_sampled
    assert counts[idle].by_hour == {}
    sampled = _ask(database_url, lambda conn: store.count_attempts(conn, [endpoint], Caps(1, 1, 10)))[endpoint]
    assert sampled.is_sampled
    assert sum(sampled.by_hour[hour - timedelta(hours=3)]) == 10
    assert sampled.by_hour[hour - timedelta(hours=50)] == (2, 0)


def test_no_page_reads_a_whole_table(filled_database: tuple[str, dict[str, Any]]) -> None:
    conninfo, arguments = filled_database
    most = {
        store.STANDINGS: 2 * (100 + 100 + 200),
        store.COUNT_ATTEMPTS: 2 * 48 * 26,
        store.LIST_DELIVERIES: 1000,
        store.OF_MESSAGE: 10 * 100,
    }
    for query, rows_max in most.items():
        with psycopg.connect(conninfo, autocommit=True) as conn:
            row = conn.execute(f"EXPLAIN (FORMAT JSON, ANALYZE) {query}", arguments).fetchone()
        assert row is not None
        scans = [
            node
            for node in _nodes(row[0][0]["Plan"])
            if node.get("Relation Name", "") in ("webhook_deliveries", "webhook_attempts")
        ]
        assert scans, query
        assert not [scan for scan in scans if scan["Node Type"] == "Seq Scan"], query
        assert sum(scan["Actual Rows"] * scan["Actual Loops"] for scan in scans) <= rows_max, query


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", ()):
        yield from _nodes(inner)


@pytest.fixture
def filled_database(database_url: str) -> tuple[str, dict[str, Any]]:
    """A database with 30,000 deliveries and attempts of ten endpoints, and the arguments of a page about some."""
    org, message = new_id(), new_id()
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("INSERT INTO orgs (id, name) VALUES (%s, 'x')", [org])
        endpoints = [new_id() for _ in range(10)]
        conn.execute(
            "INSERT INTO webhook_endpoints (id, org_id, env, url, dialect, types, topics, secret)"
            " SELECT id, %s, 'live', 'https://h.example/', 'nightmail', '{message.sent}', '{email.sent}', 'whsec_x'"
            " FROM unnest(%s::uuid[]) AS e (id)",
            [org, endpoints],
        )
        start = now() - timedelta(days=6)
        events = [_id_at(start + timedelta(minutes=2.8) * n) for n in range(3000)]
        conn.execute(
            "INSERT INTO webhook_deliveries (endpoint_id, event_id, org_id, topic, occurred_at, due_at, state, seq,"
            " finished_at) SELECT e.id, d.id, %s, 'email.sent', now(), now(),"
            " CASE d.n %% 3 WHEN 0 THEN 'pending' WHEN 1 THEN 'failed' ELSE 'delivered' END, nullif(d.n, 3),"
            " CASE WHEN d.n %% 3 > 0 THEN now() END"
            " FROM unnest(%s::uuid[]) AS e (id) CROSS JOIN unnest(%s::uuid[]) WITH ORDINALITY AS d (id, n)",
            [org, endpoints, events],
        )
        conn.execute(
            "INSERT INTO webhook_attempts (endpoint_id, event_id, sent_at, duration_ms, http_status)"
            " SELECT endpoint_id, event_id, now(), 5, 200 FROM webhook_deliveries"
        )
        conn.execute(
            "INSERT INTO messages (id, org_id, env, channel, sender, addresses, units, period, created_at)"
            " VALUES (%s, %s, 'live', 'email', 'a@b.c', '{d@e.f}', 1, '2026-01', now())",
            [message, org],
        )
        conn.execute(
            "INSERT INTO message_events (message_id, org_id, kind, occurred_at) VALUES (%s, %s, 'sent', now())",
            [message, org],
        )
        conn.execute("VACUUM ANALYZE")
    arguments = {
        "endpoint_ids": endpoints[:2], "endpoint_id": endpoints[0], "message_id": message, "pending": 100,
        "newest": 200, "attempts": 25, "before": UUID(int=2**128 - 1), "scan": 1000, "limit": 50, "state": "failed",
        "spans": 40,
    }  # fmt: skip
    return database_url, arguments


def test_one_failure_among_thousands_is_drawn_and_nothing_leaves_the_plot() -> None:
    hour = datetime(2026, 3, 1, 12, tzinfo=UTC)
    counts = AttemptCounts(
        hour, {hour: (5000, 1), hour - timedelta(hours=23): (0, 3), hour - timedelta(hours=30): (9, 0)}
    )
    day = charts.draw_day(counts)
    assert [bar.tone for bar in day.bars] == ["failed", "delivered", "failed"]
    assert (day.top, day.total) == (5001, 5004)
    assert all(bar.height >= 2 and bar.y >= 0 and bar.y + bar.height <= day.height for bar in day.bars)
    assert day.bars[0].x < 5 < day.width - 5 < day.bars[1].x
    assert "5,000 delivered, 1 failed" in day.bars[1].label
    assert charts.draw_week(counts).total == 5013
    assert charts.draw_week(AttemptCounts(hour)).bars == []
