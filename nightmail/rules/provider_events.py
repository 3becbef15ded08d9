"""What providers report, in our words; here those of Amazon SES, of SMS in rules.sms_events.

Several reports of one fact carry the same `provider_ref`, so that the event exists once however often it is told.

| SES | here |
| --- | --- |
| Send | accepted |
| Delivery | delivered |
| Bounce, Permanent | bounced, and a suppression |
| Bounce, Transient or Undetermined | bounced when it is final, else delayed |
| Complaint | complained, and a suppression; `not-spam` is a report to the contrary and nothing here |
| DeliveryDelay | delayed |
| Open, Click | opened, clicked |
| Reject, Rendering Failure | failed |

A soft bounce: SES reports one only when it has given up, or when somebody's auto-reply looked like one. The first is an
end, and Resend calls it `bounced` too; the second is none. The recipient's server tells them apart: a delivery report
says `action: failed`, an auto-reply says nothing and is filed under `General`. No soft bounce suppresses anybody.

Source: Amazon SES developer guide, "Contents of event data that Amazon SES publishes to Amazon SNS". Not verified
against a live account: which fields the bounce of an auto-reply carries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar
from uuid import UUID

import msgspec

from nightmail.rules.messages import State

Kind = Literal["accepted", "delivered", "delayed", "bounced", "complained", "failed", "opened", "clicked"]

# Carry our message id in every message we send, and back in events: the first in EmailTags and Context.
MESSAGE_TAG = "nightmail_message"
MESSAGE_HEADER = "X-Nightmail-Message"
# Longer than anything a provider says that is worth keeping; links may be long.
MAX_TEXT = 500
MAX_LINK = 2048

STATES: dict[Kind, State] = {
    "delivered": "delivered",
    "bounced": "bounced",
    "complained": "complained",
    "failed": "failed",
}


class BadEvent(ValueError):
    """The payload is none that we know how to read; the text says where."""


@dataclass(frozen=True, slots=True)
class ProviderEvent:
    """One fact; `recipient` is as reported, '' for the whole message. `suppresses` is why nothing more may be sent."""

    kind: Kind
    provider_ref: str
    occurred_at: datetime
    recipient: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    suppresses: Literal["bounce", "complaint"] | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What one notification says of one message; `message_id` None when it does not name one of ours."""

    channel: Literal["email", "sms"]
    name: str
    message_id: UUID | None
    provider_message_id: str
    events: Sequence[ProviderEvent] = ()


class _Part(msgspec.Struct, rename="camel"):
    """A part of a payload; what is not declared is ignored, since AWS adds fields."""


class _Header(_Part):
    name: str = ""
    value: str = ""


class _Mail(_Part):
    message_id: str
    tags: dict[str, list[str]] | None = None
    headers: list[_Header] | None = None


class _Recipient(_Part):
    email_address: str
    action: str | None = None
    status: str | None = None
    diagnostic_code: str | None = None


class _Bounce(_Part):
    bounce_type: str
    bounced_recipients: list[_Recipient]
    bounce_sub_type: str = ""
    feedback_id: str | None = None
    timestamp: str | None = None


class _Complaint(_Part):
    complained_recipients: list[_Recipient]
    complaint_feedback_type: str | None = None
    complaint_sub_type: str | None = None
    feedback_id: str | None = None
    timestamp: str | None = None


class _Delivery(_Part):
    recipients: list[str]
    smtp_response: str | None = None
    timestamp: str | None = None


class _Delay(_Part):
    delayed_recipients: list[_Recipient]
    delay_type: str = ""
    expiration_time: str | None = None
    timestamp: str | None = None


class _Look(_Part):
    timestamp: str | None = None
    ip_address: str | None = None
    user_agent: str | None = None
    link: str = ""


class _Reject(_Part):
    reason: str | None = None


class _Failure(_Part):
    error_message: str | None = None


