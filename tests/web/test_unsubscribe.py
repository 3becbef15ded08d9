"""One-click unsubscribe: the headers of the email, the page, and the click."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import UUID

import psycopg
import pytest

from nightmail.embedded import EmbeddedServers
from nightmail.ids import new_id
from nightmail.rules.unsubscribe import make_token, read_token
from tests.conftest import _fresh_database
from tests.web.serving import Org, Server, serving

MAIL = {
    "from": "Acme <news@example.com>",
    "to": "ada@example.org",
    "subject": "s",
    "text": "t",
    "one_click_unsubscribe": True,
}
CLICK = {"List-Unsubscribe": "One-Click"}
PUBLIC = "https://mail.example.com"


@pytest.fixture
def server(database_url: str) -> Iterator[Server]:
    with serving(database_url, public_url=PUBLIC) as running:
        yield running


@pytest.fixture(scope="module")
def shared(
    embedded_servers: EmbeddedServers,
    maintenance: psycopg.Connection[Any],
    template_database: str,
    worker_id: str,
) -> Iterator[Server]:
    """One server for the tests that make an org of their own and look at nothing else."""
    for url in _fresh_database(embedded_servers, maintenance, worker_id, template_database):
        with serving(url, public_url=PUBLIC) as running:
            yield running


def link_of(server: Server, sent: str) -> str:
    """Return the path of the link in a stored email."""
    [(headers,)] = server.rows("SELECT headers FROM message_bodies WHERE message_id = %s", sent)
    found = dict(headers)
    assert found["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    link = found["List-Unsubscribe"]
    assert link.startswith(f"<{PUBLIC}/unsubscribe/")
    assert link.endswith(">")
    return str(link[len(PUBLIC) + 1 : -1])


@pytest.mark.parametrize("env", ["live", "test"])
def test_a_click_suppresses_the_recipient_and_is_told_once(server: Server, org: Org, env: str) -> None:
    key = org.live_key if env == "live" else org.test_key
    for one in (org.live_key, org.test_key):
        server.call(
            "POST", "/webhooks", one, {"endpoint": "https://h.example.com/", "events": ["message.unsubscribed"]}
        )
    sent = server.call("POST", "/emails", key, {**MAIL, "headers": {"X-Own": "1"}}).json()["id"]
    path = link_of(server, sent)
    page = server.call("GET", path)
    assert page.status_code == 200
    assert "news@example.com" in page.text
    assert "ada@example.org" not in page.text
    assert server.rows("SELECT count(*) FROM suppressions") == [(0,)], "scanners follow links"
    for _ in range(2):
        clicked = server.call("POST", path, data=CLICK)
        assert (clicked.status_code, "unsubscribed" in clicked.text) == (200, True)
    assert server.rows("SELECT env, channel, address, origin FROM suppressions") == [
        (env, "email", "ada@example.org", "unsubscribe")
    ]
    assert server.rows("SELECT recipient, message_id::text FROM message_events WHERE kind = 'unsubscribed'") == [
        ("ada@example.org", sent)
    ]
    told = "SELECT e.env, d.topic FROM webhook_deliveries AS d JOIN webhook_endpoints AS e ON e.id = d.endpoint_id"
    assert server.rows(told) == [(env, "email.unsubscribed")]
    assert server.call("GET", f"/emails/{sent}/events", key).json()["data"][-1]["type"] == "unsubscribed"


def test_a_click_counts_again_after_the_suppression_was_lifted(server: Server, org: Org) -> None:
    path = link_of(server, server.call("POST", "/emails", org.live_key, MAIL).json()["id"])
    server.call("POST", path, data=CLICK)
    server.call("DELETE", "/suppressions/ada@example.org", org.live_key)
    server.call("POST", path, data=CLICK)
    assert server.rows("SELECT origin FROM suppressions") == [("unsubscribe",)]


def test_the_page_forbids_everything_it_does_not_need(server: Server, org: Org) -> None:
    path = link_of(server, server.call("POST", "/emails", org.live_key, MAIL).json()["id"])
    page = server.call("GET", path)
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'self';")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "<script" not in page.text
    assert "style=" not in page.text
    assert page.headers["cache-control"] == "no-store"
    assert page.headers["content-type"] == "text/html; charset=utf-8"


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"List-Unsubscribe=One-Click", "application/x-www-form-urlencoded", 200),
        (b"a=b&List-Unsubscribe=One%2DClick", "application/x-www-form-urlencoded", 200),
        (
            b'--b\r\nContent-Disposition: form-data; name="List-Unsubscribe"\r\n\r\nOne-Click\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
            200,
        ),
        (b"", "application/x-www-form-urlencoded", 400),
        (b"List-Unsubscribe=Two-Click", "application/x-www-form-urlencoded", 400),
        (b"{}", "application/json", 400),
        (b"\xff\xfe\x00", "application/x-www-form-urlencoded", 400),
        (b"&".join([b"a=b"] * 50), "application/x-www-form-urlencoded", 400),
        (b"x" * 5000, "application/x-www-form-urlencoded", 413),
    ],
)
def test_only_the_form_of_the_rfc_is_a_click(shared: Server, content: bytes, kind: str, status: int) -> None:
    org = shared.make_org()
    path = link_of(shared, shared.call("POST", "/emails", org.live_key, MAIL).json()["id"])
    answer = shared.call("POST", path, data=content, headers={"Content-Type": kind})
    assert answer.status_code == status
    stored = shared.rows("SELECT count(*) FROM suppressions WHERE org_id = %s", org.id)
    assert stored == [(int(status == 200),)]


def test_a_link_that_was_not_made_here_does_nothing(server: Server, org: Org) -> None:
    path = link_of(server, server.call("POST", "/emails", org.live_key, MAIL).json()["id"])
    token = path.rpartition("/")[2]
    stranger = make_token(b"another installation's secret....", new_id())
    swapped = token[:-1] + ("A" if token[-1] != "A" else "B")
    for wrong in (stranger, swapped, token[:-1], token + "A", "x", "%00", "%ff", "..%2f", token.replace(token[0], "!")):
        for method, data in (("GET", None), ("POST", CLICK)):
            answer = server.call(method, f"/unsubscribe/{wrong}", data=data)
            assert answer.status_code == 404, wrong
    assert server.rows("SELECT count(*) FROM suppressions") == [(0,)]
    for _ in range(6):
        answer = server.call("GET", "/unsubscribe/again")
    assert answer.status_code == 429
    assert server.call("GET", path).status_code == 200, "a link that works is never refused"
    assert server.call("DELETE", path).status_code == 405


def test_a_link_to_a_message_that_is_gone_does_nothing(server: Server, org: Org) -> None:
    path = link_of(server, server.call("POST", "/emails", org.live_key, MAIL).json()["id"])
    server.rows("DELETE FROM messages")
    assert server.call("GET", path).status_code == 404
    assert server.call("POST", path, data=CLICK).status_code == 404


@pytest.mark.parametrize(
    "fields",
    [
        {"to": ["ada@example.org", "bob@example.org"]},
        {"cc": "bob@example.org"},
        {"bcc": "bob@example.org"},
        {"headers": {"list-unsubscribe": "<https://example.com/>"}},
        {"headers": {"List-Unsubscribe-Post": "List-Unsubscribe=One-Click"}},
        {"one_click_unsubscribe": "yes"},
        {"one_click_unsubscribe": 1},
    ],
)
def test_what_does_not_go_with_it_is_refused(shared: Server, fields: dict[str, Any]) -> None:
    org = shared.make_org()
    before = shared.counts()
    answer = shared.call("POST", "/emails", org.live_key, {**MAIL, **fields})
    assert (answer.status_code, answer.json()["name"]) == (422, "validation_error")
    assert shared.call("POST", "/emails/batch", org.live_key, [{**MAIL, **fields}]).status_code == 422
    assert shared.counts() == before


def test_batches_get_a_link_each(server: Server, org: Org) -> None:
    mails = [MAIL, {**MAIL, "to": "bob@example.org"}, {**MAIL, "one_click_unsubscribe": False}]
    data = server.call("POST", "/emails/batch", org.live_key, mails).json()["data"]
    links = [link_of(server, item["id"]) for item in data[:2]]
    assert len(set(links)) == 2
    assert server.rows("SELECT headers FROM message_bodies WHERE message_id = %s", data[2]["id"]) == [([],)]


def test_callers_may_set_the_headers_themselves(server: Server, org: Org) -> None:
    own = {"List-Unsubscribe": "<https://example.com/u>"}
    mail = {**MAIL, "one_click_unsubscribe": False, "headers": own}
    sent = server.call("POST", "/emails", org.live_key, mail).json()["id"]
    assert server.rows("SELECT headers FROM message_bodies WHERE message_id = %s", sent) == [
        ([["List-Unsubscribe", "<https://example.com/u>"]],)
    ]


def test_without_a_public_url_it_is_refused(database_url: str) -> None:
    with serving(database_url) as server:
        org = server.make_org()
        answer = server.call("POST", "/emails", org.live_key, MAIL)
        assert answer.status_code == 422
        assert "PUBLIC_URL" in answer.json()["message"]
        assert server.call("POST", "/emails", org.live_key, {**MAIL, "one_click_unsubscribe": False}).status_code == 200
        described = server.call("GET", "/openapi.json").text
        assert "one_click_unsubscribe" in described


def test_production_wants_https(database_url: str) -> None:
    secret = "k3-Jq8-Zr1-Xw6-Pt9-Vb4-Ln7"
    for url, status in (("http://mail.example.com", 422), ("https://mail.example.com", 200)):
        with serving(database_url, nightmail_env="production", cron_secret=secret, public_url=url) as server:
            org = server.make_org()
            assert server.call("POST", "/emails", org.live_key, MAIL).status_code == status


def test_tokens_belong_to_their_secret() -> None:
    message_id = UUID("01890000-0000-7000-8000-000000000000")
    token = make_token(b"a" * 32, message_id)
    assert len(token) == 43
    assert read_token(b"a" * 32, token) == message_id
    assert read_token(b"b" * 32, token) is None


def test_each_installation_has_a_secret_of_its_own(server: Server) -> None:
    assert server.rows("SELECT length(secret), count(*) FROM unsubscribe_secret GROUP BY 1") == [(32, 1)]
