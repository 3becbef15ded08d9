"""What the dashboard reads of webhooks: endpoints of all orgs, their deliveries and attempts; nothing written.

A page costs the same with ten endpoints and with ten thousand, however much waits behind one: every statement follows
an index and stops at a LIMIT. Event ids are UUIDv7, so a part of the primary keys (endpoint_id, event_id) is a span of
time. Signing secrets stay in the database, but for the last four characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from nightmail.rules.webhooks import Dialect, Status
from nightmail.store.database import Connection
from nightmail.store.overview import NEWEST, PAGE, SCAN

ENDPOINTS_PAGE = 25
HOURS_DRAWN = 168


@dataclass(frozen=True, slots=True)
class Caps:
    """How much is read of one endpoint: `pending` rows of each kind, `newest` events, `attempts` of each span."""

    pending: int
    newest: int
    attempts: int


def caps_of(endpoints: int) -> Caps:
    """Return what each of so many endpoints on one page gets: what is read in all stays about the same.

    When all of them are busy that is 50,000 attempts and as many deliveries, about a fifth of a second.
    """
    share = max(endpoints, 1)
    return Caps(max(500, 10_000 // share), max(200, 5_000 // share), max(40, 1_000 // share))


@dataclass(frozen=True, slots=True)
class EndpointRow:
    """An endpoint of any org; `secret_end` is all that is shown of its secret."""

    id: UUID
    org_id: UUID
    org: str
    env: str
    url: str
    description: str
    dialect: Dialect
    types: list[str]
    status: Status
    disabled_reason: str | None
    schedule: str
    secret_end: str
    previous_until: datetime | None
    failures: int
    first_failing_at: datetime | None
    blocked_until: datetime | None
    created_at: datetime

    @property
    def shown_status(self) -> str:
        """Return the status; `failing` is enabled and failed last."""
        return "failing" if self.status == "enabled" and self.failures else self.status


@dataclass(frozen=True, slots=True)
class EndpointFilter:
    """Which endpoints; None or '' leaves it open. `status` is the one shown; `url` is any part, in lower case."""

    org_id: UUID | None = None
    status: str | None = None
    url: str = ""


@dataclass(frozen=True, slots=True)
class EndpointPage:
    """Endpoints, newest first; `next_before` continues, None at the end. `scanned` when the look ended before it."""

    rows: list[EndpointRow] = field(default_factory=list)
    next_before: UUID | None = None
    scanned: bool = False


# Reads webhook_endpoints_pkey backwards; what no index answers is looked for in SCAN endpoints.
LIST_ENDPOINTS = """
SELECT e.id, e.org_id, coalesce(o.name, ''), e.env, e.url, e.description, e.dialect, e.types, e.status,
       e.disabled_reason, e.schedule, right(e.secret, 4),
       CASE WHEN e.previous_until > nm_now() THEN e.previous_until END, e.failures, e.first_failing_at,
       CASE WHEN e.blocked_until > nm_now() THEN e.blocked_until END, e.created_at
FROM (
    SELECT *
    FROM (
        SELECT *
        FROM webhook_endpoints
        WHERE id < %(before)s
        ORDER BY id DESC
        LIMIT %(scan)s
    ) AS scanned
    WHERE (%(status)s::text IS NULL
           OR %(status)s = CASE WHEN status = 'enabled' AND failures > 0 THEN 'failing' ELSE status END)
      AND (%(url)s = '' OR strpos(lower(url), %(url)s) > 0)
    ORDER BY id DESC
    LIMIT %(limit)s + 1
) AS e
LEFT JOIN orgs AS o ON o.id = e.org_id
ORDER BY e.id DESC
"""

# The same over webhook_endpoints_of_org; an org has a bounded number.
LIST_ENDPOINTS_OF_ORG = """
SELECT e.id, e.org_id, coalesce(o.name, ''), e.env, e.url, e.description, e.dialect, e.types, e.status,
       e.disabled_reason, e.schedule, right(e.secret, 4),
       CASE WHEN e.previous_until > nm_now() THEN e.previous_until END, e.failures, e.first_failing_at,
       CASE WHEN e.blocked_until > nm_now() THEN e.blocked_until END, e.created_at
