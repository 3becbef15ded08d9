"""Email by SMTP: a small pool of connections and an outcome class for every way a dialogue can end.

    connect, TLS, EHLO, AUTH    │ MAIL, RCPT…, DATA │ content and the final dot │ answer
    ────────────────────────────┼───────────────────┼───────────────────────────┼──────────────────
    any failure: Retryable      │ drop: Retryable   │ drop, timeout: InDoubt    │ 250 accepted
    bad login: channel_stopped  │ 4xx, 5xx: by code │                           │ 4xx, 5xx: by code

By code: 421, 450, 451, 452, 454 are Throttled when the text speaks of rate, else Retryable, as every 4xx; 5xx
is Permanent, but for missing or wrong credentials, which stop the channel (Throttled, code
`channel_stopped`).

A reused connection may have been closed by the server meanwhile (idle limit, messages per connection). It is
tried by RSET before it is used, and replaced when that fails: no submission has begun, so this is no second
attempt.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

import aiosmtplib

from nightmail import clock
from nightmail.errors import InDoubt, Permanent, ProviderError, Retryable, SettingsError, Throttled
from nightmail.ports import Accepted, OutgoingEmail
from nightmail.providers.mime import MimeMessage, encode_mime

__all__ = ["SmtpSender", "SmtpTarget"]

StartTls = Literal["auto", "required", "off"]

_START_TLS: dict[str, StartTls] = {
    "auto": "auto", "required": "required", "1": "required", "true": "required", "off": "off", "0": "off",
    "false": "off",
}  # fmt: skip

PARK_S = 600.0  # wrong credentials or a used-up daily quota do not heal in seconds
CONNECT_TIMEOUT_S = 5.0  # three or four round trips: TCP, TLS, EHLO, AUTH
MESSAGES_PER_CONNECTION = 100  # Postfix and Exim defaults for one session are 100 and more
DETAIL_CHARACTERS = 300

_RATE_CODES = frozenset({421, 450, 451, 452, 454})
_CREDENTIAL_CODES = frozenset({530, 534, 535, 538})
_RATE_WORDS = re.compile(
    r"\brate\b|too (?:many|fast|much)|throttl|slow down|quota|limit exceeded|sending limit", re.IGNORECASE
)
_DAILY_WORDS = re.compile(r"daily.*quota", re.IGNORECASE)
_SES_ANSWER = re.compile(r"(?:\d\.\d\.\d )?Ok ([0-9a-f]{16}-[0-9a-f-]{36}-[0-9]{6})", re.IGNORECASE)
_LEADING_DOT = re.compile(rb"(?m)^\.")


@dataclass(frozen=True, slots=True)
class SmtpTarget:
    """Where to and how: what an SMTP_URL says."""

    host: str
    port: int
    is_tls: bool
    start_tls: StartTls
    username: str | None
    password: str | None

    @classmethod
    def parse(cls, url: str) -> SmtpTarget:
        """Read `smtp[s]://[user[:password]@]host[:port][?starttls=auto|required|off]`.

        Default of starttls: `required` when there is a password and the host is not this machine, else
        `auto`. Raises SettingsError.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as exc:
            raise SettingsError("SMTP_URL is not a URL") from exc
        if parts.scheme not in ("smtp", "smtps") or not parts.hostname or parts.path not in ("", "/"):
            raise SettingsError("SMTP_URL must look like smtp://user:password@host:587 or smtps://host")
        is_tls = parts.scheme == "smtps"
        is_local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        query = parse_qs(parts.query, keep_blank_values=True)
        asked = query.pop("starttls", ["required" if parts.password and not is_local else "auto"])[-1]
        start_tls = _START_TLS.get(asked.lower())
        if query or start_tls is None:
            raise SettingsError("SMTP_URL knows one option: ?starttls=auto, required (or 1) or off (or 0)")
        return cls(
            host=parts.hostname,
            port=port or (465 if is_tls else 587 if parts.username else 25),
            is_tls=is_tls,
            start_tls="off" if is_tls else start_tls,
            username=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password is not None else None,
        )


@dataclass(slots=True)
class _Connection:
    client: aiosmtplib.SMTP
    idle_since: float = 0.0
    messages: int = 0


