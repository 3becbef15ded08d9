"""A small company's books: messages of every fate, credits of every kind, overage, webhooks; all of it in order."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg

from nightmail.ids import new_id
from nightmail.rules.webhooks import NIGHTMAIL_TYPES
from nightmail.store import credit_expiry, credit_grants, credits, gate, queue, record
from nightmail.store.accept import NewMessage, accept_messages
from nightmail.store.credit_grants import START, NewGrant
from nightmail.store.credits import Wallet
from nightmail.store.database import Connection, Database
from nightmail.store.orgs import NewOrg, create_org
from nightmail.store.purchases import NewPurchase, create_purchase
from nightmail.store.record import Outcome
from nightmail.store.test_sends import finish_due_test_messages

SOON = timedelta(days=2)

# An hour old: what happens now was told to it.
ENDPOINT = """
INSERT INTO webhook_endpoints (id, org_id, env, url, dialect, types, topics, secret, created_at)
VALUES (%(id)s, %(org_id)s, 'live', 'https://example.com/', 'nightmail', %(types)s, %(topics)s, 'whsec_x',
        now() - interval '1 hour')
"""

# As the rating would have left it: all units of a message are paid with credits, two for each.
RATE = """
WITH rated AS (
    UPDATE messages
    SET rating = 'credits', credit_units = units, metered_units = 0, credits = 2 * units,
        credit_account_id = %(account)s
    WHERE id = %(message)s
    RETURNING org_id, channel, env, period, units
), moved AS (
    INSERT INTO usage_records AS u (org_id, channel, env, period, rating, shard, reserved)
    SELECT org_id, channel, env, period, 'credits', 0, units FROM rated
    ON CONFLICT (org_id, channel, env, period, rating, shard) DO UPDATE SET reserved = u.reserved + excluded.reserved
)
INSERT INTO usage_records AS u (org_id, channel, env, period, rating, shard, reserved)
SELECT org_id, channel, env, period, 'included', 0, -units FROM rated
ON CONFLICT (org_id, channel, env, period, rating, shard) DO UPDATE SET reserved = u.reserved + excluded.reserved
"""

QUOTA = """
DELETE FROM usage_quotas;
INSERT INTO usage_quotas (org_id, channel, period, taken)
SELECT org_id, channel, period, sum(reserved + used)
FROM usage_records
WHERE env = 'live' AND rating = 'included'
GROUP BY org_id, channel, period
"""

# One message of 12,000 units in a month that is over, of a plan that includes 10,000; told to Stripe in two parts.
METERED = """
WITH month AS (
    SELECT to_char(date_trunc('month', now() AT TIME ZONE 'UTC') - interval '3 months', 'YYYY-MM') AS period
), message AS (
    INSERT INTO messages (
        id, org_id, env, channel, state, sender, addresses, units, rating, period, created_at, sent_at,
        provider_message_id, metered_units
    )
    SELECT %(id)s, %(org_id)s, 'live', 'email', 'sent', 's', '{a@b.c}', 12000, 'metered', period, now(), now(), 'p',
           2000
    FROM month
), event AS (
    INSERT INTO message_events (message_id, org_id, kind, occurred_at) VALUES (%(id)s, %(org_id)s, 'sent', now())
), usage AS (
    INSERT INTO usage_records (org_id, channel, env, period, rating, shard, used)
    SELECT %(org_id)s, 'email', 'live', period, part.rating, 0, part.units
    FROM month, (VALUES ('included', 10000), ('metered', 2000)) AS part (rating, units)
)
INSERT INTO overage_reports (
    org_id, channel, period, revision, units, total, identifier, event_name, stripe_customer_id, event_at, state,
    attempts, first_called_at, reported_at
)
SELECT %(org_id)s, 'email', period, part.revision, part.units, part.total, 'overage-' || part.revision, 'email_overage',
       'cus_1', (period || '-28')::timestamp AT TIME ZONE 'UTC', 'reported', 1, now(), now()
FROM month, (VALUES (1, 1500, 1500), (2, 500, 2000)) AS part (revision, units, total)
"""


@dataclass
class Books:
    """The company's ids, by what they are."""

    url: str
    org_id: UUID = field(default_factory=new_id)
    metered_id: UUID = field(default_factory=new_id)
    ids: dict[str, UUID] = field(default_factory=dict)

    @property
    def wallet(self) -> Wallet:
        """Return the wallet that most happens to."""
        return Wallet(self.org_id, "live", "billing")

    @property
    def account_id(self) -> int:
        """Return its account."""
        (found,) = self.ask(
            "SELECT id FROM credit_accounts WHERE org_id = %s AND env = 'live' AND user_id = 'billing'", self.org_id
        )
        return int(found[0])

    def ask(self, query: str, *arguments: Any) -> list[tuple[Any, ...]]:
        """Return rows, on a connection of its own."""
        with psycopg.connect(self.url, autocommit=True) as conn:
            return conn.execute(query, arguments).fetchall()

    def tell(self, statement: str, **named: Any) -> None:
        """Run statements, on a connection of its own."""
        with psycopg.connect(self.url, autocommit=True) as conn:
            conn.execute(statement, named or None)


