"""Named crash points for tests: NIGHTMAIL_CRASH=<job>:<point>:<exit|stop|raise>[:<nth>].

Settings refuse the variable unless NIGHTMAIL_ENV is `test`. `exit` is kill -9, `stop` is SIGSTOP: both act on the
whole process at once, as an operator's or the kernel's would.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field

from nightmail.errors import NightmailError, SettingsError

ACTIONS = {"exit": signal.SIGKILL, "stop": signal.SIGSTOP}


class CrashInjected(NightmailError):
    """A test asked for a failure here."""


@dataclass(slots=True)
class CrashPoints:
    """Counts how often each point is reached and acts at the nth; `place` None never acts."""

    place: str | None = None
    action: str = ""
    nth: int = 1
    _seen: dict[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str | None) -> CrashPoints:
        """Read the variable's value. Raises SettingsError."""
        if not text:
            return cls()
        job, point, action, *nth = text.split(":") + [""] * (3 - len(text.split(":")))
        if action not in (*ACTIONS, "raise") or len(nth) > 1 or not all(n.isdigit() for n in nth):
            raise SettingsError("NIGHTMAIL_CRASH: <job>:<point>:<exit|stop|raise>[:<nth>]")
        return cls(f"{job}:{point}", action, int(nth[0]) if nth else 1)

    def reach(self, place: str) -> None:
        """Act if this place (`job:point`) is the chosen one and this its nth passing; otherwise do nothing."""
        if place != self.place:
            return
        self._seen[place] = self._seen.get(place, 0) + 1
        if self._seen[place] == self.nth:
            if self.action == "raise":
                raise CrashInjected(place)
            os.kill(os.getpid(), ACTIONS[self.action])
