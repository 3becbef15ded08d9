"""How soon after its due time a message leaves under `serve`: the provider's log against the asked time."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

from bench import seed, service
from bench.crew import fake_provider
from bench.plan import Plan, Tell
from bench.report import Check, Section
from bench.server import Bench, Connection

EVERY_MS = 53  # prime, so that due times drift through every phase of a poll
LEAD_S = 3.0
LATE_LIMIT_S = 20.0


def run(bench: Bench, plan: Plan, tell: Tell) -> Section:
    """Schedule messages one by one through the API and read when the provider got them."""
    tell(f"{plan.dispatch_messages} messages, {EVERY_MS} ms apart")
    with (
        bench.seeded("dispatching", _seed) as url,
        fake_provider(bench.folder, latency_ms=5) as (endpoint, log),
        service.nightmail(
            url, bench.valkey_url, environment={"EMAIL_PROVIDER": "ses", "AWS_ENDPOINT_URL": endpoint}
        ) as address,
    ):
        due = _schedule(address, service.make_key(url, "live"), plan.dispatch_messages)
        delays = sorted(_delays_ms(log, due))
    bench.drop("dispatching")
    count = len(delays)
    p50, p95, most = delays[count // 2], delays[count * 95 // 100], delays[-1]
    return Section(
        title="Dispatch under `serve`",
        columns=("messages", "first ms", "p50 ms", "p95 ms", "max ms"),
        rows=[(f"{count}", *(f"{value:.0f}" for value in (delays[0], p50, p95, most)))],
        lines=[
            f"Emails scheduled through the API for moments {EVERY_MS} ms apart; arrival at the provider (SES adapter) "
            "less the due time, host clock.",
        ],
        checks=[Check("dispatch, 95th percentile after the due time, ms", p95, most=100)],
    )


def _schedule(address: str, token: str, messages: int) -> dict[str, float]:
    """Post the messages and return when each is due, in seconds of the epoch."""
    due: dict[str, float] = {}
    connection = HTTPConnection(urlsplit(address).netloc, timeout=10)
    first = datetime.now(UTC) + timedelta(seconds=LEAD_S)
    for number in range(messages):
        moment = first + timedelta(milliseconds=EVERY_MS * number)
        # never closer than a second to its due time: this measures dispatch, not acceptance
        time.sleep(max(0.0, (moment - datetime.now(UTC)).total_seconds() - 2 * LEAD_S))
        body = {
            "from": "bench@sender.test",
            "to": f"person{number}@recipient.test",
            "subject": "Timed",
            "text": "On time.",
            "scheduled_at": moment.isoformat(timespec="milliseconds"),
        }
        connection.request("POST", "/emails", json.dumps(body), {"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise AssertionError(f"{answer.status}: {content!r}")
        due[json.loads(content)["id"]] = moment.replace(microsecond=moment.microsecond // 1000 * 1000).timestamp()
    connection.close()
    return due


def _delays_ms(log: Path, due: dict[str, float]) -> list[float]:
    """Wait until every message is in the log, within a limit, and return the delays."""
    give_up_at = max(due.values()) + LATE_LIMIT_S
    while True:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        if len(lines) >= len(due):
            return [(line["at"] - due[line["message_id"]]) * 1000 for line in lines]
        if time.time() > give_up_at:
            raise AssertionError(f"{len(lines)} of {len(due)} messages arrived in time")
        time.sleep(0.1)


def _seed(conn: Connection) -> None:
    seed.seed_orgs(conn, 1)