FROM (
    SELECT *
    FROM webhook_endpoints
    WHERE org_id = %(org_id)s
      AND id < %(before)s
      AND (%(status)s::text IS NULL
           OR %(status)s = CASE WHEN status = 'enabled' AND failures > 0 THEN 'failing' ELSE status END)
      AND (%(url)s = '' OR strpos(lower(url), %(url)s) > 0)
    ORDER BY id DESC
    LIMIT %(limit)s + 1
) AS e
LEFT JOIN orgs AS o ON o.id = e.org_id
ORDER BY e.id DESC
"""

LAST_SCANNED_ENDPOINT = """
SELECT id
FROM webhook_endpoints
WHERE id < %(before)s
ORDER BY id DESC
LIMIT 1 OFFSET %(scan)s - 1
"""


async def list_endpoints(conn: Connection, wanted: EndpointFilter, *, before: UUID | None = None) -> EndpointPage:
    """Return a page of endpoints of all orgs or one, newest first."""
    arguments = {
        "org_id": wanted.org_id,
        "status": wanted.status,
        "url": wanted.url,
        "before": before or NEWEST,
        "scan": SCAN,
        "limit": ENDPOINTS_PAGE,
    }
    cursor = await conn.execute(LIST_ENDPOINTS if wanted.org_id is None else LIST_ENDPOINTS_OF_ORG, arguments)
    rows = [EndpointRow(*row) for row in await cursor.fetchall()]
    if len(rows) > ENDPOINTS_PAGE:
        return EndpointPage(rows[:ENDPOINTS_PAGE], rows[ENDPOINTS_PAGE - 1].id)
    if wanted.org_id is not None:
        return EndpointPage(rows)
    cursor = await conn.execute(LAST_SCANNED_ENDPOINT, arguments)
    last = await cursor.fetchone()
    return EndpointPage(rows, last[0] if last else None, last is not None)


GET_ENDPOINT = """
SELECT e.id, e.org_id, coalesce(o.name, ''), e.env, e.url, e.description, e.dialect, e.types, e.status,
       e.disabled_reason, e.schedule, right(e.secret, 4),
       CASE WHEN e.previous_until > nm_now() THEN e.previous_until END, e.failures, e.first_failing_at,
       CASE WHEN e.blocked_until > nm_now() THEN e.blocked_until END, e.created_at
FROM webhook_endpoints AS e
LEFT JOIN orgs AS o ON o.id = e.org_id
WHERE e.id = %(endpoint_id)s
"""


async def get_endpoint(conn: Connection, endpoint_id: UUID) -> EndpointRow | None:
    """Return any org's endpoint, None when there is none with this id."""
    cursor = await conn.execute(GET_ENDPOINT, {"endpoint_id": endpoint_id})
    row = await cursor.fetchone()
    return EndpointRow(*row) if row else None


COUNT_ENDPOINTS = """
SELECT CASE WHEN status = 'enabled' AND failures > 0 THEN 'failing' ELSE status END, count(*)
FROM (
    SELECT status, failures
    FROM webhook_endpoints
    ORDER BY id DESC
    LIMIT %(limit)s
) AS newest
GROUP BY 1
"""


async def count_endpoints(conn: Connection) -> dict[str, int]:
    """Count the newest SCAN endpoints by the status that is shown."""
    cursor = await conn.execute(COUNT_ENDPOINTS, {"limit": SCAN})
    return {row[0]: row[1] for row in await cursor.fetchall()}


@dataclass(frozen=True, slots=True)
class Standing:
    """What waits for an endpoint, and what failed; the counts stop at Caps.

    `fresh` were never tried, `again` will be tried again, `held` of these are being tried now. `oldest_at` is when the
    oldest of them happened; `next_due_at` is the next repeat. `failed` are among the newest `looked_at` events.
    """

    fresh: int
    again: int
    held: int
    oldest_at: datetime | None
    next_due_at: datetime | None
    failed: int
    looked_at: int