class _Ses(_Part):
    mail: _Mail
    event_type: str | None = None
    notification_type: str | None = None
    bounce: _Bounce | None = None
    complaint: _Complaint | None = None
    delivery: _Delivery | None = None
    delivery_delay: _Delay | None = None
    open: _Look | None = None
    click: _Look | None = None
    reject: _Reject | None = None
    failure: _Failure | None = None


T = TypeVar("T")


def read_ses_event(payload: Any, *, told_at: datetime) -> Report:
    """Return what an SES notification says; `told_at` stands in for a time it does not give. Raises BadEvent."""
    said = _convert(payload, _Ses)
    name = said.event_type or said.notification_type
    if name is None:
        raise BadEvent("neither eventType nor notificationType is given")
    provider_id = _short(said.mail.message_id)
    return Report("email", _short(name), _message_of(said.mail), provider_id, _ses_events(name, said, told_at))


def _ses_events(name: str, said: _Ses, told_at: datetime) -> list[ProviderEvent]:
    provider_id = _short(said.mail.message_id)
    match name:
        case "Send":
            return [ProviderEvent("accepted", provider_id, told_at)]
        case "Delivery":
            return _deliveries(_needed(said.delivery, "delivery"), provider_id, told_at)
        case "Bounce":
            return _bounces(_needed(said.bounce, "bounce"), provider_id, told_at)
        case "Complaint":
            return _complaints(_needed(said.complaint, "complaint"), provider_id, told_at)
        case "DeliveryDelay":
            return _delays(_needed(said.delivery_delay, "deliveryDelay"), provider_id, told_at)
        case "Open" | "Click":
            return [_look(name, _needed(said.open if name == "Open" else said.click, name.lower()), said, told_at)]
        case "Reject":
            reason = said.reject.reason if said.reject else None
            return [_failed(provider_id, f"refused by SES: {reason or 'no reason given'}", told_at)]
        case "Rendering Failure":
            reason = said.failure.error_message if said.failure else None
            return [
                _failed(provider_id, f"the template could not be filled in: {reason or 'no reason given'}", told_at)
            ]
        case _:
            return []


def _deliveries(delivery: _Delivery, provider_id: str, told_at: datetime) -> list[ProviderEvent]:
    when = _time(delivery.timestamp, told_at)
    data = {"delivery": {"response": _short(delivery.smtp_response)}} if delivery.smtp_response else {}
    return [ProviderEvent("delivered", provider_id, when, address, data) for address in delivery.recipients]


def _bounces(bounce: _Bounce, provider_id: str, told_at: datetime) -> list[ProviderEvent]:
    when = _time(bounce.timestamp, told_at)
    ref = _short(bounce.feedback_id or provider_id)
    events = []
    for recipient in bounce.bounced_recipients:
        data = {
            "type": _short(bounce.bounce_type),
            "subtype": _short(bounce.bounce_sub_type),
            "message": _describe_bounce(bounce, recipient),
            "diagnostic_code": _short(recipient.diagnostic_code),
        }
        if bounce.bounce_type == "Permanent":
            event = ProviderEvent("bounced", ref, when, recipient.email_address, {"bounce": data}, "bounce")
        elif is_final_bounce(bounce.bounce_sub_type, recipient.action, recipient.status):
            event = ProviderEvent("bounced", ref, when, recipient.email_address, {"bounce": data})
        else:
            event = ProviderEvent("delayed", ref, when, recipient.email_address, {"delay": data})
        events.append(event)
    return events


def is_final_bounce(subtype: str, action: str | None, status: str | None) -> bool:
    """Return whether a soft bounce is an end: the server said so, or the reason cannot be an auto-reply's."""
    if action is not None or status is not None:
        return action == "failed" or (action is None and (status or "").startswith("5"))
    return subtype not in ("", "General", "Undetermined")


def _describe_bounce(bounce: _Bounce, recipient: _Recipient) -> str:
    kind = f"{bounce.bounce_type}/{bounce.bounce_sub_type}".removesuffix("/")
    return f"{kind}: {recipient.diagnostic_code or recipient.status or 'no further reason was given'}"[:MAX_TEXT]


