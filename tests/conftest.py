"""What every test has: one embedded server for the whole run, a fresh database per test, no network.

The controller of a run makes a folder and names it in the environment, so that all xdist workers find the
same one; it removes the folder at the end, upon which the supervisor stops the servers. When the run is
killed the supervisor stops them too, because no user is left.
"""

from __future__ import annotations

import fcntl
import hashlib
import ipaddress
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest
import uvloop
from psycopg import sql
from valkey import Valkey

from nightmail.embedded import EmbeddedServers, start
from nightmail.schema.migrate import DIRECTORY, migrate, read_migrations

RUN_FOLDER = "NIGHTMAIL_TEST_RUN_FOLDER"

# A crash of the machine may lose the tests' data. Measured with 0001: CREATE DATABASE 23 ms with file_copy,
# 110 ms with wal_log, and 108 ms with file_copy and fsync.
SERVER_SETTINGS = {"fsync": "off", "full_page_writes": "off"}


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder of the run, unless this is a worker and the controller has."""
    if not hasattr(config, "workerinput"):
        folder = Path(tempfile.mkdtemp(prefix="nightmail-tests-"))
        folder.chmod(0o755)
        os.environ[RUN_FOLDER] = str(folder)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the folder of the run; the supervisor sees that, and stops what still writes there."""
    if hasattr(config, "workerinput"):
        return
    folder = Path(os.environ.pop(RUN_FOLDER))
    deadline = time.monotonic() + 5
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)


@pytest.fixture(scope="session")
def run_folder() -> Path:
    """Return the folder that all workers of this run share."""
    return Path(os.environ[RUN_FOLDER])


@pytest.fixture(scope="session")
def embedded_servers(run_folder: Path) -> Iterator[EmbeddedServers]:
    """The servers that all workers of this run share."""
    with start(run_folder / "servers", extra_settings=SERVER_SETTINGS) as servers:
        yield servers


@pytest.fixture(scope="session")
def maintenance(embedded_servers: EmbeddedServers) -> Iterator[psycopg.Connection[Any]]:
    """A connection that makes and drops databases."""
    with psycopg.connect(embedded_servers.database_url, dbname="postgres", autocommit=True) as connection:
        yield connection


@pytest.fixture(scope="session")
def template_database(run_folder: Path, embedded_servers: EmbeddedServers, maintenance: psycopg.Connection[Any]) -> str:
    """The name of the migrated database that the tests copy; the first worker makes it."""
    content = "".join(migration.sha256 for migration in read_migrations(DIRECTORY))
    name = "template_" + hashlib.sha256(content.encode()).hexdigest()[:16]
    with (run_folder / "template.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if maintenance.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone() is None:
            unfinished = sql.Identifier(name + "_unfinished")
            maintenance.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(unfinished))
            maintenance.execute(sql.SQL("CREATE DATABASE {}").format(unfinished))
            migrate(_url_of(embedded_servers, name + "_unfinished"))
            maintenance.execute(sql.SQL("ALTER DATABASE {} RENAME TO {}").format(unfinished, sql.Identifier(name)))
    return name


_numbers = count(1)


@pytest.fixture
def database_url(
    embedded_servers: EmbeddedServers,
    maintenance: psycopg.Connection[Any],
    template_database: str,
    worker_id: str,
) -> Iterator[str]:
    """The URL of a fresh, migrated database of this test alone."""
    yield from _fresh_database(embedded_servers, maintenance, worker_id, template_database)


@pytest.fixture
def empty_database_url(
    embedded_servers: EmbeddedServers, maintenance: psycopg.Connection[Any], worker_id: str
) -> Iterator[str]:
    """The URL of a database without a schema."""
    yield from _fresh_database(embedded_servers, maintenance, worker_id, "template1")


def _fresh_database(
    servers: EmbeddedServers, maintenance: psycopg.Connection[Any], worker: str, template: str
) -> Iterator[str]:
    name = f"test_{worker}_{next(_numbers)}"
    create = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy")
    maintenance.execute(create.format(sql.Identifier(name), sql.Identifier(template)))
    try:
        yield _url_of(servers, name)
    finally:
        maintenance.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def _url_of(servers: EmbeddedServers, database: str) -> str:
    return servers.database_url.replace("/nightmail?", f"/{database}?", 1)


@pytest.fixture
def valkey_url(embedded_servers: EmbeddedServers, worker_id: str) -> str:
    """The URL of an empty Valkey database that belongs to this worker."""
    assert embedded_servers.valkey_url is not None
    number = int(worker_id.removeprefix("gw")) + 1 if worker_id != "master" else 0
    url = embedded_servers.valkey_url.replace("?db=0", f"?db={number}")
    with Valkey.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """Run async tests on the loop that production uses."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test that dials beyond this machine or asks for an address, even if it swallows the error."""
    attempts: list[str] = []

    def refuse(target: object) -> None:
        attempts.append(f"a test tried to reach {target!r}")
        raise ConnectionRefusedError(attempts[-1])

    class Guarded:
        """The functions that are replaced, as they were."""

        connect = socket.socket.connect
        connect_ex = socket.socket.connect_ex
        getaddrinfo = staticmethod(socket.getaddrinfo)
        create_connection = uvloop.Loop.create_connection

    def connect(self: socket.socket, address: Any) -> None:
        if not _is_local(self.family, address):
            refuse(address)
        Guarded.connect(self, address)

    def connect_ex(self: socket.socket, address: Any) -> int:
        if not _is_local(self.family, address):
            refuse(address)
        return Guarded.connect_ex(self, address)

    def getaddrinfo(host: Any, *args: Any, **options: Any) -> Any:
        if not _is_local_host(host) and not _is_address(host):
            refuse(host)
        return Guarded.getaddrinfo(host, *args, **options)

    async def create_connection(
        self: uvloop.Loop, factory: Any, host: Any = None, port: Any = None, **options: Any
    ) -> Any:
        if host is not None and not _is_local_host(host):
            refuse(host)
        return await Guarded.create_connection(self, factory, host, port, **options)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "connect_ex", connect_ex)
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    # libuv dials by itself, unseen by the socket module
    monkeypatch.setattr(uvloop.Loop, "create_connection", create_connection)
    yield
    if attempts:
        pytest.fail("; ".join(attempts))


def _is_local(family: int, address: Any) -> bool:
    return family not in (socket.AF_INET, socket.AF_INET6) or _is_local_host(address[0])


def _is_local_host(host: Any) -> bool:
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost") or host.endswith(".localhost"):
        return True
    return _is_address(host) and ipaddress.ip_address(host.partition("%")[0]).is_loopback


def _is_address(host: Any) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
