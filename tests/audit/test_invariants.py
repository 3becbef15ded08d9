"""Every invariant can fail: one row of good books is spoilt, and the audit names it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from nightmail.store import credits
from nightmail.store.audit import INVARIANTS, Finding, audit
from nightmail.store.audit.invariant import Chunk
from nightmail.store.audit.walk import check_chunk, reading
from nightmail.store.credit_grants import NewGrant, claw_back, find_batch, grant
from nightmail.store.credits import Wallet
from nightmail.store.database import Connection
from tests.audit.books import Books

pytestmark = pytest.mark.anyio

NOBODY = UUID(int=7)

# What is spoilt → the invariants that must name it, and no other. Where there are several, each is about another side
# of the same fact. `{name}` are ids of the books.
SPOILT: dict[str, tuple[str, set[str]]] = {
    "a queued message is canceled": ("UPDATE messages SET state = 'canceled' WHERE id = {waiting}", {"queued"}),
    "a waiting message leaves the queue": (
        "DELETE FROM message_queue WHERE message_id = {in_test}", {"queued", "reserved"},
    ),
    "a waiting message has a sent event": (
        "INSERT INTO message_events (message_id, org_id, kind, provider_ref, occurred_at)"
        " VALUES ({in_test}, {org}, 'sent', 'x', now())",
        {"sent_event"},
    ),
    "a sent message has no sent event": (
        "DELETE FROM message_events WHERE message_id = {test_sent}", {"sent_event", "used"},
    ),
    "a sent message has no provider id": (
        "UPDATE messages SET provider_message_id = NULL WHERE id = {sent}", {"provider_id"},
    ),
    "a message of nobody": (
        "INSERT INTO messages (id, org_id, env, channel, state, sender, addresses, units, period, created_at)"
        " VALUES (gen_random_uuid(), {nobody}, 'live', 'email', 'canceled', 's', '{{a}}', 1, '2026-01', now())",
        {"owned"},
    ),
    "a sent message was charged half": (
        "UPDATE messages SET credits = 2 * credits WHERE id = {paid}", {"paid", "credit_captured_for"},
    ),
    "a failed message was charged": (
        "UPDATE credit_transactions SET kind = 'capture'"
        " WHERE kind = 'release' AND reference = 'message:' || {refused}",
        {"paid", "credit_captured_for", "credit_replay"},
    ),
    "another message was charged": (
        "UPDATE credit_transactions SET reference = 'message:' || {nobody}"
        " WHERE kind IN ('reserve', 'capture') AND reference = 'message:' || {paid}",
        {"paid", "credit_captured_for"},
    ),
    "a waiting message reserved half": (
        "UPDATE messages SET credits = 2 * credits WHERE id = {waiting_paid}", {"paid", "credit_reserved_for"},
    ),
    "a claim that is not there": (
        "UPDATE message_queue SET claim_id = gen_random_uuid() WHERE message_id = {waiting}", {"held"},
    ),
    "a claim long over": (
        "INSERT INTO claims VALUES (gen_random_uuid(), 'dead', now() - interval '11 minutes')", {"leased"},
    ),
    "a call in doubt that nobody takes up": (
        "UPDATE message_queue SET intent_at = now(), due_at = now() - interval '11 minutes'"
        " WHERE message_id = {waiting}",
        {"doubtful"},
    ),
    "usage reserved twice": (
        "UPDATE usage_records SET reserved = reserved + 1 WHERE org_id = {org} AND env = 'test'", {"reserved"},
    ),
    "usage counted twice": (
        "UPDATE usage_records SET used = used + 1 WHERE org_id = {org} AND env = 'test'", {"used"},
    ),
    "usage with another rating": (
        "UPDATE usage_records SET rating = 'metered' WHERE org_id = {org} AND rating = 'credits'", {"reserved", "used"},
    ),
    "a quota miscounted": ("UPDATE usage_quotas SET taken = taken + 1 WHERE org_id = {org}", {"taken"}),
    "an endpoint was not told": (
        "DELETE FROM webhook_deliveries WHERE topic = 'email.sent' AND message_id = {sent}", {"telling"},
    ),
    "an endpoint was told of what was not": (
        "INSERT INTO webhook_deliveries (endpoint_id, event_id, org_id, topic, message_id, recipient, occurred_at,"
        " due_at) SELECT endpoint_id, nm_uuid7(), org_id, topic, message_id, 'nobody', now(), now()"
        " FROM webhook_deliveries"
        " WHERE message_id = {sent} AND topic = 'email.sent'",
        {"told"},
    ),
    "a numbered delivery has no body": (
        "UPDATE webhook_deliveries SET seq = 0 WHERE message_id = {sent} AND topic = 'email.sent'", {"told"},
    ),
    "a number was given twice": (
        "UPDATE webhook_deliveries SET seq = 1, body = '{{}}' WHERE message_id = {sent} AND topic = 'email.sent'",
        {"numbered"},
    ),
    "a balance": ("UPDATE credit_accounts SET balance = balance + 1 WHERE id = {account}", {"credit_balance"}),
    "a running balance": (
        "UPDATE credit_entries SET balance_after = balance_after + 1 WHERE account_id = {account} AND seq = 2",
        {"credit_running_balance"},
    ),
    "a hole in the numbers": (
        "UPDATE credit_entries SET seq = seq + 1 WHERE account_id = {account}"
        " AND seq = (SELECT seq FROM credit_accounts WHERE id = {account});"
        " UPDATE credit_accounts SET seq = seq + 1 WHERE id = {account}",
        {"credit_balance", "credit_running_balance"},
    ),
    "a batch that lost something": (
        "ALTER TABLE credit_batches DROP CONSTRAINT credit_batches_conserved;"
        "UPDATE credit_batches SET consumed = consumed + 1 WHERE id = {late}",
        {"credit_batches", "credit_replay"},
    ),
    "a transaction that does not sum to zero": (
        "UPDATE credit_entries SET amount = amount + 1 WHERE account LIKE 'service:%%' AND transaction_id = {spent}",
        {"credit_zero"},
    ),
    "an expiry that was not booked": (
        "UPDATE credit_batches SET consumed = consumed - 1, expired = expired + 1 WHERE id = {late}",
        {"credit_expired", "credit_replay"},
    ),
    "a batch expired twice": (
        "INSERT INTO credit_transactions (id, account_id, kind, amount) VALUES ({nobody}, {account}, 'expire', 1);"
        "INSERT INTO credit_entries (transaction_id, line, account_id, account, seq, balance_after, batch_id, amount)"
        " SELECT {nobody}, s.line, a.id, s.account, a.seq + s.nth, a.balance + s.after, s.batch_id::uuid, s.amount"
        " FROM credit_accounts AS a,"
        " (VALUES (1, 'wallet', 1, -1, {mistake}, -1), (2, 'system:expiry', NULL, NULL, NULL, 1)) AS s"
        " (line, account, nth, after, batch_id, amount) WHERE a.id = {account};"
        "UPDATE credit_accounts SET balance = balance - 1, seq = seq + 1 WHERE id = {account}",
        {"credit_balance", "credit_batches", "credit_expired", "credit_expired_once", "credit_replay"},
    ),
    "a reservation that grew": (
        "UPDATE credit_reservations SET amount = amount + 1 WHERE reference = 'open'",
        {"credit_reserved", "credit_settled"},
    ),
    "one reference for two spends": (
        "UPDATE credit_transactions SET reference = 'released' WHERE reference = 'both'", {"credit_references"},
    ),
    "a settlement that lost something": (
        "UPDATE credit_transactions SET answer = answer || '{{\"released\": 1}}'"
        " WHERE reference = 'captured' AND kind = 'capture'",
        {"credit_settled"},
    ),
    "a month granted as more than it gave": (
        "UPDATE credit_grants SET amount = amount + 1", {"credit_grants"},
    ),
    "a month whose grant is not written down": (
        "DELETE FROM credit_grants WHERE period_start = (SELECT min(period_start) FROM credit_grants)",
        {"credit_grants"},
    ),
    "a spend from a dead batch": (
        "UPDATE credit_batches SET expires_at = issued_at WHERE id = {early}",
        {"credit_never_spent_dead", "credit_burn_order"},
    ),
    "a refund of more than was spent": (
        "UPDATE credit_transactions SET amount = 9 WHERE reference = 'spent'", {"credit_refunds"},
    ),
    "a spend out of order": ("UPDATE credit_batches SET priority = 5 WHERE id = {late}", {"credit_burn_order"}),
    "a batch that another history made": (
        "UPDATE credit_batches SET remaining = remaining + 2, reserved = reserved - 2 WHERE id = {late}",
        {"credit_reserved", "credit_replay"},
    ),
    "a revision's total": ("UPDATE overage_reports SET total = total + 1 WHERE revision = 1", {"overage_revisions"}),
    "a revision is missing": (
        "UPDATE overage_reports SET revision = 3 WHERE revision = 2", {"overage_revisions"},
    ),
    "a report of another month": (
        "UPDATE overage_reports SET event_at = event_at + interval '10 days'", {"overage_revisions"},
    ),
    "more reported than metered": (
        "UPDATE overage_reports SET units = units + 1, total = total + 1 WHERE revision = 2", {"overage_units"},
    ),
    "less reported than metered": ("DELETE FROM overage_reports WHERE revision = 2", {"overage_complete"}),
    "reported without a call": ("UPDATE overage_reports SET first_called_at = NULL", {"overage_called"}),
    "an entry of no transaction": (
        "INSERT INTO credit_entries (transaction_id, line, account_id, account, amount)"
        " VALUES (gen_random_uuid(), 1, {account}, 'service:x', 1)",
        {"credit_entries_owned"},
    ),
    "a batch that nothing granted": (
        "INSERT INTO credit_batches (id, account_id, granted, remaining, consumed, source, issued_at)"
        " VALUES (gen_random_uuid(), {account}, 1, 0, 1, 'bonus', now())",
        {"credit_batches_owned"},
    ),
    "an open batch that nothing granted": (
        "INSERT INTO credit_batches (id, account_id, granted, remaining, source, issued_at)"
        " VALUES (gen_random_uuid(), {account}, 1, 1, 'bonus', now())",
        {"credit_balance", "credit_batches", "credit_batches_owned", "credit_replay"},
    ),
    "a reservation of no transaction": (
        "UPDATE credit_reservations SET transaction_id = gen_random_uuid() WHERE reference = 'open'",
        {"credit_reservations_owned"},
    ),
    "a queue row of no message": (
        "INSERT INTO message_queue (message_id, org_id, lane, due_at) VALUES (gen_random_uuid(), {org}, 'test', now())",
        {"queue_owned"},
    ),
    "an event of no message": (
        "INSERT INTO message_events (message_id, org_id, kind, occurred_at)"
        " VALUES (gen_random_uuid(), {org}, 'failed', now())",
        {"events_owned"},
    ),
    "usage of nobody": (
        "INSERT INTO usage_records (org_id, channel, env, period, rating, shard) VALUES"
        " ({nobody}, 'email', 'live', '2026-01', 'included', 0)",
        {"usage_owned"},
    ),
}  # fmt: skip


async def violations(conn: Connection) -> dict[str, Finding]:
    return {finding.name: finding for finding in await audit(conn) if finding.violations}


async def test_good_books_are_clean_and_every_invariant_looked_at_something(conn: Connection) -> None:
    findings = await audit(conn)
    assert {finding.name: finding.first for finding in findings if finding.violations} == {}
    assert {finding.name for finding in findings if not finding.checked} == {"leased", "doubtful", "held"}
    assert [finding.name for finding in findings] == [invariant.name for invariant in INVARIANTS]


@pytest.mark.parametrize("what", SPOILT)
async def test_one_spoilt_row_is_named(books: Books, conn: Connection, what: str) -> None:
    statement, expected = SPOILT[what]
    batch = "(SELECT id FROM credit_transactions WHERE kind = 'grant' AND reference = '{}')"
    names: dict[str, Any] = {name: f"'{id}'::uuid" for name, id in books.ids.items()}
    names |= {name: batch.format(name) for name in ("early", "late", "mistake")}
    names |= {
        "org": f"'{books.org_id}'::uuid",
        "nobody": f"'{NOBODY}'::uuid",
        "account": str(books.account_id),
        "spent": "(SELECT id FROM credit_transactions WHERE kind = 'consume' AND reference = 'spent')",
    }
    async with conn.transaction(force_rollback=True):
        await conn.execute("SET LOCAL session_replication_role = replica")
        for part in statement.format(**names).split(";"):
            assert (await conn.execute(part.replace("%%", "%").encode())).rowcount != 0, part
        found = await violations(conn)
        assert {name: finding.first for name, finding in found.items()}.keys() == expected
        assert all(finding.first and finding.violations >= 1 for finding in found.values())


def test_each_invariant_is_spoilt_by_something() -> None:
    assert set().union(*(names for _, names in SPOILT.values())) == {invariant.name for invariant in INVARIANTS}


async def test_a_reservation_outlives_its_message(books: Books, conn: Connection) -> None:
    """One for a message that is not there, or is finished, or for what is no id at all."""
    async with conn.transaction(force_rollback=True):
        # After the expiry of the books: a wallet's times do not go back.
        await conn.execute("SELECT set_config('nightmail.clock_offset', '4 days', true)")
        references = [f"message:{uuid4()}", f"message:{books.ids['sent']}", "message:x"]
        for reference in references:
            await credits.reserve(conn, books.wallet, amount=1, reference=reference)
        found = await violations(conn)
        assert found.keys() == {"credit_reserved_for"}
        assert found["credit_reserved_for"].first == sorted(references)


@pytest.mark.parametrize("is_jobs", [False, True])
async def test_a_batch_that_a_clawback_ended_was_spent_in_its_old_order(
    books: Books, conn: Connection, is_jobs: bool
) -> None:
    """By the end that the clawback's answer keeps, also for grants of the job, which have no answer."""
    wallet = Wallet(books.org_id, "live", "bob")
    now = datetime.now(UTC)
    async with conn.transaction(force_rollback=True):
        await grant(conn, wallet, NewGrant(10, "clawed", expires_at=now + timedelta(days=40)))
        await grant(conn, wallet, NewGrant(10, "sooner", expires_at=now + timedelta(days=20)))
        await credits.consume(conn, wallet, amount=4, reference="one")
        batch_id = await find_batch(conn, wallet, "clawed")
        assert batch_id is not None
        await claw_back(conn, wallet, reference="back", batch_id=batch_id, reason="mistake")
        await credits.consume(conn, wallet, amount=4, reference="two")
        await conn.execute("SET LOCAL session_replication_role = replica")
        if is_jobs:
            await conn.execute("UPDATE credit_transactions SET answer = NULL WHERE id = %s", [batch_id])
        assert not await violations(conn)
        await conn.execute("UPDATE credit_batches SET priority = 1 WHERE id = %s", [batch_id])
        assert set(await violations(conn)) == {"credit_burn_order"}


async def test_an_audit_can_write_nothing(books: Books, conn: Connection) -> None:
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        async with reading(conn):
            await conn.execute("UPDATE credit_accounts SET balance = balance")
    await conn.execute("SET default_transaction_read_only = on")
    assert (await check_chunk(conn, Chunk("accounts", [books.account_id])))["credit_balance"].checked == 1
    assert not await violations(conn)
