"""UTC wall time and the monotonic clock, so that nobody reaches for naive datetimes."""

from __future__ import annotations

from datetime import UTC, datetime
from time import monotonic

__all__ = ["monotonic", "now"]


def now() -> datetime:
    """Return the current time in UTC; dueness and leases use the database's clock instead."""
    return datetime.now(UTC)
