"""One embedded server for all benchmarks, and fresh copies of seeded databases on it."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from nightmail.embedded import EmbeddedServers, start
from nightmail.schema.migrate import migrate

Connection = psycopg.Connection[Any]
Seed = Callable[[Connection], None]
EMPTY = "empty"
STOP_LIMIT_S = 30.0


class Bench:
    """The server; each timed run gets a database of its own, copied file by file from a seeded one."""

    def __init__(self, servers: EmbeddedServers, folder: Path) -> None:
        self.folder = folder
        self._servers = servers
        self._numbers = count(1)
        self._seeded: set[str] = set()

    def url(self, database: str) -> str:
        """Return the libpq URL of a database."""
        return self._servers.database_url.replace("/nightmail?", f"/{database}?", 1)

    @property
    def valkey_url(self) -> str | None:
        """Return the URL of the embedded Valkey."""
        return self._servers.valkey_url

    @contextmanager
    def seeded(self, name: str, seed: Seed) -> Iterator[str]:
        """Yield the URL of a fresh copy of the database that `seed` fills; the original is made once and kept."""
        if name not in self._seeded:
            self.make(name, seed)
        copy = f"{name}_{next(self._numbers)}"
        self._copy(name, copy)
        try:
            with psycopg.connect(self.url(copy), autocommit=True) as conn:
                conn.execute("VACUUM (ANALYZE)")
                conn.execute("CHECKPOINT")
            yield self.url(copy)
        finally:
            self.drop(copy)

    def make(self, name: str, seed: Seed) -> str:
        """Create a migrated database, fill it, and return its URL."""
        if EMPTY not in self._seeded:
            with self._maintenance() as conn:
                conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(EMPTY)))
            migrate(self.url(EMPTY))
            self._seeded.add(EMPTY)
        self._copy(EMPTY, name)
        url = self.url(name)
        with psycopg.connect(url, autocommit=True) as conn:
            seed(conn)
            conn.execute("VACUUM (ANALYZE)")
            conn.execute("CHECKPOINT")
        self._seeded.add(name)
        return url

    def drop(self, name: str) -> None:
        """Remove a database, whoever is still connected."""
        with self._maintenance() as conn:
            conn.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
        self._seeded.discard(name)

    def _copy(self, original: str, copy: str) -> None:
        create = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy")
        with self._maintenance() as conn:
            conn.execute(create.format(sql.Identifier(copy), sql.Identifier(original)))

    def _maintenance(self) -> Connection:
        return psycopg.connect(self.url("postgres"), autocommit=True)


@contextmanager
def open_bench() -> Iterator[Bench]:
    """Yield the server in a folder that is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="nightmail-bench-"))
    folder.chmod(0o755)  # the server's own account must reach its data
    try:
        with start(folder / "servers") as servers:
            yield Bench(servers, folder)
    finally:
        give_up_at = time.monotonic() + STOP_LIMIT_S
        while folder.exists() and time.monotonic() < give_up_at:  # the supervisor stops what still writes there
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.05)
