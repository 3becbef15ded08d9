"""The operator's pages: who may see them, what may start something, and that nothing from outside acts in them."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import requests
import uvicorn
from starlette.applications import Starlette

from nightmail.clock import now
from nightmail.ids import new_id
from nightmail.jobs.table import JOBS
from nightmail.main import Servers, build_web, open_application
from nightmail.settings import load
from nightmail.web import admin_session, wording
from tests.web.serving import ADMIN_TOKEN, Org, Server

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>\u202e{{7*7}}'
PAGES = ("/dashboard", "/dashboard/runs", "/dashboard/messages", "/dashboard/inbox")
OURS = {"Sec-Fetch-Site": "same-origin"}


@contextmanager
def dashboard(conninfo: str, *, bound_host: str = "127.0.0.1", **fields: Any) -> Iterator[Server]:
    """Serve the whole application in a thread, without a scheduler; `fields` are settings."""
    settings = load({"nightmail_env": "test", "admin_token": ADMIN_TOKEN, "api_rate_per_s": 100_000, **fields})
    listener = socket.create_server(("127.0.0.1", 0))
    servers: list[uvicorn.Server] = []
    began = threading.Event()

    async def serve() -> None:
        async with open_application(settings, Servers(conninfo, None)) as application:
            app = build_web(application, bound_host)
            config = uvicorn.Config(app, log_config=None, access_log=False, proxy_headers=False, lifespan="off")
            servers.append(uvicorn.Server(config))
            began.set()
            await servers[0].serve([listener])

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert began.wait(30)
    running = Server(f"http://127.0.0.1:{listener.getsockname()[1]}", conninfo, Starlette())
    try:
        assert running.call("GET", "/healthz").status_code == 200
        yield running
    finally:
        running.session.close()
        servers[0].should_exit = True
        thread.join(15)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture
def site(database_url: str) -> Iterator[Server]:
    """A server with the pages, reached without a session."""
    with dashboard(database_url) as server:
        yield server


@pytest.fixture
def operator(site: Server) -> Server:
    """The same, logged in."""
    assert log_in(site).status_code == 303
    return site


def log_in(server: Server, token: str = ADMIN_TOKEN, **options: Any) -> requests.Response:
    """Send the login form."""
    headers = {**OURS, **options.pop("headers", {})}
    form = {"token": token, **options.pop("form", {})}
    return server.session.post(
        server.url + "/dashboard/login", data=form, headers=headers, allow_redirects=False, timeout=30
    )


def get(server: Server, path: str, **options: Any) -> requests.Response:
    """Look at a page without following redirects."""
    return server.session.get(server.url + path, allow_redirects=False, timeout=30, **options)


def post(server: Server, path: str, **options: Any) -> requests.Response:
    """Send a form."""
    return server.session.post(server.url + path, allow_redirects=False, timeout=30, **options)


def send(server: Server, org: Org, **fields: Any) -> str:
    """Send an email through the API and return its id."""
    body = {"from": "a@example.com", "to": "b@example.com", "subject": "Hello", "text": "Hi", **fields}
    answer = server.call("POST", "/emails", org.live_key, body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


# ── who may look ──


def test_a_page_without_a_session_leads_to_the_login_and_back(site: Server) -> None:
    for path in (*PAGES, f"/dashboard/messages/{new_id()}", f"/dashboard/runs/{new_id()}"):
        site.session.cookies.clear()
        answer = get(site, path)
        assert answer.status_code == 303
        assert answer.headers["location"].startswith("/dashboard/login?next=%2Fdashboard")
        landed = log_in(site, form={"next": path})
        assert landed.headers["location"] == path
        assert get(site, path).status_code in (200, 404)


def test_the_session_cookie_is_strict_and_ends_with_the_logout(site: Server) -> None:
    cookie = log_in(site).headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert "Path=/dashboard" in cookie
    assert "Secure" not in cookie
    assert get(site, "/dashboard").status_code == 200
    assert post(site, "/dashboard/logout", headers=OURS).status_code == 303
    assert get(site, "/dashboard").status_code == 303


def test_the_cookie_is_secure_behind_the_public_https_address(database_url: str) -> None:
    with dashboard(database_url, public_url="https://mail.example.com") as server:
        cookie = log_in(server, headers={"Host": "mail.example.com"}).headers["set-cookie"]
    assert "; Secure" in cookie


def test_a_wrong_token_opens_nothing(site: Server) -> None:
    for token in ("", "wrong", ADMIN_TOKEN + "x", "é" * 20, "\x00"):
        answer = log_in(site, token)
        assert answer.status_code == 401
        assert "set-cookie" not in answer.headers
        assert get(site, "/dashboard").status_code == 303


def test_wrong_tokens_are_slowed_down_and_the_right_one_is_not(site: Server) -> None:
    statuses = [log_in(site, f"guess {i}").status_code for i in range(admin_session.FAILURES_MAX + 2)]
    assert statuses[-1] == 429
    assert log_in(site).status_code == 303


def test_a_forged_cookie_opens_nothing(site: Server) -> None:
    forged = ("", "x", "9999999999.n.00", "9" * 20 + ".n.s", "é.é.é", "-1.n.s", "1.n." + "0" * 64, '"', "a=b; c")
    for value in forged:
        answer = get(site, "/dashboard", headers={"Cookie": f"{admin_session.COOKIE}={value}".encode()})
        assert answer.status_code == 303, value


def test_an_ended_session_and_one_of_another_token_open_nothing() -> None:
    token = load({"admin_token": ADMIN_TOKEN}).admin_token
    other = load({"admin_token": ADMIN_TOKEN + "2"}).admin_token
    assert token is not None
    assert other is not None
    value = admin_session.sign(token, ends_at=4_102_444_800, nonce="n")
    assert admin_session.is_valid(token, value)
    assert not admin_session.is_valid(other, value)
    assert not admin_session.is_valid(token, admin_session.sign(token, ends_at=1, nonce="n"))


def test_the_login_never_leads_to_another_site(site: Server) -> None:
    for wanted in (
        "https://evil.test/", "//evil.test/dashboard", "/\\evil.test", "/dashboard\\@evil.test", "javascript:alert(1)",
        "/dashboardx", "/dashboard/\r\nSet-Cookie: a=b", "/dashboard?next=\u2028",
    ):  # fmt: skip
        assert log_in(site, form={"next": wanted}).headers["location"] == "/dashboard"
        site.session.cookies.clear()
        page = get(site, "/dashboard/login", params={"next": wanted})
        assert 'name="next" value="/dashboard' in page.text
        assert "evil" not in page.text
        assert "\r" not in page.text


def test_without_a_token_only_this_machine_may_look_and_only_in_development(database_url: str) -> None:
    with dashboard(database_url, nightmail_env="development", admin_token=None) as server:
        page = get(server, "/dashboard")
        assert page.status_code == 200
        assert "No ADMIN_TOKEN is set" in page.text
        rebound = get(server, "/dashboard", headers={"Host": "rebound.example.com"})
        assert rebound.status_code == 503
        assert "ADMIN_TOKEN" in rebound.text
    for closed in ({"nightmail_env": "test"}, {"nightmail_env": "development", "bound_host": "0.0.0.0"}):
        with dashboard(database_url, admin_token=None, **closed) as server:
            for path in (*PAGES, "/dashboard/login"):
                answer = get(server, path)
                assert answer.status_code == 503
                assert "ADMIN_TOKEN" in answer.text
            assert log_in(server, "").status_code == 503


# ── what may start something ──


@pytest.mark.parametrize("path", ["/dashboard/jobs/cleanup-idempotency/run", "/dashboard/login", "/dashboard/logout"])
def test_a_post_from_elsewhere_does_nothing(operator: Server, path: str) -> None:
    foreign: tuple[dict[str, str], ...] = (
        {},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
        {"Sec-Fetch-Site": "cross-site", "Origin": operator.url},
        {"Origin": "https://evil.test"},
        {"Origin": "null"},
        {"Origin": ""},
    )
    for headers in foreign:
        answer = post(operator, path, headers=headers, data={"token": ADMIN_TOKEN})
        assert answer.status_code == 403, headers
        assert "set-cookie" not in answer.headers
    assert operator.rows("SELECT count(*) FROM job_runs") == [(0,)]


def test_a_post_is_recognised_by_its_origin_where_browsers_send_no_fetch_metadata(operator: Server) -> None:
    answer = post(operator, "/dashboard/jobs/cleanup-idempotency/run", headers={"Origin": operator.url})
    assert answer.status_code == 303


def test_a_post_without_a_session_runs_nothing(site: Server) -> None:
    answer = post(site, "/dashboard/jobs/cleanup-idempotency/run", headers=OURS)
    assert answer.headers["location"] == "/dashboard/login"
    assert site.rows("SELECT count(*) FROM job_runs") == [(0,)]


def test_run_now_leads_to_the_run_and_a_dry_run_leaves_no_trace(operator: Server) -> None:
    dry = post(operator, "/dashboard/jobs/cleanup-idempotency/run", headers=OURS, data={"dry": "1"})
    assert dry.status_code == 200
    assert "Nothing was changed" in dry.text
    assert operator.rows("SELECT count(*) FROM job_runs") == [(0,)]
    run = post(operator, "/dashboard/jobs/cleanup-idempotency/run", headers=OURS, data={"dry": "0"})
    assert run.status_code == 303
    page = get(operator, run.headers["location"])
    assert page.status_code == 200
    assert "succeeded" in page.text
    assert operator.rows("SELECT trigger, state FROM job_runs") == [("dashboard", "succeeded")]


def test_a_job_that_is_not_built_or_does_not_exist_cannot_be_run(operator: Server) -> None:
    assert post(operator, "/dashboard/jobs/retention/run", headers=OURS).status_code == 501
    assert post(operator, "/dashboard/jobs/nothing/run", headers=OURS).status_code == 404
    assert post(operator, "/dashboard/jobs/cleanup-idempotency/run", headers=OURS, data="x" * 5000).status_code == 413
    many = "&".join(f"a{i}=1" for i in range(50))
    assert post(operator, "/dashboard/jobs/cleanup-idempotency/run", headers=OURS, data=many).status_code == 422


# ── what pages show ──


def test_the_overview_shows_every_job_and_says_which_are_not_built(operator: Server) -> None:
    text = get(operator, "/dashboard").text
    assert all(spec.name in text and spec.path in text for spec in JOBS)
    assert text.count("not built yet") == sum(spec.run is None for spec in JOBS)
    assert text.count(">Run now<") == sum(spec.run is not None for spec in JOBS)


def test_nothing_from_outside_acts_in_a_page(operator: Server) -> None:
    org = operator.make_org()
    operator.rows("UPDATE orgs SET name = %s", HOSTILE)
    mail = send(
        operator,
        org,
        html=f"<p>{HOSTILE}</p>",
        text=HOSTILE,
        to='<b>x" <b@example.com>',
        attachments=[{"filename": "<script>.txt", "content": "aGk="}],
    )
    operator.call("POST", "/sms", org.live_key, {"to": "+12025550123", "text": HOSTILE})
    operator.rows(
        "UPDATE messages SET subject = %s, last_error = %s, reason = %s, state = 'failed' WHERE id = %s",
        HOSTILE, HOSTILE, HOSTILE, mail,
    )  # fmt: skip
    operator.rows(
        "INSERT INTO message_events (message_id, org_id, recipient, kind, provider_ref, occurred_at, data)"
        " VALUES (%s, %s, %s, 'failed', 'r', now(), jsonb_build_object('code', %s::text, 'all', ARRAY[%s::text]))",
        mail, org.id, HOSTILE, HOSTILE, HOSTILE,
    )  # fmt: skip
    operator.rows(
        "INSERT INTO alerts (id, preset, job, summary, opened_at)"
        " VALUES (gen_random_uuid(), 'run_failed', 'x', %s, now())",
        HOSTILE,
    )
    run = new_id()
    operator.rows(
        "INSERT INTO job_runs (job_id, job, slot, trigger, host, started_at, deadline_s, finished_at, state, error,"
        " duration_ms) VALUES (%s, %s, now(), %s, %s, now(), 25, now(), 'failed', %s, 5)",
        run, "gone-job", HOSTILE, HOSTILE, HOSTILE,
    )  # fmt: skip
    pages = [*PAGES, f"/dashboard/messages/{mail}", f"/dashboard/runs/{run}", "/dashboard/runs?job=gone-job",
             f"/dashboard/messages?org={org.id}&q=%3Cscript%3E"]  # fmt: skip
    for path in pages:
        page = get(operator, path)
        assert page.status_code == 200, path
        assert re.search(r"<script(?! src=\"/dashboard/static/live\.js\")", page.text) is None, path
        assert "<img src=x" not in page.text, path
        assert "{{7*7}}" in page.text or "49" not in page.text
    text = get(operator, f"/dashboard/messages/{mail}").text
    assert text.count("<iframe") == 1
    assert '<iframe class="mail" sandbox srcdoc="&lt;p&gt;' in text


def test_every_answer_forbids_what_is_not_ours(operator: Server) -> None:
    mail = send(operator, operator.make_org(), html="<p style='color:red'>x</p>")
    for path in (*PAGES, f"/dashboard/messages/{mail}", "/dashboard/runs/none", "/dashboard/login"):
        headers = get(operator, path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; style-src 'self'")
        assert "script-src 'self';" in policy
        assert "frame-ancestors 'none'" in policy
        assert ("unsafe-inline" in policy) == path.endswith(mail)
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert headers["referrer-policy"] == "same-origin"


def test_no_page_uses_inline_style_or_script_or_anything_from_elsewhere(operator: Server) -> None:
    mail = send(operator, operator.make_org())
    for path in (*PAGES, f"/dashboard/messages/{mail}", "/dashboard/runs/none"):
        text = get(operator, path).text
        assert re.search(r"<[^>]+\s(style|on\w+)=", text) is None, path
        assert re.search(r"(src|href)=\"(?!/(dashboard|docs))", text) is None, path
        assert "http://" not in text, path


def test_static_files_are_ours_alone(site: Server) -> None:
    for name, kind in (("pages.css", "text/css"), ("live.js", "javascript"), ("icon.svg", "image/svg+xml")):
        answer = get(site, f"/dashboard/static/{name}")
        assert answer.status_code == 200
        assert kind in answer.headers["content-type"]
    for path in ("/dashboard/static/../dashboard.py", "/dashboard/static/%2e%2e/dashboard.py", "/dashboard/static/"):
        assert get(site, path).status_code in (303, 404)


def test_an_unknown_id_is_not_found(operator: Server) -> None:
    for path in (
        "/dashboard/messages/none", "/dashboard/messages/" + "a" * 36, f"/dashboard/messages/{new_id()}",
        "/dashboard/messages/%00", "/dashboard/runs/none", f"/dashboard/runs/{new_id()}",
        "/dashboard/runs/%F0%9F%93%A7", "/dashboard/nothing",
    ):  # fmt: skip
        assert get(operator, path).status_code == 404, path


def test_odd_parameters_are_ignored_or_find_nothing(operator: Server) -> None:
    send(operator, operator.make_org())
    last = "f" * 8 + "-ffff" * 3 + "-" + "f" * 12
    for query in (
        "q=%00", "q=%FF%FE", "q=%ED%A0%80", "q=" + "x" * 5000, "q=%25_%5C", "state=nothing", "state=%00", "org=x",
        "before=x", "before=%00", "channel=fax", "env=prod", f"before={new_id()}", f"before={last}", "q=a&q=b",
        "job=%27;DROP", "=&=&&", "state=sending&q=b@", f"q={last}",
    ):  # fmt: skip
        for path in ("/dashboard/messages", "/dashboard/runs", "/dashboard/inbox", "/dashboard", "/dashboard/login"):
            assert get(operator, f"{path}?{query}").status_code in (200, 303), (path, query)


def test_messages_are_found_by_recipient_state_org_and_id(operator: Server) -> None:
    one, two = operator.make_org("One"), operator.make_org("Two")
    ada = send(operator, one, to=["Ada.Lovelace@example.com", "other@example.net"])
    bob = send(operator, two, to="bob@example.org", scheduled_at="in 1 hour")
    operator.call("POST", f"/emails/{bob}/cancel", two.live_key)

    def found(**query: str) -> set[str]:
        text = get(operator, "/dashboard/messages", params=query).text
        return set(re.findall(r"/dashboard/messages/([0-9a-f-]{36})", text))

    assert found() == {ada, bob}
    assert found(q="LOVELACE") == {ada}
    assert found(q="other@") == {ada}
    assert found(state="canceled") == {bob}
    assert found(org=one.id) == {ada}
    assert found(org=one.id, q="bob") == set()
    assert found(channel="sms") == set()
    assert found(env="test") == set()
    assert found(q="%") == set()
    assert get(operator, "/dashboard/messages", params={"q": ada}).headers["location"] == f"/dashboard/messages/{ada}"


@pytest.mark.parametrize("of_org", [False, True])
def test_paging_shows_every_message_once(operator: Server, of_org: bool) -> None:
    org = operator.make_org()
    mail = {"from": "a@example.com", "to": "b@example.com", "subject": "s", "text": "t"}
    sent: set[str] = set()
    for key, count in ((org.live_key, 60), (org.test_key, 70)):
        answer = operator.call("POST", "/emails/batch", key, [mail] * count)
        sent |= {item["id"] for item in answer.json()["data"]}
    seen: list[str] = []
    path = f"/dashboard/messages?org={org.id}" if of_org else "/dashboard/messages"
    for _ in range(5):
        text = get(operator, path).text
        seen += re.findall(r"/dashboard/messages/([0-9a-f-]{36})", text)
        older = re.search(r'href="([^"]+before=[^"]+)"', text)
        if older is None:
            break
        path = older[1].replace("&amp;", "&")
    assert sorted(seen) == sorted(sent)
    assert seen == sorted(seen, reverse=True)


def test_a_search_that_finds_nothing_near_offers_to_look_further(
    operator: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nightmail.store.overview.SCAN", 10)
    org = operator.make_org()
    rare = send(operator, org, to="rare@example.com")
    mail = {"from": "a@example.com", "to": "b@example.com", "subject": "s", "text": "t"}
    operator.call("POST", "/emails/batch", org.live_key, [mail] * 15)
    text = get(operator, "/dashboard/messages?q=rare").text
    assert rare not in text
    further = re.search(r'href="([^"]+before=[^"]+)">Look further', text)
    assert further is not None
    assert rare in get(operator, further[1].replace("&amp;", "&")).text


def test_the_inbox_shows_what_capture_took_and_leaves_out_who_got_nothing(operator: Server) -> None:
    org = operator.make_org()
    mail = send(operator, org, to=["got@example.com", "dropped@example.com"], subject="Taken")
    waiting = send(operator, org, subject="Waiting")
    operator.rows(
        "UPDATE messages SET state = 'sent', sent_at = now(), provider_message_id = 'capture_1' WHERE id = %s", mail
    )
    operator.rows(
        "INSERT INTO recipient_outcomes (message_id, address, state) VALUES (%s, 'dropped@example.com', 'suppressed')",
        mail,
    )
    text = get(operator, "/dashboard/inbox").text
    assert mail in text
    assert waiting not in text
    assert "got@example.com" in text
    assert "dropped@example.com" not in text


def test_a_lost_database_is_a_page_that_tries_again(database_url: str) -> None:
    broken = re.sub(r"/test_[^?]*", "/no_such_database", database_url)
    with dashboard(broken) as server:
        log_in(server)
        answer = get(server, "/dashboard")
    assert answer.status_code == 503
    assert "database" in answer.text


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0, "0 ms"), (999, "999 ms"), (1500, "1.5 s"), (59_700, "1 min 0 s"), (61_000, "1 min 1 s"), (900_000, "15 min"),
     (7_260_000, "2 h 1 min"), (90_000_000, "1 d")],
)  # fmt: skip
def test_spans_of_time_are_said_in_the_unit_that_fits(milliseconds: float, text: str) -> None:
    assert wording.duration(milliseconds) == text


def test_distances_are_said_from_now() -> None:
    moment = now()
    assert wording.distance(moment, moment) == "now"
    assert wording.distance(moment.replace(year=moment.year + 1), moment).startswith("in 36")


def test_without_a_token_the_pages_are_closed_to_what_a_proxy_forwards(database_url: str) -> None:
    with dashboard(database_url, admin_token=None, nightmail_env="development") as server:
        assert get(server, "/dashboard/runs").status_code == 200
        for header in ("X-Forwarded-For", "Forwarded"):
            assert get(server, "/dashboard/runs", headers={header: "127.0.0.1"}).status_code == 503
        assert get(server, "/dashboard/runs", headers={"Host": "mail.example.com"}).status_code == 503
