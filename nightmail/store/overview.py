"""What the dashboard reads: many tables, nothing written.

A page must cost the same with ten messages and with ten million, so every statement here follows an index and stops
at a LIMIT. What no index answers (a state, a part of an address) is looked for in the newest SCAN messages; the page
then offers to go on from where the look ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from nightmail.store.database import Connection

PAGE = 50
# Messages looked at for one page of a search: about 20 ms.
SCAN = 10_000
# A count on a page stops here and is shown as "10,000 or more".
COUNT_MAX = 10_000
RUNS_DRAWN = 30
MINUTES_DRAWN = 30
# Above this many sends in the minutes drawn, they are summed from run records instead of single events.
EVENTS_DRAWN = 100_000
NEWEST = UUID(int=2**128 - 1)


@dataclass(frozen=True, slots=True)
class RunView:
    """A call of a job; `duration_ms` and `finished_at` are None while it runs."""

    job_id: UUID
    job: str
    slot: datetime
    trigger: str
    host: str
    started_at: datetime
    finished_at: datetime | None
    deadline_s: float
    state: str
    results: dict[str, Any]
    more: bool
    duration_ms: int | None
    error: str | None


# Rows of the dispatcher stand for a minute of work, not for a run: their length says nothing.
# The range instead of `job = j.job`, and job in the order, leave job_runs_by_job as the only index that fits: with an
# equality the planner walks job_runs_started for a job that hardly ever runs (250 ms for 100,000 rows, now 1 ms).
NEWEST_RUNS = """
SELECT r.job_id, r.job, r.slot, r.trigger, r.host, r.started_at, r.finished_at, r.deadline_s, r.state, r.results,
       r.more, r.duration_ms, r.error
FROM unnest(%(jobs)s::text[]) AS j (job)
CROSS JOIN LATERAL (
    SELECT *
    FROM job_runs
    WHERE job BETWEEN j.job AND j.job
      AND trigger <> 'dispatcher'
    ORDER BY job DESC, started_at DESC
    LIMIT %(limit)s
) AS r
ORDER BY r.job, r.started_at
"""


async def newest_runs(conn: Connection, jobs: Sequence[str]) -> dict[str, list[RunView]]:
    """Return the newest runs of each job, oldest first; a job that never ran has an empty list."""
    cursor = await conn.execute(NEWEST_RUNS, {"jobs": list(jobs), "limit": RUNS_DRAWN})
    runs: dict[str, list[RunView]] = {job: [] for job in jobs}
    for row in await cursor.fetchall():
        runs[row[1]].append(RunView(*row))
    return runs


# Paged by (started_at, job_id); one of the two statements, so that each follows its index: job_runs_started,
# job_runs_by_job. A state is looked for in the newest SCAN runs.
LIST_RUNS = """
SELECT job_id, job, slot, trigger, host, started_at, finished_at, deadline_s, state, results, more, duration_ms, error
FROM (
    SELECT *
    FROM job_runs
    WHERE (started_at, job_id) < (
        coalesce((SELECT started_at FROM job_runs WHERE job_id = %(before)s), 'infinity'), %(before)s
    )
    ORDER BY started_at DESC, job_id DESC
    LIMIT %(scan)s
) AS r
WHERE %(state)s::text IS NULL OR state = %(state)s
ORDER BY started_at DESC, job_id DESC
LIMIT %(limit)s
"""
LIST_RUNS_OF_JOB = LIST_RUNS.replace(
    "WHERE (started_at", "WHERE job BETWEEN %(job)s AND %(job)s\n      AND (started_at"
).replace("ORDER BY started_at", "ORDER BY job DESC, started_at")


async def list_runs(
    conn: Connection, *, job: str | None = None, state: str | None = None, before: UUID | None = None
) -> tuple[list[RunView], bool]:
    """Return a page of runs, newest first, and whether there are older ones."""
    arguments = {"job": job, "state": state, "before": before or NEWEST, "scan": SCAN, "limit": PAGE + 1}
    cursor = await conn.execute(LIST_RUNS if job is None else LIST_RUNS_OF_JOB, arguments)
    runs = [RunView(*row) for row in await cursor.fetchall()]
    return runs[:PAGE], len(runs) > PAGE


GET_RUN = """
SELECT job_id, job, slot, trigger, host, started_at, finished_at, deadline_s, state, results, more, duration_ms, error
FROM job_runs
WHERE job_id = %(job_id)s
"""


async def get_run(conn: Connection, job_id: UUID) -> RunView | None:
    """Return a run, None when there is none with this id."""
    cursor = await conn.execute(GET_RUN, {"job_id": job_id})
    row = await cursor.fetchone()
    return RunView(*row) if row else None


RUNS_OF_SLOT = """
SELECT job_id, job, slot, trigger, host, started_at, finished_at, deadline_s, state, results, more, duration_ms, error
FROM job_runs
WHERE job = %(job)s
  AND slot = %(slot)s
