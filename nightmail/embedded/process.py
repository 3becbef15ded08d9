"""Processes that outlive their parent: whose account runs them, whether they live, how they are ended."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nightmail.errors import EmbeddedError

# Existing accounts, best first. Nightmail never creates one.
ACCOUNTS_FOR_ROOT = ("nightmail", "postgres", "nobody")

POLL_S = 0.02


def environment() -> dict[str, str]:
    """Return a small environment, free of PG* and locale settings of whoever came first."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "LC_ALL": "C",
        "TZ": "UTC",
        "TMPDIR": tempfile.gettempdir(),
        "PGCONNECT_TIMEOUT": "5",
    }


@dataclass(frozen=True, slots=True)
class Account:
    """Whom the servers run as; `capable` means past closed folders, with CAP_DAC_OVERRIDE."""

    uid: int
    gid: int
    capable: bool = False

    def popen(
        self,
        argv: Sequence[str | Path],
        *,
        output: int = subprocess.DEVNULL,
        pass_fds: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        """Start a process as the account, in its own session, with both outputs to one descriptor."""
        drops = os.geteuid() == 0 and not self.capable
        command = [*self._setpriv(), *map(str, argv)] if self.capable else [*map(str, argv)]
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            env=environment(),
            pass_fds=pass_fds,
            start_new_session=True,
            umask=0o077,
            user=self.uid if drops else None,
            group=self.gid if drops else None,
            extra_groups=[] if drops else None,
        )

    def _setpriv(self) -> list[str]:
        """Return the command that changes the account and keeps one capability.

        PostgreSQL asks access(2) whether it may run itself, and access(2) ignores the capabilities of an
        ordinary account unless no_setuid_fixup is set: "could not locate my own executable path".
        """
        program = shutil.which("setpriv")
        if program is None:
            raise EmbeddedError(
                "the data folder or the PostgreSQL binaries lie in a folder closed to other accounts, and "
                "there is no setpriv (util-linux) to get past it; use other folders, or do not run as root"
            )
        return [
            program,
            f"--reuid={self.uid}",
            f"--regid={self.gid}",
            "--clear-groups",
            "--securebits=+no_setuid_fixup",
            "--inh-caps=-all,+dac_override",
            "--ambient-caps=-all,+dac_override",
            "--no-new-privs",
            "--",
        ]

    def can_read(self, paths: Sequence[Path]) -> bool:
        """Ask the kernel, in a process of the account, whether it gets to all the paths."""
        probe = 'for path; do test -r "$path" || exit 1; done'
        return self.popen(["/bin/sh", "-c", probe, "sh", *map(str, paths)]).wait() == 0

    def kill_all_in(self, folder: Path) -> None:
        """Kill the processes that work in the folder (Linux; elsewhere nothing is found).

        A process of the account does it: root in a container without CAP_SYS_PTRACE cannot see where they work.
        """
        script = 'for p in /proc/[0-9]*; do test "$(readlink "$p/cwd")" = "$1" && kill -9 "${p#/proc/}"; done'
        self.popen(["/bin/sh", "-c", script, "sh", str(folder)]).wait()


def choose_account(owned: Path, needed: Sequence[Path]) -> Account:
    """Return the account for the servers: our own, or for root another one, as PostgreSQL refuses root.

    `owned` is made and given to the account; if it belongs to an ordinary account already, it stays so.
    """
    owned.mkdir(mode=0o700, exist_ok=True)
    if os.geteuid() != 0:
        if owned.stat().st_uid != os.geteuid():
            raise EmbeddedError(f"{owned} belongs to uid {owned.stat().st_uid}: run as that account, or as root")
        return Account(os.geteuid(), os.getegid())
    found = owned.stat()
    account = Account(found.st_uid, found.st_gid) if found.st_uid else _account_for_root()
    os.chown(owned, account.uid, account.gid)
    for candidate in (account, Account(account.uid, account.gid, capable=True)):
        if candidate.can_read([owned, *needed]):
            return candidate
    raise EmbeddedError(
        f"uid {account.uid} gets neither to {owned} nor with CAP_DAC_OVERRIDE past its parents; "
        "use a folder that every account may enter, or do not run as root"
    )


def _account_for_root() -> Account:
    for name in ACCOUNTS_FOR_ROOT:
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Account(entry.pw_uid, entry.pw_gid)
    raise EmbeddedError(f"PostgreSQL refuses to run as root and none of {', '.join(ACCOUNTS_FOR_ROOT)} exists")


class Process:
    """A child, or a process that an earlier supervisor started."""

    def __init__(self, pid: int, child: subprocess.Popen[bytes] | None = None) -> None:
        self.pid = pid
        self._child = child

    @property
    def is_alive(self) -> bool:
        """Return whether it runs; a zombie does not."""
        if self._child is not None:
            return self._child.poll() is None
        return is_alive(self.pid)

    def end(self, steps: Sequence[tuple[signal.Signals, float]]) -> bool:
        """Send each signal and wait its seconds, until the process has ended; return whether it has."""
        for number, seconds in steps:
            if self.is_alive:
                with suppress(ProcessLookupError):
                    os.kill(self.pid, number)
            deadline = time.monotonic() + seconds
            while self.is_alive and time.monotonic() < deadline:
                time.sleep(POLL_S)
            if not self.is_alive:
                return True
        return False


def exists(pid: int) -> bool:
    """Return whether there is such a process, be it a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def is_alive(pid: int) -> bool:
    """Return whether the process runs; in a container nobody may reap orphans, so zombies are told apart."""
    if not exists(pid) or sys.platform != "linux":
        return exists(pid)
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def runs_in(pid: int, folder: Path) -> bool | None:
    """Return whether the process lives and works in the folder, as servers do: numbers are reused.

    None means that the system does not say: not Linux, or root in a container without CAP_SYS_PTRACE.
    """
    if not is_alive(pid):
        return False
    try:
        return Path(f"/proc/{pid}/cwd").samefile(folder)
    except FileNotFoundError:
        return None if sys.platform != "linux" else False
    except OSError:
        return None


def read_pid(path: Path) -> int | None:
    """Return the number in the first line of a pid file, None when it is absent or unfinished."""
    try:
        return int(path.read_text().split("\n", 1)[0])
    except (OSError, ValueError):
        return None
