"""What telling endpoints costs send-scheduled: test environment, with no, one and three endpoints an org."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import psycopg

from bench import seed
from bench.crew import work
from bench.plan import Plan, Tell, alternate
from bench.report import Check, Section
from bench.server import Bench, Connection

ENDPOINTS = (0, 1, 3)


def run(bench: Bench, plan: Plan, tell: Tell) -> Section:
    """Measure ours without and with endpoints, and ours against a floor that writes the same deliveries."""

    def measure(kind: str, per_org: int, processes: int) -> float:
        with bench.seeded(_database(per_org), partial(_seed, plan=plan, per_org=per_org)) as url:
            tasks = [{"kind": kind, "url": url, "lanes": ["test"], "shard": n} for n in range(processes)]
            worked = work(tasks)
            _check(url, plan.fan_out_messages, plan.fan_out_messages * per_org, worked.items)
            return worked.per_s

    core: dict[str, Callable[[], float]] = {
        "Nightmail, no endpoint": partial(measure, "job", 0, 1),
        "Nightmail, 1 endpoint, 1 process": partial(measure, "job", 1, 1),
        "floor, 1 endpoint, 1 process": partial(measure, "floor_fan_out", 1, 1),
        "Nightmail, 1 endpoint, 2 processes": partial(measure, "job", 1, 2),
        "floor, 1 endpoint, 2 processes": partial(measure, "floor_fan_out", 1, 2),
    }
    others = {
        "Nightmail, 3 endpoints": partial(measure, "job", 3, 1),
        "floor, 3 endpoints": partial(measure, "floor_fan_out", 3, 1),
    }
    # As in bench.send_test: the gain of a second process is a ratio of ratios, and needs the rounds.
    rates = alternate(core, plan.core_rounds, tell) | alternate(others, plan.rounds, tell)
    for per_org in ENDPOINTS:
        bench.drop(_database(per_org))
    median = {name: found.median for name, found in rates.items()}
    none, ours, floor = (median[name] for name in list(core)[:3])
    ours_2, floor_2 = (median[name] for name in list(core)[3:])
    gain = (ours_2 / ours) / (floor_2 / floor)
    of_floor = {name: _of_floor(name, median) for name in rates}
    return Section(
        title="send-scheduled with webhook endpoints, test environment",
        columns=("contender", "messages/s", "of no endpoint", "of the floor"),
        rows=[(name, rates[name].text(), f"{median[name] / none:.2f}", of_floor[name]) for name in rates],
        lines=[
            f"{plan.fan_out_messages:,} due messages of {plan.orgs} orgs, whose endpoints ask for message.sent: each "
            "message also inserts a delivery for each endpoint, in its own transaction.",
            "The floor is that of the test environment, with the same deliveries written by the same statement.",
        ],
        checks=[
            Check("fan-out, 1 endpoint, of no endpoint", ours / none, least=0.65),
            Check("fan-out, 1 process, of the floor", ours / floor, least=0.6),
            Check("fan-out, gain by a second process, of the floor's gain", gain, least=0.9),
        ],
    )


def _of_floor(name: str, median: dict[str, float]) -> str:
    floor = median.get("floor, " + name.partition(", ")[2])
    return f"{median[name] / floor:.2f}" if floor is not None else ""


def _database(per_org: int) -> str:
    return f"fan_out_{per_org}"


def _seed(conn: Connection, plan: Plan, per_org: int) -> None:
    seed.seed_due(conn, plan.fan_out_messages, orgs=plan.orgs, env="test")
    seed.seed_endpoints(conn, orgs=plan.orgs, per_org=per_org)


DONE = """
SELECT (SELECT count(*) FROM messages WHERE state = 'sent'),
       (SELECT count(*) FROM message_events WHERE kind = 'sent'),
       (SELECT sum(used) FROM usage_records),
       (SELECT count(*) FROM message_queue),
       (SELECT count(DISTINCT (endpoint_id, message_id)) FROM webhook_deliveries WHERE topic = 'email.sent')
"""


def _check(url: str, messages: int, deliveries: int, items: int) -> None:
    """Every contender must have left the same rows, a delivery for each endpoint and message among them."""
    with psycopg.connect(url, autocommit=True) as conn:
        row = conn.execute(DONE).fetchone()
    if row != (messages, messages, messages, 0, deliveries) or items != messages:
        raise AssertionError(f"{messages} messages, worked {items}; sent, events, used, queued, deliveries: {row}")