class SmtpSender:
    """Sends by SMTP over at most `concurrency` connections; idle ones are closed after `idle_s` seconds."""

    name = "smtp"

    def __init__(
        self,
        *,
        url: str,
        concurrency: int = 8,
        idle_s: float = 15.0,
        local_hostname: str | None = None,
        tls_context: ssl.SSLContext | None = None,
    ) -> None:
        self._target = SmtpTarget.parse(url)
        self._idle_s = idle_s
        self._local_hostname = local_hostname or socket.gethostname()
        self._tls_context = tls_context
        self._slots = asyncio.Semaphore(concurrency)
        self._concurrency = concurrency
        self._idle: deque[_Connection] = deque()
        self._reaper: asyncio.TimerHandle | None = None
        self._is_closed = False

    async def send_email(self, email: OutgoingEmail, *, timeout_s: float) -> Accepted:
        """Make one attempt; `detail` of the answer names refused recipients and their codes.

        Raises Throttled, Retryable, Permanent or InDoubt.
        """
        message = await encode_mime(email)
        dialogue = _Dialogue(message)
        try:
            async with asyncio.timeout(timeout_s):
                await self._slots.acquire()
        except TimeoutError as exc:
            raise Retryable("no_free_slot", "all connections are busy") from exc
        try:
            async with asyncio.timeout(timeout_s):
                return await self._send(dialogue)
        except TimeoutError as exc:
            if dialogue.is_content_written:
                raise InDoubt("timeout", "no answer to the message") from exc
            raise Retryable("timeout", "the message was not written in time") from exc
        finally:
            self._slots.release()

    async def close(self) -> None:
        """Close idle connections; busy ones close as their calls end."""
        self._is_closed = True
        self._reap(older_than_s=0.0)

    async def _send(self, dialogue: _Dialogue) -> Accepted:
        connection = await self._take()
        try:
            accepted = await dialogue.run(connection.client)
        except (Permanent, Throttled, Retryable):
            # The server has answered and may be used again; RSET before the next message clears the rest.
            if dialogue.is_out_of_step:
                connection.client.close()
            self._give_back(connection)
            raise
        except BaseException:
            connection.client.close()
            raise
        connection.messages += 1
        self._give_back(connection)
        return accepted

    async def _take(self) -> _Connection:
        """Return a live connection: the one used last (warmest) or a new one."""
        while self._idle:
            connection = self._idle.pop()
            try:
                if connection.client.is_connected:
                    await connection.client.rset()
                    return connection
            except (aiosmtplib.SMTPException, OSError):
                pass
            except BaseException:
                connection.client.close()
                raise
            connection.client.close()
        return _Connection(await self._connect())

    async def _connect(self) -> aiosmtplib.SMTP:
        target = self._target
        client = aiosmtplib.SMTP(
            hostname=target.host,
            port=target.port,
            use_tls=target.is_tls,
            start_tls={"auto": None, "required": True, "off": False}[target.start_tls],
            username=target.username,
            password=target.password,
            local_hostname=self._local_hostname,
            tls_context=self._tls_context,
            timeout=None,  # the whole call is bounded by send_email
        )
        with _stage_of_connecting():
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await client.connect()
                if client.is_ehlo_or_helo_needed:
                    await client.ehlo()
        return client

    def _give_back(self, connection: _Connection) -> None:
        worn_out = connection.messages >= MESSAGES_PER_CONNECTION
        if self._is_closed or worn_out or not connection.client.is_connected:
            connection.client.close()
            return
        connection.idle_since = clock.monotonic()
        self._idle.append(connection)
        if self._reaper is None:
            self._reaper = asyncio.get_running_loop().call_later(self._idle_s, self._reap)

    def _reap(self, *, older_than_s: float | None = None) -> None:
        """Close connections idle for too long and look again later while there are others."""
        if self._reaper is not None:
            self._reaper.cancel()
            self._reaper = None
        oldest = clock.monotonic() - (self._idle_s if older_than_s is None else older_than_s)
        while self._idle and self._idle[0].idle_since <= oldest:
            self._idle.popleft().client.close()
        if self._idle:
            wait_s = max(0.01, self._idle[0].idle_since + self._idle_s - clock.monotonic())
            self._reaper = asyncio.get_running_loop().call_later(wait_s, self._reap)