ORDER BY started_at
LIMIT 20
"""


async def runs_of_slot(conn: Connection, *, job: str, slot: datetime) -> list[RunView]:
    """Return the calls that named this slot, at most 20, so that duplicates can be seen."""
    cursor = await conn.execute(RUNS_OF_SLOT, {"job": job, "slot": slot})
    return [RunView(*row) for row in await cursor.fetchall()]


@dataclass(frozen=True, slots=True)
class Totals:
    """Messages by state among the newest COUNT_MAX; `stored` is the planner's estimate when there are more."""

    by_state: dict[str, int]
    counted: int
    since: datetime | None
    stored: int

    @property
    def is_all(self) -> bool:
        """Return whether every stored message was counted."""
        return self.counted < COUNT_MAX


TOTALS = """
SELECT state, count(*), min(created_at),
       (SELECT greatest(reltuples, 0)::bigint FROM pg_class WHERE oid = 'messages'::regclass)
FROM (
    SELECT CASE WHEN state = 'canceled' AND reason = 'suppressed' THEN 'suppressed' ELSE state END AS state, created_at
    FROM messages
    ORDER BY id DESC
    LIMIT %(limit)s
) AS newest
GROUP BY state
"""


async def count_by_state(conn: Connection) -> Totals:
    """Count the newest messages by state; a message whose recipients were all suppressed counts as `suppressed`."""
    cursor = await conn.execute(TOTALS, {"limit": COUNT_MAX})
    rows = await cursor.fetchall()
    counted = sum(row[1] for row in rows)
    since = min((row[2] for row in rows), default=None)
    stored = max(counted, rows[0][3]) if rows else 0
    return Totals({row[0]: row[1] for row in rows}, counted, since, stored)


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits in one lane; counts stop at COUNT_MAX. `oldest_due_at` None: nothing is due."""

    lane: str
    due: int
    later: int
    oldest_due_at: datetime | None


BACKLOG = """
SELECT lane.name,
       (SELECT count(*) FROM (
            SELECT FROM message_queue
            WHERE lane = lane.name AND claim_id IS NULL AND due_at <= nm_now()
            LIMIT %(limit)s
       ) AS due),
       (SELECT count(*) FROM (
            SELECT FROM message_queue
            WHERE lane = lane.name AND claim_id IS NULL AND due_at > nm_now()
            LIMIT %(limit)s
       ) AS later),
       (SELECT min(due_at) FROM message_queue
        WHERE lane = lane.name AND claim_id IS NULL AND due_at <= nm_now())
FROM unnest(ARRAY['live:email', 'live:sms', 'test']) AS lane (name)
"""

IN_FLIGHT = """
SELECT count(*)
FROM (
    SELECT
    FROM message_queue
    WHERE claim_id IS NOT NULL
    LIMIT %(limit)s
) AS held
"""


async def read_backlog(conn: Connection) -> tuple[list[Backlog], int]:
    """Return what waits in each lane, and how many messages runners hold now."""
    cursor = await conn.execute(BACKLOG, {"limit": COUNT_MAX})
    lanes = [Backlog(*row) for row in await cursor.fetchall()]
    cursor = await conn.execute(IN_FLIGHT, {"limit": COUNT_MAX})
    row = await cursor.fetchone()
    return lanes, row[0] if row else 0


SENT_BY_RUNS = """
SELECT date_trunc('minute', started_at), sum(coalesce((results ->> 'sent')::bigint, 0))::bigint
FROM job_runs
WHERE job = 'send-scheduled'
  AND started_at > date_trunc('minute', nm_now()) - make_interval(mins => %(minutes)s)
