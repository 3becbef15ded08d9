"""The command line as scripts use it: real processes, exit codes, JSON, and errors in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from nightmail import cli, terminal

SECRET = "4f1c0e6ad3b84c7b9a52d06e8f3b71c9"


def nightmail(*arguments: str, database_url: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nightmail", *arguments],
        env=environment(database_url, **env),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def environment(database_url: str, **env: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "LANG", "TMPDIR")}
    return {**kept, **({"DATABASE_URL": database_url} if database_url else {}), **env}


def in_process(
    monkeypatch: pytest.MonkeyPatch, *arguments: str, database_url: str = "", **env: str
) -> int | str | None:
    """Run main() here, which costs no start of a process; return the exit code. Logging is left as it is."""
    for name in list(os.environ):
        monkeypatch.delenv(name)
    for name, value in environment(database_url, **env).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["nightmail", *arguments])
    for module in (cli, terminal):
        monkeypatch.setattr(module, "configure_logging", lambda settings: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def answer(ran: subprocess.CompletedProcess[str]) -> Any:
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@contextmanager
def serving(*arguments: str, database_url: str, **env: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "nightmail", "serve", "--port", "0", *arguments],
        env=environment(database_url, **env),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("Nightmail is ready at http://127.0.0.1:"), line
        yield line.removeprefix("Nightmail is ready at ").strip(), process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def fetch(url: str, **headers: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_an_org_a_key_a_run_and_a_clean_audit(database_url: str) -> None:
    org = answer(nightmail("org", "create", "Acme", "--plan", "pro", "--json", database_url=database_url))
    assert set(org) == {"id", "live_key", "test_key"}
    assert org["live_key"].startswith("nm_live_")
    assert org["test_key"].startswith("nm_test_")

    key = answer(nightmail("key", "create", org["id"], "--env", "test", "--json", database_url=database_url))
    assert key["key"].startswith("nm_test_")

    run = answer(nightmail("run", "send-scheduled", "--json", database_url=database_url))
    assert run["success"] is True
    assert run["job"] == "send-scheduled"
    assert set(run["results"]) == {"claimed", "sent", "canceled", "retried", "failed", "ambiguous", "lost"}

    assert answer(nightmail("audit", "--json", database_url=database_url))["clean"] is True


def test_the_list_of_jobs_says_which_are_built() -> None:
    jobs = answer(nightmail("jobs", "--json"))
    assert len(jobs) == 13
    assert {job["job"] for job in jobs if job["built"]} == {
        "send-scheduled",
        "retry-webhooks",
        "cleanup-idempotency",
        "credits-grant",
        "credits-expire",
        "report-overage",
    }
    assert "not built yet" in nightmail("jobs").stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["run", "send-mail"], "no job named 'send-mail'"),
        (["run", "send-scheduled", "--deadline", "0"], "--deadline must be between 1 and"),
        (["run", "send-scheduled", "--deadline", "nan"], "--deadline must be between 1 and"),
        (["run", "send-scheduled", "--slot", "2026-01-01"], "with zone"),
        (["org", "create", "x\ny"], "printable"),
        (["org", "create", "Acme", "--plan", "gold"], "no plan is called 'gold'; there are free, pro"),
        (["key", "create", "nobody"], "must be the org's id"),
        (["key", "create", "00000000-0000-0000-0000-000000000000"], "no org has the id"),
        (["serve", "--port", "99999"], "65535"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_bad_usage_is_exit_code_2_and_a_sentence(
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    text: str,
) -> None:
    assert in_process(monkeypatch, *arguments, database_url=database_url) == 2
    said = capsys.readouterr().err
    assert text in said
    assert "Traceback" not in said


def test_a_process_ends_with_the_exit_code_and_the_sentence() -> None:
    ran = nightmail("run", "send-mail", database_url="postgresql:///nowhere?host=/nowhere")
    assert ran.returncode == 2
    assert "no job named 'send-mail'" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({"NIGHTMAIL_ENV": "production"}, "CRON_SECRET"),
        ({"NIGHTMAIL_ENV": "production", "CRON_SECRET": ""}, "CRON_SECRET"),
        ({"NIGHTMAIL_ENV": "production", "CRON_SECRET": "a1b2c3d4e5f6g7h8i9j0k1l2m3n4o5p6"}, "sample or guessable"),
        ({"NIGHTMAIL_ENV": "production", "CRON_SECRET": "aaaaaaaaaaaaaaaa"}, "sample or guessable"),
        ({"NIGHTMAIL_ENV": "prod", "CRON_SECRET": SECRET}, "NIGHTMAIL_ENV"),
        ({"CRON_SECRET": "short"}, "at least 16"),
        ({"CRON_SECRET": f"{SECRET}\n"}, "visible ASCII"),
        ({"CRON_SECRET": f"{SECRET},{SECRET},{SECRET}"}, "at most two"),
        ({"NIGHTMAIL_CRASH": "send-scheduled:claimed:exit"}, "NIGHTMAIL_ENV=test"),
        ({"EMAIL_PROVIDER": "smtp"}, "SMTP_URL"),
        ({"CRON_ALLOWED_IPS": "10.0.0.0/99"}, "CIDR"),
    ],
)
def test_unusable_settings_stop_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], env: dict[str, str], text: str
) -> None:
    nowhere = "postgresql:///nowhere?host=/nowhere"
    assert in_process(monkeypatch, "serve", "--port", "0", database_url=nowhere, **env) == 2
    said = capsys.readouterr()
    assert text in said.err
    assert "Traceback" not in said.err
    assert SECRET not in said.err
    assert "ready" not in said.out


@pytest.mark.parametrize(
    ("env", "text"),
    [({"NIGHTMAIL_ENV": "production"}, "CRON_SECRET"), ({"CRON_SECRET": f"{SECRET}\n"}, "visible ASCII")],
)
def test_a_process_with_unusable_settings_does_not_start(env: dict[str, str], text: str) -> None:
    ran = nightmail("serve", "--port", "0", database_url="postgresql:///nowhere?host=/nowhere", **env)
    assert ran.returncode == 2
    assert text in ran.stderr
    assert "Traceback" not in ran.stderr
    assert SECRET not in ran.stderr
    assert "ready" not in ran.stdout


def test_serve_says_when_it_is_ready_and_stops_cleanly(database_url: str) -> None:
    with serving(database_url=database_url, CRON_SECRET=SECRET) as (url, process):
        assert fetch(f"{url}/healthz") == (200, {"status": "ok"})
        assert fetch(f"{url}/readyz")[0] == 200
        assert fetch(f"{url}/api/cron/send-scheduled") == (401, {"error": "Unauthorized"})
        status, body = fetch(f"{url}/api/cron/send-scheduled", Authorization=f"Bearer {SECRET}")
        assert (status, body["success"]) == (200, True)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0
        assert time.monotonic() - began < 10


def test_workers_share_the_port_and_a_dead_one_is_replaced(database_url: str) -> None:
    with serving("--workers", "2", "--no-scheduler", database_url=database_url) as (url, process):
        children = children_of(process.pid)
        assert len(children) == 2
        os.kill(children[0], signal.SIGKILL)
        deadline = time.monotonic() + 20
        while len(set(children_of(process.pid)) - {children[0]}) < 2:
            assert time.monotonic() < deadline, "the dead worker was not replaced"
            time.sleep(0.1)
        assert fetch(f"{url}/healthz") == (200, {"status": "ok"})
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0
    assert children_of(process.pid) == []


def children_of(pid: int) -> list[int]:
    ran = subprocess.run(["ps", "-o", "pid=,stat=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line.split()[0]) for line in ran.stdout.splitlines() if "Z" not in line.split()[1]]


def test_without_postgresql_it_serves_503_and_says_why() -> None:
    with serving(database_url="postgresql:///nowhere?host=/nowhere", CRON_SECRET=SECRET) as (url, process):
        assert fetch(f"{url}/healthz") == (200, {"status": "ok"})
        with ThreadPoolExecutor(2) as threads:  # each waits for a connection
            ready = threads.submit(fetch, f"{url}/readyz")
            called = threads.submit(fetch, f"{url}/api/cron/send-scheduled", Authorization=f"Bearer {SECRET}")
        status, body = ready.result()
        assert status == 503
        assert body["reasons"]
        assert called.result()[0] == 503
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0


def test_a_run_without_postgresql_fails_with_a_sentence() -> None:
    ran = nightmail("run", "send-scheduled", database_url="postgresql:///nowhere?host=/nowhere")
    assert ran.returncode == 1
    assert "PostgreSQL is away" in ran.stderr
    assert "Traceback" not in ran.stderr
