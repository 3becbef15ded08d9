"""The three AWS requests the fake provider understands, and their answers as the real services word them.

SES v2                 POST /v2/email/outbound-emails, REST-JSON
SNS                    POST /, query in, XML out, Action=Publish
PinpointSMSVoiceV2     POST /, JSON 1.0, X-Amz-Target: PinpointSMSVoiceV2.SendTextMessage
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from typing import ClassVar
from urllib.parse import parse_qs
from xml.sax.saxutils import escape

import msgspec

from nightmail.fakes.message_log import Submission
from nightmail.fakes.script import Behaviour

__all__ = ["MESSAGE_HEADER", "Answer", "AwsService", "InvalidRequestError", "header_of", "service_of"]

MESSAGE_HEADER = "X-Nightmail-Message"
MESSAGE_TAG = "nightmail_message"
RECIPIENTS_MAX = 50

_TAG = re.compile(r"[A-Za-z0-9_-]{1,256}")
_NUMBER = re.compile(r"\+?[1-9][0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer without its connection headers."""

    status: int
    content_type: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


class InvalidRequestError(Exception):
    """The request is not one the real service would take; carries the refusal."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.body)
        self.answer = answer


@dataclass(frozen=True, slots=True)
class _Refusal:
    status: int
    code: str
    message: str
    reason: str = ""


class AwsService(ABC):
    """One service: reads requests, words answers."""

    name: str
    invalid = _Refusal(400, "ValidationException", "")
    refusals: ClassVar[Mapping[Behaviour, _Refusal]]

    @abstractmethod
    def read(self, headers: Mapping[str, str], body: bytes) -> Submission:
        """Return what is asked for; raises InvalidRequestError."""

    @abstractmethod
    def accepted(self, message_id: str) -> Answer:
        """Return the answer with the provider's message id; without one when it is ''."""

    @abstractmethod
    def refused(self, refusal: _Refusal) -> Answer:
        """Return the answer to a request not taken."""

    def refused_for(self, behaviour: Behaviour) -> Answer:
        """Return the refusal that belongs to a behaviour."""
        return self.refused(self.refusals.get(behaviour) or _COMMON[behaviour])

    def check(self, is_right: object, message: str) -> None:
        """Raise InvalidRequestError unless `is_right`."""
        if not is_right:
            raise InvalidRequestError(self.refused(_Refusal(self.invalid.status, self.invalid.code, message)))


_COMMON: dict[Behaviour, _Refusal] = {
    Behaviour.DENIED: _Refusal(403, "AccessDeniedException", "User is not authorized to perform this action"),
    Behaviour.TEMPFAIL: _Refusal(503, "ServiceUnavailable", "Service is unable to handle request"),
    Behaviour.FAIL5XX: _Refusal(500, "InternalFailure", "We encountered an internal error"),
    Behaviour.FAIL5XX_AFTER_ACCEPT: _Refusal(500, "InternalFailure", "We encountered an internal error"),
    Behaviour.CREDENTIALS: _Refusal(403, "UnrecognizedClientException", "The security token is invalid"),
}


# SES v2


class _Raw(msgspec.Struct):
    Data: bytes


class _Text(msgspec.Struct):
    Data: str


class _Header(msgspec.Struct):
    Name: str
    Value: str


class _Simple(msgspec.Struct):
    Subject: _Text
    Headers: list[_Header] = []


class _Content(msgspec.Struct):
    Raw: _Raw | None = None
    Simple: _Simple | None = None


class _Destination(msgspec.Struct):
    ToAddresses: list[str] = []
    CcAddresses: list[str] = []
    BccAddresses: list[str] = []


class _SendEmail(msgspec.Struct):
    Content: _Content
    Destination: _Destination = msgspec.field(default_factory=_Destination)
    FromEmailAddress: str = ""
    EmailTags: list[_Header] = []
    ConfigurationSetName: str | None = None


