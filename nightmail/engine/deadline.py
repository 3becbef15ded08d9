"""When a run must have answered, on the monotonic clock."""

from __future__ import annotations

from dataclasses import dataclass

from nightmail.clock import monotonic

# The contract: answer at least half a second before the deadline. The rest pays for writing the run's own record.
ANSWER_MARGIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment on the monotonic clock, `total_s` seconds after the run began."""

    at: float
    total_s: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """Return the deadline that lies `seconds` from now."""
        return cls(monotonic() + seconds, seconds)

    @property
    def left_s(self) -> float:
        """Return the seconds a step may still take, margin for the answer already taken off; negative when over."""
        return self.at - monotonic() - min(ANSWER_MARGIN_S, self.total_s / 2)

    @property
    def is_over(self) -> bool:
        """Return whether no further step may begin."""
        return self.left_s <= 0