# webhook_deliveries_fresh and webhook_deliveries_due in their order, then the primary key backwards.
STANDINGS = """
SELECT e.id, fresh.rows, again.rows, again.held, least(fresh.oldest_at, again.oldest_at), again.next_due_at,
       newest.failed, newest.rows
FROM unnest(%(endpoint_ids)s::uuid[]) AS e (id)
CROSS JOIN LATERAL (
    SELECT count(*) AS rows, min(f.occurred_at) AS oldest_at
    FROM (
        SELECT occurred_at
        FROM webhook_deliveries
        WHERE endpoint_id = e.id
          AND seq IS NULL
          AND state = 'pending'
        ORDER BY due_at
        LIMIT %(pending)s
    ) AS f
) AS fresh
CROSS JOIN LATERAL (
    SELECT count(*) AS rows, min(r.occurred_at) AS oldest_at,
           count(*) FILTER (WHERE r.is_held) AS held, min(r.due_at) FILTER (WHERE NOT r.is_held) AS next_due_at
    FROM (
        SELECT occurred_at, due_at, claim_id IS NOT NULL AND due_at > nm_now() AS is_held
        FROM webhook_deliveries
        WHERE endpoint_id = e.id
          AND seq IS NOT NULL
          AND state = 'pending'
        ORDER BY due_at
        LIMIT %(pending)s
    ) AS r
) AS again
CROSS JOIN LATERAL (
    SELECT count(*) AS rows, count(*) FILTER (WHERE n.state = 'failed') AS failed
    FROM (
        SELECT state
        FROM webhook_deliveries
        WHERE endpoint_id = e.id
        ORDER BY event_id DESC
        LIMIT %(newest)s
    ) AS n
) AS newest
"""


async def read_standings(conn: Connection, endpoint_ids: Sequence[UUID], caps: Caps) -> dict[UUID, Standing]:
    """Return what waits for each endpoint and what failed."""
    arguments = {"endpoint_ids": list(endpoint_ids), "pending": caps.pending, "newest": caps.newest}
    cursor = await conn.execute(STANDINGS, arguments)
    return {row[0]: Standing(*row[1:]) for row in await cursor.fetchall()}


@dataclass(slots=True)
class AttemptCounts:
    """Attempts of an endpoint by hour of the last HOURS_DRAWN: answered with 2xx, and all others.

    `is_sampled`: there were more than Caps allows in some span, and the counts are a sample over the whole time.
    """

    this_hour: datetime
    by_hour: dict[datetime, tuple[int, int]] = field(default_factory=dict)
    is_sampled: bool = False


# Spans of event ids: 24 hours, and 24 times six hours before. Of each the newest attempts up to a bound, so that a busy
# endpoint is sampled over the whole week and not only seen in its last minutes. An attempt counts in the hour in which
# it was made; of events older than a week none is seen.
COUNT_ATTEMPTS = """
WITH span AS MATERIALIZED (
    SELECT (lpad(to_hex((extract(epoch FROM starts_at) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid AS first,
           (lpad(to_hex((extract(epoch FROM ends_at) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid AS after
    FROM (
        SELECT hour, hour + make_interval(hours => 1)
        FROM generate_series(
            date_trunc('hour', nm_now(), 'UTC') - make_interval(hours => 23), date_trunc('hour', nm_now(), 'UTC'),
            make_interval(hours => 1)
        ) AS s (hour)
        UNION ALL
        SELECT hour, hour + make_interval(hours => 6)
        FROM generate_series(
            date_trunc('hour', nm_now(), 'UTC') - make_interval(hours => 167),
            date_trunc('hour', nm_now(), 'UTC') - make_interval(hours => 29),
            make_interval(hours => 6)
        ) AS s (hour)
    ) AS s (starts_at, ends_at)
), seen AS (
    SELECT e.id, date_trunc('hour', a.sent_at, 'UTC') AS hour, a.http_status BETWEEN 200 AND 299 AS is_success, a.place
    FROM unnest(%(endpoint_ids)s::uuid[]) AS e (id)
    CROSS JOIN span AS s
    CROSS JOIN LATERAL (
        SELECT sent_at, http_status, row_number() OVER (ORDER BY event_id DESC, webhook_attempts.id DESC) AS place
        FROM webhook_attempts
        WHERE endpoint_id = e.id
          AND event_id >= s.first
          AND event_id < s.after
        ORDER BY event_id DESC, webhook_attempts.id DESC
        LIMIT %(attempts)s + 1
    ) AS a
)
SELECT id, hour, count(*) FILTER (WHERE is_success AND place <= %(attempts)s),
       count(*) FILTER (WHERE is_success IS NOT TRUE AND place <= %(attempts)s), bool_or(place > %(attempts)s)
FROM seen
GROUP BY id, hour
"""
THIS_HOUR = "SELECT date_trunc('hour', nm_now(), 'UTC')"


