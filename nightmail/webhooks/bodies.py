"""The body of an event, in the dialect of its endpoint: pure, and the same bytes for the same row.

Nightmail: {"type", "timestamp", "data"}. Resend: {"type", "created_at", "data"}, with Resend's fields in `data`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec

from nightmail.rules.addresses import bare_address
from nightmail.rules.webhooks import Dialect, type_of


class AboutMessage(msgspec.Struct, frozen=True):
    """What a body tells of the message the event is about; `to`, `cc` and `tags` are None when its content is gone."""

    id: UUID
    env: str
    channel: str
    sender: str
    subject: str | None
    to: list[str] | None
    cc: list[str] | None
    tags: list[dict[str, str]] | None
    units: int
    created_at: datetime
    scheduled_at: datetime | None
    provider_message_id: str | None


class Event(msgspec.Struct, frozen=True):
    """A delivery's row as the body needs it; `message` is None when the event is about something else."""

    topic: str
    recipient: str
    data: Mapping[str, Any]
    occurred_at: datetime
    message: AboutMessage | None


def render(event: Event, dialect: Dialect) -> str:
    """Return the JSON text that is signed and posted, the same at every attempt."""
    moment = format_time(event.occurred_at)
    if dialect == "resend":
        envelope = {"type": type_of("resend", event.topic), "created_at": moment, "data": _resend_data(event)}
    else:
        envelope = {"type": type_of("nightmail", event.topic), "timestamp": moment, "data": _data(event)}
    return msgspec.json.encode(envelope).decode()


def format_time(moment: datetime) -> str:
    """Return ISO 8601 in UTC with milliseconds, as both dialects write it."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _data(event: Event) -> dict[str, Any]:
    message = event.message
    if message is None:
        return dict(event.data)
    data: dict[str, Any] = {
        "id": str(message.id),
        "channel": message.channel,
        "env": message.env,
        "from": message.sender,
        "to": message.to or [],
    }
    if event.recipient:
        data["recipient"] = event.recipient
    if message.channel == "email":
        data["cc"] = message.cc or []
        data["subject"] = message.subject or ""
    data["tags"] = _tags(message)
    data["units"] = message.units
    data["created_at"] = format_time(message.created_at)
    if message.scheduled_at is not None:
        data["scheduled_at"] = format_time(message.scheduled_at)
    if message.provider_message_id is not None:
        data["provider_message_id"] = message.provider_message_id
    return data | dict(event.data)


def _resend_data(event: Event) -> dict[str, Any]:
    message = event.message
    if message is None:
        return dict(event.data)
    domain = bare_address(message.sender).rpartition("@")[2]
    data: dict[str, Any] = {
        "email_id": str(message.id),
        "message_id": f"<{message.id}@{domain}>",
        "created_at": format_time(message.created_at),
        "from": message.sender,
        "to": [event.recipient] if event.recipient else message.to or [],
        "subject": message.subject or "",
        "tags": _tags(message),
    }
    return data | _resend_detail(event)


def _resend_detail(event: Event) -> dict[str, Any]:
    """Return what Resend's event of this kind has besides the common fields."""
    kind = event.topic.partition(".")[2]
    known = event.data
    if kind == "bounced":
        bounce = _object(known, "bounce")
        detail = {
            "message": _text(bounce, "message"),
            "type": _text(bounce, "type"),
            "subType": _text(bounce, "subtype"),
        }
        if bounce.get("diagnostic_code"):
            detail["diagnosticCode"] = _text(bounce, "diagnostic_code")
        return {"bounce": detail}
    if kind == "clicked":
        click = _object(known, "click")
        return {
            "click": {
                "ipAddress": _text(click, "ip_address"),
                "link": _text(click, "link"),
                "timestamp": _text(click, "timestamp"),
                "userAgent": _text(click, "user_agent"),
            }
        }
    if kind == "failed":
        reason = known.get("reason") or known.get("code") or known.get("detail") or "failed"
        return {"failed": {"reason": str(reason)}}
    if kind == "suppressed":
        return {"suppressed": {"message": "Every recipient is on the suppression list.", "type": "OnSuppressionList"}}
    return {}


def _tags(message: AboutMessage) -> dict[str, str]:
    # A list when sent, a map in events: so it is at Resend.
    return {tag["name"]: tag["value"] for tag in message.tags or ()}


def _object(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = data.get(name)
    return value if isinstance(value, dict) else {}


def _text(data: Mapping[str, Any], name: str) -> str:
    value = data.get(name)
    return "" if value is None else str(value)
