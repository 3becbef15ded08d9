"""Stripe's meters through the official SDK: one attempt per call, in a bounded number of threads.

| what Stripe does | what we raise or return |
| --- | --- |
| 400, an event already exists with identifier … | "duplicate": it was counted, or will be |
| 401, 403 | Throttled("channel_stopped"): the key's trouble, not the report's |
| 429 | Throttled |
| 409 | Retryable: another call for the same customer and meter is under way |
| other 4xx | Permanent |
| 5xx, timeout or reset after the request was written, an unreadable 2xx | InDoubt |
| no connection | Retryable |

The SDK would make up a random Idempotency-Key for each call and may keep it: it is the identifier of the event that
tells repetitions apart, because Stripe replays what it answered to a key, a 500 too. Its own retries are off.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, Literal, TypeVar

import requests
import stripe

from nightmail.clock import monotonic
from nightmail.errors import InDoubt, NotConfigured, Permanent, ProviderError, Retryable, Throttled
from nightmail.ports import MeterEvent
from nightmail.rules.stripe_objects import MeterErrors, read_meter_errors

__all__ = ["StripeMeter", "outcome_of"]

T = TypeVar("T")

CONNECT_TIMEOUT_S = 2.0
CONCURRENCY = 8
PARK_S = 600.0
DETAIL_CHARACTERS = 300
# Stripe's error code, and the words it came with where the code was left out.
DUPLICATE_CODE = "duplicate_meter_event"
DUPLICATE_WORDS = "event already exists with identifier"
# An account has few meters; a page more than this is not ours to read.
METERS_READ = 1000


class StripeMeter:
    """The meters of one account; without a key every call raises NotConfigured."""

    def __init__(self, *, api_key: str | None, api_base: str | None = None, timeout_s: float = 10.0) -> None:
        self._timeout_s = timeout_s
        self._slots = asyncio.Semaphore(CONCURRENCY)
        self._overrunning = 0
        self._meters: dict[str, str] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._client: stripe.StripeClient | None = None
        if api_key is not None:
            # Slots in use and threads that nobody waits for any more: a granted call never waits for a thread.
            self._threads = ThreadPoolExecutor(2 * CONCURRENCY, thread_name_prefix="nightmail-stripe")
            http = stripe.RequestsClient(timeout=(min(CONNECT_TIMEOUT_S, timeout_s), timeout_s))
            bases: Any = {"api": api_base} if api_base else {}
            self._client = stripe.StripeClient(api_key, base_addresses=bases, max_network_retries=0, http_client=http)

    async def report(self, event: MeterEvent, *, timeout_s: float) -> Literal["accepted", "duplicate"]:
        """Report usage in one attempt."""

        def call(client: stripe.StripeClient) -> Literal["accepted", "duplicate"]:
            try:
                made = client.v1.billing.meter_events.create(
                    {
                        "event_name": event.event_name,
                        "identifier": event.identifier,
                        "payload": {"stripe_customer_id": event.stripe_customer_id, "value": str(event.value)},
                        "timestamp": int(event.at.timestamp()),
                    }
                )
            except stripe.InvalidRequestError as error:
                if error.code == DUPLICATE_CODE or DUPLICATE_WORDS in str(error).lower():
                    return "duplicate"
                raise
            if getattr(made, "identifier", None) != event.identifier:
                raise InDoubt("unreadable_answer", "a 2xx answer without the identifier")
            return "accepted"

        return await self._run(call, timeout_s)

    async def sum_of(
        self, *, event_name: str, stripe_customer_id: str, start: datetime, end: datetime, timeout_s: float
    ) -> int:
        """Return what the meter counted from `start` to before `end`."""

        def call(client: stripe.StripeClient) -> int:
            meter_id = self._meter_of(client, event_name)
            page = client.v1.billing.meters.event_summaries.list(
                meter_id,
                {
                    "customer": stripe_customer_id,
                    "start_time": int(start.timestamp()),
                    "end_time": int(end.timestamp()),
                    "limit": 100,
                },
            )
            return round(sum(summary.aggregated_value for summary in page.auto_paging_iter()))

        return await self._run(call, timeout_s)

    async def fetch_errors(self, event_id: str, *, timeout_s: float) -> MeterErrors:
        """Return what a thin event about errors of a meter only points to."""

        def call(client: stripe.StripeClient) -> MeterErrors:
            event: Any = client.v2.core.events.retrieve(event_id)
            return read_meter_errors(event.to_dict().get("data") or {})

        return await self._run(call, timeout_s)

    async def close(self) -> None:
        """Take no more calls; threads still in one end by their read timeout."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _meter_of(self, client: stripe.StripeClient, event_name: str) -> str:
        """Return the id of the active meter with this event name, asked once. Raises Permanent."""
        if event_name not in self._meters:
            page = client.v1.billing.meters.list({"status": "active", "limit": 100})
            for seen, meter in enumerate(page.auto_paging_iter()):
                self._meters[meter.event_name] = meter.id
                if seen >= METERS_READ:
                    break
        if event_name not in self._meters:
            raise Permanent("no_meter", f"no active meter has the event name {event_name}")
        return self._meters[event_name]

    async def _run(self, call: Callable[[stripe.StripeClient], T], timeout_s: float) -> T:
        if self._client is None or self._threads is None:
            raise NotConfigured(["STRIPE_API_KEY"])
        deadline = monotonic() + timeout_s
        if self._overrunning >= CONCURRENCY:
            raise Retryable("threads_busy", f"{self._overrunning} earlier calls have not ended")
        try:
            async with asyncio.timeout(timeout_s):
                await self._slots.acquire()
        except TimeoutError as error:
            raise Retryable("no_free_slot", f"{CONCURRENCY} calls were running for {timeout_s:g} s") from error
        try:
            future = asyncio.get_running_loop().run_in_executor(self._threads, call, self._client)
            try:
                done, _ = await asyncio.wait((future,), timeout=max(0.0, deadline - monotonic()))
            except asyncio.CancelledError:
                self._leave_behind(future)
                raise
            if not done:
                self._leave_behind(future)
                raise InDoubt("call_timeout", "no answer in time")
        finally:
            self._slots.release()
        failure = future.exception()
        if failure is None:
            return future.result()
        raise outcome_of(failure) from failure

    def _leave_behind(self, future: asyncio.Future[Any]) -> None:
        self._overrunning += 1

        def end(ended: asyncio.Future[Any]) -> None:
            self._overrunning -= 1
            if not ended.cancelled():
                ended.exception()  # seen, though nobody waits any more: the identifier tells what became of it

        future.add_done_callback(end)


