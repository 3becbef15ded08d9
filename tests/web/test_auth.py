"""Keys, networks, the admin token; and all of it before a body is read."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from nightmail.web.operation import Operation
from tests.web.examples import BUILT, WITH_BODY, make_belongings, name_of
from tests.web.serving import ADMIN_TOKEN, Org, Server, make_run, serving


@pytest.fixture
def server(module_server: Server) -> Server:
    return module_server


NEEDS_KEY = [operation for operation in BUILT if operation.access in ("sending", "full")]
ADMIN = [operation for operation in BUILT if operation.access == "admin"]


@pytest.mark.parametrize("operation", NEEDS_KEY, ids=name_of)
def test_every_operation_wants_a_key(server: Server, org: Org, operation: Operation) -> None:
    path = make_belongings(server, org, org.live_key).path_of(operation)
    before = server.counts()
    no_key = server.call(operation.method, path, None, operation.example)
    assert (no_key.status_code, no_key.json()["name"]) == (401, "missing_api_key")
    for wrong in ("nonsense", "nm_live_" + "A" * 43, ADMIN_TOKEN, org.live_key.upper()):
        answer = server.call(operation.method, path, wrong, operation.example)
        assert (answer.status_code, answer.json()["name"]) == (403, "invalid_api_key")
        assert wrong not in answer.text
    assert server.counts() == before


@pytest.mark.parametrize("operation", NEEDS_KEY, ids=name_of)
def test_sending_keys_may_only_send(server: Server, org: Org, operation: Operation) -> None:
    path = make_belongings(server, org, org.live_key).path_of(operation)
    made = server.call("POST", "/api-keys", org.live_key, {"name": "s", "permission": "sending_access"}).json()
    answer = server.call(operation.method, path, made["token"], operation.example)
    if operation.path in ("/emails", "/emails/batch", "/sms", "/sms/batch") and operation.method == "POST":
        assert answer.ok, answer.text
    else:
        assert (answer.status_code, answer.json()["name"]) == (401, "restricted_api_key")


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic Zm9v", "nm_live_x", "Token x"])
def test_other_authorization_is_a_missing_key(server: Server, header: str) -> None:
    answer = server.call("GET", "/emails", headers={"Authorization": header} if header else {})
    assert (answer.status_code, answer.json()["name"]) == (401, "missing_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_expired_keys_are_refused_at_their_time(server: Server, org: Org) -> None:
    assert server.call("GET", "/emails", org.live_key).ok
    server.rows("UPDATE api_keys SET expires_at = now() - interval '1 second' WHERE env = 'test' RETURNING 1")
    assert server.call("GET", "/emails", org.test_key).status_code == 403
    server.rows("UPDATE api_keys SET expires_at = now() + interval '1 second' WHERE env = 'test' RETURNING 1")
    assert server.call("GET", "/emails", org.test_key).ok
    server.rows("SELECT pg_sleep(1.1)")
    assert server.call("GET", "/emails", org.test_key).status_code == 403, "the cache outlived the key"


def test_a_revoked_key_is_refused_at_once_in_its_process(server: Server, org: Org) -> None:
    made = server.call("POST", "/api-keys", org.live_key, {"name": "k"}).json()
    assert server.call("GET", "/emails", made["token"]).ok
    assert server.call("DELETE", f"/api-keys/{made['id']}", org.live_key).json()["deleted"] is True
    assert server.call("GET", "/emails", made["token"]).status_code == 403
    assert server.call("DELETE", f"/api-keys/{made['id']}", org.live_key).status_code == 404


def test_a_key_with_networks_works_from_there_only(server: Server, org: Org) -> None:
    here = server.call("POST", "/api-keys", org.live_key, {"name": "k", "cidrs": ["127.0.0.0/8"]}).json()["token"]
    elsewhere = server.call("POST", "/api-keys", org.live_key, {"name": "k", "cidrs": ["192.0.2.0/24", "::1"]})
    assert server.call("GET", "/emails", here).ok
    answer = server.call("GET", "/emails", elsewhere.json()["token"], headers={"X-Forwarded-For": "192.0.2.1"})
    assert (answer.status_code, answer.json()["name"]) == (403, "invalid_api_key")


def test_a_trusted_proxy_names_the_caller(database_url: str) -> None:
    with serving(database_url, trusted_proxies="127.0.0.0/8,10.0.0.0/8") as server:
        org = server.make_org()
        body = {"name": "k", "cidrs": ["192.0.2.0/24"]}
        key = server.call("POST", "/api-keys", org.live_key, body).json()["token"]
        for forwarded, status in (
            ("192.0.2.7", 200),
            ("192.0.2.7, 10.1.1.1", 200),
            ("198.51.100.9", 403),
            # the left part is the caller's own claim
            ("192.0.2.7, 198.51.100.9", 403),
            ("nonsense", 403),
        ):
            answer = server.call("GET", "/emails", key, headers={"X-Forwarded-For": forwarded})
            assert answer.status_code == status, forwarded


@pytest.mark.parametrize("operation", ADMIN, ids=name_of)
def test_admin_operations_want_the_admin_token(server: Server, org: Org, operation: Operation) -> None:
    run_id = make_run(server)
    path = make_belongings(server, org, org.live_key).path_of(operation).replace("{jobId}", run_id)
    before = server.counts()
    assert server.call(operation.method, path, None, operation.example).status_code == 401
    for wrong in (org.live_key, ADMIN_TOKEN + "x", ADMIN_TOKEN[:-1], "x"):
        answer = server.call(operation.method, path, wrong, operation.example)
        assert (answer.status_code, answer.json()["name"]) == (403, "invalid_api_key")
    assert server.counts() == before
    assert server.call(operation.method, path, ADMIN_TOKEN, operation.example).ok


@pytest.fixture(autouse=True)
def no_failures_yet(server: Server) -> None:
    """Wrong tokens of one test do not count in the next."""
    server.app.state.api.failures._times.clear()


def test_wrong_admin_tokens_are_slowed_down_and_the_right_one_is_not(server: Server) -> None:
    statuses = [server.call("GET", "/orgs", f"guess-{i}").status_code for i in range(22)]
    assert statuses == [403] * 20 + [429] * 2
    answer = server.call("POST", "/orgs", "guess", {"name": "x"})
    assert (answer.status_code, answer.json()["name"]) == (429, "rate_limit_exceeded")
    assert answer.headers["retry-after"] == "60"
    assert server.call("GET", "/orgs", ADMIN_TOKEN).status_code == 200


def status_of_orgs(server: Server, host: str | None = None) -> tuple[int, str]:
    answer = server.call("GET", "/orgs", headers={"Host": host} if host else {})
    return answer.status_code, answer.text


def test_without_admin_token_only_development_on_loopback_is_open(database_url: str) -> None:
    with serving(database_url, admin_token=None, nightmail_env="development") as server:
        assert status_of_orgs(server)[0] == 200
        for host in ("localhost:8025", "127.0.0.1", "[::1]:8025", "LOCALHOST"):
            assert status_of_orgs(server, host)[0] == 200, host
        # a name that an attacker's page resolves to this machine
        for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "[::1].evil.example"):
            status, text = status_of_orgs(server, host)
            assert (status, "set ADMIN_TOKEN" in text) == (503, True), host
    with serving(database_url, admin_token=None, nightmail_env="development", bound_host="0.0.0.0") as server:
        assert status_of_orgs(server)[0] == 503
    with serving(database_url, admin_token=None, nightmail_env="test") as server:
        assert status_of_orgs(server)[0] == 503


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "X-Real-IP", "X-Forwarded-Host", "Via"])
def test_without_admin_token_what_a_proxy_forwards_is_refused(module_server: Server, header: str) -> None:
    with serving(module_server.conninfo, admin_token=None, nightmail_env="development") as server:
        answer = server.call("GET", "/orgs", headers={"Host": "localhost", header: "127.0.0.1"})
        assert (answer.status_code, "set ADMIN_TOKEN" in answer.text) == (503, True)


def test_keys_of_an_org_are_made_for_either_env(server: Server, org: Org) -> None:
    for env in ("live", "test"):
        made = server.call("POST", f"/orgs/{org.id}/api-keys", ADMIN_TOKEN, {"name": "k", "env": env}).json()
        assert made["token"].startswith(f"nm_{env}_")
        assert server.call("GET", "/emails", made["token"]).ok
    unknown = server.call("POST", "/orgs/01a206aa-e4a1-734f-a2d1-eda46887c7d0/api-keys", ADMIN_TOKEN, {"name": "k"})
    assert unknown.status_code == 404


def test_secrets_are_never_stored_with_an_idempotency_key(server: Server, org: Org) -> None:
    options: dict[str, Any] = {"headers": {"Idempotency-Key": "one"}}
    tokens = {server.call("POST", "/api-keys", org.live_key, {"name": "k"}, **options).json()["token"] for _ in "ab"}
    assert len(tokens) == 2
    assert server.rows("SELECT count(*) FROM idempotency_keys") == [(0,)]
    stored = json.dumps(server.rows("SELECT to_jsonb(k) FROM api_keys AS k"), default=str)
    for token in (*tokens, org.live_key):
        assert token not in stored
        assert token[8:] not in stored


@pytest.mark.parametrize("operation", WITH_BODY, ids=name_of)
def test_the_key_is_checked_before_the_body_is_read(server: Server, operation: Operation) -> None:
    """The body never comes; an answer proves that nobody waited for it."""
    host, port = server.url.removeprefix("http://").split(":")
    path = operation.path.replace("{id}", "01a206aa-e4a1-734f-a2d1-eda46887c7d0")
    with socket.create_connection((host, int(port)), timeout=5) as raw:
        raw.sendall(
            f"{operation.method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n"
            f"Authorization: Bearer wrong\r\n\r\n".encode()
        )
        answer = raw.recv(65536)
    assert answer.startswith(b"HTTP/1.1 403")
