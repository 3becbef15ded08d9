"""What the send-scheduled tests share: an org with due messages, runners, and the final account.

The account compares three books: the database's, the provider's append-only log, and a trigger that writes down every
takeover (a queue row does not outlive its message, so its counter cannot be read afterwards).
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import psycopg
import structlog

from nightmail.engine.crash import CrashPoints
from nightmail.engine.deadline import Deadline
from nightmail.engine.job import JobContext
from nightmail.ids import new_id
from nightmail.jobs.send_scheduled import work_lanes
from nightmail.ports import Attachment, Ports
from nightmail.providers.capture import CaptureSender
from nightmail.settings import Settings, load
from nightmail.store.accept import NewMessage, accept_messages
from nightmail.store.audit import audit
from nightmail.store.credit_grants import NewGrant, grant
from nightmail.store.credits import Wallet
from nightmail.store.database import Database
from nightmail.store.orgs import NewOrg, create_org
from tests.ports import make_ports
from tests.providers.conftest import AWS_VARIABLES, FakeProviderProcess, make_sender, start_fake_provider

__all__ = ["Account", "FakeProviderProcess", "World", "start_provider"]

# One short line per event: the console renderer would print every local of a traceback.
QUIET = structlog.wrap_logger(
    structlog.PrintLogger(),
    processors=[
        structlog.processors.format_exc_info,
        structlog.processors.KeyValueRenderer(key_order=["event"]),
    ],
)
LANES = ("live:email", "live:sms", "test")
ACCEPT_AT_ONCE = 1000
# What is not included is metered: nothing is refused.
UNLIMITED = {"plan": "pro", "billing": "metered"}
# The first four emails are included, the next are paid with what WALLET holds, and then all are metered.
MIXED = {"plan": "mixed", "billing": "metered"}
MIXED_PLAN = "INSERT INTO message_plans VALUES ('mixed', 4, 4, 3, 3) ON CONFLICT DO NOTHING"
WALLET = 15

TAKEOVER_BOOK = """
CREATE TABLE takeover_book (message_id uuid NOT NULL, takeovers int NOT NULL, claim_id uuid);
CREATE FUNCTION note_takeover() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO takeover_book VALUES (NEW.message_id, NEW.takeovers, OLD.claim_id);
    RETURN NULL;
END $$;
CREATE TRIGGER note_takeover AFTER UPDATE OF takeovers ON message_queue
    FOR EACH ROW WHEN (NEW.takeovers > OLD.takeovers) EXECUTE FUNCTION note_takeover();
"""

MESSAGES = """
SELECT m.id::text, m.state, m.provider_message_id, m.env,
       (SELECT count(*) FROM message_events AS e WHERE e.message_id = m.id AND e.kind = 'sent'),
       (SELECT count(*) FROM message_events AS e WHERE e.message_id = m.id AND e.kind = 'late_result'),
       (SELECT count(*) FROM takeover_book AS t WHERE t.message_id = m.id)
FROM messages AS m
"""

# What must have been used: the units of sent messages without the recipients that did not get them.
USAGE = """
SELECT (SELECT coalesce(sum(used), 0)::bigint FROM usage_records),
       (SELECT coalesce(sum(reserved), 0)::bigint FROM usage_records),
       (SELECT coalesce(sum(m.units - (
            SELECT count(*) FROM recipient_outcomes AS r
            WHERE r.message_id = m.id AND r.state IN ('suppressed', 'refused')
        )), 0)::bigint FROM messages AS m WHERE m.state = 'sent'),
       (SELECT coalesce(sum(m.units), 0)::bigint FROM messages AS m WHERE m.state IN ('scheduled', 'ambiguous')),
       (SELECT count(*) FROM message_queue),
       (SELECT count(*) FROM claims)