class Ses(AwsService):
    """SES v2 SendEmail."""

    name = "ses"
    invalid = _Refusal(400, "BadRequestException", "")
    refusals: ClassVar[Mapping[Behaviour, _Refusal]] = {
        Behaviour.THROTTLE: _Refusal(429, "TooManyRequestsException", "Maximum sending rate exceeded."),
        Behaviour.QUOTA: _Refusal(429, "TooManyRequestsException", "Daily message quota exceeded."),
        Behaviour.PAUSED: _Refusal(400, "SendingPausedException", "Email sending is disabled for this account."),
        Behaviour.REJECT: _Refusal(400, "MessageRejected", "Email address is not verified."),
    }
    _decoder = msgspec.json.Decoder(_SendEmail)

    def read(self, headers: Mapping[str, str], body: bytes) -> Submission:
        """Read REST-JSON; our id from the EmailTag, else from the message's header."""
        try:
            request = self._decoder.decode(body)
        except msgspec.MsgspecError as exc:
            raise InvalidRequestError(self.refused(_Refusal(400, "BadRequestException", f"{exc}"))) from exc
        to = request.Destination
        recipients = [*to.ToAddresses, *to.CcAddresses, *to.BccAddresses]
        self.check(recipients, "Destination is missing")
        self.check(len(recipients) <= RECIPIENTS_MAX, "Recipient count exceeds 50.")
        self.check(request.FromEmailAddress, "Missing required header 'From'.")
        self.check(all(address.isascii() for address in recipients), "Local address contains non-ASCII characters")
        tags = {tag.Name: tag.Value for tag in request.EmailTags}
        for name, value in tags.items():
            self.check(_TAG.fullmatch(name) and _TAG.fullmatch(value), f"Invalid tag {name}")
        content = request.Content
        if content.Raw is not None:
            data = content.Raw.Data
            subject, in_header = header_of(data, "Subject"), header_of(data, MESSAGE_HEADER)
            self.check(header_of(data, "From"), "Missing required header 'From'.")
        else:
            self.check(content.Simple, "Content is missing")
            assert content.Simple is not None
            data, subject = b"", content.Simple.Subject.Data
            in_header = {header.Name: header.Value for header in content.Simple.Headers}.get(MESSAGE_HEADER, "")
        return Submission(
            channel="email",
            service=self.name,
            message_id=tags.get(MESSAGE_TAG) or in_header or headers.get("x-nightmail-message", ""),
            recipients=recipients,
            subject=subject,
            content=data,
            tags=tags,
        )

    def accepted(self, message_id: str) -> Answer:
        """Return SendEmailResponse."""
        return _json(200, {"MessageId": message_id} if message_id else {})

    def refused(self, refusal: _Refusal) -> Answer:
        """Return a REST-JSON error: the code is in a header."""
        return _json(refusal.status, {"message": refusal.message}, headers=(("x-amzn-ErrorType", refusal.code),))


# End User Messaging SMS


class _SendTextMessage(msgspec.Struct):
    DestinationPhoneNumber: str
    MessageBody: str = ""
    OriginationIdentity: str | None = None
    MessageType: str = "TRANSACTIONAL"
    ConfigurationSetName: str | None = None
    Context: dict[str, str] = {}


class SmsVoice(AwsService):
    """PinpointSMSVoiceV2 SendTextMessage."""

    name = "aws_sms"
    refusals: ClassVar[Mapping[Behaviour, _Refusal]] = {
        Behaviour.THROTTLE: _Refusal(400, "ThrottlingException", "Rate exceeded"),
        Behaviour.QUOTA: _Refusal(
            400, "ServiceQuotaExceededException", "Spend limit", "MONTHLY_SPEND_LIMIT_REACHED_FOR_TEXT"
        ),
        Behaviour.PAUSED: _Refusal(400, "AccessDeniedException", "Account disabled", "ACCOUNT_DISABLED"),
        Behaviour.REJECT: _Refusal(
            400, "ConflictException", "Destination opted out", "DESTINATION_PHONE_NUMBER_OPTED_OUT"
        ),
    }
    _decoder = msgspec.json.Decoder(_SendTextMessage)

    def read(self, headers: Mapping[str, str], body: bytes) -> Submission:
        """Read JSON 1.0; our id from Context."""
        try:
            request = self._decoder.decode(body)
        except msgspec.MsgspecError as exc:
            raise InvalidRequestError(self.refused(_Refusal(400, "ValidationException", f"{exc}"))) from exc
        self.check(_NUMBER.fullmatch(request.DestinationPhoneNumber), "DestinationPhoneNumber")
        self.check(0 < len(request.MessageBody) <= 1600, "MessageBody must be 1 to 1600 characters")
        self.check(len(request.Context) <= 5, "Context holds at most 5 entries")
        return Submission(
            channel="sms",
            service=self.name,
            message_id=request.Context.get(MESSAGE_TAG) or headers.get("x-nightmail-message", ""),
            recipients=[request.DestinationPhoneNumber],
            subject="",
            content=request.MessageBody.encode("utf-8"),
            tags={"origination_identity": request.OriginationIdentity or "", **request.Context},
        )

    def accepted(self, message_id: str) -> Answer:
        """Return SendTextMessageResult."""
        return _json(200, {"MessageId": message_id} if message_id else {}, content_type="application/x-amz-json-1.0")

    def refused(self, refusal: _Refusal) -> Answer:
        """Return a JSON 1.0 error: the code is `__type`."""
        body = {"__type": f"com.amazonaws.pinpointsmsvoicev2#{refusal.code}", "Message": refusal.message}
        if refusal.reason:
            body["Reason"] = refusal.reason
        return _json(refusal.status, body, content_type="application/x-amz-json-1.0")


