"""Deliveries of webhooks: the shipped run against a bare loop that signs and posts the same number of bodies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import psycopg

from bench import floor_webhooks, seed
from bench.crew import count_received, webhook_sink, work
from bench.plan import Plan, Tell, alternate
from bench.report import Check, Section
from bench.server import Bench, Connection

NAME = "deliver_due"
ENDPOINTS = 10
CONCURRENCY = 100
# So that the total is the bound, for one endpoint may use it all.
SETTINGS = {
    "webhook_concurrency": CONCURRENCY,
    "webhook_endpoint_concurrency": CONCURRENCY,
    "webhook_allow_cidrs": "127.0.0.0/8",
}
BODY_SLACK = 0.05


def run(bench: Bench, plan: Plan, tell: Tell) -> Section:
    """Measure ours and the floor, each with one and two processes."""

    def measure(processes: int) -> float:
        with bench.seeded(NAME, partial(_seed, plan=plan)) as url, webhook_sink() as sink:
            with psycopg.connect(url, autocommit=True) as conn:
                seed.point_endpoints(conn, range(1, ENDPOINTS + 1), sink)
            worked = work([{"kind": "deliver", "url": url, "settings": SETTINGS}] * processes)
            _check_rows(url, plan.deliveries, worked.items)
            _check_sink(sink, plan.deliveries)
            return worked.per_s

    def measure_floor(processes: int) -> float:
        posts = plan.deliveries // processes
        with webhook_sink() as sink:
            task = {"kind": "floor_deliver", "sink": sink, "posts": posts, "paths": ENDPOINTS}
            worked = work([{**task, "concurrency": CONCURRENCY}] * processes)
            _check_sink(sink, posts * processes)
            return worked.per_s

    contenders: dict[str, Callable[[], float]] = {}
    for processes in (1, 2):
        suffix = f"{processes} process{'es' * (processes > 1)}"
        contenders[f"Nightmail, {suffix}"] = partial(measure, processes)
        contenders[f"floor, {suffix}"] = partial(measure_floor, processes)
    rates = alternate(contenders, plan.rounds, tell)
    bench.drop(NAME)
    shares = {name: found.median / rates["floor, " + name.partition(", ")[2]].median for name, found in rates.items()}
    return Section(
        title="Deliveries of webhooks",
        columns=("contender", "deliveries/s", "of the floor"),
        rows=[(name, found.text(), f"{shares[name]:.2f}") for name, found in rates.items()],
        lines=[
            f"{plan.deliveries:,} due deliveries of message.sent, neither numbered nor rendered yet, for {ENDPOINTS} "
            f"endpoints of as many orgs, to a sink on loopback that answers at once; {CONCURRENCY} posts at once a "
            "process.",
            "Nightmail claims, renders, signs, posts, and records delivery and attempt. The floor signs and posts "
            "bodies of the same size through the same aiohttp session, without a database.",
        ],
        checks=[Check("deliveries, 1 process, of the floor", shares["Nightmail, 1 process"], least=0.5)],
    )


def _seed(conn: Connection, plan: Plan) -> None:
    seed.seed_sent(conn, plan.deliveries, orgs=ENDPOINTS)
    seed.seed_endpoints(conn, orgs=ENDPOINTS)
    for number in range(1, ENDPOINTS + 1):
        seed.seed_deliveries(conn, plan.deliveries // ENDPOINTS, endpoint=number)


DONE = """
SELECT (SELECT count(*) FROM webhook_deliveries WHERE state = 'delivered' AND seq IS NOT NULL AND attempts = 1),
       (SELECT count(*) FROM webhook_deliveries),
       (SELECT count(*) FROM webhook_attempts WHERE http_status = 200),
       (SELECT avg(octet_length(body))::float8 FROM webhook_deliveries)
"""


def _check_rows(url: str, deliveries: int, items: int) -> None:
    """Everything is recorded once, and the bodies are of the size that the floor posts."""
    with psycopg.connect(url, autocommit=True) as conn:
        found: tuple[Any, ...] = conn.execute(DONE).fetchone() or ()
    if found[:3] != (deliveries,) * 3 or items != deliveries:
        raise AssertionError(f"{deliveries} deliveries, worked {items}; delivered, stored, attempts: {found[:3]}")
    posted = len(floor_webhooks.example_body())
    if abs(found[3] / posted - 1) > BODY_SLACK:
        raise AssertionError(f"bodies of {found[3]:.0f} bytes on average, the floor posts {posted}")


def _check_sink(sink: str, deliveries: int) -> None:
    distinct, doubles = count_received(sink)
    if (distinct, doubles) != (deliveries, 0):
        raise AssertionError(f"{deliveries} deliveries, the sink got {distinct} and {doubles} doubles")