"""


def start_provider(folder: Path, *arguments: str) -> FakeProviderProcess:
    """Start the fake provider with its log in `folder`."""
    return start_fake_provider(folder, *arguments)


@contextmanager
def aws_credentials() -> Iterator[None]:
    """Give this process credentials that the fake provider accepts, while clients are made."""
    before = {name: os.environ.get(name) for name in AWS_VARIABLES}
    os.environ.update(AWS_VARIABLES)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@dataclass(slots=True)
class Account:
    """What became of every message, by all three books; violations are what must never be."""

    states: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    calls: int = 0
    doubles: int = 0
    takeovers: int = 0
    late_results: int = 0
    queue_left: int = 0
    claims_left: int = 0
    reserved_left: int = 0
    lost: list[str] = field(default_factory=list)
    beyond_bound: list[str] = field(default_factory=list)
    called_but_unsent: list[str] = field(default_factory=list)
    foreign_ids: list[str] = field(default_factory=list)
    wrong_events: list[str] = field(default_factory=list)
    usage: tuple[int, int] = (0, 0)

    @property
    def violations(self) -> dict[str, Any]:
        """Return what is wrong, empty when nothing is; a message with a call may still be unfinished."""
        wrong: dict[str, Any] = {
            name: getattr(self, name) for name in ("lost", "beyond_bound", "foreign_ids", "wrong_events")
        }
        if self.usage[0] != self.usage[1]:
            wrong["used, should be"] = self.usage
        if self.reserved_left:
            wrong["reserved_left"] = self.reserved_left
        return {name: value for name, value in wrong.items() if value}


@dataclass
class World:
    """One database, one org in it, one provider process."""

    database_url: str
    provider: FakeProviderProcess
    sender: str = "ses"
    org_id: UUID = field(default_factory=new_id)
    options: dict[str, Any] = field(default_factory=dict)
    senders: list[Any] = field(default_factory=list)
    has_sms: bool = False
    is_mixed: bool = False  # the org's messages are included, paid with credits, and metered

    # ── making it ──

    @classmethod
    async def make(cls, database_url: str, provider: FakeProviderProcess, **fields: Any) -> World:
        """Add the takeover book and an org to a fresh database."""
        world = cls(database_url, provider, **fields)
        with psycopg.connect(database_url, autocommit=True) as conn:
            conn.execute(TAKEOVER_BOOK)
            conn.execute(MIXED_PLAN)
        world.org_id = await world.add_org(**(MIXED if world.is_mixed else {}))
        if world.is_mixed:
            await world.give_credits(WALLET, "first")
        return world

    async def add_org(self, **fields: Any) -> UUID:
        """Make another org; unless `fields` say otherwise no limit keeps it from sending."""
        async with self.database() as database, database.connection() as conn:
            org, _, _ = await create_org(conn, NewOrg(**{"name": "Crossing", **UNLIMITED, **fields}), actor="test")
        return org.id

    async def give_credits(self, credits: int, reference: str = "more") -> None:
        """Fill the wallet that pays for the org's messages."""
        async with self.database() as database, database.connection() as conn:
            await grant(conn, Wallet(self.org_id, "live", "billing"), NewGrant(credits, reference))

    async def accept(
        self,
        count: int = 1,
        *,
        to: Callable[[int], list[str]] = lambda number: [f"ok+{number}@recipient.test"],
        at: datetime | None = None,
        env: str = "live",
        channel: Any = "email",
        org_id: UUID | None = None,
        policy: str | None = None,
        offset: str = "",
        subject: str = "Night mail",
        attachments: Sequence[Attachment] = (),
    ) -> list[UUID]:
        """Accept messages through the store, due at `at` or now; recipients say how the provider treats them."""
        self.has_sms = self.has_sms or channel == "sms"
        messages = [
            NewMessage(
                id=new_id(),
                channel=channel,
                sender="post@sender.test" if channel == "email" else "",
                subject=subject if channel == "email" else None,
                addresses=to(number),
                to=to(number),
                cc=[],
                bcc=[],
                reply_to=[],
                html=None,
                text="Past cotton-grass and moorland boulder",
                headers=[],
                tags=[],
                attachments=attachments,
                units=len(to(number)),
                scheduled_at=at,
                send_policy=policy,
            )
            for number in range(count)
        ]
        async with self.database(offset) as database:
            for start in range(0, count, ACCEPT_AT_ONCE):
                answer = await accept_messages(
                    database,
                    org_id=org_id or self.org_id,
                    env=env,
                    messages=messages[start : start + ACCEPT_AT_ONCE],
                    idempotency=None,
                )
                assert answer == "accepted"
        return [message.id for message in messages]

    # ── running ──

    @asynccontextmanager
    async def database(self, offset: str = "") -> AsyncIterator[Database]:
        """Lend a pool whose clock is `offset` (an interval) ahead."""
        database = Database(self.database_url, pool_max=8, clock_offset=offset)
        await database.open()
        try:
            yield database
        finally:
            await database.close()

    def settings(self, **options: Any) -> Settings:
        """Return settings with this world's options and more."""
        return load({"nightmail_env": "test", "send_concurrency": 8, **self.options, **options})

    def ports(self) -> Ports:
        """Return the real adapters, pointed at the provider; they live as long as the world."""
        if not self.senders:
            urls: dict[str, Any] = {"http_url": self.provider.http_url, "smtp_url": self.provider.smtp_url}
            with aws_credentials():
                # A client costs 0.2 s: SMS has one only where SMS is sent.
                self.senders = [make_sender(self.sender, **urls, concurrency=16)]
                self.senders.append(make_sender("aws_sms", **urls) if self.has_sms else CaptureSender())
        email, sms = self.senders
        return make_ports(email=email, sms=sms)

    async def close(self) -> None:
        """Close the adapters."""
        for sender in self.senders:
            await sender.close()

    def context(self, database: Database, *, deadline_s: float = 25.0, **options: Any) -> JobContext:
        """Return the context of one run."""
        crash = CrashPoints.parse(options.pop("crash", None))
        return JobContext(
            job_id=new_id(),
            job="send-scheduled",
            database=database,
            ports=options.pop("ports", None) or self.ports(),
            settings=self.settings(**options),
            deadline=Deadline.after(deadline_s),
            runner=f"test-{os.getpid()}",
            log=QUIET,
            crash=crash,
        )

    async def run(
        self, *, offset: str = "", lanes: Sequence[str] = LANES, deadline_s: float = 25.0, **options: Any
    ) -> Counter[str]:
        """Run the job once, in this process, with the clock moved by `offset`."""
        async with self.database(offset) as database:
            counts, _ = await work_lanes(self.context(database, deadline_s=deadline_s, **options), lanes)
        return counts

    async def drain(self, *, limit_s: float = 30.0, **options: Any) -> Counter[str]:
        """Run again and again, waiting for leases of the dead to end, until no message is unfinished."""
        total: Counter[str] = Counter()
        async with asyncio.timeout(limit_s), self.database() as database:
            while True:
                counts, _ = await work_lanes(self.context(database, **options), LANES)
                total.update(counts)
                async with database.connection() as conn:
                    cursor = await conn.execute(
                        "SELECT count(*), extract(epoch FROM min(c.lease_until) - nm_now())::float8"
                        " FROM message_queue AS q LEFT JOIN claims AS c USING (claim_id)"
                    )
                    left, lease_s = await cursor.fetchone() or (0, None)
                if not left:
                    return total
                await asyncio.sleep(max(0.01, min(lease_s or 0.02, 1.0)))

    # ── reading ──

    def ask(self, query: str, *arguments: Any) -> list[Any]:
        """Return the rows of a query on a connection of its own; single columns come as values."""
        with psycopg.connect(self.database_url, autocommit=True) as conn:
            rows = conn.execute(query, arguments or None).fetchall()
        return [row[0] if len(row) == 1 else row for row in rows]

    def tell(self, statement: str, *arguments: Any) -> None:
        """Run a statement on a connection of its own."""
        with psycopg.connect(self.database_url, autocommit=True) as conn:
            conn.execute(statement, arguments or None)

    def taken(self) -> Counter[str]:
        """Return how often the provider took each message."""
        return Counter(self.provider.get("/_log/counts"))

    def state(self, message_id: UUID) -> tuple[str, str | None]:
        """Return a message's state and reason."""
        (row,) = self.ask("SELECT state, reason FROM messages WHERE id = %s", message_id)
        return row  # type: ignore[no-any-return]

    def queued(self, message_id: UUID) -> dict[str, Any]:
        """Return a message's queue row, empty when it has none; `wait_s` is the time until it is due."""
        rows = self.ask(
            "SELECT attempts, takeovers, intent_at IS NOT NULL, claim_id,"
            " extract(epoch FROM due_at - now())::float8 FROM message_queue WHERE message_id = %s",
            message_id,
        )
        names = ("attempts", "takeovers", "intent", "claim_id", "wait_s")
        return dict(zip(names, rows[0], strict=True)) if rows else {}

    async def broken(self) -> list[str]:
        """Return the audit's invariants that do not hold."""
        async with self.database() as database, database.connection() as conn:
            return [finding.name for finding in await audit(conn) if finding.violations]

    def ratings(self) -> dict[str, int]:
        """Return used units by rating."""
        return dict(self.ask("SELECT rating, sum(used)::int FROM usage_records GROUP BY rating"))

    def intents(self) -> int:
        """Return how many rows have a call in flight, or one whose end nobody knows."""
        return int(self.ask("SELECT count(*) FROM message_queue WHERE intent_at IS NOT NULL")[0])

    def account(self) -> Account:
        """Compare the three books."""
        account = Account()
        taken = self.taken()
        accepted_ids: set[tuple[str, str]] = set()
        with self.provider.log.open("rb") as lines:
            for line in lines:
                entry = msgspec.json.decode(line)
                accepted_ids.add((entry["message_id"], entry["provider_message_id"]))
        for message_id, state, provider_id, env, sent_events, late, takeovers in self.ask(MESSAGES):
            calls = taken[message_id]
            account.states[state] += 1
            account.calls += calls
            account.takeovers += takeovers
            account.late_results += late
            account.doubles += max(0, calls - 1)
            account.sent += state == "sent"
            if state == "scheduled" or (state == "sent" and env == "live" and calls == 0):
                account.lost.append(message_id)
            if state not in ("sent", "scheduled") and calls:
                account.called_but_unsent.append(message_id)
            if calls > 1 + takeovers:
                account.beyond_bound.append(message_id)
            if sent_events != (state == "sent"):
                account.wrong_events.append(message_id)
            is_named = (message_id, provider_id) in accepted_ids or self.sender != "ses"
            if state == "sent" and env == "live" and not is_named:
                account.foreign_ids.append(message_id)
        used, reserved, should, waiting, account.queue_left, account.claims_left = self.ask(USAGE)[0]
        account.usage = (used, should)
        account.reserved_left = reserved - waiting
        return account
