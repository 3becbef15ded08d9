"""Users of an embedded server as real processes, and what the tests ask about them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from nightmail.embedded.folder import Folder

REPOSITORY = Path(__file__).parents[2]

# Starts the servers, prints their URLs and holds them until its input ends.
SCRIPT = """
import json, sys
from pathlib import Path
from nightmail.embedded import start
options = json.loads(sys.argv[2])
with start(Path(sys.argv[1]), **options) as servers:
    print(json.dumps([servers.database_url, servers.valkey_url]), flush=True)
    sys.stdin.read()
"""


class User:
    """A process that uses the servers of a folder."""

    def __init__(self, folder: Path, package: Path = REPOSITORY, **options: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-W", "error", "-c", SCRIPT, str(folder), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(package)},
            text=True,
        )
        self.database_url = ""
        self.valkey_url: str | None = None

    def wait(self) -> User:
        """Wait until the servers are up."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(self.process.communicate()[1])
        self.database_url, self.valkey_url = json.loads(line)
        return self

    def fail(self) -> str:
        """Wait for the user to fail and return what it said."""
        out, err = self.process.communicate(timeout=60)
        assert (out, self.process.returncode) == ("", 1)
        return err

    def leave(self) -> None:
        """Let the user close its servers and end."""
        if self.process.poll() is None:
            self.process.communicate(timeout=20)

    def kill(self) -> None:
        """Kill -9."""
        self.process.kill()
        self.process.communicate()


StartUser = Callable[..., User]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A data folder whose servers are gone at the end."""
    parent = Path(tempfile.mkdtemp(prefix="nightmail-embedded-"))
    parent.chmod(0o755)
    path = parent / "data"
    yield path
    shutil.rmtree(parent, ignore_errors=True)
    wait_until(lambda: not servers_of(path))
    shutil.rmtree(parent, ignore_errors=True)  # what was written meanwhile


@pytest.fixture
def start_user(folder: Path) -> Iterator[StartUser]:
    """Start users of the folder; they are killed at the end."""
    users: list[User] = []

    def start_one(path: Path = folder, **options: Any) -> User:
        users.append(User(path, **options))
        return users[-1]

    yield start_one
    for user in users:
        user.kill()


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait for something that other processes do."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def command_lines() -> dict[int, str]:
    """Return the command lines of all processes that are no zombies."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        if line:
            found[int(path.parent.name)] = line
    return found


def postmasters_of(folder: Path) -> list[int]:
    """Return the main PostgreSQL processes of the folder."""
    needle = f"/postgres -D {folder}/"
    return [pid for pid, line in command_lines().items() if needle in line and "setpriv" not in line]


def servers_of(folder: Path) -> list[int]:
    """Return the processes of the folder's PostgreSQL, its supervisors and its Valkey."""
    state = Folder(folder).read_state()
    sockets = state.sockets if state is not None else "no such folder"
    lines = command_lines().items()
    return [pid for pid, line in lines if f"{folder}/postgres/" in line or f"{sockets}/" in line] + supervisors_of(
        folder
    )


def supervisors_of(folder: Path) -> list[int]:
    """Return the supervisors of the folder."""
    needle = f"-m nightmail.embedded.supervisor {folder} "
    return [pid for pid, line in command_lines().items() if needle in line]


def fetch(url: str, query: str) -> Any:
    """Return the first value of a query."""
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(query.encode()).fetchone()
        assert row is not None
        return row[0]


def kill(pid: int) -> None:
    """Kill -9."""
    os.kill(pid, signal.SIGKILL)
