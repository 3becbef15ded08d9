"""send-scheduled in the live environment: the SES adapter against a provider that takes 20 ms, and a raw floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import psycopg

from bench import seed
from bench.crew import fake_provider, work
from bench.plan import Plan, Tell, alternate
from bench.report import Section
from bench.server import Bench

NAME = "send_due_live"
LATENCY_MS = 20.0
CONCURRENCIES = (32, 64)

DONE = """
SELECT (SELECT count(*) FROM messages WHERE state = 'sent'),
       (SELECT count(*) FROM message_events WHERE kind = 'sent'),
       (SELECT sum(used) FROM usage_records),
       (SELECT count(*) FROM message_queue)
"""


def run(bench: Bench, plan: Plan, tell: Tell) -> Section:
    """Measure ours and the floor with 32 and 64 calls at once, one and two processes."""

    def measure(kind: str, concurrency: int, processes: int) -> float:
        with (
            bench.seeded(NAME, partial(_seed, plan=plan)) as url,
            fake_provider(bench.folder, latency_ms=LATENCY_MS) as (endpoint, log),
        ):
            tasks = [
                {
                    "kind": kind,
                    "url": url,
                    "lanes": ["live:email"],
                    "endpoint": endpoint,
                    "concurrency": concurrency,
                    "settings": {"send_concurrency": concurrency},
                    "shard": number,
                }
                for number in range(processes)
            ]
            worked = work(tasks)
            with log.open() as lines:
                taken = sum(1 for _ in lines)
            _check(url, plan.live_messages, worked.items, taken)
            return worked.per_s

    contenders: dict[str, Callable[[], float]] = {}
    for processes in (1, 2):
        for concurrency in CONCURRENCIES:
            suffix = f"{concurrency} calls at once, {processes} process{'es' * (processes > 1)}"
            contenders[f"Nightmail, {suffix}"] = partial(measure, "job", concurrency, processes)
            contenders[f"floor, {suffix}"] = partial(measure, "floor_live", concurrency, processes)
    rates = alternate(contenders, plan.rounds, tell)
    bench.drop(NAME)
    rows: list[Sequence[str]] = []
    for name, found in rates.items():
        floor = rates["floor, " + name.partition(", ")[2]].median
        rows.append((name, found.text(), f"{found.median / floor:.2f}"))
    return Section(
        title="send-scheduled, live, a provider that takes 20 ms",
        columns=("contender", "messages/s", "of the floor"),
        rows=rows,
        lines=[
            f"{plan.live_messages:,} due emails of {plan.orgs} orgs to a fake SES on loopback. Nightmail calls it "
            "through boto3 (what AWS maintains: signing, parsing,",
            "a thread per call); the floor writes prepared bytes to asyncio sockets, without signature, and claims and "
            "gates in one statement.",
            "All calls at once would make 1,600 a second per process at 32, 3,200 at 64.",
        ],
    )


def _seed(conn: psycopg.Connection[Any], plan: Plan) -> None:
    seed.seed_due(conn, plan.live_messages, orgs=plan.orgs, env="live")


def _check(url: str, messages: int, items: int, taken: int) -> None:
    """Each contender must have left the same rows and sent each message once."""
    with psycopg.connect(url, autocommit=True) as conn:
        row = conn.execute(DONE).fetchone()
    if row != (messages, messages, messages, 0) or items != messages or taken != messages:
        raise AssertionError(f"{messages} messages, worked {items}, taken {taken}; sent, events, used, queued: {row}")