async def make_books(url: str) -> Books:
    """Do a day's business."""
    books = Books(url)
    database = Database(url, pool_max=4)
    await database.open()
    try:
        async with database.connection() as conn:
            org, _, _ = await create_org(conn, NewOrg("Acme"), actor="test")
            metered, _, _ = await create_org(
                conn, NewOrg("Metered", plan="pro", billing="metered", stripe_customer_id="cus_1"), actor="test"
            )
            books.org_id, books.metered_id = org.id, metered.id
            topics = sorted({topic for names in NIGHTMAIL_TYPES.values() for topic in names})
            books.ids["endpoint"] = new_id()
            named = {"id": books.ids["endpoint"], "org_id": org.id, "types": list(NIGHTMAIL_TYPES), "topics": topics}
            await conn.execute(ENDPOINT, named)
            await spend(conn, books)
            await subscribe(conn, Wallet(org.id, "live", "ada"))
        await send(database, books)
        books.ids["metered"] = new_id()
        books.tell(METERED, id=books.ids["metered"], org_id=books.metered_id)
        books.tell(QUOTA)
    finally:
        await database.close()
    await expire(url)
    return books


async def spend(conn: Connection, books: Books) -> None:
    """Do with one wallet all that can be done with it."""
    wallet = books.wallet
    now = datetime.now(UTC)
    await credit_grants.grant(conn, wallet, NewGrant(100, "early", priority=10, expires_at=now + SOON))
    await credit_grants.grant(conn, wallet, NewGrant(500, "late"))
    await credits.consume(conn, wallet, amount=30, reference="spent")
    await credits.consume(conn, wallet, amount=80, reference="both")
    await credits.reserve(conn, wallet, amount=20, reference="open")
    await credits.reserve(conn, wallet, amount=10, reference="captured")
    await credits.capture(conn, wallet, reference="captured", amount=6)
    await credits.reserve(conn, wallet, amount=5, reference="released")
    await credits.release(conn, wallet, reference="released")
    await credit_grants.refund(conn, wallet, reference="back", of="spent", amount=10)
    await credit_grants.grant(conn, wallet, NewGrant(7, "mistake", expires_at=now + SOON))
    batch_id = await credit_grants.find_batch(conn, wallet, "mistake")
    assert batch_id is not None
    await credit_grants.claw_back(conn, wallet, reference="oops", batch_id=batch_id, reason="mistake", amount=3)


async def subscribe(conn: Connection, wallet: Wallet) -> None:
    """Give a wallet a subscription that rolls over, some months old, and let it spend."""
    anchor = datetime.now(UTC) - timedelta(days=70)
    await create_purchase(conn, wallet, NewPurchase("yearly", "sub_1", anchor=anchor, grants_from=anchor), actor="test")
    await credits.consume(conn, wallet, amount=1200, reference="render")


async def expire(url: str) -> None:
    """Book what has ended three days later."""
    database = Database(url, pool_max=2, clock_offset="3 days")
    await database.open()
    async with database.connection() as conn:
        until = await queue.read_clock(conn)
        assert await credit_expiry.expire_chunk(conn, until=until, after=START, limit=100)
    await database.close()


def message(number: int, *, units: int = 1, scheduled_at: datetime | None = None) -> NewMessage:
    """Return a message to as many as it has units."""
    to = [f"{number}-{unit}@example.org" for unit in range(units)]
    return NewMessage(
        id=new_id(), channel="email", sender="a@example.com", subject="s", addresses=to, to=to, cc=[], bcc=[],
        reply_to=[], html=None, text="t", headers=[], tags=[], attachments=(), units=units, scheduled_at=scheduled_at,
    )  # fmt: skip


async def send(database: Database, books: Books) -> None:
    """Send, refuse and keep messages: test and live, included and paid with credits."""
    later = datetime.now(UTC) + timedelta(minutes=1)
    waiting, waiting_paid, in_test = (message(n, units=2, scheduled_at=later) for n in range(3))
    sent, paid, refused, test_sent = (message(n, units=3) for n in range(3, 7))
    names = ("waiting", "waiting_paid", "in_test", "sent", "paid", "refused", "test_sent")
    books.ids |= dict(
        zip(names, (m.id for m in (waiting, waiting_paid, in_test, sent, paid, refused, test_sent)), strict=True)
    )
    for env, messages in (("live", [waiting, waiting_paid, sent, paid, refused]), ("test", [in_test, test_sent])):
        for one in messages:
            answer = await accept_messages(database, org_id=books.org_id, env=env, messages=[one], idempotency=None)
            assert answer == "accepted"
    async with database.connection() as conn:
        for one in (waiting_paid, paid, refused):
            await conn.execute(RATE, {"account": books.account_id, "message": one.id})
            await credits.reserve(
                conn, books.wallet, amount=2 * one.units, reference=f"message:{one.id}", service="email"
            )
        assert (await finish_due_test_messages(conn, limit=10, shard=0)).sent == 1
        rows = await queue.claim_due(conn, "live:email", runner="test", limit=10, lease_s=60)
        passed = (await gate.pass_gate(conn, rows[0].claim_id, [r.message_id for r in rows], call_s=5, shard=0)).passed
        outcomes = [outcome_of(one, refused.id) for one in passed]
        assert len(outcomes) == 3
        await record.record_outcomes(conn, outcomes, shard=0)
        await conn.execute("DELETE FROM claims")
        # Nothing to do where the record step has settled them itself.
        await credits.capture(conn, books.wallet, reference=f"message:{paid.id}")
        await credits.release(conn, books.wallet, reference=f"message:{refused.id}")


def outcome_of(passed: gate.Passed, refused: UUID) -> Outcome:
    """Return how a call ended."""
    if passed.message_id == refused:
        return Outcome(passed.message_id, passed.claim_id, "failed", code="MessageRejected")
    return Outcome(passed.message_id, passed.claim_id, "sent", passed.units, "ses", f"ses-{passed.message_id}")
