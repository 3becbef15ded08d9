"""Payloads as Amazon SES and End User Messaging SMS write them, for tests."""

from __future__ import annotations

from typing import Any
from uuid import UUID

SES_ID = "0100018f-ses-id-000000"


def ses(kind: str, message_id: UUID | None, part: Any = None, **mail: Any) -> dict[str, Any]:
    """Return an event of SES about a message of ours; `part` is the object named after the kind."""
    names = {"DeliveryDelay": "deliveryDelay", "Rendering Failure": "failure"}
    tags = {} if message_id is None else {"nightmail_message": [str(message_id)], "ses:caller-identity": ["x"]}
    said = {
        "eventType": kind,
        "mail": {
            "timestamp": "2026-11-23T09:00:00.000Z",
            "messageId": SES_ID,
            "source": "post@sender.test",
            "destination": ["a@recipient.test"],
            "headersTruncated": False,
            "tags": tags,
            **mail,
        },
    }
    return said if part is None else {**said, names.get(kind, kind.lower()): part}


def delivery(message_id: UUID, *addresses: str) -> dict[str, Any]:
    part = {"timestamp": "2026-11-23T09:00:02.000Z", "recipients": list(addresses), "smtpResponse": "250 ok"}
    return ses("Delivery", message_id, part)


def bounce(
    message_id: UUID,
    *addresses: str,
    kind: str = "Permanent",
    subtype: str = "General",
    feedback: str = "fb-1",
    **dsn: Any,
) -> dict[str, Any]:
    fields = dsn or {"action": "failed", "status": "5.1.1", "diagnosticCode": "smtp; 550 5.1.1 user unknown"}
    part = {
        "bounceType": kind,
        "bounceSubType": subtype,
        "bouncedRecipients": [{"emailAddress": address, **fields} for address in addresses],
        "timestamp": "2026-11-23T09:00:03.000Z",
        "feedbackId": feedback,
        "reportingMTA": "dsn; mx.recipient.test",
    }
    return ses("Bounce", message_id, part)


def complaint(message_id: UUID, *addresses: str, kind: str = "abuse") -> dict[str, Any]:
    part = {
        "complainedRecipients": [{"emailAddress": address} for address in addresses],
        "timestamp": "2026-11-23T09:00:04.000Z",
        "feedbackId": "fb-2",
        "complaintFeedbackType": kind,
    }
    return ses("Complaint", message_id, part)


def opened(message_id: UUID, second: int = 5) -> dict[str, Any]:
    part = {"ipAddress": "192.0.2.1", "timestamp": f"2026-11-23T09:00:{second:02}.000Z", "userAgent": "Mail/1"}
    return ses("Open", message_id, part)


def clicked(message_id: UUID, link: str = "https://example.com/") -> dict[str, Any]:
    part = {"ipAddress": "192.0.2.1", "timestamp": "2026-11-23T09:00:06.000Z", "userAgent": "Mail/1", "link": link}
    return ses("Click", message_id, part)


def delay(message_id: UUID, *addresses: str) -> dict[str, Any]:
    part = {
        "delayType": "MailboxFull",
        "timestamp": "2026-11-23T09:00:01.000Z",
        "expirationTime": "2026-11-23T23:00:00.000Z",
        "delayedRecipients": [
            {"emailAddress": address, "status": "4.2.2", "diagnosticCode": "452 full"} for address in addresses
        ],
    }
    return ses("DeliveryDelay", message_id, part)


def text_event(kind: str, message_id: UUID | None, number: str = "+15005550006", **fields: Any) -> dict[str, Any]:
    """Return an event of End User Messaging SMS."""
    return {
        "eventType": f"TEXT_{kind}",
        "eventVersion": "1.0",
        "eventTimestamp": 1795424400000,
        "isFinal": True,
        "originationPhoneNumber": "+15005550001",
        "destinationPhoneNumber": number,
        "isoCountryCode": "US",
        "messageId": "862a8790-60c0-4430-9b2b-000000000001",
        "messageRequestTimestamp": 1795424399000,
        "messageEncoding": "GSM",
        "messageType": "TRANSACTIONAL",
        "messageStatus": kind,
        "messageStatusDescription": f"it is {kind}",
        "context": {} if message_id is None else {"nightmail_message": str(message_id)},
        "totalMessageParts": 1,
        "totalMessagePrice": 0.00645,
        "totalCarrierFee": 0.0,
        **fields,
    }


def inbound(body: str, *, inbound_id: str, sender: str = "+15005550006", to: str = "+15005550001") -> dict[str, Any]:
    """Return an SMS that somebody wrote."""
    return {
        "originationNumber": sender,
        "destinationNumber": to,
        "messageKeyword": "KEYWORD_123456789012",
        "messageBody": body,
        "inboundMessageId": inbound_id,
        "previousPublishedMessageId": "862a8790-60c0-4430-9b2b-000000000001",
    }
