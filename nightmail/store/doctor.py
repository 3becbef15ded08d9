"""What the database itself can say about its fitness for this work. Read-only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nightmail.store.database import Connection


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at: `warn` deserves a look, `bad` must be mended."""

    name: str
    state: Literal["ok", "warn", "bad"]
    detail: str


SERVER = "SELECT current_setting('server_version_num')::int, pg_is_in_recovery()"

# One old snapshot keeps dead rows from being cleaned and made claims 39 times slower.
OLDEST_SNAPSHOT = """
SELECT coalesce(max(extract(epoch FROM clock_timestamp() - xact_start)), 0)::float8
FROM pg_stat_activity
WHERE backend_xmin IS NOT NULL
  AND pid <> pg_backend_pid()
"""

MIN_VERSION = 150_000
MAX_SNAPSHOT_S = 300.0


async def examine(conn: Connection) -> list[Check]:
    """Look at version, role of the server and old snapshots."""
    row = await (await conn.execute(SERVER)).fetchone()
    version, is_standby = row or (0, False)
    snapshot = await (await conn.execute(OLDEST_SNAPSHOT)).fetchone()
    oldest_s = snapshot[0] if snapshot else 0.0
    return [
        Check("PostgreSQL", "ok" if version >= MIN_VERSION else "bad", f"{version // 10_000}, needs 15 or newer"),
        Check(
            "server role",
            "bad" if is_standby else "ok",
            "a standby: nothing can be written; point DATABASE_URL at the primary" if is_standby else "primary",
        ),
        Check(
            "oldest snapshot",
            "warn" if oldest_s > MAX_SNAPSHOT_S else "ok",
            f"{oldest_s:.0f} s; a transaction open for minutes slows every claim",
        ),
    ]
