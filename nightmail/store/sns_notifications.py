"""sns_notifications: which notifications have had their effects."""

from __future__ import annotations

from nightmail.store.database import Connection

KEEP_DAYS = 2
PRUNED_PER_INSERT = 20

# The same notification at the same time on two connections: the second insert waits for the first to commit, and then
# does nothing. Each insert takes a few old rows away, so that the table cannot outgrow two days of traffic.
REMEMBER = """
WITH old AS MATERIALIZED (
    SELECT message_id
    FROM sns_notifications
    WHERE received_at < nm_now() - make_interval(days => %(keep_days)s)
    ORDER BY received_at
    LIMIT %(pruned)s
    FOR UPDATE SKIP LOCKED
), pruned AS (
    DELETE FROM sns_notifications
    WHERE message_id = ANY (ARRAY(SELECT message_id FROM old))
)
INSERT INTO sns_notifications (message_id, topic_arn, received_at)
VALUES (%(message_id)s, %(topic_arn)s, nm_now())
ON CONFLICT DO NOTHING
"""


async def remember_notification(conn: Connection, *, message_id: str, topic_arn: str) -> bool:
    """Note a notification; part of the transaction of its effects. Returns whether it is new."""
    cursor = await conn.execute(
        REMEMBER,
        {"message_id": message_id, "topic_arn": topic_arn, "keep_days": KEEP_DAYS, "pruned": PRUNED_PER_INSERT},
    )
    return cursor.rowcount == 1


IS_KNOWN = """
SELECT EXISTS (SELECT FROM sns_notifications WHERE message_id = %(message_id)s)
"""


async def is_known_notification(conn: Connection, message_id: str) -> bool:
    """Return whether a notification has had its effects."""
    cursor = await conn.execute(IS_KNOWN, {"message_id": message_id})
    row = await cursor.fetchone()
    return bool(row and row[0])
