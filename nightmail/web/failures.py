"""Wrong secrets are counted by address, in this process; who has had their tries is refused for failing calls only."""

from __future__ import annotations

from nightmail.clock import monotonic

FAILURES_WINDOW_S = 60.0
FAILURES_A_MINUTE = 20
# Addresses remembered; beyond that the oldest is forgotten.
MAX_ADDRESSES = 10_000


class Failures:
    """Counts wrong secrets per address; `most` are taken within a minute."""

    def __init__(self, most: int = FAILURES_A_MINUTE) -> None:
        self._most = most
        self._times: dict[str, list[float]] = {}

    def is_over(self, address: str) -> bool:
        """Return whether the address has had its tries for now."""
        self._times[address] = [t for t in self._times.get(address, ()) if monotonic() - t < FAILURES_WINDOW_S]
        if not self._times[address]:
            del self._times[address]
            return False
        return len(self._times[address]) >= self._most

    def note(self, address: str) -> None:
        """Count one more."""
        if address not in self._times and len(self._times) >= MAX_ADDRESSES:
            self._times.pop(next(iter(self._times)))
        self._times.setdefault(address, []).append(monotonic())
