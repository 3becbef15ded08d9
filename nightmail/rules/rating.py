"""Rating: who pays for the units of a message. Included quota → credits → metered, fixed at accept.

A message that straddles a border is split. The split is made in the database, where the quota and the wallet are
(nm_rate); what becomes of it when the message ends is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

Rating = Literal["included", "credits", "metered"]
Billing = Literal["quota", "prepaid", "metered"]


@dataclass(frozen=True, slots=True)
class Split:
    """Units by who pays for them; all ≥ 0."""

    included: int
    credits: int = 0
    metered: int = 0

    @property
    def units(self) -> int:
        """Return the units of all."""
        return self.included + self.credits + self.metered

    @property
    def rating(self) -> Rating:
        """Return the dearest kind among the units, which stands for the message."""
        if self.metered:
            return "metered"
        return "credits" if self.credits else "included"

    def used(self, units: int) -> Split:
        """Return who pays when only so many were used: what was dropped takes away the dearest units first."""
        included = min(units, self.included)
        credits = min(units - included, self.credits)
        return Split(included, credits, min(units - included - credits, self.metered))

    def parts(self) -> Iterator[tuple[Rating, int]]:
        """Yield each kind with its units, also those of none."""
        yield "included", self.included
        yield "credits", self.credits
        yield "metered", self.metered


def quota_resets_at(period: str) -> datetime:
    """Return when the month after this one (`YYYY-MM`, UTC) begins."""
    year, month = map(int, period.split("-"))
    return datetime(year + month // 12, month % 12 + 1, 1, tzinfo=UTC)