GROUP BY 1
"""

# message_events_recorded is a BRIN index: the newest pages only.
SENT_BY_EVENTS = """
SELECT date_trunc('minute', recorded_at), count(*)
FROM (
    SELECT recorded_at
    FROM message_events
    WHERE recorded_at > date_trunc('minute', nm_now()) - make_interval(mins => %(minutes)s)
      AND kind = 'sent'
    LIMIT %(limit)s
) AS sent
GROUP BY 1
"""

THIS_MINUTE = "SELECT date_trunc('minute', nm_now())"


async def sent_by_minute(conn: Connection) -> tuple[datetime, dict[datetime, int]]:
    """Return this minute and how many messages were sent in each of the last MINUTES_DRAWN that had any.

    Up to EVENTS_DRAWN of them the events are counted; above that the run records are, which may put a send into the
    minute in which its run began.
    """
    cursor = await conn.execute(THIS_MINUTE)
    now = await cursor.fetchone()
    assert now is not None, "a SELECT without FROM has one row"
    cursor = await conn.execute(SENT_BY_RUNS, {"minutes": MINUTES_DRAWN})
    by_runs = dict(await cursor.fetchall())
    if sum(by_runs.values()) > EVENTS_DRAWN:
        return now[0], by_runs
    cursor = await conn.execute(SENT_BY_EVENTS, {"minutes": MINUTES_DRAWN, "limit": EVENTS_DRAWN})
    return now[0], dict(await cursor.fetchall())


@dataclass(frozen=True, slots=True)
class AlertView:
    """An alert that is open now; `job` is '' when it is about no single job."""

    preset: str
    job: str
    summary: str
    opened_at: datetime


OPEN_ALERTS = """
SELECT preset, job, summary, opened_at
FROM alerts
WHERE closed_at IS NULL
ORDER BY opened_at DESC
LIMIT 50
"""


async def open_alerts(conn: Connection) -> list[AlertView]:
    """Return the alerts that are open, newest first, at most 50."""
    cursor = await conn.execute(OPEN_ALERTS)
    return [AlertView(*row) for row in await cursor.fetchall()]


@dataclass(frozen=True, slots=True)
class MessageLine:
    """A message in a list. `state` is what people see: sending and suppressed included."""

    id: UUID
    org_id: UUID
    org: str
    env: str
    channel: str
    state: str
    reason: str | None
    sender: str
    subject: str | None
    addresses: list[str]
    units: int
    created_at: datetime
    scheduled_at: datetime | None
    sent_at: datetime | None
    provider_message_id: str | None
    last_error: str | None
    excerpt: str


@dataclass(frozen=True, slots=True)
class MessageFilter:
    """What to list; None or '' leaves it open. `recipient` is any part of an address, in lower case."""

    org_id: UUID | None = None
    env: str | None = None
    channel: str | None = None
    state: str | None = None
    recipient: str = ""
    captured: bool = False

    @property
    def needs_scan(self) -> bool:
        """Return whether something is asked that no index answers."""
        is_unindexed = self.org_id is None and (self.env or self.channel)
        return bool(self.state or self.recipient or self.captured or is_unindexed)


@dataclass(frozen=True, slots=True)
class MessagePage:
    """Messages, newest first; `next_before` continues, None at the end. `scanned` when the look ended before it."""

    lines: list[MessageLine] = field(default_factory=list)
    next_before: UUID | None = None
    scanned: bool = False


# Reads messages_pkey backwards from `before`; stops at the page's length or after SCAN rows. Bodies and queue rows
# are joined for the rows that are shown only. `captured`: live, and taken by a provider that is no real one.
LIST_MESSAGES = """
SELECT m.id, m.org_id, coalesce(o.name, ''), m.env, m.channel,
       CASE
           WHEN q.intent_at IS NOT NULL THEN 'sending'
           WHEN m.state = 'canceled' AND m.reason = 'suppressed' THEN 'suppressed'
           ELSE m.state
       END,
       m.reason, m.sender, m.subject, m.addresses, m.units, m.created_at, m.scheduled_at, m.sent_at,
       m.provider_message_id, m.last_error, coalesce(left(b.text, 160), '')
