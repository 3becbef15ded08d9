"""Stamping: a delivery gets its number and its body, off the hot path, when it is first claimed or pulled."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from nightmail.rules.webhooks import Dialect
from nightmail.store import webhook_deliveries
from nightmail.store.database import Connection
from nightmail.store.webhook_deliveries import Stamped
from nightmail.webhooks.bodies import AboutMessage, Event, render


def make_body(stamped: Stamped, dialect: Dialect) -> str:
    """Return the body of a delivery in its endpoint's dialect."""
    message = AboutMessage(*stamped.message) if stamped.message is not None else None
    return render(Event(stamped.topic, stamped.recipient, stamped.data, stamped.occurred_at, message), dialect)


async def keep_bodies(conn: Connection, stamped: Sequence[Stamped], dialects: Sequence[Dialect]) -> list[str]:
    """Make and write the bodies of deliveries stamped in this transaction; return them in order."""
    bodies = [make_body(one, dialect) for one, dialect in zip(stamped, dialects, strict=True)]
    await webhook_deliveries.set_bodies(conn, stamped, bodies)
    return bodies


async def stamp_fresh(conn: Connection, endpoint_id: UUID, *, limit: int) -> int:
    """Number up to `limit` fresh deliveries of an endpoint and write their bodies; return how many.

    Takes the endpoint's row lock: call it in a transaction, before any lock on deliveries. An endpoint that is not
    there has none.
    """
    locked = await webhook_deliveries.lock_endpoint(conn, endpoint_id)
    if locked is None:
        return 0
    dialect, _ = locked
    stamped = await webhook_deliveries.number_fresh(conn, endpoint_id, limit=limit)
    await keep_bodies(conn, stamped, [dialect] * len(stamped))
    return len(stamped)
