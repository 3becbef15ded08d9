"""What a dead endpoint's backlog costs a healthy one: the time until the healthy one has what is due to it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median

import psycopg

from bench import seed
from bench.crew import webhook_sink, work
from bench.plan import Plan, Tell, alternate
from bench.report import Check, Section
from bench.server import Bench, Connection

HEALTHY, REFUSING, HANGING = 1, 2, 3
SCENARIOS = {
    "alone": (),
    "behind an endpoint that refuses": (REFUSING,),
    "behind an endpoint that hangs": (HANGING,),
    "behind both": (REFUSING, HANGING),
}
# A run's deadline: who waits longer than this waits for the next run.
RUN_S = 25.0
SETTINGS = {"webhook_allow_cidrs": "127.0.0.0/8", "job_deadline_s": RUN_S}


def run(bench: Bench, plan: Plan, tell: Tell) -> Section:
    """Measure one run from its start to the healthy endpoint's last answer, in each company."""
    claims: dict[str, list[float]] = {name: [] for name in SCENARIOS}

    def measure(name: str) -> float:
        dead = SCENARIOS[name]
        fill = partial(_seed, plan=plan, dead=dead)
        with bench.seeded(_database(dead), fill) as url, webhook_sink() as sink, _refusing_port() as refusing:
            with psycopg.connect(url, autocommit=True) as conn:
                seed.point_endpoints(conn, [HEALTHY], sink)
                seed.point_endpoints(conn, [REFUSING], f"http://127.0.0.1:{refusing}")
                seed.point_endpoints(conn, [HANGING], f"{sink}/hang")
            worked = work([{"kind": "deliver_first", "url": url, "settings": SETTINGS, "wanted": plan.starve_due}])
            _check(url, plan.starve_due, dead)
            claims[name] += worked.claims_ms
            return worked.seconds

    contenders: dict[str, Callable[[], float]] = {name: partial(measure, name) for name in SCENARIOS}
    times = alternate(contenders, plan.rounds, tell)
    for dead in SCENARIOS.values():
        bench.drop(_database(dead))
    alone = times["alone"].median
    delays = {name: found.median - alone for name, found in times.items() if name != "alone"}
    return Section(
        title="A healthy endpoint beside dead ones",
        columns=(f"{plan.starve_due} deliveries", "seconds", "claim ms, median", "claim ms, max"),
        rows=[
            (name, found.text(3), f"{median(claims[name]):.1f}", f"{max(claims[name]):.1f}")
            for name, found in times.items()
        ],
        lines=[
            f"{plan.starve_due} deliveries to a healthy endpoint and {plan.starve_backlog:,} to each dead one, all "
            "due; one process, default settings. From the start of the run to the healthy endpoint's last answer.",
            "One dead endpoint is a port that refuses, the other takes the request and never answers. A claim includes "
            "the making of bodies.",
        ],
        checks=[Check(f"{plan.starve_due} deliveries {name}, delay, s", s, most=RUN_S) for name, s in delays.items()],
    )


def _database(dead: Sequence[int]) -> str:
    return "starve" + "".join(f"_{number}" for number in dead)


def _seed(conn: Connection, plan: Plan, dead: Sequence[int]) -> None:
    seed.seed_sent(conn, 3 * plan.starve_due, orgs=3)
    seed.seed_endpoints(conn, orgs=3)
    seed.seed_deliveries(conn, plan.starve_due, endpoint=HEALTHY)
    for number in dead:
        seed.seed_deliveries(conn, plan.starve_backlog, endpoint=number)


@contextmanager
def _refusing_port() -> Iterator[int]:
    """Yield a port that nobody can listen on, so that each connection to it is refused."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


ATTEMPTS = """
SELECT endpoint_id::text, count(*) FILTER (WHERE http_status = 200), count(*) FILTER (WHERE http_status IS NULL)
FROM webhook_attempts
GROUP BY endpoint_id
"""


def _check(url: str, deliveries: int, dead: Sequence[int]) -> None:
    """The healthy endpoint got all of its own, and the dead ones were tried and gave no answer."""
    with psycopg.connect(url, autocommit=True) as conn:
        found = {id: (answered, silent) for id, answered, silent in conn.execute(ATTEMPTS)}
    healthy = found.pop(seed.endpoint_id(HEALTHY), (0, 0))
    is_dead = all(answered == 0 and silent > 0 for answered, silent in found.values())
    if healthy != (deliveries, 0) or found.keys() != {seed.endpoint_id(number) for number in dead} or not is_dead:
        raise AssertionError(f"{deliveries} deliveries, attempts answered and not: {healthy}, dead endpoints: {found}")