FROM (
    SELECT *
    FROM (
        SELECT *
        FROM messages
        WHERE id < %(before)s
        ORDER BY id DESC
        LIMIT %(scan)s
    ) AS scanned
    WHERE (%(env)s::text IS NULL OR env = %(env)s)
      AND (%(channel)s::text IS NULL OR channel = %(channel)s)
      AND (%(state)s::text IS NULL OR CASE %(state)s::text
              WHEN 'suppressed' THEN state = 'canceled' AND reason = 'suppressed'
              WHEN 'canceled' THEN state = 'canceled' AND reason IS DISTINCT FROM 'suppressed'
              WHEN 'sending' THEN state = 'scheduled' AND EXISTS (
                  SELECT FROM message_queue AS held WHERE held.message_id = scanned.id AND held.intent_at IS NOT NULL
              )
              ELSE state = %(state)s
          END)
      AND (%(recipient)s = '' OR EXISTS (
              SELECT FROM unnest(addresses) AS a (address) WHERE strpos(lower(a.address), %(recipient)s) > 0
          ))
      AND (NOT %(captured)s OR (env = 'live' AND provider_message_id IS NOT NULL))
    ORDER BY id DESC
    LIMIT %(limit)s
) AS m
LEFT JOIN orgs AS o ON o.id = m.org_id
LEFT JOIN message_bodies AS b ON b.message_id = m.id
LEFT JOIN message_queue AS q ON q.message_id = m.id
ORDER BY m.id DESC
"""

# The same over messages_list.
LIST_MESSAGES_OF_ORG = LIST_MESSAGES.replace(
    "WHERE id < %(before)s",
    "WHERE org_id = %(org_id)s\n          AND env = %(env)s\n          AND channel = %(channel)s\n"
    "          AND id < %(before)s",
)

LAST_SCANNED = """
SELECT id
FROM messages
WHERE id < %(before)s
ORDER BY id DESC
LIMIT 1 OFFSET %(scan)s - 1
"""

LAST_SCANNED_OF_ORG = LAST_SCANNED.replace(
    "WHERE id", "WHERE org_id = %(org_id)s\n  AND env = %(env)s\n  AND channel = %(channel)s\n  AND id"
)


async def list_messages(conn: Connection, wanted: MessageFilter, *, before: UUID | None = None) -> MessagePage:
    """Return a page of messages of all orgs or one, newest first.

    An org's messages are indexed by env and channel, so up to four short reads are merged: nothing older than the
    point that all of them have reached is shown.
    """
    if wanted.org_id is None:
        reads = [(wanted.env, wanted.channel)]
    else:
        envs = [wanted.env] if wanted.env else ["live", "test"]
        channels = [wanted.channel] if wanted.channel else ["email", "sms"]
        reads = [(env, channel) for env in envs for channel in channels]
    lines: list[MessageLine] = []
    reached: list[UUID] = []
    scanned = False
    for env, channel in reads:
        found, end, was_scan = await _read_messages(conn, wanted, env, channel, before or NEWEST)
        lines += found
        scanned = scanned or was_scan
        if end is not None:
            reached.append(end)
    horizon = max(reached, default=None)
    shown = sorted((n for n in lines if horizon is None or n.id >= horizon), key=lambda n: n.id, reverse=True)
    if len(shown) > PAGE:
        return MessagePage(shown[:PAGE], shown[PAGE - 1].id)
    return MessagePage(shown, horizon, scanned)


async def _read_messages(
    conn: Connection, wanted: MessageFilter, env: str | None, channel: str | None, before: UUID
) -> tuple[list[MessageLine], UUID | None, bool]:
    """Return messages, the id down to which they are complete (None: to the end), and whether SCAN ended the look."""
    arguments = {
        "org_id": wanted.org_id,
        "env": env,
        "channel": channel,
        "state": wanted.state,
        "recipient": wanted.recipient,
        "captured": wanted.captured,
        "before": before,
        "scan": SCAN,
        "limit": PAGE + 1,
    }
    cursor = await conn.execute(LIST_MESSAGES if wanted.org_id is None else LIST_MESSAGES_OF_ORG, arguments)
    lines = [MessageLine(*row) for row in await cursor.fetchall()]
    if len(lines) > PAGE:
        return lines, lines[-1].id, False
    if not wanted.needs_scan:
        return lines, None, False
    cursor = await conn.execute(LAST_SCANNED if wanted.org_id is None else LAST_SCANNED_OF_ORG, arguments)
    row = await cursor.fetchone()
    return lines, row[0] if row else None, row is not None


@dataclass(frozen=True, slots=True)
class MessageDetail:
    """A message with everything known of it but its events; queue fields are None once it is finished."""

    id: UUID
    org_id: UUID
    org: str
    env: str
    channel: str
    state: str
    reason: str | None
    sender: str
    subject: str | None
    addresses: list[str]
    units: int
    rating: str
    credit_units: int
    metered_units: int
    credits: int
    credit_account_id: int | None
    credit_user: str | None
    period: str
    send_policy: str
    created_at: datetime
    scheduled_at: datetime | None
    sent_at: datetime | None
    provider_message_id: str | None
    last_error: str | None
    to: list[str]
    cc: list[str]
    bcc: list[str]
    reply_to: list[str]
    html: str | None
    text: str | None
    headers: list[tuple[str, str]]
    tags: list[dict[str, str]]
    due_at: datetime | None
    attempts: int | None
    takeovers: int | None
    intent_at: datetime | None
    runner: str | None
    lease_until: datetime | None


GET_MESSAGE = """
SELECT m.id, m.org_id, coalesce(o.name, ''), m.env, m.channel,
       CASE
           WHEN q.intent_at IS NOT NULL THEN 'sending'
           WHEN m.state = 'canceled' AND m.reason = 'suppressed' THEN 'suppressed'
           ELSE m.state
       END,
       m.reason, m.sender, m.subject, m.addresses, m.units, m.rating, m.credit_units,
       m.metered_units, m.credits, m.credit_account_id, a.user_id, m.period,
       coalesce(m.send_policy, o.send_policy, 'at_least_once'), m.created_at, m.scheduled_at, m.sent_at,
       m.provider_message_id, m.last_error, coalesce(b.to_addresses, '{}'), coalesce(b.cc_addresses, '{}'),
       coalesce(b.bcc_addresses, '{}'), coalesce(b.reply_to, '{}'), left(b.html, %(body)s), left(b.text, %(body)s),
       coalesce(b.headers, '[]'), coalesce(b.tags, '[]'),
       q.due_at, q.attempts, q.takeovers, q.intent_at, c.runner, c.lease_until