async def count_attempts(conn: Connection, endpoint_ids: Sequence[UUID], caps: Caps) -> dict[UUID, AttemptCounts]:
    """Return each endpoint's attempts of the last week by hour."""
    cursor = await conn.execute(THIS_HOUR)
    this_hour = await cursor.fetchone()
    assert this_hour is not None, "a SELECT without FROM has one row"
    counts = {endpoint_id: AttemptCounts(this_hour[0]) for endpoint_id in endpoint_ids}
    cursor = await conn.execute(COUNT_ATTEMPTS, {"endpoint_ids": list(endpoint_ids), "attempts": caps.attempts})
    for endpoint_id, hour, delivered, failed, is_sampled in await cursor.fetchall():
        one = counts[endpoint_id]
        one.by_hour[hour] = (delivered, failed)
        one.is_sampled = one.is_sampled or is_sampled
    return counts


@dataclass(frozen=True, slots=True)
class DeliveryRow:
    """An event for an endpoint, without its body; `is_claimed`: an attempt is being made now.

    `addresses` are those of its message, where they were read.
    """

    endpoint_id: UUID
    event_id: UUID
    topic: str
    message_id: UUID | None
    recipient: str
    occurred_at: datetime
    seq: int | None
    state: str
    reason: str | None
    due_at: datetime
    is_claimed: bool
    attempts: int
    finished_at: datetime | None
    addresses: list[str] | None = None

    @property
    def shown_state(self) -> str:
        """Return the state in the word of the pages."""
        if self.state != "pending":
            return self.state
        if self.is_claimed:
            return "attempting"
        return "retrying" if self.attempts else "pending"


@dataclass(frozen=True, slots=True)
class DeliveryPage:
    """Deliveries, newest event first; `next_before` continues. `scanned` when the look ended before the end."""

    rows: list[DeliveryRow] = field(default_factory=list)
    next_before: UUID | None = None
    scanned: bool = False


# There is no index on the state, which the hot path would pay for: it is looked for in the newest SCAN events.
LIST_DELIVERIES = """
SELECT d.endpoint_id, d.event_id, d.topic, d.message_id, d.recipient, d.occurred_at, d.seq, d.state, d.reason, d.due_at,
       d.claim_id IS NOT NULL AND d.due_at > nm_now(), d.attempts, d.finished_at, m.addresses
FROM (
    SELECT *
    FROM (
        SELECT *
        FROM webhook_deliveries
        WHERE endpoint_id = %(endpoint_id)s
          AND event_id < %(before)s
        ORDER BY event_id DESC
        LIMIT %(scan)s
    ) AS scanned
    WHERE %(state)s::text IS NULL OR state = %(state)s
    ORDER BY event_id DESC
    LIMIT %(limit)s + 1
) AS d
LEFT JOIN messages AS m ON m.id = d.message_id
ORDER BY d.event_id DESC
"""

LAST_SCANNED_DELIVERY = """
SELECT event_id
FROM webhook_deliveries
WHERE endpoint_id = %(endpoint_id)s
  AND event_id < %(before)s
ORDER BY event_id DESC
LIMIT 1 OFFSET %(scan)s - 1
"""


async def list_deliveries(
    conn: Connection, endpoint_id: UUID, *, state: str | None = None, before: UUID | None = None
) -> DeliveryPage:
    """Return a page of an endpoint's deliveries, newest event first."""
    arguments: dict[str, Any] = {
        "endpoint_id": endpoint_id,
        "state": state,
        "before": before or NEWEST,
        "scan": SCAN,
        "limit": PAGE,
    }
    cursor = await conn.execute(LIST_DELIVERIES, arguments)
    rows = [DeliveryRow(*row) for row in await cursor.fetchall()]
    if len(rows) > PAGE:
        return DeliveryPage(rows[:PAGE], rows[PAGE - 1].event_id)
    if state is None:
        return DeliveryPage(rows)
    cursor = await conn.execute(LAST_SCANNED_DELIVERY, arguments)
    last = await cursor.fetchone()
    return DeliveryPage(rows, last[0] if last else None, last is not None)


GET_DELIVERY = """
SELECT endpoint_id, event_id, topic, message_id, recipient, occurred_at, seq, state, reason, due_at,
       claim_id IS NOT NULL AND due_at > nm_now(), attempts, finished_at, body
FROM webhook_deliveries
WHERE endpoint_id = %(endpoint_id)s
  AND event_id = %(event_id)s
"""


async def get_delivery(conn: Connection, endpoint_id: UUID, event_id: UUID) -> tuple[DeliveryRow, str | None] | None:
    """Return a delivery and its body (None until its number is given); None when there is none with these ids."""
    cursor = await conn.execute(GET_DELIVERY, {"endpoint_id": endpoint_id, "event_id": event_id})
    row = await cursor.fetchone()
    return (DeliveryRow(*row[:-1]), row[-1]) if row else None


