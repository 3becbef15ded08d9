"""/api/cron/* and /api/jobs/* over a real socket: who may call, and what they get."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from structlog.testing import capture_logs

from nightmail.engine.job import JobContext, JobResult
from nightmail.jobs.table import JOBS
from nightmail.web.cron import camel_case, is_loopback, platform_of
from tests.engine.place import SECRET, content_of, counting, job
from tests.web.cron_server import SEND, Server, serving

UNAUTHORIZED = b'{"error":"Unauthorized"}'
PATHS = [spec.path for spec in JOBS] + ["/api/cron/tick"]


@pytest.fixture
def server(database_url: str) -> Iterator[Server]:
    with serving(database_url) as server:
        yield server


def rows(url: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        return connection.execute(query).fetchall()


# ── methods and bodies ──


def test_every_path_answers_get_and_post_alike_and_nobody_without_the_secret(server: Server, database_url: str) -> None:
    for path in [*PATHS, "/api/cron/unknown", "/api/jobs/credits/unknown", "/api/cron", "/api/jobs/", SEND + "/"]:
        for method in ("GET", "POST"):
            refused = server.call(path, method, [("X-Forwarded-For", "1.2.3.4")])
            if refused.status == 429:
                break
            assert (refused.status, refused.body) == (401, UNAUTHORIZED)
            assert refused.headers["www-authenticate"] == "Bearer"
            assert refused.headers["content-type"] == "application/json"
            assert refused.headers["cache-control"] == "no-store"
    assert rows(database_url, "SELECT count(*) FROM job_runs") == [(0,)]
    for path in PATHS:
        replies = [server.with_secret(path, method) for method in ("GET", "POST")]
        assert {reply.status for reply in replies} <= {200, 501}
        assert {reply.headers["cache-control"] for reply in replies} == {"no-store"}
        assert set(replies[0].json) == set(replies[1].json)
        assert len(replies[0].body) < 65536


def test_other_methods_are_405_and_run_nothing(server: Server, database_url: str) -> None:
    for method in ("PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "PROPFIND"):
        for path in (SEND, "/api/cron/tick", "/api/cron/unknown"):
            reply = server.with_secret(path, method)
            assert reply.status == 405
            assert reply.headers["allow"] == "GET, POST"
            assert reply.headers["cache-control"] == "no-store"
            assert reply.body == (b"" if method == "HEAD" else b'{"error":"Method Not Allowed"}')
    assert rows(database_url, "SELECT count(*) FROM job_runs") == [(0,)]


def test_unknown_names_are_404_with_the_secret(server: Server) -> None:
    for path in (
        "/api/cron/unknown",
        "/api/jobs/credits",
        "/api/jobs/credits/Grant",
        SEND + "/",
        "/api/cron/%00",
        "/api/cron",
    ):
        reply = server.with_secret(path)
        assert (reply.status, reply.body) == (404, b'{"error":"Not Found"}')


def test_the_reply_has_the_contracts_keys(server: Server) -> None:
    body = server.with_secret(SEND).json
    assert list(body) == ["success", "jobId", "job", "date", "duration", "results", "more"]
    assert body["success"] is True
    assert body["job"] == "send-scheduled"
    assert datetime.fromisoformat(body["date"]).date() - datetime.now(UTC).date() <= timedelta(days=1)
    assert list(body["results"]) == ["claimed", "sent", "canceled", "retried", "failed", "ambiguous", "lost"]
    assert body["more"] is False
    assert camel_case("total_expired_amount") == "totalExpiredAmount"


def test_a_job_that_is_not_built_is_501_with_what_is_missing(database_url: str) -> None:
    with serving(database_url, jobs=[job("later", None)]) as server:
        reply = server.with_secret("/api/cron/later")
    assert reply.status == 501
    assert reply.body == b'{"error":"Not Implemented","missing":["later is not built in this version"]}'


def test_a_broken_run_is_500_without_stack_or_secret(database_url: str) -> None:
    async def run(ctx: JobContext) -> JobResult:
        raise RuntimeError(f"{SECRET} is out\nTraceback")

    with serving(database_url, jobs=[job("broken", run)]) as server:
        reply = server.with_secret("/api/cron/broken")
    assert reply.status == 500
    assert list(reply.json) == ["success", "jobId", "error"]
    assert reply.json["success"] is False
    assert reply.json["error"] == "RuntimeError: [hidden] is out"


def test_the_database_away_is_503() -> None:
    with serving("postgresql://nobody@127.0.0.1:9/none", job_deadline_s=2) as server:
        for path in (SEND, "/api/cron/tick", SEND + "?slot=2026-01-01T00:00:00Z", SEND + "?dry=1"):
            began = time.monotonic()
            reply = server.with_secret(path)
            assert time.monotonic() - began <= 1.6
            assert (reply.status, reply.body) == (503, b'{"error":"Service Unavailable"}')


# ── slot, deadline, dry, platform ──


UNUSABLE = [
    "slot=yesterday",
    "slot=2026-01-01T00:00:00",
    "slot=2999-01-01T00:00:00Z",
    "slot=%00",
    "slot=1&slot=2",
    "slot=" + "9" * 4000,
    "deadline=0.5",
    "deadline=0",
    "deadline=-1",
    "deadline=301",
    "deadline=nan",
    "deadline=inf",
    "deadline=1e3",
    "deadline=1_0",
    "deadline=",
    "deadline=5&deadline=6",
    "dry=maybe",
]


def test_an_unusable_wish_is_400_and_runs_nothing(server: Server, database_url: str) -> None:
    for query in UNUSABLE:
        reply = server.with_secret(f"{SEND}?{query}")
        assert reply.status == 400, query
        assert list(reply.json) == ["error", "message"]
        assert reply.json["error"] == "Bad Request"
    assert rows(database_url, "SELECT count(*) FROM job_runs") == [(0,)]


def test_slot_and_platform_are_in_the_record(server: Server, database_url: str) -> None:
    yesterday = (datetime.now(UTC) - timedelta(days=1)).replace(hour=3, minute=0, second=0, microsecond=0)
    path, named = "/api/cron/cleanup-idempotency", yesterday.strftime("%Y-%m-%dT%H:%M:%SZ")
    server.with_secret(f"{path}?slot={named}", headers=[("User-Agent", "vercel-cron/1.0")])
    server.with_secret(path, headers=[("X-Nightmail-Slot", named), ("X-Nightmail-Platform", "My-Host.1")])
    server.with_secret(
        path, headers=[("X-CloudScheduler-ScheduleTime", named), ("User-Agent", "Google-Cloud-Scheduler")]
    )
    reply = server.with_secret("/api/cron/tick", headers=[("X-CloudScheduler-ScheduleTime", named)])
    assert reply.status == 200
    found = rows(
        database_url, "SELECT slot, trigger FROM job_runs WHERE job = 'cleanup-idempotency' ORDER BY started_at"
    )
    assert found[:3] == [(yesterday, "vercel"), (yesterday, "my-host.1"), (yesterday, "cloud-scheduler")]


@pytest.mark.parametrize(
    ("headers", "platform"),
    [
        ({"user-agent": "vercel-cron/1.0"}, "vercel"),
        ({"user-agent": "Mozilla/4.0 (compatible; cron-job.org; http://cron-job.org/abuse/)"}, "cron-job.org"),
        ({"user-agent": "Upstash-QStash"}, "qstash"),
        ({"user-agent": "GitHub-Actions"}, "github-actions"),
        ({"user-agent": "curl/8"}, "http"),
        ({}, "http"),
        ({"x-nightmail-platform": "systemd", "user-agent": "vercel-cron/1.0"}, "systemd"),
        ({"x-nightmail-platform": "dispatcher"}, "http"),
        ({"x-nightmail-platform": "a b\x1b"}, "http"),
        ({"x-nightmail-platform": "x" * 41}, "http"),
    ],
)
def test_who_triggered_is_told_by_headers(headers: dict[str, str], platform: str) -> None:
    assert platform_of(headers) == platform


def test_a_dry_call_changes_nothing_in_the_whole_database(server: Server, database_url: str) -> None:
    before = content_of(database_url)
    for path in PATHS:
        reply = server.with_secret(f"{path}?dry=1")
        assert reply.status in (200, 501)
        if reply.status == 200:
            assert reply.json["dry"] is True
    assert content_of(database_url) == before


def test_an_overrun_is_answered_half_a_second_before_the_deadline(database_url: str) -> None:
    async def run(ctx: JobContext) -> JobResult:
        await asyncio.sleep(30)
        raise AssertionError("not reached")

    with serving(database_url, jobs=[job("slow", run)]) as server:
        began = time.monotonic()
        reply = server.with_secret("/api/cron/slow?deadline=2")
        took = time.monotonic() - began
    assert reply.status == 500
    assert took <= 1.5


def test_a_run_goes_on_when_the_caller_hangs_up(database_url: str) -> None:
    begun, go_on = threading.Event(), threading.Event()

    async def run(ctx: JobContext) -> JobResult:
        begun.set()
        await asyncio.to_thread(go_on.wait, 20)
        return JobResult({"claimed": 5})

    with serving(database_url, jobs=[job("long", run)]) as server:
        caller = threading.Thread(target=hang_up, args=(server, begun))
        caller.start()
        caller.join(30)
        go_on.set()
        end = time.monotonic() + 20
        while rows(database_url, "SELECT state FROM job_runs") != [("succeeded",)]:
            assert time.monotonic() < end
            time.sleep(0.02)


def hang_up(server: Server, begun: threading.Event) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"GET /api/cron/long HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SECRET}\r\n\r\n"
        connection.sendall(head.encode())
        assert begun.wait(20)


def test_a_second_caller_of_a_whole_table_job_gets_the_running_job_id(database_url: str) -> None:
    begun, go_on = threading.Event(), threading.Event()

    async def run(ctx: JobContext) -> JobResult:
        begun.set()
        await asyncio.to_thread(go_on.wait, 20)
        return JobResult({"claimed": 1})

    with serving(database_url, jobs=[job("whole", run, holds="table")]) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.with_secret, "/api/cron/whole")
        assert begun.wait(20)
        second = server.with_secret("/api/cron/whole")
        go_on.set()
        assert second.status == 200
        assert second.json["deduplicated"] is True
        assert second.json["jobId"] == second.json["runningJobId"] == first.result().json["jobId"]
        assert second.json["callId"] != second.json["jobId"]


def test_five_platforms_at_once_all_get_200_and_the_work_is_done_once(server: Server, database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "INSERT INTO idempotency_keys SELECT gen_random_uuid(), 'live', n::text, '\\x00', 200, '{}', now(), now()"
            " FROM generate_series(1, 20000) AS n"
        )
    agents = ("vercel-cron/1.0", "cron-job.org", "Upstash-QStash", "github", "curl/8")
    with ThreadPoolExecutor(5) as pool:
        calls = [
            pool.submit(server.with_secret, "/api/cron/cleanup-idempotency", "GET", [("User-Agent", agent)])
            for agent in agents
        ]
        replies = [call.result() for call in calls]
    assert {reply.status for reply in replies} == {200}
    assert sum(reply.json["results"]["deleted"] for reply in replies) == 20000
    assert rows(database_url, "SELECT count(DISTINCT trigger), count(DISTINCT slot) FROM job_runs") == [(5, 1)]


def test_a_tick_says_what_it_ran(database_url: str) -> None:
    calls: list[str] = []
    with serving(database_url, jobs=[job("one", counting(calls, "one")), job("later", None)]) as server:
        first = server.with_secret("/api/cron/tick", "POST").json
        second = server.with_secret("/api/cron/tick").json
    assert [(ran["job"], ran["status"]) for ran in first["results"]["ran"]] == [
        ("one", "succeeded"),
        ("later", "not_configured"),
    ]
    assert all(set(ran) == {"job", "jobId", "status"} for ran in first["results"]["ran"])
    assert second["results"] == {"ran": [], "waiting": 0}
    assert calls == ["one"]


# ── the secret ──


WRONG = [
    b"",
    b"Bearer",
    b"Bearer ",
    b"Bearer  " + SECRET.encode(),
    b"Bearer " + SECRET.encode()[:-1],
    b"Bearer " + SECRET.encode() + b"x",
    b"Bearer\t" + SECRET.encode(),
    b"Bearer " + SECRET.encode().upper(),
    b"Basic " + SECRET.encode(),
    SECRET.encode(),
    b"Bearer undefined",
    b"Bearer \xc3\xa9\xff\xfe",
    b"Bearer " + b"a" * 60_000,
    b"Bearer " + SECRET.encode() + b", Bearer " + SECRET.encode(),
]


def test_a_wrong_header_is_401_to_the_byte(server: Server) -> None:
    for header in WRONG:
        reply = server.call(headers=[("Authorization", header)])
        assert (reply.status, reply.body) == (401, UNAUTHORIZED), header[:60]


def test_nul_and_an_endless_header_never_make_a_5xx(server: Server) -> None:
    nul = server.raw(
        b"GET " + SEND.encode() + b" HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \0\r\nConnection: close\r\n\r\n"
    )
    assert nul.split()[1] in (b"400", b"401")
    assert server.call(headers=[("Authorization", "Bearer " + "a" * 1_048_576)]).status in (400, 401, 431)
    assert server.with_secret().status == 200


def test_two_headers_or_a_secret_in_the_query_are_401(server: Server) -> None:
    right = ("Authorization", f"Bearer {SECRET}")
    assert server.call(headers=[right, right]).status == 401
    assert server.call(headers=[right, ("Authorization", "Bearer no")]).status == 401
    assert server.call(f"{SEND}?secret={SECRET}&token={SECRET}").status == 401


def test_the_scheme_is_case_insensitive(server: Server) -> None:
    for scheme in ("bearer", "BEARER", "BeArEr"):
        assert server.call(headers=[("Authorization", f"{scheme} {SECRET}")]).status == 200


def test_a_secret_is_rotated_under_load_without_a_single_401(database_url: str) -> None:
    old, new = "old-secret-1234567890", "new-secret-0987654321"
    statuses: list[int] = []
    with (
        serving(database_url, cron_secret=old) as before,
        serving(database_url, cron_secret=f"{new},{old}") as both,
        serving(database_url, cron_secret=new) as after,
        ThreadPoolExecutor(4) as pool,
    ):
        # servers get the pair one by one, then callers change over, then the old secret goes
        stages = [((before, both), (old,)), ((both,), (old, new)), ((both, after), (new,))]
        for servers, secrets in stages:
            calls = [
                pool.submit(server.call, "/api/cron/later-unknown", "GET", [("Authorization", f"Bearer {secret}")])
                for _ in range(10)
                for server in servers
                for secret in secrets
            ]
            statuses += [call.result().status for call in calls]
        assert after.call(headers=[("Authorization", f"Bearer {old}")]).status == 401
    assert set(statuses) == {404}


def test_first_and_last_use_of_a_secret_are_remembered_by_hash(server: Server, database_url: str) -> None:
    for _ in range(3):
        server.with_secret()
    assert server.here is not None
    end = time.monotonic() + 10
    while not (found := rows(database_url, "SELECT sha256, first_seen = last_used FROM cron_secrets")):
        assert time.monotonic() < end
        time.sleep(0.02)
    assert found == [(hashlib.sha256(SECRET.encode()).digest(), True)]


def test_after_twenty_failures_failing_calls_get_429_and_the_right_secret_is_served(server: Server) -> None:
    with capture_logs() as lines:
        statuses = [server.call().status for _ in range(22)]
        late = server.call()
    assert statuses == [401] * 20 + [429] * 2
    assert (late.status, late.body) == (429, b'{"error":"Too Many Requests"}')
    assert server.with_secret().status == 200
    attempts = [line for line in lines if "Unauthorized cron attempt" in str(line["event"])]
    assert len(attempts) == 20
    assert attempts[0]["event"] == "[Security] Unauthorized cron attempt from 127.0.0.1"


def test_failures_count_by_address_and_behind_a_proxy_by_the_callers(database_url: str) -> None:
    with serving(database_url, trusted_proxies="127.0.0.1") as server, capture_logs() as lines:
        for number in range(21):
            server.call(headers=[("X-Forwarded-For", f"9.9.9.9, 198.51.100.{number}")])
        assert server.call(headers=[("X-Forwarded-For", "198.51.100.77")]).status == 401
        for _ in range(20):
            server.call(headers=[("X-Forwarded-For", "198.51.100.1")])
        assert server.call(headers=[("X-Forwarded-For", "198.51.100.1")]).status == 429
    assert any(line["event"] == "[Security] Unauthorized cron attempt from 198.51.100.7" for line in lines)


def test_what_a_caller_writes_cannot_forge_a_log_line(server: Server) -> None:
    with capture_logs() as lines:
        server.call("/api/cron/%0a%1b[2J", headers=[("User-Agent", "a\x85" + "b" * 300)])
    (line,) = [line for line in lines if line.get("kind") == "cron.unauthorized"]
    assert line["path"] == "/api/cron/\\n\\x1b[2J"
    assert line["user_agent"] == "a\\x85" + "b" * 198


def test_an_address_outside_the_list_is_403_before_anything_else(database_url: str) -> None:
    with serving(database_url, cron_allowed_ips="198.51.100.0/24,2001:db8::/32", trusted_proxies="127.0.0.1") as server:
        for method in ("GET", "PUT"):
            reply = server.with_secret(SEND, method)
            assert (reply.status, reply.body) == (403, b'{"error":"Forbidden"}')
        assert server.with_secret(headers=[("X-Forwarded-For", "203.0.113.1")]).status == 403
        for inside in ("198.51.100.9", "2001:db8::9", "::ffff:198.51.100.9", "[2001:db8::9]:80"):
            assert server.with_secret(headers=[("X-Forwarded-For", inside)]).status == 200
        assert server.call(headers=[("X-Forwarded-For", "198.51.100.9")]).status == 401


def test_without_a_secret_development_is_open_on_loopback_and_closed_elsewhere(database_url: str) -> None:
    plain: dict[str, Any] = {"cron_secret": (), "nightmail_env": "development"}
    with capture_logs() as lines, serving(database_url, **plain) as server:
        assert server.call().status == 200
        assert server.call("/api/cron/unknown").status == 404
    assert any(line["event"] == "cron.open" for line in lines)
    for host in ("0.0.0.0", "::", "192.0.2.1", "mail.example.com"):
        with serving(database_url, bound_host=host, **plain) as server:
            reply = server.call(headers=[("Authorization", "Bearer undefined")])
            assert (reply.status, reply.body) == (503, b'{"error":"Service Unavailable"}')
    assert [is_loopback(host) for host in ("127.0.0.9", "::1", "localhost", "0.0.0.0", "::")] == [True] * 3 + [
        False
    ] * 2


def test_without_a_secret_only_this_machine_is_let_in_and_nothing_a_proxy_forwards(database_url: str) -> None:
    with serving(database_url, cron_secret=(), nightmail_env="development") as server:
        for header, value in (("X-Forwarded-For", "127.0.0.1"), ("Forwarded", "for=127.0.0.1")):
            reply = server.call(headers=[(header, value)])
            assert (reply.status, reply.body) == (503, b'{"error":"Service Unavailable"}')
        for host in (b"mail.example.com", b"127.0.0.1.evil.example"):
            answer = server.raw(
                b"GET " + SEND.encode() + b" HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n"
            )
            assert answer.startswith(b"HTTP/1.1 503")
        assert rows(database_url, "SELECT count(*) FROM job_runs") == [(0,)]
        assert server.call().status == 200


def test_every_secret_is_compared_whatever_the_caller_sends(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def note(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return compare(one, other)

    with serving(database_url, cron_secret=f"{SECRET},another-secret-of-ours") as server:
        monkeypatch.setattr(hmac, "compare_digest", note)
        for token in (SECRET, SECRET[:-1] + "x", "x", "", "another-secret-of-ours"):
            compared.clear()
            server.call("/api/cron/unknown", headers=[("Authorization", f"Bearer {token}")])
            assert len(compared) == 2
            assert {len(one) for pair in compared for one in pair} == {32}
