"""idempotency_keys: answers kept for 24 hours; written by accept (store.accept), deleted here."""

from __future__ import annotations

from nightmail.store.database import Connection

CHUNK = 5000

# A key whose request still runs is held by that request's transaction and skipped.
DELETE_EXPIRED = """
WITH expired AS MATERIALIZED (
    SELECT org_id, env, key
    FROM idempotency_keys
    WHERE expires_at <= nm_now()
    ORDER BY expires_at
    LIMIT %(chunk)s
    FOR UPDATE SKIP LOCKED
)
DELETE FROM idempotency_keys AS k
USING expired AS e
WHERE (k.org_id, k.env, k.key) = (e.org_id, e.env, e.key)
"""


async def delete_expired(conn: Connection) -> int:
    """Delete up to CHUNK expired keys; return how many."""
    cursor = await conn.execute(DELETE_EXPIRED, {"chunk": CHUNK})
    return cursor.rowcount


COUNT_EXPIRED = "SELECT count(*) FROM idempotency_keys WHERE expires_at <= nm_now()"


async def count_expired(conn: Connection) -> int:
    """Count the keys a run would delete now."""
    cursor = await conn.execute(COUNT_EXPIRED)
    row = await cursor.fetchone()
    return int(row[0]) if row else 0
