"""SMS by Amazon SNS: Publish to a phone number.

The simple way: no registration objects, no delivery events per message, no tags. Our message id travels only
in the HTTP header X-Nightmail-Message, so an SNS call in doubt never finds evidence.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from nightmail.ports import Accepted, OutgoingSms
from nightmail.providers.aws import BoundedCalls, aws_config, aws_session, read_message_id

if TYPE_CHECKING:
    from types_boto3_sns.type_defs import MessageAttributeValueTypeDef

__all__ = ["SnsSender"]


class SnsSender:
    """Sends by SNS Publish. AWS_ENDPOINT_URL and AWS_ENDPOINT_URL_SNS are honoured unless `endpoint_url` is given."""

    name = "sns"

    def __init__(
        self,
        *,
        region: str | None,
        sender: str | None = None,
        message_type: Literal["Transactional", "Promotional"] = "Transactional",
        concurrency: int = 32,
        timeout_s: float = 10.0,
        endpoint_url: str | None = None,
    ) -> None:
        session, region = aws_session(region)
        self._sender = sender
        self._message_type = message_type
        self._calls = BoundedCalls(provider=self.name, concurrency=concurrency)
        self._client = session.client(
            "sns",
            region_name=region,
            endpoint_url=endpoint_url,
            config=aws_config(concurrency=concurrency, timeout_s=timeout_s),
        )
        self._calls.watch(self._client)

    async def send_sms(self, sms: OutgoingSms, *, timeout_s: float) -> Accepted:
        """Make one attempt; raises Throttled, Retryable, Permanent or InDoubt."""
        send = partial(
            self._client.publish,
            PhoneNumber=sms.to,
            Message=sms.body,
            MessageAttributes=self._attributes(sms),
        )
        return Accepted(read_message_id(await self._calls.run(send, message_id=sms.message_id, timeout_s=timeout_s)))

    async def close(self) -> None:
        """Release connections and threads."""
        await self._calls.close()
        self._client.close()

    def _attributes(self, sms: OutgoingSms) -> dict[str, MessageAttributeValueTypeDef]:
        attributes = {"AWS.SNS.SMS.SMSType": _string(self._message_type)}
        sender = sms.sender or self._sender
        if sender:
            is_number = sender.lstrip("+").isdigit()
            name = "AWS.MM.SMS.OriginationNumber" if is_number else "AWS.SNS.SMS.SenderID"
            attributes[name] = _string(sender)
        return attributes


def _string(text: str) -> MessageAttributeValueTypeDef:
    return {"DataType": "String", "StringValue": text}
