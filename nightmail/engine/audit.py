"""The hourly audit: what was written since the last pass, in short read-only chunks, by whoever ticks.

One process at a time has the turn (store.audit.marks), however many tick. A pass stops when its time is over or the
process ends, and the next one goes on where its marks stand. What it finds is kept and looked at again each hour until
it is right: an alert is open as long as anything is (store.alerts).

Not in the hourly pass are sums over all messages of an org and whole tables: `nightmail audit` looks at those.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

import structlog

from nightmail.clock import monotonic
from nightmail.ids import new_claim_id
from nightmail.store.audit import INVARIANTS, Scope
from nightmail.store.audit.invariant import MOST_NAMED, Chunk, Tally
from nightmail.store.audit.marks import (
    OpenFinding,
    end_turn,
    get_mark,
    list_changed_accounts,
    list_changed_messages,
    list_open,
    read_horizon,
    read_lengths,
    record_chunk,
    take_turn,
)
from nightmail.store.audit.walk import FIRST, SIZE, check_chunk, list_keys, read_span
from nightmail.store.database import Database

EVERY_S = 3600.0
# One pass stops after this; the turn goes back, and whoever looks next goes on.
PASS_S = 20.0
STATEMENT_S = 25.0
# A chunk that began in time may take a while: a successor waits for it.
LEASE_S = 120.0
# For transactions that have read the time and not yet written anything.
MARGIN_S = 1.0
# Wallets or messages that a span of time may bring. One that brings more is halved before anything is checked: a mark
# moves after a whole span only, so that what is too much for one pass would be begun anew by each.
WANTED = 2000
# Entries of the wallets of a span, likewise: some seconds of work. A wallet that alone has more is named in the log and
# left to the full audit: a pass that cannot come to the end of it would never look at anything else.
MOST_ENTRIES = 100_000
FIRST_SPAN = timedelta(minutes=1)
LONGEST_SPAN = timedelta(hours=6)
SHORTEST_SPAN = timedelta(milliseconds=1)
# Findings about what was written are looked at one by one.
MOST_MOMENTS = 500
# A moment that is looked at again.
MOMENT = timedelta(milliseconds=1)
BY_NAME = {invariant.name: invariant for invariant in INVARIANTS}
# Looked at in whole by every pass: these are as many as there are endpoints, claims, metered orgs.
ALWAYS: tuple[Scope, ...] = ("now", "endpoints", "overage")


@dataclass(slots=True)
class Pass:
    """What a pass did: things checked, violations seen, and whether it came to its end."""

    checked: int = 0
    violations: int = 0
    accounts: int = 0
    messages: int = 0
    is_done: bool = False
    seen: set[Any] = field(default_factory=set)


class Auditor:
    """Audits for one process; any number of callers at once, one of whom gets the turn."""

    def __init__(self, database: Database, stopping: asyncio.Event) -> None:
        self._database = database
        self._stopping = stopping
        self._log = structlog.get_logger()

    async def audit_if_due(
        self, *, pass_s: float = PASS_S, margin_s: float = MARGIN_S, is_early: bool = False
    ) -> Pass | None:
        """Take the turn if one is due (or `is_early`), and work for at most `pass_s`; None when it cannot be had.

        Raises DatabaseAway.
        """
        claim_id = new_claim_id()
        take = partial(take_turn, claim_id=claim_id, lease_s=max(LEASE_S, 2 * pass_s), is_early=is_early)
        if not await self._database.run(take):
            return None
        work = Work(self._database, self._stopping, claim_id, until=monotonic() + pass_s)
        done = work.done
        try:
            await work.do(margin_s)
        finally:
            end = partial(end_turn, claim_id=claim_id, is_done=done.is_done, every_s=EVERY_S, checked=done.checked)
            await self._database.run(end)
        say = self._log.warning if done.violations else self._log.info
        say(
            "audit.pass",
            checked=done.checked,
            violations=done.violations,
            accounts=done.accounts,
            messages=done.messages,
            is_done=done.is_done,
        )
        return done


class Work:
    """One pass under way: the holder of a turn."""

    def __init__(self, database: Database, stopping: asyncio.Event, claim_id: UUID, *, until: float) -> None:
        self.done = Pass()
        self._database = database
        self._stopping = stopping
        self._claim_id = claim_id
        self._until = until
        self._log = structlog.get_logger()

    @property
    def _is_over(self) -> bool:
        return monotonic() >= self._until or self._stopping.is_set()

    async def do(self, margin_s: float) -> None:
        """Look again at what was wrong, at what is looked at each time, and at what was written since."""
        done = self.done
        findings = await self._database.run(list_open)
        of_scope: dict[Scope, list[OpenFinding]] = defaultdict(list)
        for finding in findings:
            if finding.invariant in BY_NAME:
                of_scope[BY_NAME[finding.invariant].scope].append(finding)
        # Those of an older version's invariants can never be met again.
        await self._clear({}, [finding for finding in findings if finding.invariant not in BY_NAME])
        wallets, _ = await self._leave_out({int(finding.key) for finding in of_scope["accounts"]})
        await self._look_again("accounts", wallets, of_scope["accounts"])
        await self._look_again("messages", {UUID(f.key): f for f in of_scope["messages"]}, of_scope["messages"])
        for finding in of_scope["written"][:MOST_MOMENTS]:
            start = datetime.fromisoformat(finding.key)
            await self._clear(await self._check(Chunk("written", start=start, end=start + MOMENT)), [finding])
        horizon = await self._database.run(partial(read_horizon, margin_s=margin_s))
        for scope in ALWAYS:
            await self._look_at_all(scope, of_scope[scope])
        await self._follow("accounts", horizon)
        done.seen.clear()
        await self._follow("messages", horizon)
        done.is_done = not self._is_over

    async def _look_again(self, scope: Scope, keys: Iterable[Any], findings: Sequence[OpenFinding]) -> None:
        """Look again at what was wrong, and clear what no longer is."""
        ordered = sorted(keys)
        for first in range(0, len(ordered), SIZE[scope]):
            if self._is_over:
                return
            part = ordered[first : first + SIZE[scope]]
            tallies = await self._check(Chunk(scope, part))
            texts = {str(key) for key in part}
            await self._clear(tallies, [finding for finding in findings if finding.key in texts])

    async def _look_at_all(self, scope: Scope, findings: Sequence[OpenFinding]) -> None:
        """Check a whole scope; a finding is cleared when all of it was looked at without meeting it again."""
        met: dict[str, Tally] = defaultdict(Tally)
        after = FIRST.get(scope)
        while not self._is_over:
            keys: Sequence[Any] = ()
            if after is not None:
                keys = await self._database.run(partial(list_keys, scope=scope, after=after, limit=SIZE[scope]))
            if keys or after is None:
                for name, tally in (await self._check(Chunk(scope, keys))).items():
                    met[name].add(tally)
            if not keys:
                await self._clear(met, findings)
                return
            after = keys[-1]

    # ── what was written since ──

    async def _follow(self, scope: Scope, horizon: datetime) -> None:
        """Check what was written since the scope's mark until the horizon, span by span, and move the mark."""
        mark = await self._database.run(partial(get_mark, scope=scope))
        start = mark if mark is not None else (await self._database.run(read_span))[0]
        span = FIRST_SPAN
        while start < horizon and not self._is_over:
            end = min(start + span, horizon)
            keys = await self._changed(scope, start, end)
            entries = 0
            if scope == "accounts":
                keys, entries = await self._leave_out(keys)
            if (len(keys) > WANTED or entries > MOST_ENTRIES) and end - start > SHORTEST_SPAN:
                span = max((end - start) / 2, SHORTEST_SPAN)
                continue
            fresh = [key for key in keys if key not in self.done.seen]
            for first in range(0, len(fresh), SIZE[scope]):
                part = fresh[first : first + SIZE[scope]]
                await self._check(Chunk(scope, part))
                self.done.seen.update(part)
            if scope == "accounts":
                self.done.accounts += len(fresh)
            else:
                self.done.messages += len(fresh)
                await self._check(Chunk("written", start=start, end=end))
            await self._record({}, scope=scope, audited_to=end)
            start = end
            if len(keys) <= WANTED / 2 and entries <= MOST_ENTRIES / 2:
                span = min(span * 2, LONGEST_SPAN)

    async def _leave_out(self, account_ids: Iterable[int]) -> tuple[list[int], int]:
        """Return the wallets that are not too long to be looked at here, and how many entries they have together."""
        lengths = await self._database.run(partial(read_lengths, account_ids=sorted(account_ids)))
        for account_id, entries in lengths.items():
            if entries > MOST_ENTRIES:
                self._log.warning("audit.left_out", account_id=account_id, entries=entries)
        short = {account_id: entries for account_id, entries in lengths.items() if entries <= MOST_ENTRIES}
        return sorted(short), sum(short.values())

    async def _changed(self, scope: Scope, start: datetime, end: datetime) -> Sequence[Any]:
        if scope == "accounts":
            return await self._database.run(partial(list_changed_accounts, start=start, end=end))
        return await self._database.run(partial(list_changed_messages, start=start, end=end))

    # ── one chunk ──

    async def _check(self, chunk: Chunk) -> dict[str, Tally]:
        """Check a chunk and keep what it found."""
        tallies = await self._database.run(partial(check_chunk, chunk=chunk, limit_s=STATEMENT_S))
        self.done.checked += sum(tally.checked for tally in tallies.values())
        self.done.violations += sum(tally.violations for tally in tallies.values())
        found = {name: tally.named for name, tally in tallies.items() if tally.named}
        if found:
            await self._record(found)
        return tallies

    async def _clear(self, tallies: Mapping[str, Tally], findings: Sequence[OpenFinding]) -> None:
        """Clear the findings that the tallies do not name, unless they could not name all."""
        named = {(name, offender.id) for name, tally in tallies.items() for offender in tally.named}
        overfull = {name for name, tally in tallies.items() if tally.violations >= MOST_NAMED}
        cleared = [f for f in findings if (f.invariant, f.offender) not in named and f.invariant not in overfull]
        if cleared:
            await self._record({}, cleared=cleared)

    async def _record(self, found: dict[str, Any], **what: Any) -> None:
        await self._database.run(partial(record_chunk, claim_id=self._claim_id, found=found, **what))
