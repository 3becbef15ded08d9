"""What AWS End User Messaging reports of an SMS, in our words.

Source: AWS End User Messaging user guide, "Messaging Events". Not verified against a live account: whether `context`
comes back in every TEXT_ event, and which statuses follow SUCCESSFUL.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec

from nightmail.rules.provider_events import (
    MAX_TEXT,
    MESSAGE_TAG,
    STATES,
    BadEvent,
    Kind,
    ProviderEvent,
    Report,
    parse_message_id,
)

PREFIX = "TEXT_"
# Nobody knows what became of the message after 72 hours without a word from the carrier: no reason to call it bounced.
SMS_KINDS: dict[str, Kind] = {
    "SENT": "accepted",
    "PENDING": "accepted",
    "QUEUED": "accepted",
    "DELIVERED": "delivered",
    "SUCCESSFUL": "delivered",
    "UNKNOWN": "delayed",
    **dict.fromkeys(
        (
            "INVALID", "INVALID_MESSAGE", "UNREACHABLE", "CARRIER_UNREACHABLE", "BLOCKED", "CARRIER_BLOCKED", "SPAM",
            "PROTECT_BLOCKED", "TTL_EXPIRED",
        ),
        "bounced",
    ),
}  # fmt: skip


class _SmsEvent(msgspec.Struct, rename="camel"):
    """What we read of an event; AWS adds fields, which are ignored."""

    event_type: str
    message_id: str
    message_status_description: str | None = None
    destination_phone_number: str | None = None
    event_timestamp: int | None = None
    context: dict[str, str] | None = None


def read_sms_event(payload: Any, *, told_at: datetime) -> Report:
    """Return what an event says; `told_at` stands in for a time it does not give. Raises BadEvent."""
    try:
        said = msgspec.convert(payload, _SmsEvent, strict=True)
    except msgspec.ValidationError as error:
        raise BadEvent(str(error)) from None
    provider_id = said.message_id[:MAX_TEXT]
    message_id = parse_message_id((said.context or {}).get(MESSAGE_TAG))
    status = said.event_type.removeprefix(PREFIX)
    kind = SMS_KINDS.get(status) if said.event_type.startswith(PREFIX) else None
    events: list[ProviderEvent] = []
    if kind is not None:
        # Accepted by the carrier and delivered to the phone are one `delivered`, told once.
        ref = provider_id if kind in STATES else f"{provider_id}:{status}"
        when = _milliseconds(said.event_timestamp, told_at)
        events.append(ProviderEvent(kind, ref, when, said.destination_phone_number or "", _data(kind, status, said)))
    return Report("sms", said.event_type[:MAX_TEXT], message_id, provider_id, events)


def _data(kind: Kind, status: str, said: _SmsEvent) -> dict[str, Any]:
    text = (said.message_status_description or status)[:MAX_TEXT]
    if kind == "bounced":
        # AWS does not say whether it is for good: the raw status does, to who knows it.
        reason = {"type": "Undetermined", "subtype": status, "message": text, "diagnostic_code": None}
        return {"bounce": reason, "status": status}
    if kind == "delayed":
        return {"delay": {"type": status, "message": text}, "status": status}
    return {"status": status}


def _milliseconds(value: int | None, otherwise: datetime) -> datetime:
    if value is None or not 0 <= value < 10**14:
        return otherwise
    return datetime.fromtimestamp(value / 1000, UTC)
