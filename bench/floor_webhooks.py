"""The floors of deliveries: the same rows by one INSERT, the same posts by a bare loop around aiohttp."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from ipaddress import IPv4Network
from uuid import uuid4

import aiohttp
from yarl import URL

from bench.seed import SECRET
from nightmail.ids import new_id
from nightmail.providers.guarded_http import Guard, SystemLookup, guarded_session
from nightmail.providers.webhook_http import HEADERS
from nightmail.webhooks.bodies import AboutMessage, Event, render
from nightmail.webhooks.signature import signature_headers

# bench.floor.FINISH_TEST with a delivery for each endpoint of the org that wants to know.
FINISH_AND_TELL = """
WITH due AS MATERIALIZED (
    SELECT message_id
    FROM message_queue
    WHERE lane = 'test'
      AND claim_id IS NULL
      AND due_at <= statement_timestamp()
    ORDER BY due_at
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
), finished AS (
    DELETE FROM message_queue
    WHERE message_id = ANY (ARRAY(SELECT message_id FROM due))
    RETURNING message_id
), recorded AS (
    UPDATE messages AS m
    SET state = 'sent',
        sent_at = statement_timestamp(),
        provider_message_id = 'test_' || m.id
    FROM finished
    WHERE m.id = finished.message_id
    RETURNING m.id, m.org_id, m.channel, m.period, m.rating, m.units
), events AS (
    INSERT INTO message_events (message_id, org_id, kind, occurred_at)
    SELECT id, org_id, 'sent', statement_timestamp()
    FROM recorded
), deliveries AS (
    INSERT INTO webhook_deliveries (endpoint_id, event_id, org_id, topic, message_id, data, occurred_at, due_at)
    SELECT e.id, uuidv7(), r.org_id, 'email.sent', r.id, '{}', statement_timestamp(), statement_timestamp()
    FROM recorded AS r
    JOIN webhook_endpoints AS e ON e.org_id = r.org_id AND e.env = 'test' AND e.status = 'enabled'
    WHERE 'email.sent' = ANY (e.topics)
), usage AS (
    INSERT INTO usage_records AS u (org_id, channel, env, period, rating, shard, reserved, used)
    SELECT org_id, channel, 'test', period, rating, %(shard)s, -sum(units), sum(units)
    FROM recorded
    GROUP BY 1, 2, 3, 4, 5
    ORDER BY 1, 2, 3, 4, 5
    ON CONFLICT (org_id, channel, env, period, rating, shard)
    DO UPDATE SET reserved = u.reserved + excluded.reserved, used = u.used + excluded.used
)
SELECT count(*) FROM recorded
"""


def example_body() -> bytes:
    """Return a body as large as those of the seeded messages (bench.seed)."""
    moment = datetime.now(UTC)
    message = AboutMessage(
        id=new_id(),
        env="test",
        channel="email",
        sender="Sender <sender@sender.test>",
        subject="Message number 12345",
        to=["person12345@recipient.test"],
        cc=[],
        tags=[],
        units=1,
        created_at=moment,
        scheduled_at=moment,
        provider_message_id="stored_12345",
    )
    return render(Event("email.sent", "", {}, moment, message), "nightmail").encode()


async def post_all(sink: str, *, posts: int, paths: int, concurrency: int) -> int:
    """Sign and post that many bodies, `concurrency` at once, over one session with the settings of the real one."""
    urls = [URL(f"{sink}/endpoint/{number}") for number in range(paths)]
    body, numbers, timeout = example_body(), iter(range(posts)), aiohttp.ClientTimeout(total=15)

    async def post_some() -> None:
        for number in numbers:
            headers = signature_headers((SECRET,), webhook_id=str(uuid4()), timestamp=int(time.time()), body=body)
            url = urls[number % paths]
            async with session.post(
                url, data=body, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                await response.read()
                assert response.status == 200

    guard = Guard(SystemLookup(), [IPv4Network("127.0.0.0/8")])
    async with guarded_session(guard, concurrency=concurrency, headers=HEADERS) as session:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(post_some())
    return posts
