"""Whether PostgreSQL answers and takes writes."""

from __future__ import annotations

from nightmail.store.database import Connection

# Reading our own table fails as DatabaseAway while the schema is not there.
PING = "SELECT current_setting('transaction_read_only') = 'off' AND EXISTS (SELECT FROM schema_migrations)"


async def is_writable(conn: Connection) -> bool:
    """Return whether this server takes writes now; a standby does not."""
    cursor = await conn.execute(PING)
    row = await cursor.fetchone()
    return bool(row and row[0])
