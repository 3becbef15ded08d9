"""Accepting one email over HTTP: our API against a raw ASGI handler that writes the same rows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from bench import seed, service
from bench.plan import Plan, Tell, alternate
from bench.report import ROOT, Check, Section
from bench.server import Bench, Connection

NAME = "accepting"
CONCURRENCY = 32


def run(bench: Bench, plan: Plan, tell: Tell) -> Section:
    """Measure both with the same load generator."""
    latencies: dict[str, list[dict[str, Any]]] = {}

    def load(name: str, address: str, token: str) -> float:
        arguments = (address, token, str(CONCURRENCY), str(plan.accept_seconds), str(plan.accept_warm_s))
        done = subprocess.run(
            [sys.executable, "-m", "bench.load", *arguments],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        result = json.loads(done.stdout)
        if result["failed"]:
            raise AssertionError(f"{name}: {result['failed']} requests failed")
        latencies.setdefault(name, []).append(result)
        return float(result["requests"] / result["seconds"])

    def measure_ours() -> float:
        with bench.seeded(NAME, _seed) as url:
            token = service.make_key(url, "live")
            with service.nightmail(url, bench.valkey_url, "--no-scheduler") as address:
                return load("ours", address, token)

    def measure_floor() -> float:
        with bench.seeded(NAME, _seed) as url, service.process(["bench.raw_accept", url], "ready", {}) as address:
            return load("floor", address, "none")

    rates = alternate({"Nightmail": measure_ours, "floor": measure_floor}, plan.rounds, tell)
    bench.drop(NAME)
    ratio = rates["Nightmail"].median / rates["floor"].median
    rows: list[Sequence[str]] = []
    for name, key in (("Nightmail", "ours"), ("floor", "floor")):
        middle = sorted(latencies[key], key=lambda result: float(result["p95"]))[len(latencies[key]) // 2]
        rows.append((name, rates[name].text(), *(f"{middle[p]:.1f}" for p in ("p50", "p95", "p99"))))
    return Section(
        title="Accepting one email over HTTP",
        columns=("contender", "requests/s", "p50 ms", "p95 ms", "p99 ms"),
        rows=rows,
        lines=[
            f"POST /emails, {CONCURRENCY} keep-alive connections, one uvicorn worker, idempotency key in each request, "
            "durable commit before the answer.",
            "Nightmail checks the key, the rate limit (Valkey), every field and address, and the idempotency key. The "
            "floor is one ASGI function and one",
            "statement that writes the same rows unchecked. Server, load generator and PostgreSQL share the cores.",
        ],
        checks=[Check("accepting one email, of the raw handler", ratio, least=0.55)],
    )


def _seed(conn: Connection) -> None:
    seed.seed_orgs(conn, 1)
