"""What the tests of provider events and inbound SMS share: messages that were sent, endpoints, and the end state."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from nightmail.ids import new_id
from nightmail.rules.provider_events import Report, read_ses_event
from nightmail.rules.sms_events import read_sms_event
from nightmail.rules.webhooks import NIGHTMAIL_TYPES
from nightmail.store import audit
from nightmail.store.database import Connection
from nightmail.store.provider_events import Applied, apply_report
from tests.crash.world import World

WHEN = datetime(2026, 11, 23, 9, tzinfo=UTC)
TOPIC = "arn:aws:sns:eu-west-1:123456789012:nightmail"


async def apply(conn: Connection, payload: dict[str, Any], notification_id: str | None = None) -> Applied:
    """Apply a payload as the endpoint does, by default as a notification of its own."""
    return await apply_report(conn, read(payload), notification_id=notification_id or str(new_id()), topic_arn=TOPIC)


def read(payload: dict[str, Any]) -> Report:
    """Return the report of a payload of either service."""
    if str(payload.get("eventType", "")).startswith("TEXT_"):
        return read_sms_event(payload, told_at=WHEN)
    return read_ses_event(payload, told_at=WHEN)


def mark_sent(world: World, *message_ids: UUID, sender: str | None = None) -> None:
    """Write down the messages as sent, without a provider."""
    for message_id in message_ids:
        world.tell("DELETE FROM message_queue WHERE message_id = %s", message_id)
        world.tell(
            "UPDATE messages SET state = 'sent', sent_at = now(), provider_message_id = 'p',"
            " sender = coalesce(%s, sender) WHERE id = %s",
            sender,
            message_id,
        )
        world.tell(
            "INSERT INTO message_events (message_id, org_id, kind, occurred_at)"
            " SELECT id, org_id, 'sent', now() FROM messages WHERE id = %s",
            message_id,
        )


def add_endpoint(world: World, org_id: UUID | None = None, *, env: str = "live") -> UUID:
    """Add an endpoint that wants everything."""
    endpoint_id = new_id()
    world.tell(
        "INSERT INTO webhook_endpoints (id, org_id, env, url, dialect, types, topics, secret)"
        " VALUES (%s, %s, %s, 'https://example.com/', 'nightmail', %s, %s, 'whsec_x')",
        endpoint_id,
        org_id or world.org_id,
        env,
        list(NIGHTMAIL_TYPES),
        sorted({topic for topics in NIGHTMAIL_TYPES.values() for topic in topics}),
    )
    return endpoint_id


def told(world: World, endpoint_id: UUID) -> list[Any]:
    """Return (topic, recipient, data) of an endpoint's deliveries, in order of topic."""
    return world.ask(
        "SELECT topic, recipient, data FROM webhook_deliveries WHERE endpoint_id = %s ORDER BY topic, recipient",
        endpoint_id,
    )


async def findings(conn: Connection) -> list[str]:
    """Return the audit's complaints, but for usage: these messages were never counted as used."""
    return [f.name for f in await audit.audit(conn) if f.violations and f.name not in ("used", "reserved")]
