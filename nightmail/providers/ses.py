"""Email by Amazon SES v2: SendEmail with Raw content.

Raw rather than Simple: the same tested bytes as SMTP, any header the sender wants (Simple limits values to
995 printable ASCII characters), inline images in every region. SES replaces `Message-ID` and `Date` by its
own, so what comes back in events is the EmailTag `nightmail_message` (event publishing needs a configuration
set) and the header X-Nightmail-Message.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from nightmail.errors import Permanent
from nightmail.ports import Accepted, OutgoingEmail
from nightmail.providers.aws import BoundedCalls, aws_config, aws_session, read_message_id
from nightmail.providers.mime import Mailbox, MimeMessage, encode_mime
from nightmail.rules.provider_events import MESSAGE_TAG

if TYPE_CHECKING:
    from types_boto3_sesv2.type_defs import MessageTagTypeDef, SendEmailRequestTypeDef

__all__ = ["SesSender"]

_TAG_REFUSED = re.compile(r"[^A-Za-z0-9_-]")  # SES refuses the whole message for one such character
_TAG_CHARACTERS = 256


class SesSender:
    """Sends by SES v2. AWS_ENDPOINT_URL and AWS_ENDPOINT_URL_SESV2 are honoured unless `endpoint_url` is given."""

    name = "ses"

    def __init__(
        self,
        *,
        region: str | None,
        configuration_set: str | None = None,
        concurrency: int = 32,
        timeout_s: float = 10.0,
        endpoint_url: str | None = None,
    ) -> None:
        session, region = aws_session(region)
        self._configuration_set = configuration_set
        self._calls = BoundedCalls(provider=self.name, concurrency=concurrency)
        self._client = session.client(
            "sesv2",
            region_name=region,
            endpoint_url=endpoint_url,
            config=aws_config(concurrency=concurrency, timeout_s=timeout_s),
        )
        self._calls.watch(self._client)

    async def send_email(self, email: OutgoingEmail, *, timeout_s: float) -> Accepted:
        """Make one attempt; raises Throttled, Retryable, Permanent or InDoubt."""
        message = await encode_mime(email)
        if message.smtputf8:
            raise Permanent("non_ascii_local_part", "SES takes no address whose local part is not ASCII")
        send = partial(self._client.send_email, **self._request(email, message))
        return Accepted(read_message_id(await self._calls.run(send, message_id=email.message_id, timeout_s=timeout_s)))

    async def close(self) -> None:
        """Release connections and threads."""
        await self._calls.close()
        self._client.close()

    def _request(self, email: OutgoingEmail, message: MimeMessage) -> SendEmailRequestTypeDef:
        request: SendEmailRequestTypeDef = {
            "FromEmailAddress": message.sender.encoded(),
            "Destination": {
                "ToAddresses": _addresses(message.to),
                "CcAddresses": _addresses(message.cc),
                "BccAddresses": _addresses(message.bcc),
            },
            "Content": {"Raw": {"Data": message.content}},
            "EmailTags": _tags(email),
        }
        if self._configuration_set:
            request["ConfigurationSetName"] = self._configuration_set
        return request


def _addresses(mailboxes: Sequence[Mailbox]) -> list[str]:
    return [mailbox.address for mailbox in mailboxes]


def _tags(email: OutgoingEmail) -> list[MessageTagTypeDef]:
    """Our tag first and unforgeable; the sender's in the alphabet SES allows."""
    tags: list[MessageTagTypeDef] = [{"Name": MESSAGE_TAG, "Value": str(email.message_id)}]
    for name, value in email.tags:
        if name != MESSAGE_TAG and name and value:
            tags.append({"Name": _tag_text(name), "Value": _tag_text(value)})
    return tags


def _tag_text(text: str) -> str:
    return _TAG_REFUSED.sub("_", text)[:_TAG_CHARACTERS]
