"""A mail catcher for the demonstration: an SMTP server in this process that keeps the last messages, parsed."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any

from aiosmtpd.smtp import SMTP, Envelope, Session

__all__ = ["CaughtEmail", "SmtpCatcher"]

KEEP = 200
DATA_SIZE_MAX = 40_000_000

_BOUNCE = re.compile(r"bounce(?:[-+._].*)?@", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class CaughtEmail:
    """A message as it arrived: envelope and content."""

    mail_from: str
    recipients: Sequence[str]
    message: EmailMessage

    @property
    def nightmail_message(self) -> str:
        """Our message id, '' when the message did not come from Nightmail."""
        return str(self.message.get("X-Nightmail-Message", ""))


class SmtpCatcher:
    """Listens on a free loopback port; refuses `bounce@`, `bounce-…@`, `bounce+…@` with 550.

    `messages` holds the last `keep`, newest last; `count` counts all taken, `refused` all refused recipients.
    """

    def __init__(self, *, keep: int = KEEP, port: int = 0) -> None:
        self.messages: deque[CaughtEmail] = deque(maxlen=keep)
        self.count = 0
        self.refused = 0
        self._port = port
        self._server: asyncio.Server | None = None

    async def start(self) -> str:
        """Start listening and return the SMTP_URL."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._protocol, "127.0.0.1", self._port)
        return f"smtp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}?starttls=off"

    async def stop(self) -> None:
        """Stop listening; open dialogues end by themselves."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def _protocol(self) -> SMTP:
        return SMTP(
            _Hooks(self),
            hostname="catcher.nightmail.test",
            enable_SMTPUTF8=True,
            data_size_limit=DATA_SIZE_MAX,
            loop=asyncio.get_running_loop(),
        )


class _Hooks:
    def __init__(self, catcher: SmtpCatcher) -> None:
        self._catcher = catcher

    async def handle_RCPT(
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        """Refuse addresses that ask for it."""
        if _BOUNCE.match(address):
            self._catcher.refused += 1
            return "550 5.1.1 No such user here"
        envelope.rcpt_tos.append(address)
        envelope.rcpt_options.extend(options)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        """Keep the message."""
        content: Any = envelope.content
        message = message_from_bytes(content, _class=EmailMessage, policy=policy.default)
        self._catcher.count += 1
        self._catcher.messages.append(
            CaughtEmail(mail_from=envelope.mail_from or "", recipients=tuple(envelope.rcpt_tos), message=message)
        )
        return f"250 2.0.0 Ok: caught as {self._catcher.count}"
