"""The process that owns the servers of a data folder: `python -m nightmail.embedded.supervisor DIR OPTIONS`.

It starts them or adopts those of a supervisor that was killed, restarts one that died, and stops them when no
user is left. It belongs to no user: it has its own session, and is started by whoever finds none.

    user      holds users.lock shared ─┐             starts a supervisor when supervisor.lock is free
    supervisor    tries it exclusively ─┴─ got it for GRACE_S ─→ keeps it, stops the servers, exits

Whoever arrives while the servers are being stopped waits for users.lock, which is let go when the supervisor
exits, and so finds none. Whoever arrives earlier holds users.lock, and the supervisor cannot stop. Both locks
are the kernel's, so kill -9 at any line leaves nothing to clean up.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import select
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Protocol

from nightmail.embedded.folder import Folder, State, Status, bound_log, is_same_file, open_lock, try_lock
from nightmail.embedded.postgres import Postgres, find_binaries
from nightmail.embedded.process import choose_account
from nightmail.embedded.valkey import Valkey, find_binary
from nightmail.errors import EmbeddedError

TICK_S = 0.25
STARTING_TICK_S = 0.05
GRACE_S = 2.0

# Another process that only looks whether a supervisor lives holds its lock for a moment.
LOCK_PATIENCE_S = 2.0

BACKOFF_S = 0.25
BACKOFF_LIMIT_S = 15.0
STEADY_S = 30.0  # a server that ran this long starts again without a wait

POSTGRES_LOG_LIMIT_BYTES = 16 << 20
SUPERVISOR_LOG_LIMIT_BYTES = 1 << 20


class Server(Protocol):
    """What the supervisor needs of a server."""

    name: str

    @property
    def is_alive(self) -> bool:
        """Return whether it runs."""
        ...

    @property
    def is_reachable(self) -> bool:
        """Return whether its socket is there."""
        ...

    def launch(self) -> bool:
        """Start or adopt it; False when neither is possible just yet."""
        ...

    def check(self) -> bool:
        """Return whether it answers."""
        ...

    def stop(self, *, folder_is_gone: bool = False) -> None:
        """Stop it and wait until it has."""
        ...

    def why(self) -> str:
        """Return the end of its log."""
        ...


class Keeper:
    """Keeps one server running: launches it, waits for its answer, and again after it died, with backoff."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.ready = False
        self.error = ""
        self._launched = False
        self._launched_at = 0.0
        self._retry_at = 0.0
        self._backoff_s = BACKOFF_S

    def step(self) -> None:
        """Do what is due now; an error is kept for the users to see."""
        now = time.monotonic()
        if self._launched and not self.server.is_alive:
            self._failed(now, "stopped" if self.ready else f"did not start:\n{self.server.why()}")
        elif self.ready and not self.server.is_reachable:
            log(f"{self.server.name}: its socket is gone, restarting")
            self.server.stop()
            self._failed(now, "lost its socket")
        elif self._launched and not self.ready and self.server.check():
            log(f"{self.server.name}: ready")
            self.ready, self.error = True, ""
        elif not self._launched and now >= self._retry_at:
            self._launch(now)

    def _launch(self, now: float) -> None:
        try:
            self._launched = self.server.launch()
        except (EmbeddedError, OSError) as error:
            self._failed(now, str(error))
        else:
            self._launched_at = now
            self._retry_at = now + TICK_S

    def _failed(self, now: float, why: str) -> None:
        log(f"{self.server.name}: {why}")
        if self.ready and now - self._launched_at >= STEADY_S:
            self._backoff_s = BACKOFF_S
        # A server that was up is restarted at once the first time; users hear only of a start that failed.
        self._retry_at = now if self.ready and self._backoff_s == BACKOFF_S else now + self._backoff_s
        self.error = "" if self.ready else f"{self.server.name} {why}"
        self._backoff_s = min(2 * self._backoff_s, BACKOFF_LIMIT_S)
        self._launched = self.ready = False


