"""send_rates: the generic cell rate algorithm on one row per provider account, shared by all runners."""

from __future__ import annotations

from nightmail.store.database import Connection

# next_free_at is the theoretical arrival time: the moment at which the account would be idle again. A call may start
# while it lies less than `burst` calls ahead. The row lock makes takers queue; a waiter's nm_now() is a little old by
# then, which errs on the slow side. No grant moves it further ahead than burst / per_s, so a value a minute beyond that
# was written before the clock was set back. Nothing is written when nothing is granted.
TAKE = """
WITH held AS MATERIALIZED (
    SELECT account,
           CASE
               WHEN next_free_at > nm_now() + make_interval(secs => 60 + %(burst)s / %(per_s)s::double precision)
               THEN nm_now()
               ELSE greatest(next_free_at, nm_now())
           END AS free_at
    FROM send_rates
    WHERE account = %(account)s
    FOR UPDATE
), granted AS MATERIALIZED (
    SELECT account, free_at,
           greatest(0, least(%(wanted)s, floor(
               %(burst)s::double precision
               - extract(epoch FROM free_at - nm_now())::double precision * %(per_s)s::double precision
               + 0.000001
           )))::int AS calls
    FROM held
), taken AS (
    UPDATE send_rates AS r
    SET next_free_at = g.free_at + make_interval(secs => g.calls / %(per_s)s::double precision)
    FROM granted AS g
    WHERE r.account = g.account
      AND g.calls > 0
)
SELECT calls FROM granted
"""

ADD_ACCOUNT = """
INSERT INTO send_rates (account, next_free_at)
VALUES (%(account)s, nm_now())
ON CONFLICT (account) DO NOTHING
"""


async def take(conn: Connection, account: str, *, wanted: int, per_s: float, burst: int) -> int:
    """Return how many of `wanted` calls may start now at `per_s` calls a second and at most `burst` at once."""
    wish = {"account": account, "wanted": wanted, "per_s": per_s, "burst": burst}
    cursor = await conn.execute(TAKE, wish)
    row = await cursor.fetchone()
    if row is None:
        await conn.execute(ADD_ACCOUNT, {"account": account})
        cursor = await conn.execute(TAKE, wish)
        row = await cursor.fetchone()
    return int(row[0]) if row else 0
