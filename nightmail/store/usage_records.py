"""usage_records: units reserved at accept and used at send, in shards so that no row is hot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from nightmail.store.database import Connection

SHARDS = 8


@dataclass(frozen=True, slots=True, order=True)
class Settlement:
    """Units of one (org, channel, env, period, rating) that leave the reservation, and how many of them were used."""

    org_id: UUID
    channel: str
    env: str
    period: str
    rating: str
    reserved: int
    used: int


# Rows are locked in key order: two record steps of different runners cannot deadlock on them.
SETTLE = """
INSERT INTO usage_records AS u (org_id, channel, env, period, rating, shard, reserved, used)
SELECT s.org_id, s.channel, s.env, s.period, s.rating, %(shard)s, -s.reserved, s.used
FROM unnest(
    %(org_ids)s::uuid[], %(channels)s::text[], %(envs)s::text[], %(periods)s::text[], %(ratings)s::text[],
    %(reserved)s::bigint[], %(used)s::bigint[]
) AS s (org_id, channel, env, period, rating, reserved, used)
ORDER BY 1, 2, 3, 4, 5
ON CONFLICT (org_id, channel, env, period, rating, shard)
DO UPDATE SET reserved = u.reserved + excluded.reserved, used = u.used + excluded.used
"""


async def settle(conn: Connection, settlements: Sequence[Settlement], *, shard: int) -> None:
    """Take units from the reservation and count the used ones; part of the record step's transaction."""
    if not settlements:
        return
    await conn.execute(
        SETTLE,
        {
            "shard": shard % SHARDS,
            "org_ids": [s.org_id for s in settlements],
            "channels": [s.channel for s in settlements],
            "envs": [s.env for s in settlements],
            "periods": [s.period for s in settlements],
            "ratings": [s.rating for s in settlements],
            "reserved": [s.reserved for s in settlements],
            "used": [s.used for s in settlements],
        },
    )


TOTALS = """
SELECT channel, env, period, rating, sum(reserved)::bigint, sum(used)::bigint
FROM usage_records
WHERE org_id = %(org_id)s
  AND period = %(period)s
GROUP BY channel, env, period, rating
ORDER BY channel, env, rating
"""


@dataclass(frozen=True, slots=True)
class UsageTotal:
    """Sums over the shards of one (channel, env, period, rating)."""

    channel: str
    env: str
    period: str
    rating: str
    reserved: int
    used: int


async def list_totals(conn: Connection, org_id: UUID, period: str) -> list[UsageTotal]:
    """Return the org's usage in one period (`YYYY-MM`)."""
    cursor = await conn.execute(TOTALS, {"org_id": org_id, "period": period})
    return [UsageTotal(*row) for row in await cursor.fetchall()]
