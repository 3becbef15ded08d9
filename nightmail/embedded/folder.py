"""The data folder: its files, its locks, and what the supervisor tells the users.

    DIR/users.lock        every user holds it shared while it lives; the kernel lets go even at kill -9
    DIR/supervisor.lock   the supervisor holds it while it lives
    DIR/postgres.lock     inherited by all processes of the server, so it is free only when all are gone
    DIR/valkey.lock       the same for Valkey
    DIR/servers.json      state, written by the supervisor, read by users
    DIR/valkey.wanted     some user asked for Valkey
    DIR/instance.json     names the folder of the Unix sockets
    DIR/postgres.conf     our settings; includes the file that initdb made
    DIR/supervisor.log    DIR/postgres.log    both bounded by the supervisor
    DIR/postgres/data     the database; `postgres` is the only folder given to another account when root

flock belongs to an open file: closed on exec it is not the children's, and pass_fds gives it to a server.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import stat
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from nightmail.errors import EmbeddedError

# sun_path is 108 bytes on Linux and 104 on macOS, with a closing zero.
SOCKET_PATH_LIMIT_BYTES = 103
LONGEST_SOCKET_NAME = ".s.PGSQL.5432.lock"


Status = Literal["starting", "ready", "failed"]


@dataclass(frozen=True, slots=True)
class State:
    """What the supervisor says of its servers; `id` is new at every write."""

    id: str
    supervisor_pid: int
    status: Status
    sockets: str
    valkey: bool
    error: str


@dataclass(frozen=True, slots=True)
class Folder:
    """One data folder; `path` is absolute and free of symbolic links."""

    path: Path

    @classmethod
    def make(cls, path: Path) -> Folder:
        """Create the folder when it is absent; its parents' modes stay as they are."""
        try:
            path.mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as error:
            raise EmbeddedError(f"cannot create the data folder {path}: {error}") from error
        return cls(path.resolve(strict=True))

    @property
    def users_lock(self) -> Path:
        """Held shared by each user."""
        return self.path / "users.lock"

    @property
    def supervisor_lock(self) -> Path:
        """Held exclusively by the supervisor."""
        return self.path / "supervisor.lock"

    @property
    def supervisor_log(self) -> Path:
        """Output of the supervisor and of Valkey."""
        return self.path / "supervisor.log"

    @property
    def postgres_log(self) -> Path:
        """Output of initdb and of PostgreSQL."""
        return self.path / "postgres.log"

    @property
    def valkey_wanted(self) -> Path:
        """Present when a user asked for Valkey."""
        return self.path / "valkey.wanted"

    @property
    def state_file(self) -> Path:
        """Written by the supervisor only."""
        return self.path / "servers.json"

    def read_state(self) -> State | None:
        """Return the last state, None when there is none that can be read."""
        try:
            return State(**json.loads(self.state_file.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def write_state(self, state: State) -> None:
        """Replace the state in one step, so that no reader sees half of it."""
        write_file(self.state_file, json.dumps(asdict(state)))

    def supervisor_is_alive(self) -> bool:
        """Return whether some process holds the supervisor's lock."""
        try:
            descriptor = open_lock(self.supervisor_lock)
        except FileNotFoundError:
            return False
        try:
            return not try_lock(descriptor, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)

    def socket_folder(self) -> Path:
        """Return the path of the folder for Unix sockets; called under the supervisor's lock.

        It lies in the temporary folder because a socket's path is short. The token tells a folder from an
        earlier one at the same path whose servers are still going away; the path tells a copy from its
        original.
        """
        instance = self.path / "instance.json"
        try:
            known = json.loads(instance.read_bytes())
            token, parent = str(known["token"]), str(known["temporary"])
        except (OSError, ValueError, TypeError, KeyError):
            token, parent = secrets.token_hex(8), tempfile.gettempdir()
            write_file(instance, json.dumps({"token": token, "temporary": parent}))
        digest = hashlib.sha256(os.fsencode(self.path) + b"\0" + token.encode()).hexdigest()
        name = f"nightmail-{os.geteuid()}-{digest[:16]}"
        if len(os.fsencode(Path(parent, name, LONGEST_SOCKET_NAME))) > SOCKET_PATH_LIMIT_BYTES:
            parent = "/tmp"  # noqa: S108  make_private_folder checks whose it is
        return Path(parent, name)


def open_lock(path: Path, *, create: bool = False) -> int:
    """Open a lock file; the descriptor is closed on exec, so that no child keeps the lock."""
    return os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o644)


def try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Take the lock if it is free now."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_same_file(descriptor: int, path: Path) -> bool:
    """Return whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False


def write_file(path: Path, text: str) -> None:
    """Write a small file beside its place and move it there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def make_private_folder(path: Path, uid: int, gid: int) -> None:
    """Create a 0700 folder for the account, or check that it is ours: anybody may write in /tmp."""
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (uid, os.geteuid()):
        raise EmbeddedError(f"{path} belongs to somebody else (uid {found.st_uid}); remove it")
    if (found.st_uid, found.st_gid) != (uid, gid) and os.geteuid() == 0:
        os.chown(path, uid, gid, follow_symlinks=False)
    path.chmod(0o700)


def tail(path: Path, limit: int = 4000) -> str:
    """Return the last characters of a log, empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - limit))
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""


def bound_log(path: Path, limit_bytes: int) -> None:
    """Copy a log that is too long to `<name>.1` and cut it, since servers keep the file open (O_APPEND)."""
    with suppress(OSError):
        if path.stat().st_size <= limit_bytes:
            return
        with suppress(OSError):  # a full disk must not keep the log from being cut
            write_file(path.with_name(path.name + ".1"), tail(path, limit_bytes))
        os.truncate(path, 0)
