"""`nightmail demo` as people run it: a process, a folder, and every expectation met."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from nightmail.demo.run import demo_settings, listen_near

DEMO = (sys.executable, "-m", "nightmail", "demo", "--port", "0")
# What could reach out of the demonstration or change it.
FOREIGN = {
    "NIGHTMAIL_ENV": "production",
    "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
    "EMAIL_PROVIDER": "ses",
    "ADMIN_TOKEN": "a-token-that-is-not-the-demos",
    "ALERT_WEBHOOK_URL": "http://127.0.0.1:1/",
    "WEBHOOK_ALLOW_CIDRS": "10.0.0.0/8",
}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A data folder whose path is short enough for sockets, wherever pytest keeps its own."""
    made = Path(tempfile.mkdtemp(prefix="nm-demo-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_demo_meets_every_expectation_twice_on_one_folder_and_stops_cleanly(folder: Path) -> None:
    first = subprocess.run(
        [*DEMO, "--once", "--data", str(folder)],
        env={**os.environ, **FOREIGN},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert first.returncode == 0, first.stdout + first.stderr
    assert "✗" not in first.stdout
    met = re.search(r"(\d+) of (\d+) expectations met", first.stdout)
    assert met is not None
    assert met[1] == met[2]
    assert re.search(r"✓ Every fact in the database was told[^:]*: (\d{3}) facts, \1 told", first.stdout)
    assert "503, 503, 200; success" in first.stdout

    second = subprocess.Popen(
        [*DEMO, "--data", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert second.stdout is not None
    ready = next(line for line in second.stdout if "is ready at" in line)
    found = re.search(r"ready at (http://\S+) after ([\d.]+) s", ready)
    assert found is not None
    with urllib.request.urlopen(found[1] + "/dashboard", timeout=30) as page:
        assert page.status == 200
    assert float(found[2]) < 15  # 0.6 s on an idle machine
    second.send_signal(signal.SIGINT)
    asked = time.monotonic()
    rest, _ = second.communicate(timeout=20)
    assert time.monotonic() - asked < 10
    assert second.returncode == 0, rest


def test_a_port_that_is_taken_gives_way_to_the_next_free_one() -> None:
    with listen_near(0) as taken:
        port = taken.getsockname()[1]
        with listen_near(port) as listener:
            assert listener.getsockname()[1] > port


def test_the_demo_hangs_on_nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FOREIGN.items():
        monkeypatch.setenv(name, value)
    settings = demo_settings()
    assert settings == demo_settings()
    assert settings.nightmail_env == "development"
    assert settings.database_url is None
    assert settings.admin_token is None
    assert settings.email_provider == "capture"
    assert settings.alert_webhook_url is None
    assert [str(network) for network in settings.webhook_allow_cidrs] == ["127.0.0.1/32"]