class _Dialogue:
    """One message over one connection; `is_content_written` is the line between Retryable and InDoubt."""

    def __init__(self, message: MimeMessage) -> None:
        self._message = message
        self.is_content_written = False
        self.is_out_of_step = False

    async def run(self, client: aiosmtplib.SMTP) -> Accepted:
        """MAIL, RCPT for each recipient, DATA, content."""
        try:
            await self._mail(client)
            refused = await self._recipients(client)
            answer = await self._data(client)
        except aiosmtplib.SMTPResponseException as exc:
            if exc.code == aiosmtplib.SMTPStatus.invalid_response:
                self.is_out_of_step = True  # what comes next on this connection answers who knows what
                raise self._broken("unreadable_answer", exc) from exc
            raise _refusal(exc.code, exc.message) from exc
        except (aiosmtplib.SMTPException, OSError) as exc:
            raise self._broken("connection_lost", exc) from exc
        except ValueError as exc:  # aiosmtplib refuses control characters in command arguments
            raise Permanent("invalid_address", str(exc)) from exc
        found = _SES_ANSWER.match(answer)
        # A relay's queue id is unique to the relay only and comes back nowhere; our Message-ID does, in
        # bounces.
        return Accepted(found[1] if found else self._message.message_id.strip("<>"), detail=refused)

    async def _mail(self, client: aiosmtplib.SMTP) -> None:
        options = []
        if self._message.smtputf8:
            if not client.supports_extension("smtputf8"):
                raise Permanent("non_ascii_local_part", "the server does not support SMTPUTF8")
            options.append("SMTPUTF8")
        if client.supports_extension("size"):
            options.append(f"SIZE={len(self._message.content)}")
        await client.mail(self._message.sender.address, options=options, encoding="utf-8")

    async def _recipients(self, client: aiosmtplib.SMTP) -> dict[str, str]:
        """Return {refused address: code}; raises when all are refused, the most hopeful class of them."""
        refusals: dict[str, aiosmtplib.SMTPRecipientRefused] = {}
        recipients = self._message.recipients
        for address in recipients:
            try:
                await client.rcpt(address, encoding="utf-8")
            except aiosmtplib.SMTPRecipientRefused as exc:
                refusals[address] = exc
        if len(refusals) == len(recipients):
            raise _most_hopeful(refusals)
        return {address: str(refusal.code) for address, refusal in refusals.items()}

    async def _data(self, client: aiosmtplib.SMTP) -> str:
        """Write the content and return the server's words. aiosmtplib's data() hides the moment of writing."""
        start = await client.execute_command(b"DATA")
        if start.code != aiosmtplib.SMTPStatus.start_input:
            raise aiosmtplib.SMTPDataError(start.code, start.message)
        protocol = client.protocol
        if protocol is None:
            raise aiosmtplib.SMTPServerDisconnected("Connection lost")
        content = _LEADING_DOT.sub(b"..", self._message.content)
        content += b".\r\n" if content.endswith(b"\r\n") else b"\r\n.\r\n"
        self.is_content_written = True
        protocol.write(content)
        answer = await protocol.read_response()
        if answer.code != aiosmtplib.SMTPStatus.completed:
            raise aiosmtplib.SMTPDataError(answer.code, answer.message)
        return answer.message

    def _broken(self, code: str, exc: Exception) -> ProviderError:
        detail = f"{type(exc).__name__}: {exc}"[:DETAIL_CHARACTERS]
        return InDoubt(code, detail) if self.is_content_written else Retryable(code, detail)


@contextmanager
def _stage_of_connecting() -> Iterator[None]:
    """Turn every failure to get a usable connection into a class; none of them is about the message."""
    try:
        yield
    except aiosmtplib.SMTPAuthenticationError as exc:
        if exc.code < 500:
            raise _refusal(exc.code, exc.message) from exc
        raise Throttled("channel_stopped", _said(exc.code, exc.message), retry_after_s=PARK_S) from exc
    except aiosmtplib.SMTPResponseException as exc:
        if 400 <= exc.code < 500 or exc.code in _CREDENTIAL_CODES:
            raise _refusal(exc.code, exc.message) from exc
        raise Retryable("connect_refused", _said(exc.code, exc.message)) from exc
    except TimeoutError as exc:
        raise Retryable("connect_timeout", f"no usable connection within {CONNECT_TIMEOUT_S:g} s") from exc
    except (aiosmtplib.SMTPException, OSError) as exc:
        is_tls = isinstance(exc, ssl.SSLError) or isinstance(exc.__cause__, ssl.SSLError)
        raise Retryable("tls_failed" if is_tls else "connect_failed", str(exc)[:DETAIL_CHARACTERS]) from exc


def _refusal(code: int, text: str) -> ProviderError:
    said = _said(code, text)
    if code in _CREDENTIAL_CODES:
        return Throttled("channel_stopped", said, retry_after_s=PARK_S)
    if code >= 500:
        return Permanent(f"smtp_{code}", said)
    if code in _RATE_CODES and _DAILY_WORDS.search(text):
        return Throttled("daily_quota", said, retry_after_s=PARK_S)
    if code in _RATE_CODES and _RATE_WORDS.search(text):
        return Throttled("throttled", said)
    return Retryable(f"smtp_{code}", said)


def _most_hopeful(refusals: Mapping[str, aiosmtplib.SMTPRecipientRefused]) -> ProviderError:
    outcomes = [_refusal(refusal.code, refusal.message) for refusal in refusals.values()]
    for kind in (Throttled, Retryable):
        for outcome in outcomes:
            if isinstance(outcome, kind):
                return outcome
    return outcomes[0]


def _said(code: int, text: str) -> str:
    return f"{code} {text}"[:DETAIL_CHARACTERS]
