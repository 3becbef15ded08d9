"""Units an org used since midnight (UTC), for GET /usage; periods are in usage_records."""

from __future__ import annotations

from uuid import UUID

from nightmail.store.database import Connection

# Ids are UUIDv7, so a day is a range of the index messages_list: its first id is its milliseconds, then zeros.
TODAY = """
SELECT coalesce(sum(units), 0)::bigint,
       coalesce(sum(units) FILTER (WHERE state IN ('sent', 'delivered', 'bounced', 'complained')), 0)::bigint
FROM messages
WHERE org_id = %(org_id)s
  AND env = %(env)s
  AND channel = %(channel)s
  AND state NOT IN ('canceled', 'failed')
  AND id >= (
      lpad(to_hex((extract(epoch FROM date_trunc('day', nm_now(), 'UTC')) * 1000)::bigint), 12, '0')
      || '00000000000000000000'
  )::uuid
"""


async def count_today(conn: Connection, *, org_id: UUID, env: str, channel: str) -> tuple[int, int]:
    """Return units of the messages accepted since midnight UTC, and of those that were sent."""
    cursor = await conn.execute(TODAY, {"org_id": org_id, "env": env, "channel": channel})
    row = await cursor.fetchone()
    return (int(row[0]), int(row[1])) if row else (0, 0)
