"""What a process calls before its event loop starts: `start(DIR)` returns the URLs of servers that are up.

Any number of processes may call it for one folder at any time. All share one pair of servers, which goes away
about two seconds after the last of them has closed or died.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from nightmail.embedded import postgres
from nightmail.embedded.folder import Folder, State, is_same_file, open_lock, tail, try_lock
from nightmail.embedded.process import environment
from nightmail.embedded.valkey import ping, valkey_url
from nightmail.errors import EmbeddedError

# Crash recovery after kill -9 under load can take this long with max_wal_size 4 GB.
START_LIMIT_S = 120.0
POLL_S = 0.05
RESPAWN_S = 3.0


class EmbeddedServers:
    """The running servers, and this process's share in them.

    `database_url` is a libpq URL; `valkey_url` is None when Valkey was not asked for. A forked child does
    not keep its parent's share: it must call `start` itself.
    """

    def __init__(self, database_url: str, valkey_url: str | None, lock: int) -> None:
        self.database_url = database_url
        self.valkey_url = valkey_url
        self._lock: int | None = lock
        _open.add(self)

    def close(self) -> None:
        """Give up the share; the servers stop soon after nobody has one. Safe to call twice."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        _open.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


# flock belongs to the open file, which fork shares: a worker that outlives its parent would keep its lock.
_open: weakref.WeakSet[EmbeddedServers] = weakref.WeakSet()


def _close_in_child() -> None:
    for servers in list(_open):
        servers.close()


os.register_at_fork(after_in_child=_close_in_child)


def start(
    data_dir: Path,
    *,
    valkey: bool = True,
    extra_settings: Mapping[str, str] | None = None,
    start_limit_s: float = START_LIMIT_S,
) -> EmbeddedServers:
    """Return the servers of the folder, started if nobody has them running; raises EmbeddedError.

    `extra_settings` are PostgreSQL settings; only those of the process that starts the server count.
    """
    folder = Folder.make(data_dir)
    deadline = time.monotonic() + start_limit_s
    lock = _lock_as_user(folder, deadline)
    try:
        if valkey:
            folder.valkey_wanted.touch()
        state = _wait_until_ready(folder, extra_settings or {}, deadline, valkey=valkey)
    except OSError as error:
        os.close(lock)
        raise EmbeddedError(f"cannot use the data folder {folder.path}: {error}") from error
    except BaseException:
        os.close(lock)
        raise
    sockets = Path(state.sockets)
    return EmbeddedServers(postgres.database_url(sockets), valkey_url(sockets) if valkey else None, lock)


def _lock_as_user(folder: Folder, deadline: float) -> int:
    """Take users.lock shared; a supervisor that is stopping its servers holds it until they are down."""
    while True:
        try:
            lock = open_lock(folder.users_lock, create=True)
        except OSError as error:
            raise EmbeddedError(f"cannot use the data folder {folder.path}: {error}") from error
        while not try_lock(lock, fcntl.LOCK_SH):
            if time.monotonic() > deadline:
                os.close(lock)
                raise EmbeddedError(f"the servers of {folder.path} are still stopping; see {folder.postgres_log}")
            time.sleep(POLL_S)
        if is_same_file(lock, folder.users_lock):
            return lock
        os.close(lock)  # the folder was removed and made again meanwhile


def _wait_until_ready(folder: Folder, settings: Mapping[str, str], deadline: float, *, valkey: bool) -> State:
    """Wait for a supervisor that says ready and servers that answer; start one whenever there is none."""
    before = folder.read_state()
    spawned_at: float | None = None
    while True:
        alive = folder.supervisor_is_alive()
        state = folder.read_state()
        is_news = state is not None and (before is None or state.id != before.id)
        if state is not None and state.status == "failed" and is_news:
            raise EmbeddedError(f"{folder.path}: {state.error}")
        if alive and state is not None and _answers(state, valkey=valkey):
            return state
        now = time.monotonic()
        if now > deadline:
            raise EmbeddedError(_too_late(folder, state))
        if not alive and (spawned_at is None or now - spawned_at > RESPAWN_S):
            _spawn_supervisor(folder, settings)
            spawned_at = now
        time.sleep(POLL_S)


def _answers(state: State, *, valkey: bool) -> bool:
    sockets = Path(state.sockets)
    if state.status != "ready" or (valkey and not state.valkey):
        return False
    try:
        postgres.query(sockets, "SELECT 1")
    except EmbeddedError:
        return False
    return not valkey or ping(sockets)


def _too_late(folder: Folder, state: State | None) -> str:
    status = state.status if state is not None else "no supervisor"
    return (
        f"the servers of {folder.path} did not get ready in time ({status})\n"
        f"--- {folder.postgres_log}\n{tail(folder.postgres_log)}\n"
        f"--- {folder.supervisor_log}\n{tail(folder.supervisor_log, 1000)}"
    )


def _spawn_supervisor(folder: Folder, settings: Mapping[str, str]) -> None:
    """Start a supervisor that is no child of ours; several may be started at once, and all but one exit."""
    package = str(Path(postgres.__file__).resolve().parents[2])
    # It must find the same wheels as we do, from another folder.
    search = os.pathsep.join([package, *filter(os.path.isabs, sys.path)])
    options = json.dumps({"settings": dict(settings)})
    command = [
        sys.executable,
        "-P",
        "-m",
        "nightmail.embedded.supervisor",
        str(folder.path),
        options,
    ]
    with folder.supervisor_log.open("ab") as log:
        done = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=environment() | {"PYTHONPATH": search},
            start_new_session=True,
        )
    if done.returncode != 0:
        raise EmbeddedError(f"the supervisor did not start:\n{tail(folder.supervisor_log)}")
