"""Unsubscribing by link: the installation's secret, and what one click does."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from nightmail.store.database import Connection
from nightmail.store.fan_out import Fact, fan_out
from nightmail.store.recipient_wishes import Wish, suppress_recipients

ACTOR = "recipient"

READ_KEY = """
SELECT secret
FROM unsubscribe_secret
"""


async def read_unsubscribe_secret(conn: Connection) -> bytes:
    """Return the key of this installation's links; it never changes."""
    cursor = await conn.execute(READ_KEY)
    row = await cursor.fetchone()
    assert row is not None, "the migration makes the secret"
    return bytes(row[0])


@dataclass(frozen=True, slots=True)
class Subscription:
    """What a link is about: the one recipient of an email."""

    message_id: UUID
    org_id: UUID
    env: str
    sender: str
    address: str


FIND = """
SELECT id, org_id, env, sender, addresses[1]
FROM messages
WHERE id = %(message_id)s
  AND channel = 'email'
  AND cardinality(addresses) = 1
"""


async def find_subscription(conn: Connection, message_id: UUID) -> Subscription | None:
    """Return what the link of a message is about, None when the message is gone."""
    cursor = await conn.execute(FIND, {"message_id": message_id})
    row = await cursor.fetchone()
    return Subscription(*row) if row else None


UNSUBSCRIBED = """
INSERT INTO message_events (message_id, org_id, recipient, kind, provider_ref, occurred_at, data)
VALUES (%(message_id)s, %(org_id)s, %(recipient)s, 'unsubscribed', 'one_click', nm_now(), '{"by": "one_click"}')
ON CONFLICT DO NOTHING
"""


async def unsubscribe(conn: Connection, message_id: UUID) -> bool:
    """Suppress the recipient of the message for its org and env; return False when the message is gone.

    A second click does nothing, unless somebody has lifted the suppression meanwhile: then it counts again.
    """
    async with conn.transaction():
        found = await find_subscription(conn, message_id)
        if found is None:
            return False
        wish = Wish(found.org_id, found.env, "email", found.address, "unsubscribe", "unsubscribed by link")
        changed = await suppress_recipients(conn, [wish], actor=ACTOR)
        arguments = {"message_id": found.message_id, "org_id": found.org_id, "recipient": found.address}
        is_new = (await conn.execute(UNSUBSCRIBED, arguments)).rowcount == 1
        if changed or is_new:
            fact = Fact(
                found.org_id, found.env, "email.unsubscribed", found.message_id, found.address, data={"by": "one_click"}
            )
            await fan_out(conn, [fact])
    return True