def _complaints(complaint: _Complaint, provider_id: str, told_at: datetime) -> list[ProviderEvent]:
    kind = complaint.complaint_feedback_type or complaint.complaint_sub_type or "unknown"
    if kind == "not-spam":
        return []
    when = _time(complaint.timestamp, told_at)
    ref = _short(complaint.feedback_id or provider_id)
    data = {"complaint": {"type": _short(kind)}}
    return [
        ProviderEvent("complained", ref, when, recipient.email_address, data, "complaint")
        for recipient in complaint.complained_recipients
    ]


def _delays(delay: _Delay, provider_id: str, told_at: datetime) -> list[ProviderEvent]:
    when = _time(delay.timestamp, told_at)
    return [
        ProviderEvent(
            "delayed",
            _digest(provider_id, delay.timestamp or told_at.isoformat(), delay.delay_type),
            when,
            recipient.email_address,
            {
                "delay": {
                    "type": _short(delay.delay_type),
                    "diagnostic_code": _short(recipient.diagnostic_code),
                    "expires_at": _short(delay.expiration_time),
                }
            },
        )
        for recipient in delay.delayed_recipients
    ]


def _look(name: str, look: _Look, said: _Ses, told_at: datetime) -> ProviderEvent:
    """Return an open or a click. SES does not say whose: it is the whole message's unless that has one recipient."""
    when = _time(look.timestamp, told_at)
    seen: dict[str, Any] = {
        "ip_address": _short(look.ip_address),
        "timestamp": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "user_agent": _short(look.user_agent),
    }
    ref = _digest(said.mail.message_id, when.isoformat(), look.link, look.ip_address or "", look.user_agent or "")
    if name == "Open":
        return ProviderEvent("opened", ref, when, data={"open": seen})
    return ProviderEvent("clicked", ref, when, data={"click": {"link": look.link[:MAX_LINK], **seen}})


def _failed(provider_id: str, reason: str, when: datetime) -> ProviderEvent:
    return ProviderEvent("failed", provider_id, when, data={"reason": _short(reason)})


def match_recipient(reported: str, addresses: Sequence[str]) -> str | None:
    """Return which of a message's addresses a report means, None when it cannot be told.

    Servers change the case of what they were given, and a delivery report may name whom the mail was forwarded to: of a
    message to one person that can only be the one.
    """
    bare = reported[reported.rindex("<") + 1 : -1] if reported.endswith(">") and "<" in reported else reported
    bare = bare.strip()
    if bare in addresses:
        return bare
    folded = bare.casefold()
    for address in addresses:
        if address.casefold() == folded:
            return address
    return addresses[0] if len(addresses) == 1 else None


def _message_of(mail: _Mail) -> UUID | None:
    for text in (mail.tags or {}).get(MESSAGE_TAG, ()):
        found = parse_message_id(text)
        if found is not None:
            return found
    for header in mail.headers or ():
        if header.name.lower() == MESSAGE_HEADER.lower():
            return parse_message_id(header.value.strip())
    return None


def parse_message_id(text: str | None) -> UUID | None:
    """Return the id as we write it into messages, None for anything else."""
    if text is None or len(text) != 36:
        return None
    try:
        return UUID(text)
    except ValueError:
        return None


def _convert(payload: Any, kind: type[T]) -> T:
    try:
        return msgspec.convert(payload, kind, strict=True)
    except msgspec.ValidationError as error:
        raise BadEvent(str(error)) from None


def _needed(part: T | None, name: str) -> T:
    if part is None:
        raise BadEvent(f"{name} is missing")
    return part


def _short(text: str | None) -> Any:
    """Return at most MAX_TEXT characters; None stays None."""
    return text if text is None else text[:MAX_TEXT]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "replace")).hexdigest()[:32]


def _time(text: str | None, otherwise: datetime) -> datetime:
    """Return an ISO time; what cannot be read is no reason to lose the event."""
    try:
        when = datetime.fromisoformat(text) if text and len(text) <= 64 else otherwise
    except ValueError:
        return otherwise
    return when.astimezone(UTC) if when.tzinfo is not None and 1970 <= when.year < 9999 else otherwise
