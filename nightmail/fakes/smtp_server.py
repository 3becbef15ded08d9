"""The SMTP side of the fake provider, and the test rule of every dialogue: refuse at RCPT or fail after DATA."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

from aiosmtpd.smtp import SMTP, Envelope, Session

from nightmail.fakes.aws_api import MESSAGE_HEADER, header_of
from nightmail.fakes.message_log import MessageLog, Submission
from nightmail.fakes.script import ACCEPTING, Behaviour, Chooser

__all__ = ["FakeSmtp", "reset"]

DATA_SIZE_MAX = 40_000_000  # SES's own limit

_AT_RCPT = {
    Behaviour.THROTTLE: "454 Throttling failure: Maximum sending rate exceeded.",
    Behaviour.QUOTA: "454 Throttling failure: Daily message quota exceeded.",
    Behaviour.PAUSED: "530 Sending is paused for this account",
    Behaviour.CREDENTIALS: "535 Authentication Credentials Invalid",
    Behaviour.REJECT: "550 5.1.1 No such user",
    Behaviour.DENIED: "554 5.7.1 Relay access denied",
    Behaviour.TEMPFAIL: "451 4.3.0 Mailbox temporarily unavailable",
}
_AFTER_DATA = {**_AT_RCPT, Behaviour.FAIL5XX: "451 4.3.0 Queue file write error"}


class FakeSmtp:
    """Makes one aiosmtpd protocol per connection; the chooser may be exchanged while it runs."""

    def __init__(self, *, log: MessageLog, chooser: Chooser) -> None:
        self.log = log
        self.chooser = chooser

    def protocol(self) -> asyncio.Protocol:
        """Return the protocol for a new connection."""
        return _Smtp(
            _Handler(self),
            hostname="fake.nightmail.test",
            ident="Nightmail fake provider",
            enable_SMTPUTF8=True,
            data_size_limit=DATA_SIZE_MAX,
            loop=asyncio.get_running_loop(),
        )


class _Smtp(SMTP):
    def connection_lost(self, error: Exception | None) -> None:
        """End the dialogue; a hanging or reset one ends in the middle of its answer, which is no news."""
        super().connection_lost(error)
        task: asyncio.Task[None] | None = self._handler_coroutine
        if task is not None:
            task.add_done_callback(lambda done: None if done.cancelled() else done.exception() and None)


class _Handler:
    """Hooks of one connection."""

    def __init__(self, server: FakeSmtp) -> None:
        self._server = server
        self._behaviour: Behaviour | None = None

    async def handle_MAIL(
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        """Begin a message."""
        self._behaviour = None
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return "250 OK"

    async def handle_RCPT(
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        """Refuse or reset here when the recipient's name says so; else remember it for DATA."""
        behaviour = self._server.chooser.named(address)
        if behaviour in _AT_RCPT or behaviour is Behaviour.RESET_BEFORE:
            self._server.log.attempt(
                service="smtp", message_id="", recipients=[address], behaviour=behaviour, accepted=False
            )
            if behaviour is Behaviour.RESET_BEFORE:
                reset(server.transport)
                await asyncio.Event().wait()
            return _AT_RCPT[behaviour]
        self._behaviour = self._behaviour or behaviour
        envelope.rcpt_tos.append(address)
        envelope.rcpt_options.extend(options)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        """Take the message or not, and answer as scripted."""
        content = envelope.content if isinstance(envelope.content, bytes) else b""
        submission = Submission(
            channel="email",
            service="smtp",
            message_id=header_of(content, MESSAGE_HEADER),
            recipients=list(envelope.rcpt_tos),
            subject=header_of(content, "Subject"),
            content=content,
            tags={"mail_from": envelope.mail_from or "", "mail_options": " ".join(envelope.mail_options)},
        )
        chooser = self._server.chooser
        behaviour = self._behaviour or chooser.drawn(submission.message_id)
        is_accepted = behaviour in ACCEPTING
        self._server.log.attempt(
            service="smtp",
            message_id=submission.message_id,
            recipients=submission.recipients,
            behaviour=behaviour,
            accepted=is_accepted,
        )
        provider_message_id = self._server.log.take(submission) if is_accepted else ""
        return await self._answer(server.transport, behaviour, f"250 2.0.0 Ok: queued as {provider_message_id}")

    async def _answer(self, transport: Any, behaviour: Behaviour, accepted: str) -> str:
        script = self._server.chooser.script
        if script.latency_ms:
            await asyncio.sleep(script.latency_ms / 1000)
        if behaviour in _AFTER_DATA:
            return _AFTER_DATA[behaviour]
        if behaviour in (Behaviour.RESET_BEFORE, Behaviour.RESET_AFTER):
            reset(transport)
            await asyncio.Event().wait()
        if behaviour in (Behaviour.HANG, Behaviour.HANG_AFTER_ACCEPT):
            await asyncio.sleep(script.hang_s)
        if behaviour in (
            Behaviour.EMPTY,
            Behaviour.FAIL5XX_AFTER_ACCEPT,
            Behaviour.HANG,
            Behaviour.HANG_AFTER_ACCEPT,
        ):
            transport.close()
            await asyncio.Event().wait()
        if behaviour is Behaviour.GARBAGE:
            return "all fine, thank you"
        if behaviour is Behaviour.SLOW:
            await asyncio.sleep(script.slow_ms / 1000)
        if behaviour is Behaviour.DRIP:
            for character in accepted[:-1]:
                transport.write(character.encode("ascii"))
                await asyncio.sleep(script.drip_ms / 1000)
            return accepted[-1]
        return accepted


def reset(transport: Any) -> None:
    """Close with a TCP reset instead of the orderly end: linger for no time."""
    connection = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
