"""Faults the simulation must find, each a replaced store function: the seams where the design could have been wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch
from uuid import UUID

from nightmail.store import gate, queue, record
from nightmail.store.database import Connection
from nightmail.store.fan_out import Fact, fan_out
from nightmail.store.gate import GateResult
from nightmail.store.queue import Claimed
from nightmail.store.rating import Ended, read_rated, settle_messages
from nightmail.store.record import Outcome, Recorded
from tests.simulation.world import ORG, Mutant

__all__ = ["MUTANTS", "SHIPPED"]


def replaced(text: str, *changes: tuple[str, str]) -> str:
    """Return SQL with each change (pattern, text) made; a pattern that no longer fits the shipped SQL is an error."""
    for pattern, new in changes:
        text, count = re.subn(pattern, new, text)
        assert count, f"the shipped SQL no longer has {pattern!r}"
    return text


STATUS_ONLY = replaced(record.RECORD, (r"q\.claim_id = [rh]\.claim_id", "q.claim_id IS NOT NULL"))


async def record_by_status(conn: Connection, outcomes: Sequence[Outcome], *, shard: int) -> Recorded:
    """Record whatever is held, by whomever: the source's `AND status = 'sending'`."""
    with patch.object(record, "RECORD", STATUS_ONLY):
        return await record.record_outcomes(conn, outcomes, shard=shard)


NO_GATE = replaced(
    gate.GATE,
    (r"JOIN claims AS c ON .*", ""),
    (r"q\.claim_id = %\(claim_id\)s", "true"),
    (r"AND c\.lease_until >= .*", ""),
    (r"cardinality\(hit\.addresses\) >= cardinality\(m\.addresses\)", "false"),
    (r"hit\.addresses AS suppressed", "'{}'::text[] AS suppressed"),
)


async def call_without_gate(
    conn: Connection, claim_id: UUID, message_ids: Sequence[UUID], *, call_s: float, shard: int
) -> GateResult:
    """Call what was claimed, without a look at lease, cancellation or suppression; intents are written."""
    with patch.object(gate, "GATE", NO_GATE):
        return await gate.pass_gate(conn, claim_id, message_ids, call_s=call_s, shard=shard)


IN_SUBQUERY = """
WITH lease AS (
    INSERT INTO claims (claim_id, runner, lease_until)
    SELECT %(claim_id)s, %(runner)s, nm_now() + make_interval(secs => %(lease_s)s)
)
UPDATE message_queue AS q
SET claim_id = %(claim_id)s
WHERE q.message_id IN (
    SELECT d.message_id
    FROM message_queue AS d
    WHERE d.lane = %(lane)s
      AND d.claim_id IS NULL
      AND d.due_at <= nm_now()
    ORDER BY d.due_at
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
)
""" + queue.CLAIM[queue.CLAIM.rindex("RETURNING") :]


async def claim_by_subquery(conn: Connection, lane: str, **options: Any) -> list[Claimed]:
    """Claim with the limit in a subquery, which a nested loop runs once per row."""
    with patch.object(queue, "CLAIM", IN_SUBQUERY):
        return await queue.claim_due(conn, lane, **options)


async def claim_without_lock(conn: Connection, lane: str, **options: Any) -> list[Claimed]:
    """Claim due rows whether or not somebody has them."""
    held = replaced(queue.CLAIM, (r"q\.claim_id IS NULL", "(q.claim_id IS NULL OR q.claim_id IS NOT NULL)"))
    with patch.object(queue, "CLAIM", held):
        return await queue.claim_due(conn, lane, **options)


NO_OUTBOX = replaced(record.RECORD, (r"(?s)(\), facts AS.*?)WHERE h\.kind IN \('sent', 'failed'\)", r"\1WHERE false"))


async def record_state_only(conn: Connection, outcomes: Sequence[Outcome], *, shard: int) -> Recorded:
    """Record the state; event, usage and delivery come later, each in a transaction of its own."""

    async def settle_later(conn: Connection, ended: Sequence[Ended], *, shard: int) -> None: ...

    with patch.object(record, "RECORD", NO_OUTBOX), patch.object(record, "settle_messages", settle_later):
        return await record.record_outcomes(conn, outcomes, shard=shard)


async def write_outbox(conn: Connection, outcomes: Sequence[Outcome], recorded: Recorded, *, shard: int) -> None:
    """Write the events, the usage and the deliveries of what was recorded before."""
    for outcome in outcomes:
        kind = recorded.written.get(outcome.message_id)
        if kind not in ("sent", "failed"):
            continue
        await conn.execute(
            "INSERT INTO message_events (message_id, org_id, kind, occurred_at)"
            " SELECT id, org_id, %s, nm_now() FROM messages WHERE id = %s",
            [kind, outcome.message_id],
        )
        used = outcome.units if kind == "sent" else 0
        await settle_messages(conn, [Ended(await read_rated(conn, outcome.message_id), used)], shard=shard)
    await write_deliveries(conn, outcomes, recorded, shard=shard)


async def record_untold(conn: Connection, outcomes: Sequence[Outcome], *, shard: int) -> Recorded:
    """Record state, event and usage; who is to be told of it comes in a transaction of its own."""

    async def fan_out_later(conn: Connection, facts: Sequence[Fact]) -> int:
        return 0

    with patch.object(record, "fan_out", fan_out_later):
        return await record.record_outcomes(conn, outcomes, shard=shard)


async def write_deliveries(conn: Connection, outcomes: Sequence[Outcome], recorded: Recorded, *, shard: int) -> None:
    """Write the deliveries of what was recorded before."""
    facts = [
        Fact(ORG, "live", f"email.{kind}", message_id=message_id)
        for message_id, kind in recorded.written.items()
        if kind in ("sent", "failed")
    ]
    await fan_out(conn, facts)


NESTED_LOOP_LEAVES_OUT = ("hashjoin", "mergejoin", "hashagg", "sort", "material")
SHIPPED = Mutant()
MUTANTS = {
    mutant.name: mutant
    for mutant in (
        Mutant("status-only guard", record_outcomes=record_by_status),
        Mutant("no gate", pass_gate=call_without_gate),
        Mutant(
            "IN-subquery claim",
            claim_due=claim_by_subquery,
            session="; ".join(f"SET enable_{way} = off" for way in NESTED_LOOP_LEAVES_OUT),
        ),
        Mutant(
            "outbox outside the transaction",
            record_outcomes=record_state_only,
            record_rest=write_outbox,
            checks_each_step=False,
        ),
        Mutant(
            "deliveries outside the transaction",
            record_outcomes=record_untold,
            record_rest=write_deliveries,
        ),
        Mutant("missing heartbeat", has_heartbeat=False),
        Mutant("counter as claim id", has_counter=True),
        Mutant("claim without a lock", claim_due=claim_without_lock),
    )
}