class Supervisor:
    """One data folder's servers and the loop around them; made while holding the supervisor's lock."""

    def __init__(self, folder: Folder, lock: int, users: int, extra_settings: Mapping[str, str]) -> None:
        self._folder = folder
        self._lock = lock
        self._users = users
        self._sockets = folder.socket_folder()
        account = choose_account(folder.path / "postgres", _needed_files())
        self._postgres = Keeper(Postgres(folder, self._sockets, account, extra_settings))
        self._valkey = Keeper(Valkey(folder, self._sockets, account))
        self._last: tuple[object, ...] = ()
        self._unused_since: float | None = None

    def run(self, wakeup: int) -> None:
        """Keep the servers running until no user is left or the folder is gone."""
        while True:
            if not self._folder_is_ours():
                log("the data folder is gone")
                self._stop(folder_is_gone=True)
                return
            if self._is_unused():
                log("no user left")
                self._stop()
                return
            keepers = self._keepers()
            for keeper in keepers:
                keeper.step()
            self._tell(keepers)
            bound_log(self._folder.postgres_log, POSTGRES_LOG_LIMIT_BYTES)
            bound_log(self._folder.supervisor_log, SUPERVISOR_LOG_LIMIT_BYTES)
            _wait(
                wakeup,
                TICK_S if all(keeper.ready for keeper in keepers) else STARTING_TICK_S,
            )

    def _keepers(self) -> list[Keeper]:
        return [self._postgres, self._valkey] if self._folder.valkey_wanted.exists() else [self._postgres]

    def _folder_is_ours(self) -> bool:
        return is_same_file(self._lock, self._folder.supervisor_lock) and is_same_file(
            self._users, self._folder.users_lock
        )

    def _is_unused(self) -> bool:
        """Return whether there was no user for the whole grace; if so users.lock stays ours until we exit."""
        if not try_lock(self._users):
            self._unused_since = None
            return False
        now = time.monotonic()
        if self._unused_since is None:
            self._unused_since = now
        if now - self._unused_since >= GRACE_S:
            return True
        unlock(self._users)
        return False

    def _tell(self, keepers: list[Keeper]) -> None:
        """Write the state when it has changed."""
        error = next((keeper.error for keeper in keepers if keeper.error), "")
        ready = all(keeper.ready for keeper in keepers)
        current = (ready, error, len(keepers))
        if current == self._last:
            return
        write_state(
            self._folder,
            self._sockets,
            ready=ready,
            valkey=ready and len(keepers) == 2,
            error=error,
        )
        self._last = current

    def _stop(self, *, folder_is_gone: bool = False) -> None:
        for keeper in (self._valkey, self._postgres):
            keeper.server.stop(folder_is_gone=folder_is_gone)
        shutil.rmtree(self._sockets, ignore_errors=True)
        if not folder_is_gone:
            for path in (self._folder.state_file, self._folder.valkey_wanted):
                path.unlink(missing_ok=True)
        log("stopped")


def write_state(folder: Folder, sockets: Path, *, ready: bool, valkey: bool, error: str) -> None:
    """Tell the users; a full disk keeps the old state, and they check the connection anyway."""
    status: Status = "failed" if error else "ready" if ready else "starting"
    with suppress(OSError):
        folder.write_state(State(secrets.token_hex(8), os.getpid(), status, str(sockets), valkey, error))


def unlock(descriptor: int) -> None:
    """Let go of a lock and keep the file open."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)


def log(text: str) -> None:
    """Write a line to supervisor.log, which is our standard output."""
    with suppress(OSError):
        print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} [{os.getpid()}] {text}", flush=True)


def _needed_files() -> list[Path]:
    """Return what the servers' account must be able to read."""
    binaries = find_binaries()
    needed = [
        binaries / "postgres",
        binaries / "initdb",
        binaries.parent / "share" / "postgresql" / "postgres.bki",
    ]
    with suppress(EmbeddedError):
        needed.append(find_binary())
    return needed


def _listen_to_signals() -> int:
    """Wake the loop when a child ends, and ignore requests to stop: the servers go with their users.

    Handlers, not SIG_IGN, which a server would inherit.
    """

    def ignore(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            log(f"{signal.Signals(number).name} ignored: the servers stop when the last user has gone")

    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, ignore)
    return read_end


def _wait(wakeup: int, seconds: float) -> None:
    if select.select([wakeup], [], [], seconds)[0]:
        with suppress(BlockingIOError):
            os.read(wakeup, 4096)


def _become_supervisor(folder: Folder) -> tuple[int, int] | None:
    """Take the lock and open users.lock; None when another supervisor is there."""
    lock = open_lock(folder.supervisor_lock, create=True)
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while not try_lock(lock):
        if time.monotonic() > deadline:
            return None
        time.sleep(0.01)
    if not is_same_file(lock, folder.supervisor_lock):
        return None
    return lock, open_lock(folder.users_lock, create=True)


def supervise(folder: Folder, extra_settings: Mapping[str, str]) -> None:
    """Run the supervisor, unless there is one."""
    wakeup = _listen_to_signals()
    locks = _become_supervisor(folder)
    if locks is None:
        return
    log("started")
    try:
        sockets = folder.socket_folder()
        write_state(folder, sockets, ready=False, valkey=False, error="")
        supervisor = Supervisor(folder, *locks, extra_settings)
    except (EmbeddedError, OSError) as error:
        log(f"failed: {error}")
        write_state(folder, folder.path, ready=False, valkey=False, error=str(error))
        return
    supervisor.run(wakeup)


def main() -> None:
    """Leave the starter's family, so that nobody has to wait for us, and supervise."""
    folder = Folder(Path(sys.argv[1]))
    options = json.loads(sys.argv[2])
    os.umask(0o022)
    if os.fork() == 0:
        supervise(folder, options["settings"])


if __name__ == "__main__":
    main()