# SNS


class Sns(AwsService):
    """SNS Publish to a phone number."""

    name = "sns"
    invalid = _Refusal(400, "InvalidParameter", "")
    refusals: ClassVar[Mapping[Behaviour, _Refusal]] = {
        Behaviour.THROTTLE: _Refusal(400, "Throttling", "Rate exceeded"),
        Behaviour.QUOTA: _Refusal(400, "Throttling", "Daily message quota exceeded"),
        Behaviour.PAUSED: _Refusal(403, "OptInRequired", "The account needs a subscription for the service"),
        Behaviour.REJECT: _Refusal(400, "InvalidParameter", "Invalid parameter: PhoneNumber"),
        Behaviour.DENIED: _Refusal(403, "AuthorizationError", "User is not authorized to perform SNS:Publish"),
        Behaviour.CREDENTIALS: _Refusal(403, "InvalidClientTokenId", "The security token is invalid"),
    }

    def read(self, headers: Mapping[str, str], body: bytes) -> Submission:
        """Read the query form; our id from the HTTP header, because SNS has no place for it."""
        form = {name: values[-1] for name, values in parse_qs(body.decode("utf-8", "replace")).items()}
        self.check(form.get("Action") == "Publish", "Action")
        self.check(_NUMBER.fullmatch(form.get("PhoneNumber", "")), "Invalid parameter: PhoneNumber")
        self.check(form.get("Message"), "Invalid parameter: Empty message")
        attributes = {
            value: form.get(name.removesuffix(".Name") + ".Value.StringValue", "")
            for name, value in form.items()
            if name.startswith("MessageAttributes.entry.") and name.endswith(".Name")
        }
        return Submission(
            channel="sms",
            service=self.name,
            message_id=headers.get("x-nightmail-message", ""),
            recipients=[form["PhoneNumber"]],
            subject="",
            content=form["Message"].encode("utf-8"),
            tags=attributes,
        )

    def accepted(self, message_id: str) -> Answer:
        """Return PublishResponse."""
        inner = f"<MessageId>{message_id}</MessageId>" if message_id else ""
        return _xml(200, f"<PublishResponse {_NAMESPACE}><PublishResult>{inner}</PublishResult></PublishResponse>")

    def refused(self, refusal: _Refusal) -> Answer:
        """Return ErrorResponse."""
        code, message = escape(refusal.code), escape(refusal.message)
        error = f"<Error><Type>Sender</Type><Code>{code}</Code><Message>{message}</Message></Error>"
        return _xml(refusal.status, f"<ErrorResponse {_NAMESPACE}>{error}</ErrorResponse>")


_NAMESPACE = 'xmlns="http://sns.amazonaws.com/doc/2010-03-31/"'
_SES, _SMS_VOICE, _SNS = Ses(), SmsVoice(), Sns()


def service_of(path: str, headers: Mapping[str, str]) -> AwsService | None:
    """Return the service a POST is for; None when it is none of the three."""
    if path == "/v2/email/outbound-emails":
        return _SES
    if headers.get("x-amz-target") == "PinpointSMSVoiceV2.SendTextMessage":
        return _SMS_VOICE
    if path == "/" and headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        return _SNS
    return None


def header_of(message: bytes, name: str) -> str:
    """Return a header of a raw message, unfolded and decoded; '' when it has none."""
    head = message.partition(b"\r\n\r\n")[0]
    found = re.search(rb"(?im)^" + name.encode("ascii") + rb":[ \t]*([^\r\n]*(?:\r\n[ \t][^\r\n]*)*)", head)
    if not found:
        return ""
    text = found[1].replace(b"\r\n", b"").decode("utf-8", "replace").strip()
    if "=?" not in text:
        return text
    try:
        return str(make_header(decode_header(text)))
    except (HeaderParseError, LookupError, UnicodeDecodeError):
        return text


def _json(
    status: int,
    body: Mapping[str, str],
    *,
    content_type: str = "application/json",
    headers: tuple[tuple[str, str], ...] = (),
) -> Answer:
    return Answer(status, content_type, msgspec.json.encode(body), headers)


def _xml(status: int, body: str) -> Answer:
    return Answer(status, "text/xml", body.encode("utf-8"))