def outcome_of(error: BaseException) -> ProviderError:
    """Return the outcome class of what the SDK raised."""
    if isinstance(error, ProviderError):
        return error
    if isinstance(error, stripe.APIConnectionError):
        detail = _short(str(error.__cause__ or error))
        return Retryable("connect_failed", detail) if _was_not_written(error) else InDoubt("connection_lost", detail)
    if not isinstance(error, stripe.StripeError):
        return InDoubt("unreadable_answer", _short(f"{type(error).__name__}: {error}"))
    status = error.http_status or 0
    code = error.code or f"http_{status}"
    detail = _short(error.user_message or type(error).__name__)
    if status in (401, 403):
        return Throttled("channel_stopped", detail, retry_after_s=PARK_S)
    if status == 429:
        return Throttled("throttled", detail)
    if status == 409:
        return Retryable("conflict", detail)
    if 400 <= status < 500:
        return Permanent(code, detail)
    return InDoubt(f"http_{status}", detail)


def _short(text: str) -> str:
    return " ".join(text.split())[:DETAIL_CHARACTERS]


def _was_not_written(error: stripe.APIConnectionError) -> bool:
    """Return whether the connection was never made, so that no byte of the request left."""
    causes = [type(link).__name__ for link in _chain(error)]
    is_late = any(isinstance(link, requests.ConnectTimeout) for link in _chain(error))
    return is_late or "NewConnectionError" in causes or "NameResolutionError" in causes


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and what it wraps; urllib3 keeps its own in `reason`, requests in its arguments."""
    waiting: list[BaseException] = [error]
    seen: set[int] = set()
    while waiting:
        link = waiting.pop()
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        wrapped = (link.__cause__, link.__context__, getattr(link, "reason", None), *link.args)
        waiting += [item for item in wrapped if isinstance(item, BaseException)]
