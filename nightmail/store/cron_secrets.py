"""cron_secrets: when each CRON_SECRET was first and last used, by its hash."""

from __future__ import annotations

from nightmail.store.database import Connection

NOTE_USE = """
INSERT INTO cron_secrets AS c (sha256, first_seen, last_used)
VALUES (%(sha256)s, nm_now(), nm_now())
ON CONFLICT (sha256) DO UPDATE
SET last_used = greatest(c.last_used, excluded.last_used)
"""


async def note_use(conn: Connection, sha256: bytes) -> None:
    """Remember that the secret with this hash was used now."""
    await conn.execute(NOTE_USE, {"sha256": sha256})
