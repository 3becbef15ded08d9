"""A stand-in for Stripe on loopback: meters, meter events, their sums and their errors, for the real SDK to talk to.

    with FakeStripe() as fake:
        fake.make_meter("email_overage")
        StripeMeter(api_key=fake.api_key, api_base=fake.url)
        fake.script = Script(rules=[Rule(match="cus_slow*", behaviour="hang-after-accept", times=1)])
        fake.events                       # what it counted: the truth, whatever the caller was told
        fake.error_report(fake.events[0]) # a thin event about an event that it could not count after all

What it does to whom is nightmail.fakes.script: recipients are customers, the message id is the identifier. Rules as
Stripe documents them: an identifier is refused for 24 hours after it was taken; a timestamp may be 35 days old and 5
minutes ahead; a value is a whole number as text. An unknown customer is accepted and found out later. `offset` shifts
its clock, so that days can pass in a test.

Written from the description and not from nightmail.providers, so that a mistake there does not agree with itself.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

from nightmail.fakes.script import ACCEPTING, Behaviour, Chooser, Script

__all__ = ["FakeStripe", "TakenEvent"]

HOST = "127.0.0.1"  # never anything else: it believes every key that begins with sk_ or rk_
REMEMBERED = timedelta(hours=24)
OLDEST = timedelta(days=35)
AHEAD = timedelta(minutes=5)
_VALUE = re.compile(r"-?[0-9]{1,15}")


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        error = {"type": "invalid_request_error" if status < 500 else "api_error", "message": message}
        self.body = {"error": {**error, **({"code": code} if code else {})}}


@dataclass(slots=True)
class TakenEvent:
    """A meter event that was taken; `is_counted` turns false when it is canceled or found to be wrong."""

    identifier: str
    event_name: str
    customer: str
    value: int
    at: datetime
    taken_at: datetime
    is_counted: bool = True


@dataclass
class FakeStripe:
    """The state of one account; start it with `with`."""

    offset: timedelta = timedelta()
    api_key: str = "sk_test_fake_0123456789"
    events: list[TakenEvent] = field(default_factory=list)
    attempts: list[str] = field(default_factory=list)
    meters: dict[str, dict[str, Any]] = field(default_factory=dict)
    unknown_customers: set[str] = field(default_factory=set)
    has_duplicate_code: bool = True

    def __post_init__(self) -> None:
        self._chooser = Chooser(Script())
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._told: dict[str, dict[str, Any]] = {}
        fake = self

        class Handler(_Handler):
            stripe = fake

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Say nothing: callers that hang up are part of the programme."""

        self._server = Server((HOST, 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> FakeStripe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    @property
    def url(self) -> str:
        """Return where it listens."""
        return f"http://{HOST}:{self._server.server_address[1]}"

    @property
    def script(self) -> Script:
        """Return what it does to whom; setting it begins the counts of "the first n times" anew."""
        return self._chooser.script

    @script.setter
    def script(self, script: Script) -> None:
        self._chooser = Chooser(script)

    def now(self) -> datetime:
        """Return its time."""
        return datetime.now(UTC) + self.offset

    def make_meter(self, event_name: str, formula: str = "sum") -> str:
        """Make an active meter; return its id."""
        meter_id = f"mtr_{uuid4().hex}"
        self.meters[meter_id] = {
            "id": meter_id, "object": "billing.meter", "event_name": event_name, "status": "active",
            "display_name": event_name, "default_aggregation": {"formula": formula}, "event_time_window": None,
            "customer_mapping": {"type": "by_id", "event_payload_key": "stripe_customer_id"},
            "value_settings": {"event_payload_key": "value"}, "livemode": False,
        }  # fmt: skip
        return meter_id

    def counted(self, customer: str, event_name: str | None = None) -> int:
        """Return the units that will be on the customer's invoices."""
        return sum(e.value for e in self.events if self._counts(e, customer, event_name))

    def _counts(self, event: TakenEvent, customer: str, event_name: str | None = None) -> bool:
        is_asked = event.customer == customer and event_name in (None, event.event_name)
        return is_asked and event.is_counted and customer not in self.unknown_customers

    def error_report(self, *events: TakenEvent, with_data: bool = False) -> dict[str, Any]:
        """Return the event that says that these could not be counted; thin, unless `with_data`."""
        for event in events:
            event.is_counted = False
        event_id = f"evt_test_{uuid4().hex}"
        samples = [
            {"error_message": "There is no such customer.", "request": {"identifier": event.identifier}}
            for event in events
        ]
        kind = {"code": "meter_event_customer_not_found", "error_count": len(events), "sample_errors": samples}
        data = {
            "developer_message_summary": f"There are {len(events)} invalid events",
            "reason": {"error_count": len(events), "error_types": [kind]},
            "validation_start": "2026-01-01T00:00:00Z",
            "validation_end": "2026-01-01T00:00:10Z",
        }
        meter = next((m for m in self.meters.values() if events and m["event_name"] == events[0].event_name), None)
        thin = {
            "id": event_id, "object": "v2.core.event", "type": "v1.billing.meter.error_report_triggered",
            "livemode": False, "created": self.now().isoformat().replace("+00:00", "Z"),
            "related_object": meter and {
                "id": meter["id"], "type": "billing.meter", "url": f"/v1/billing/meters/{meter['id']}",
            },
        }  # fmt: skip
        self._told[event_id] = {**thin, "data": data}
        return self._told[event_id] if with_data else thin

    # ── the API ──

    def answer(self, method: str, path: str, asked: Mapping[str, str]) -> dict[str, Any]:
        """Return the body of a 200. Raises _Refused."""
        with self._lock:
            if (method, path) == ("POST", "/v1/billing/meter_event_adjustments"):
                return self._cancel(asked)
            if (method, path) == ("GET", "/v1/billing/meters"):
                status = asked.get("status")
                found = [meter for meter in self.meters.values() if status in (None, meter["status"])]
                return {"object": "list", "data": found, "has_more": False, "url": path}
            if method == "GET" and (summary := re.fullmatch(r"/v1/billing/meters/([^/]+)/event_summaries", path)):
                return self._summaries(summary[1], path, asked)
            if method == "GET" and (event := re.fullmatch(r"/v2/core/events/([^/]+)", path)) and event[1] in self._told:
                return self._told[event[1]]
            raise _Refused(404, f"Unrecognized request URL ({method}: {path}).")

    def check(self, asked: Mapping[str, str]) -> TakenEvent:
        """Return the meter event that a form asks for. Raises _Refused."""
        name, customer = asked.get("event_name", ""), asked.get("payload[stripe_customer_id]", "")
        identifier, value = asked.get("identifier") or str(uuid4()), asked.get("payload[value]", "")
        if not any(meter["event_name"] == name and meter["status"] == "active" for meter in self.meters.values()):
            raise _Refused(400, f"No active meter found for event name {name}.", "resource_missing")
        if not customer:
            raise _Refused(400, "Missing required key stripe_customer_id in payload.")
        if not _VALUE.fullmatch(value):
            raise _Refused(400, f"Invalid value {value!r} in payload: it must be a whole number.")
        if len(identifier) > 100:
            raise _Refused(400, "Invalid identifier: it must be at most 100 characters.")
        now = self.now()
        at = datetime.fromtimestamp(int(asked["timestamp"]), UTC) if "timestamp" in asked else now
        if at < now - OLDEST:
            raise _Refused(400, "The timestamp is too far in the past.", "timestamp_too_far_in_past")
        if at > now + AHEAD:
            raise _Refused(400, "The timestamp is in the future.", "timestamp_in_future")
        if any(e.identifier == identifier and e.taken_at > now - REMEMBERED for e in self.events):
            code = "duplicate_meter_event" if self.has_duplicate_code else None
            raise _Refused(400, f"An event already exists with identifier {identifier}.", code)
        return TakenEvent(identifier, name, customer, int(value), at, now)

    def choose(self, asked: Mapping[str, str]) -> tuple[Behaviour, TakenEvent | None, _Refused | None]:
        """Decide about a meter event, and take it where the behaviour does; return also why it is refused."""
        with self._lock:
            identifier = asked.get("identifier", "")
            self.attempts.append(identifier)
            behaviour = self._chooser.choose([asked.get("payload[stripe_customer_id]", "")], identifier)
            try:
                event = self.check(asked)
            except _Refused as refused:
                return behaviour, None, refused
            if behaviour in ACCEPTING:
                self.events.append(event)
            return behaviour, event, None

    def _cancel(self, asked: Mapping[str, str]) -> dict[str, Any]:
        identifier = asked.get("cancel[identifier]", "")
        recent = [e for e in self.events if e.identifier == identifier and e.taken_at > self.now() - REMEMBERED]
        if asked.get("type") != "cancel" or not recent:
            raise _Refused(400, f"No event of the past 24 hours has the identifier {identifier}.")
        for event in recent:
            event.is_counted = False
        return {
            "object": "billing.meter_event_adjustment", "type": "cancel", "status": "pending", "livemode": False,
            "event_name": asked.get("event_name"), "cancel": {"identifier": identifier},
        }  # fmt: skip

    def _summaries(self, meter_id: str, path: str, asked: Mapping[str, str]) -> dict[str, Any]:
        meter = self.meters.get(meter_id)
        if meter is None:
            raise _Refused(404, f"No such meter: '{meter_id}'", "resource_missing")
        start, end = int(asked.get("start_time", "1")), int(asked.get("end_time", "1"))
        if start % 60 or end % 60 or end <= start or not asked.get("customer"):
            raise _Refused(400, "start_time and end_time must be aligned with minute boundaries.")
        held = [
            event.value
            for event in self.events
            if self._counts(event, asked["customer"], meter["event_name"]) and start <= event.at.timestamp() < end
        ]
        summary = {
            "id": f"mtrusg_{uuid4().hex}", "object": "billing.meter_event_summary", "meter": meter_id,
            "aggregated_value": float(sum(held)), "start_time": start, "end_time": end, "livemode": False,
        }  # fmt: skip
        return {"object": "list", "data": [summary], "has_more": False, "url": path}

    def hang(self) -> None:
        """Wait until the script's time is over, or the fake ends."""
        self._released.wait(self.script.hang_s)


_REFUSALS = {
    Behaviour.THROTTLE: _Refused(429, "Request rate limit exceeded.", "rate_limit"),
    Behaviour.CREDENTIALS: _Refused(401, "Invalid API Key provided: sk_test_****"),
    Behaviour.DENIED: _Refused(403, "The provided key does not have the required permissions."),
    Behaviour.REJECT: _Refused(400, "Invalid meter event."),
    Behaviour.FAIL5XX: _Refused(500, "An error occurred with our servers."),
    Behaviour.TEMPFAIL: _Refused(503, "Service unavailable."),
    Behaviour.FAIL5XX_AFTER_ACCEPT: _Refused(500, "An error occurred with our servers."),
}


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    stripe: FakeStripe

    def do_GET(self) -> None:
        self._serve("GET", b"")

    def do_POST(self) -> None:
        self._serve("POST", self.rfile.read(int(self.headers.get("content-length", "0"))))

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _serve(self, method: str, body: bytes) -> None:
        parts = urlsplit(self.path)
        asked = {k: v[-1] for k, v in parse_qs(parts.query or body.decode(), keep_blank_values=True).items()}
        if not re.match(r"Bearer (sk|rk)_", self.headers.get("authorization", "")):
            self._refuse(_REFUSALS[Behaviour.CREDENTIALS])
        elif (method, parts.path) == ("POST", "/v1/billing/meter_events"):
            self._take(asked)
        else:
            try:
                self._write(200, self.stripe.answer(method, parts.path, asked))
            except _Refused as refused:
                self._refuse(refused)

    def _take(self, asked: Mapping[str, str]) -> None:
        behaviour, event, refused = self.stripe.choose(asked)
        if behaviour in (Behaviour.HANG, Behaviour.HANG_AFTER_ACCEPT):
            self.stripe.hang()
            self.close_connection = True
        elif behaviour in (Behaviour.RESET_BEFORE, Behaviour.RESET_AFTER):
            # A closed socket with lingering off answers with a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif behaviour in _REFUSALS:
            self._refuse(_REFUSALS[behaviour])
        elif refused is not None or event is None:
            self._refuse(refused or _REFUSALS[Behaviour.REJECT])
        elif behaviour == Behaviour.GARBAGE:
            self._send(200, b"<html>It works!</html>")
        else:
            self._write(
                200,
                {
                    "object": "billing.meter_event", "event_name": event.event_name, "identifier": event.identifier,
                    "created": int(event.taken_at.timestamp()), "timestamp": int(event.at.timestamp()),
                    "livemode": False,
                    "payload": {"stripe_customer_id": event.customer, "value": str(event.value)},
                },
            )  # fmt: skip

    def _refuse(self, refused: _Refused) -> None:
        self._write(refused.status, refused.body)

    def _write(self, status: int, body: Mapping[str, Any]) -> None:
        self._send(status, json.dumps(body).encode())

    def _send(self, status: int, octets: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(octets)))
        self.send_header("request-id", f"req_{uuid4().hex[:14]}")
        self.end_headers()
        self.wfile.write(octets)
