"""How soon after a fact an endpoint is told under `serve`: the sink's clock against the time in the body."""

from __future__ import annotations

import json
import time
from datetime import datetime
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import psycopg

from bench import seed, service
from bench.crew import webhook_sink
from bench.plan import Plan, Tell
from bench.report import Section
from bench.server import Bench, Connection

EVERY_S = 0.053  # prime, so that facts drift through every phase of a poll
LATE_LIMIT_S = 20.0


def run(bench: Bench, plan: Plan, tell: Tell) -> Section:
    """Accept test messages one by one and read when the endpoint learned that they were sent."""
    tell(f"{plan.arrivals} messages, {EVERY_S * 1000:.0f} ms apart")
    log = bench.folder / "arrivals.log"
    with bench.seeded("arriving", _seed) as url, webhook_sink(log) as sink:
        with psycopg.connect(url, autocommit=True) as conn:
            seed.point_endpoints(conn, [1], sink)
        with service.nightmail(url, bench.valkey_url, environment={"WEBHOOK_ALLOW_CIDRS": "127.0.0.0/8"}) as address:
            _accept(address, service.make_key(url, "test"), plan.arrivals)
            delays = sorted(_delays_ms(log, plan.arrivals))
    bench.drop("arriving")
    log.unlink()
    count = len(delays)
    p50, p95, p99 = (delays[count * part // 100] for part in (50, 95, 99))
    return Section(
        title="From a fact to its endpoint under `serve`",
        columns=("messages", "first ms", "p50 ms", "p95 ms", "p99 ms", "max ms"),
        rows=[(f"{count}", *(f"{value:.0f}" for value in (delays[0], p50, p95, p99, delays[-1])))],
        lines=[
            f"Test emails accepted {EVERY_S * 1000:.0f} ms apart for immediate sending; arrival of message.sent at the "
            "endpoint less the moment the message was recorded as sent, host clock.",
        ],
    )


def _accept(address: str, token: str, messages: int) -> None:
    connection = HTTPConnection(urlsplit(address).netloc, timeout=10)
    began = time.monotonic()
    for number in range(messages):
        time.sleep(max(0.0, began + EVERY_S * number - time.monotonic()))
        body = {"from": "bench@sender.test", "to": f"person{number}@recipient.test", "subject": "Now", "text": "Now."}
        connection.request("POST", "/emails", json.dumps(body), {"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise AssertionError(f"{answer.status}: {content!r}")
    connection.close()


def _delays_ms(log: Path, messages: int) -> list[float]:
    """Wait until every event is in the log, within a limit, and return the delays."""
    give_up_at = time.monotonic() + LATE_LIMIT_S
    while True:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        if len(lines) >= messages:
            return [(line["at"] - _told_at(line)) * 1000 for line in lines]
        if time.monotonic() > give_up_at:
            raise AssertionError(f"{len(lines)} of {messages} events arrived in time")
        time.sleep(0.1)


def _told_at(line: dict[str, str]) -> float:
    moment: str = json.loads(line["body"])["timestamp"]
    return datetime.fromisoformat(moment).timestamp()


def _seed(conn: Connection) -> None:
    seed.seed_orgs(conn, 1)
    seed.seed_endpoints(conn, orgs=1)
