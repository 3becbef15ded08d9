"""One attempt at an AWS call: a bounded thread, a bounded time, and an outcome class for whatever happened.

Who may still reach the provider after the caller has given up is the whole subject, so the moment of sending
is a hand-over guarded by a lock:

    WAITING ──(before-send, in the thread)──► SENDING ──► answer read, or an error
       │                                        │
       └──(timeout, cancel)──► ABANDONED        └──(timeout)──► the caller raises InDoubt

    ABANDONED before SENDING: the thread finds the mark at before-send and stops; nothing was or will be
    written, so the caller may raise Retryable.

    A timeout in SENDING leaves a thread behind that nobody waits for. It ends by its own read timeout; its late
    result is only logged. `concurrency` such threads are borne besides the `concurrency` in use; beyond that
    calls are refused (Retryable, code `threads_busy`) rather than queued behind the dead. The read timeout is
    per read: a server that drips its answer byte by byte keeps a thread for as long as it drips.

botocore says `ConnectionClosedError` for a reset before as well as after the request was written, and
`SSLError` for a failed handshake as well as for a broken stream. The two are told apart by where in urllib3
the error was raised (`_validate_conn` connects and shakes hands, before any byte of the request); when that
cannot be seen the call is in doubt.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import Enum, auto
from types import TracebackType
from typing import Any
from uuid import UUID

import boto3
import structlog
from botocore import exceptions as aws_errors
from botocore.config import Config

from nightmail.clock import monotonic
from nightmail.errors import InDoubt, NotConfigured, Permanent, ProviderError, Retryable, Throttled
from nightmail.rules.provider_events import MESSAGE_HEADER

__all__ = ["BoundedCalls", "aws_config", "aws_session", "outcome_of", "read_message_id"]

CONNECT_TIMEOUT_S = 2.0  # an endpoint that has not answered a SYN by then is away; the claim loop tries again
PARK_S = 600.0  # AWS advises up to 10 minutes for a used-up daily quota; nobody resumes an account faster
DETAIL_CHARACTERS = 300

# What the account as a whole may not do now: park the channel instead of failing every message in it.
_CHANNEL_STOPS = frozenset(
    {
        "AccountSuspendedException", "SendingPausedException", "AccountSendingPausedException",
        "ConfigurationSetSendingPausedException", "ServiceQuotaExceededException",
        # wrong or expired credentials, clock skew: the account's trouble, not the message's
        "AuthFailure", "ExpiredToken", "ExpiredTokenException", "IncompleteSignature", "InvalidClientTokenId",
        "InvalidSignatureException", "MissingAuthenticationToken", "MissingAuthenticationTokenException",
        "OptInRequired", "RequestExpired", "RequestTimeTooSkewed", "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    }
)  # fmt: skip
# AccessDenied is about one sender identity as a rule (Permanent); with these reasons it is about the account.
_ACCOUNT_REASONS = frozenset({"ACCOUNT_DISABLED", "INSUFFICIENT_ACCOUNT_REPUTATION"})
_THROTTLES = frozenset(
    {
        "BandwidthLimitExceeded", "KMSThrottling", "LimitExceeded", "LimitExceededException", "PriorRequestNotComplete",
        "RequestLimitExceeded", "RequestThrottled", "RequestThrottledException", "SlowDown", "Throttled",
        "ThrottledException", "Throttling", "ThrottlingException", "TooManyRequests", "TooManyRequestsException",
    }
)  # fmt: skip

_NOT_WRITTEN: tuple[tuple[type[Exception], str], ...] = (
    (aws_errors.ConnectTimeoutError, "connect_timeout"),
    (aws_errors.EndpointConnectionError, "connect_failed"),
    (aws_errors.ProxyConnectionError, "proxy_failed"),
)
_NO_CREDENTIALS: tuple[type[Exception], ...] = (
    aws_errors.NoCredentialsError,
    aws_errors.PartialCredentialsError,
    aws_errors.CredentialRetrievalError,
    aws_errors.UnauthorizedSSOTokenError,
    aws_errors.TokenRetrievalError,
)

_log = structlog.get_logger(__name__)


class _Stage(Enum):
    WAITING = auto()
    SENDING = auto()
    ABANDONED = auto()


class _AbandonedError(Exception):
    """The caller gave up before the request was written."""


class _Ticket:
    """One call on its way from the event loop into a thread."""

    def __init__(self, *, message_id: UUID, deadline: float) -> None:
        self.message_id = str(message_id)
        self.deadline = deadline
        self._stage = _Stage.WAITING
        self._lock = threading.Lock()

    @property
    def is_sent(self) -> bool:
        """True once the request may have been written."""
        return self._stage is _Stage.SENDING

    def start_sending(self) -> None:
        """Take the right to write the request; raises when the caller has given up."""
        with self._lock:
            if self._stage is _Stage.ABANDONED or self.deadline <= monotonic():
                self._stage = _Stage.ABANDONED
                raise _AbandonedError
            self._stage = _Stage.SENDING

    def abandon(self) -> bool:
        """Give the call up; True when nothing was written and nothing will be."""
        with self._lock:
            if self._stage is _Stage.WAITING:
                self._stage = _Stage.ABANDONED
            return self._stage is _Stage.ABANDONED


class BoundedCalls:
    """Runs blocking AWS calls, at most `concurrency` at a time, each for at most its timeout."""

    def __init__(self, *, provider: str, concurrency: int) -> None:
        self._provider = provider
        self._concurrency = concurrency
        self._slots = asyncio.Semaphore(concurrency)
        self._overrunning = 0
        self._current = threading.local()
        # Slots in use + overruns <= 2 * concurrency, so a granted call never waits for a thread.
        self._threads = ThreadPoolExecutor(max_workers=2 * concurrency, thread_name_prefix=f"nightmail-{provider}")

    @property
    def overrunning(self) -> int:
        """Threads whose callers have given up."""
        return self._overrunning

    def watch(self, client: Any) -> None:
        """Hook a boto3 client: our message id as a header, the read timeout of this call, the hand-over."""
        client.meta.events.register("before-call", self._before_call)
        client.meta.events.register("before-send", self._before_send)

    async def run(
        self, send: Callable[[], Mapping[str, Any]], *, message_id: UUID, timeout_s: float
    ) -> Mapping[str, Any]:
        """Run `send` in a thread; raises Throttled, Retryable, Permanent or InDoubt."""
        deadline = monotonic() + timeout_s
        if self._overrunning >= self._concurrency:
            raise Retryable("threads_busy", f"{self._overrunning} earlier calls have not ended")
        try:
            async with asyncio.timeout(timeout_s):
                await self._slots.acquire()
        except TimeoutError as exc:
            raise Retryable("no_free_slot", f"{self._concurrency} calls were running for {timeout_s:g} s") from exc
        try:
            ticket = _Ticket(message_id=message_id, deadline=deadline)
            return await self._run_in_thread(ticket, send)
        finally:
            self._slots.release()

    async def _run_in_thread(self, ticket: _Ticket, send: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        future = asyncio.get_running_loop().run_in_executor(self._threads, self._attempt, ticket, send)
        try:
            done, _ = await asyncio.wait((future,), timeout=max(0.0, ticket.deadline - monotonic()))
        except asyncio.CancelledError:
            ticket.abandon()
            self._leave_behind(future, ticket)
            raise
        if not done:
            is_unwritten = ticket.abandon()
            self._leave_behind(future, ticket)
            if is_unwritten:
                raise Retryable("call_timeout", "nothing was written")
            raise InDoubt("call_timeout", "no answer in time")
        error = future.exception()
        if error is None:
            return future.result()
        raise outcome_of(error, is_sent=ticket.is_sent) from error

    def _attempt(self, ticket: _Ticket, send: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        self._current.ticket = ticket
        try:
            return send()
        finally:
            self._current.ticket = None

    def _before_call(self, params: dict[str, Any], context: dict[str, Any], **_: Any) -> None:
        ticket: _Ticket = self._current.ticket
        # AWS ignores headers it does not know; ours makes a request traceable where the API has no tags
        # (SNS).
        params["headers"][MESSAGE_HEADER] = ticket.message_id
        context["read_timeout"] = max(0.05, ticket.deadline - monotonic())

    def _before_send(self, **_: Any) -> None:
        ticket: _Ticket = self._current.ticket
        ticket.start_sending()

    def _leave_behind(self, future: asyncio.Future[Mapping[str, Any]], ticket: _Ticket) -> None:
        self._overrunning += 1

        def end(ended: asyncio.Future[Mapping[str, Any]]) -> None:
            self._overrunning -= 1
            error = None if ended.cancelled() else ended.exception()
            if ticket.is_sent:
                result = "accepted" if error is None else type(error).__name__
                _log.warning(
                    "provider.late_result",
                    provider=self._provider,
                    message_id=ticket.message_id,
                    result=result,
                )

        future.add_done_callback(end)

    async def close(self) -> None:
        """Take no more calls; threads still in one end by their read timeout."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def aws_session(region: str | None) -> tuple[boto3.session.Session, str]:
    """Return a session and its region; raises NotConfigured when region or credentials are missing.

    Without an explicit region: AWS_REGION, as every other AWS SDK reads it and boto3 does not, then what boto3 finds.
    Blocks while the credential chain is read (up to a second where it ends at instance metadata).
    """
    session = boto3.session.Session(region_name=region or os.environ.get("AWS_REGION") or None)
    if not session.region_name:
        raise NotConfigured(["AWS_REGION"])
    if session.get_credentials() is None:
        raise NotConfigured(["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
    return session, session.region_name


def aws_config(*, concurrency: int, timeout_s: float) -> Config:
    """Return the botocore settings of a single attempt."""
    return Config(
        # `max_attempts` counts retries in one mode and attempts in another; this one always means requests.
        retries={"total_max_attempts": 1, "mode": "standard"},
        connect_timeout=min(CONNECT_TIMEOUT_S, timeout_s),
        read_timeout=timeout_s,
        max_pool_connections=concurrency,
        tcp_keepalive=True,
        # Shapes are ours and typed; AWS checks them anyway.
        parameter_validation=False,
    )


def read_message_id(answer: Mapping[str, Any]) -> str:
    """Return MessageId; raises InDoubt when a 2xx answer has none, because the request may well have worked."""
    message_id = answer.get("MessageId")
    if not isinstance(message_id, str) or not message_id:
        raise InDoubt("unreadable_answer", "a 2xx answer without MessageId")
    return message_id


def outcome_of(error: BaseException, *, is_sent: bool) -> ProviderError:
    """Return the outcome class of what botocore raised; `is_sent` when the request may have been written."""
    detail = f"{type(error).__name__}: {error}"[:DETAIL_CHARACTERS]
    if isinstance(error, aws_errors.ClientError):
        return _refusal(error)
    if isinstance(error, _AbandonedError):
        return Retryable("call_timeout", "nothing was written")
    if isinstance(error, _NO_CREDENTIALS):
        return Throttled("channel_stopped", detail, retry_after_s=PARK_S)
    if isinstance(error, aws_errors.ParamValidationError):
        return Permanent("invalid_request", detail)
    for foreign, code in _NOT_WRITTEN:
        if isinstance(error, foreign):
            return Retryable(code, detail)
    if not is_sent or _happened_while_connecting(error):
        return Retryable("tls_failed" if isinstance(error, aws_errors.SSLError) else "connect_failed", detail)
    if isinstance(error, aws_errors.ReadTimeoutError):
        return InDoubt("read_timeout", detail)
    if isinstance(error, aws_errors.ConnectionClosedError):
        return InDoubt("connection_lost", detail)
    return InDoubt("unreadable_answer", detail)


def _refusal(error: aws_errors.ClientError) -> ProviderError:
    answer: Mapping[str, Any] = error.response
    metadata = answer.get("ResponseMetadata", {})
    status = int(metadata.get("HTTPStatusCode", 0))
    code = str(answer.get("Error", {}).get("Code", "")) or f"http_{status}"
    message = str(answer.get("Error", {}).get("Message", ""))
    reason = str(answer.get("Reason", "") or "")
    detail = ": ".join(part for part in (code, reason, message) if part)[:DETAIL_CHARACTERS]
    if code in _CHANNEL_STOPS or reason in _ACCOUNT_REASONS:
        return Throttled("channel_stopped", detail, retry_after_s=PARK_S)
    if "daily message quota exceeded" in message.lower():
        return Throttled("daily_quota", detail, retry_after_s=PARK_S)
    if status == 429 or code in _THROTTLES or "maximum sending rate exceeded" in message.lower():
        return Throttled("throttled", detail, retry_after_s=_retry_after_s(metadata))
    if status >= 500 or status == 408 or status < 300:
        return InDoubt(f"http_{status}", detail)
    if status < 400:  # a redirect: a proxy or a wrong endpoint answered, not the service
        return Retryable(f"http_{status}", detail)
    # The reason says more than the class: DESTINATION_PHONE_NUMBER_OPTED_OUT against ConflictException.
    return Permanent(reason or (f"http_{code}" if code.isdigit() else code), detail)


def _retry_after_s(metadata: Mapping[str, Any]) -> float | None:
    """Return Retry-After in seconds, at most an hour; None when absent or a date."""
    value = str(metadata.get("HTTPHeaders", {}).get("retry-after", ""))
    return min(float(value), 3600.0) if value.isdigit() else None


def _happened_while_connecting(error: BaseException) -> bool:
    """Return True when the traceback shows urllib3 still connecting or shaking hands."""
    return any(
        frame.tb_frame.f_code.co_name == "_validate_conn"
        for link in _chain(error)
        for frame in _frames(link.__traceback__)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and what it wraps: cause, context and the originals urllib3 and botocore keep in fields."""
    waiting, seen = [error], set[int]()
    while waiting:
        link = waiting.pop()
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        kept = (link.__cause__, link.__context__, getattr(link, "kwargs", {}).get("error"), *link.args)
        waiting.extend(item for item in kept if isinstance(item, BaseException))


def _frames(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next
