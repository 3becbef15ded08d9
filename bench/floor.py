"""The floors: the same rows written to the same tables and indexes, by raw SQL in the fewest round trips.

A floor has no fairness between orgs, no suppression check, no lease, no fencing, no retry and no other outcome than
`sent`: what Nightmail takes longer is the price of those.
"""

from __future__ import annotations

import asyncio
import base64
from collections import deque
from typing import Any, LiteralString
from urllib.parse import urlsplit
from uuid import uuid4

import httptools
import psycopg

Connection = psycopg.AsyncConnection[Any]
BATCH = 500
FLUSH_AT = 100

FINISH_TEST = """
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

# Claim and gate in one: the intent is committed before the call, as it must be, in the same update as the claim.
TAKE_LIVE = """
WITH due AS MATERIALIZED (
    SELECT message_id
    FROM message_queue
    WHERE lane = 'live:email'
      AND claim_id IS NULL
      AND due_at <= statement_timestamp()
    ORDER BY due_at
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
), lease AS (
    INSERT INTO claims (claim_id, runner, lease_until)
    SELECT %(claim_id)s, 'floor', statement_timestamp() + interval '60 s'
    WHERE EXISTS (SELECT FROM due)
), taken AS (
    UPDATE message_queue
    SET claim_id = %(claim_id)s,
        intent_at = statement_timestamp(),
        attempts = attempts + 1
    WHERE message_id = ANY (ARRAY(SELECT message_id FROM due))
    RETURNING message_id
)
SELECT m.id, m.sender, m.subject, b.to_addresses, b.html, b.text
FROM taken
JOIN messages AS m ON m.id = taken.message_id
JOIN message_bodies AS b ON b.message_id = taken.message_id
"""

RECORD_LIVE = """
WITH result AS MATERIALIZED (
    SELECT * FROM unnest(%(ids)s::uuid[], %(provider_ids)s::text[]) AS r (message_id, provider_id)
), finished AS (
    DELETE FROM message_queue AS q
    USING result
    WHERE q.message_id = result.message_id
), recorded AS (
    UPDATE messages AS m
    SET state = 'sent',
        sent_at = statement_timestamp(),
        provider_message_id = result.provider_id
    FROM result
    WHERE m.id = result.message_id
    RETURNING m.id, m.org_id, m.channel, m.period, m.rating, m.units, result.provider_id
), events AS (
    INSERT INTO message_events (message_id, org_id, kind, occurred_at, data)
    SELECT id, org_id, 'sent', statement_timestamp(),
           jsonb_build_object('provider', 'floor', 'provider_message_id', provider_id)
    FROM recorded
), usage AS (
    INSERT INTO usage_records AS u (org_id, channel, env, period, rating, shard, reserved, used)
    SELECT org_id, channel, 'live', period, rating, %(shard)s, -sum(units), sum(units)
    FROM recorded
    GROUP BY 1, 2, 3, 4, 5
    ORDER BY 1, 2, 3, 4, 5
    ON CONFLICT (org_id, channel, env, period, rating, shard)
    DO UPDATE SET reserved = u.reserved + excluded.reserved, used = u.used + excluded.used
)
SELECT count(*) FROM recorded
"""

END_CLAIM = "DELETE FROM claims WHERE runner = 'floor'"


async def connect(url: str) -> Connection:
    """Return a connection as fast as psycopg offers: autocommit, prepared at once."""
    conn: Connection = await psycopg.AsyncConnection.connect(url, autocommit=True)
    conn.prepare_threshold = 0
    return conn


async def drain_test(conn: Connection, *, shard: int, statement: LiteralString = FINISH_TEST) -> int:
    """Finish all due test messages, one statement a set."""
    total = 0
    while True:
        cursor = await conn.execute(statement, {"limit": BATCH, "shard": shard})
        row = await cursor.fetchone()
        if row is None or row[0] == 0:
            return total
        total += row[0]


class _Answers(asyncio.Protocol):
    """One keep-alive HTTP connection: a request at a time, its answer's body as the result."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.parser: Any = httptools.HttpResponseParser(self)
        self.body = b""
        self.answer: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        assert self.answer is not None
        self.answer.set_result(self.body)
        self.parser, self.body = httptools.HttpResponseParser(self), b""

    async def post(self, request: bytes) -> bytes:
        """Send the request and wait for the answer's body."""
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self.answer


async def drain_live(conn: Connection, url: str, *, endpoint: str, concurrency: int, shard: int) -> int:
    """Send all due live emails: `concurrency` senders, one statement per set taken and per set recorded."""
    parts = urlsplit(endpoint)
    recorder = await connect(url)
    loop = asyncio.get_running_loop()
    waiting: deque[tuple[Any, ...]] = deque()
    results: list[tuple[Any, str]] = []
    arrived = asyncio.Event()
    taking = asyncio.Lock()
    is_empty = is_over = False
    total = 0

    async def take() -> bool:
        nonlocal is_empty
        async with taking:
            if not waiting and not is_empty:
                cursor = await conn.execute(TAKE_LIVE, {"limit": BATCH, "claim_id": uuid4()})
                waiting.extend(await cursor.fetchall())
                is_empty = not waiting
        return bool(waiting)

    async def send_all() -> None:
        _, connection = await loop.create_connection(_Answers, str(parts.hostname), parts.port or 80)
        while waiting or await take():
            row = waiting.popleft()
            body = await connection.post(_request(row))
            results.append((row[0], body.split(b'"')[3].decode()))
            if len(results) >= FLUSH_AT:
                arrived.set()
        connection.transport.close()

    async def record_all() -> None:
        nonlocal total
        while not is_over or results:
            await arrived.wait()
            if not is_over:
                arrived.clear()
            rows = results[:]
            results.clear()
            ids, provider_ids = [row[0] for row in rows], [row[1] for row in rows]
            await recorder.execute(RECORD_LIVE, {"ids": ids, "provider_ids": provider_ids, "shard": shard})
            total += len(rows)

    recording = asyncio.create_task(record_all())
    await asyncio.gather(*(send_all() for _ in range(concurrency)))
    is_over = True
    arrived.set()
    await recording
    await conn.execute(END_CLAIM)
    await recorder.close()
    return total


def _request(row: tuple[Any, ...]) -> bytes:
    """Return an SES v2 SendEmail request that carries our message id, as bytes."""
    message_id, sender, subject, to, html, text = row
    mime = (
        f"From: {sender}\r\nTo: {', '.join(to)}\r\nSubject: {subject}\r\nX-Nightmail-Message: {message_id}\r\n"
        "MIME-Version: 1.0\r\nContent-Type: multipart/alternative; boundary=b\r\n\r\n"
        f"--b\r\nContent-Type: text/plain\r\n\r\n{text}\r\n--b\r\nContent-Type: text/html\r\n\r\n{html}\r\n--b--\r\n"
    )
    recipients = ",".join(f'"{address}"' for address in to)
    body = (
        f'{{"FromEmailAddress":"{sender}","Destination":{{"ToAddresses":[{recipients}]}},'
        f'"EmailTags":[{{"Name":"nightmail_message","Value":"{message_id}"}}],'
        f'"Content":{{"Raw":{{"Data":"{base64.b64encode(mime.encode()).decode()}"}}}}}}'
    ).encode()
    return (
        b"POST /v2/email/outbound-emails HTTP/1.1\r\nhost: provider\r\nauthorization: floor\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
    )
