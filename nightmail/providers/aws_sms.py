"""SMS by AWS End User Messaging (pinpoint-sms-voice-v2): SendTextMessage.

The one for registered brands, campaigns and numbers: it takes the origination identity per message, and
delivery events carry `Context`, where our message id travels.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from nightmail.ports import Accepted, OutgoingSms
from nightmail.providers.aws import BoundedCalls, aws_config, aws_session, read_message_id
from nightmail.rules.provider_events import MESSAGE_TAG

if TYPE_CHECKING:
    from types_boto3_pinpoint_sms_voice_v2.type_defs import SendTextMessageRequestTypeDef

__all__ = ["AwsSmsSender"]

# Context holds at most 5 entries (service model); one is ours.
_CONTEXT_ENTRIES = 5
_CONTEXT_NAME_CHARACTERS = 100
_CONTEXT_VALUE_CHARACTERS = 800


class AwsSmsSender:
    """Sends by End User Messaging SMS. AWS_ENDPOINT_URL_PINPOINT_SMS_VOICE_V2 is honoured."""

    name = "aws_sms"

    def __init__(
        self,
        *,
        region: str | None,
        origination_identity: str | None = None,
        configuration_set: str | None = None,
        message_type: Literal["TRANSACTIONAL", "PROMOTIONAL"] = "TRANSACTIONAL",
        concurrency: int = 32,
        timeout_s: float = 10.0,
        endpoint_url: str | None = None,
    ) -> None:
        session, region = aws_session(region)
        self._origination_identity = origination_identity
        self._configuration_set = configuration_set
        self._message_type = message_type
        self._calls = BoundedCalls(provider=self.name, concurrency=concurrency)
        self._client = session.client(
            "pinpoint-sms-voice-v2",
            region_name=region,
            endpoint_url=endpoint_url,
            config=aws_config(concurrency=concurrency, timeout_s=timeout_s),
        )
        self._calls.watch(self._client)

    async def send_sms(self, sms: OutgoingSms, *, timeout_s: float) -> Accepted:
        """Make one attempt; raises Throttled, Retryable, Permanent or InDoubt."""
        send = partial(self._client.send_text_message, **self._request(sms))
        return Accepted(read_message_id(await self._calls.run(send, message_id=sms.message_id, timeout_s=timeout_s)))

    async def close(self) -> None:
        """Release connections and threads."""
        await self._calls.close()
        self._client.close()

    def _request(self, sms: OutgoingSms) -> SendTextMessageRequestTypeDef:
        request: SendTextMessageRequestTypeDef = {
            "DestinationPhoneNumber": sms.to,
            "MessageBody": sms.body,
            "MessageType": self._message_type,
            "Context": _context(sms),
        }
        origination = sms.sender or self._origination_identity
        if origination:
            request["OriginationIdentity"] = origination
        if self._configuration_set:
            request["ConfigurationSetName"] = self._configuration_set
        return request


def _context(sms: OutgoingSms) -> dict[str, str]:
    """Our id, then as many of the sender's tags as fit; names may hold no space, values not begin or end with one."""
    context = {MESSAGE_TAG: str(sms.message_id)}
    for name, value in sms.tags:
        name, value = (
            "_".join(name.split())[:_CONTEXT_NAME_CHARACTERS],
            value[:_CONTEXT_VALUE_CHARACTERS].strip(),
        )
        if len(context) < _CONTEXT_ENTRIES and name and value:
            context.setdefault(name, value)
    return context