FROM messages AS m
LEFT JOIN orgs AS o ON o.id = m.org_id
LEFT JOIN message_bodies AS b ON b.message_id = m.id
LEFT JOIN message_queue AS q ON q.message_id = m.id
LEFT JOIN credit_accounts AS a ON a.id = m.credit_account_id
LEFT JOIN claims AS c ON c.claim_id = q.claim_id
WHERE m.id = %(message_id)s
"""
# Characters of a body that a page shows.
BODY_MAX = 500_000


async def get_message(conn: Connection, message_id: UUID) -> MessageDetail | None:
    """Return any org's message, None when there is none with this id; bodies are cut at BODY_MAX characters."""
    cursor = await conn.execute(GET_MESSAGE, {"message_id": message_id, "body": BODY_MAX})
    row = await cursor.fetchone()
    return MessageDetail(*row) if row else None


@dataclass(frozen=True, slots=True)
class RecipientOutcome:
    """What happened to one recipient; one that is not listed fared as the message did."""

    address: str
    state: str
    detail: str | None
    at: datetime


RECIPIENT_OUTCOMES = """
SELECT address, state, detail, at
FROM recipient_outcomes
WHERE message_id = %(message_id)s
ORDER BY at, address
LIMIT 200
"""


async def recipient_outcomes(conn: Connection, message_id: UUID) -> list[RecipientOutcome]:
    """Return what is known of single recipients."""
    cursor = await conn.execute(RECIPIENT_OUTCOMES, {"message_id": message_id})
    return [RecipientOutcome(*row) for row in await cursor.fetchall()]


DROPPED = """
SELECT message_id, address
FROM recipient_outcomes
WHERE message_id = ANY (%(message_ids)s)
  AND state IN ('suppressed', 'refused')
"""


async def dropped_recipients(conn: Connection, message_ids: Sequence[UUID]) -> dict[UUID, set[str]]:
    """Return the recipients that did not get each message: suppressed, or refused by the provider."""
    cursor = await conn.execute(DROPPED, {"message_ids": list(message_ids)})
    dropped: dict[UUID, set[str]] = {}
    for message_id, address in await cursor.fetchall():
        dropped.setdefault(message_id, set()).add(address)
    return dropped
