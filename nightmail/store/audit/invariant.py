"""What an invariant is, and how one chunk of it is checked.

An invariant's query has a row for each thing it looks at: `key` (what would have to be looked at again), `id` (what an
operator would look for), `things` (how many were looked at) and `is_wrong`. So one query counts, checks and names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, LiteralString

from nightmail.store.database import Connection

# Offenders shown for each invariant.
SAMPLE = 20
# Offenders that one chunk names: the audit must stay small when everything is wrong.
MOST_NAMED = 1000

Scope = Literal["accounts", "messages", "written", "endpoints", "orgs", "overage", "now", "tables"]
"""What a chunk is of: wallets, messages, orgs or endpoints by their ids; what was `written` between two moments; what
is under way `now`; or a whole table, for what no owner leads to."""


@dataclass(frozen=True, slots=True)
class Invariant:
    """A sentence that must be true. `rows` None means that replaying a wallet decides (store.audit.replay)."""

    name: str
    sentence: str
    scope: Scope
    rows: LiteralString | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one look is at: the ids of the scope, or what was written from `start` until before `end`."""

    scope: Scope
    keys: Sequence[Any] = ()
    start: datetime | None = None
    end: datetime | None = None


@dataclass(frozen=True, slots=True, order=True)
class Offender:
    """Something that is not as it must be; `key` is the id in the invariant's scope that leads to it."""

    id: str
    key: str


@dataclass(slots=True)
class Tally:
    """How an invariant fared in what was looked at so far; `named` are the first of its `violations`."""

    checked: int = 0
    violations: int = 0
    named: list[Offender] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Count another chunk."""
        self.checked += other.checked
        self.violations += other.violations
        self.named += other.named[: max(0, MOST_NAMED - len(self.named))]


@dataclass(frozen=True, slots=True)
class Finding:
    """How an invariant fared: what was looked at, how much of it violates it, and the first ids of that."""

    name: str
    sentence: str
    scope: str
    checked: int
    violations: int
    first: list[str]


def finding_of(invariant: Invariant, tally: Tally) -> Finding:
    """Return the finding for people."""
    first = [offender.id for offender in sorted(tally.named)[:SAMPLE]]
    return Finding(invariant.name, invariant.sentence, invariant.scope, tally.checked, tally.violations, first)


COUNT: LiteralString = """
SELECT coalesce(sum(things), 0)::bigint, count(*) FILTER (WHERE is_wrong),
       jsonb_path_query_array(
           jsonb_agg(jsonb_build_array(id::text, key::text) ORDER BY id) FILTER (WHERE is_wrong), '$[0 to 999]'
       )
FROM (
"""
END: LiteralString = """
) AS seen
"""


async def check_rows(conn: Connection, invariant: Invariant, chunk: Chunk) -> Tally:
    """Check an invariant in a chunk of its scope, by its query."""
    assert invariant.rows is not None, "the replay decides about the others"
    cursor = await conn.execute(
        COUNT + invariant.rows + END, {"keys": list(chunk.keys), "start": chunk.start, "end": chunk.end}
    )
    row = await cursor.fetchone()
    assert row is not None, "an aggregate has one row"
    return Tally(row[0], row[1], offenders(row[2] or ()))


def offenders(pairs: Iterable[Sequence[str]]) -> list[Offender]:
    """Return the offenders that a query named."""
    return [Offender(id, key) for id, key in pairs]
