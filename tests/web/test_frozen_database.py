"""A PostgreSQL that is there and says nothing: every request is answered in bounded time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import requests

from nightmail.web import operation
from nightmail.web.api import health
from tests.web.serving import Org, Server

MAIL = {"from": "a@example.com", "to": "b@example.org", "subject": "s", "text": "t"}


@contextmanager
def frozen(server: Server) -> Iterator[None]:
    """Stop the processes that serve the connections of the server's pool; a cancelled statement stays stuck, too."""
    found = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    pids = [pid for (pid,) in server.rows(found)]
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def post(server: Server, org: Org) -> requests.Response:
    return server.call("POST", "/emails", org.live_key, MAIL, headers={"Idempotency-Key": "one"})


def test_a_request_to_a_frozen_database_is_503_in_time_and_can_be_repeated(
    server: Server, org: Org, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert server.call("GET", "/emails", org.live_key).ok  # the key is known now: the handler is what gets stuck
    monkeypatch.setattr(operation, "ANSWER_LIMIT_S", 0.5)
    with frozen(server):
        began = time.monotonic()
        answer = post(server, org)
        assert time.monotonic() - began < 2
        assert (answer.status_code, answer.json()["name"]) == (503, "application_error")
        assert "same Idempotency-Key" in answer.json()["message"]
        assert "Nothing was accepted" not in answer.text
        assert answer.headers["retry-after"] == "2"
        assert answer.headers["x-request-id"]
        assert server.call("GET", "/healthz").ok  # on the same connection
    monkeypatch.setattr(operation, "ANSWER_LIMIT_S", 10.0)
    first = post(server, org)
    while first.status_code == 409:  # the request that was given up has not ended yet, and still holds its key
        assert first.json()["name"] == "concurrent_idempotent_requests"
        first = post(server, org)
    second = post(server, org)
    assert (first.status_code, second.json()) == (200, first.json())
    assert server.rows("SELECT count(*) FROM messages") == [(1,)]
    log = capfd.readouterr()
    assert "http.gave_up" in log.out
    assert "Traceback" not in log.out + log.err


def test_an_unknown_key_and_readiness_do_not_wait_for_a_frozen_database(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.call("GET", "/readyz").ok
    monkeypatch.setattr(operation, "ANSWER_LIMIT_S", 0.5)
    with frozen(server):
        assert server.call("GET", "/emails", "nm_live_" + "A" * 43).status_code == 503
    assert server.call("GET", "/readyz").ok
    monkeypatch.setattr(health, "READY_TIMEOUT_S", 0.3)
    with frozen(server):
        answer = server.call("GET", "/readyz")
        assert (answer.status_code, answer.json()["status"]) == (503, "unavailable")
        assert "no answer" in answer.json()["reasons"][0]
    assert server.call("GET", "/readyz").ok


def test_reading_a_slow_body_is_not_counted(server: Server, org: Org, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation, "ANSWER_LIMIT_S", 0.5)

    def slowly() -> Iterator[bytes]:
        yield b'{"from": "a@example.com", "to": "b@example.org", '
        time.sleep(1)
        yield b'"subject": "s", "text": "t"}'

    answer = server.call("POST", "/emails", org.live_key, data=slowly())
    assert answer.status_code == 200, answer.text