@dataclass(frozen=True, slots=True)
class MessageDelivery:
    """A delivery of one of a message's events, and where it goes."""

    row: DeliveryRow
    url: str
    dialect: Dialect


@dataclass(frozen=True, slots=True)
class MessageDeliveries:
    """Deliveries of a message's events, in the order of the events; `is_cut` when there may be more."""

    rows: list[MessageDelivery] = field(default_factory=list)
    is_cut: bool = False


# No index leads from a message to its deliveries, which every fact would pay for. But a delivery is inserted in the
# transaction that records its event, so its id's time is near `recorded_at`: each endpoint of the org is looked at from
# one second before to two after each second with events, and what touches is one span, so that no row is read twice.
# Endpoints and spans share the rows that are read in all; one row more of each than its share tells that it was cut.
OF_MESSAGE = """
WITH message AS MATERIALIZED (
    SELECT id, org_id, env
    FROM messages
    WHERE id = %(message_id)s
), second AS MATERIALIZED (
    SELECT DISTINCT date_trunc('second', recorded_at) AS at
    FROM message_events
    WHERE message_id = %(message_id)s
    ORDER BY at
    LIMIT %(spans)s + 1
), numbered AS (
    SELECT at, count(*) FILTER (WHERE is_first) OVER (ORDER BY at) AS number
    FROM (
        SELECT at, (at - lag(at) OVER (ORDER BY at) <= make_interval(secs => 4)) IS NOT TRUE AS is_first
        FROM second
        ORDER BY at
        LIMIT %(spans)s
    ) AS s
), span AS MATERIALIZED (
    SELECT (lpad(to_hex((extract(epoch FROM min(at) - make_interval(secs => 1)) * 1000)::bigint), 12, '0')
            || repeat('0', 20))::uuid AS first,
           (lpad(to_hex((extract(epoch FROM max(at) + make_interval(secs => 3)) * 1000)::bigint), 12, '0')
            || repeat('0', 20))::uuid AS after
    FROM numbered
    GROUP BY number
), listener AS MATERIALIZED (
    SELECT e.id, e.url, e.dialect
    FROM message AS m
    JOIN webhook_endpoints AS e ON e.org_id = m.org_id AND e.env = m.env
), share AS MATERIALIZED (
    SELECT %(scan)s / greatest((SELECT count(*) FROM listener) * (SELECT count(*) FROM span), 1) AS rows
)
SELECT d.endpoint_id, d.event_id, d.topic, d.message_id, d.recipient, d.occurred_at, d.seq, d.state, d.reason, d.due_at,
       d.claim_id IS NOT NULL AND d.due_at > nm_now(), d.attempts, d.finished_at, e.url, e.dialect,
       bool_or(d.place > (SELECT rows FROM share)) OVER () OR (SELECT count(*) FROM second) > %(spans)s
FROM listener AS e
CROSS JOIN span AS s
CROSS JOIN LATERAL (
    SELECT *, row_number() OVER (ORDER BY event_id) AS place
    FROM webhook_deliveries
    WHERE endpoint_id = e.id
      AND event_id >= s.first
      AND event_id < s.after
    ORDER BY event_id
    LIMIT (SELECT rows FROM share) + 1
) AS d
WHERE d.message_id = %(message_id)s
   OR d.place > (SELECT rows FROM share)
ORDER BY d.message_id IS NOT DISTINCT FROM %(message_id)s DESC, d.event_id, d.endpoint_id
LIMIT %(limit)s + 1
"""
SPANS_MAX = 40
# Rows of deliveries read for a message: about a tenth of a second.
OF_MESSAGE_SCAN = 100_000
OF_MESSAGE_LIMIT = 200


async def deliveries_of_message(conn: Connection, message_id: UUID) -> MessageDeliveries:
    """Return the deliveries of a message's events to endpoints that still exist."""
    arguments = {
        "message_id": message_id,
        "spans": SPANS_MAX,
        "scan": OF_MESSAGE_SCAN,
        "limit": OF_MESSAGE_LIMIT,
    }
    cursor = await conn.execute(OF_MESSAGE, arguments)
    found = await cursor.fetchall()
    rows = [MessageDelivery(DeliveryRow(*row[:13]), row[13], row[14]) for row in found if row[3] == message_id]
    is_cut = len(rows) > OF_MESSAGE_LIMIT or any(row[15] for row in found)
    return MessageDeliveries(rows[:OF_MESSAGE_LIMIT], is_cut)
