"""How much memory a run takes above its start, however much is due."""

from __future__ import annotations

from functools import partial
from typing import Any

import psycopg

from bench import seed
from bench.crew import fake_provider, work
from bench.plan import Plan, Tell
from bench.report import Check, Section
from bench.server import Bench

BOUND_MIB = 150.0


def run(bench: Bench, plan: Plan, tell: Tell) -> Section:
    """Measure the growth of a run's process over three backlogs."""
    section = Section(
        title="Memory of a run",
        columns=("backlog", "messages/s", "MiB above the start"),
        lines=["Highest resident size of the process during the run, less its resident size at the start."],
    )
    worst = 0.0
    provider_messages = max(plan.memory_live // 10, 1)
    for name, env, messages, with_provider in (
        (f"{plan.memory_test:,} test", "test", plan.memory_test, False),
        (f"{plan.memory_live:,} live, capture provider", "live", plan.memory_live, False),
        (f"{provider_messages:,} live, fake SES without delay", "live", provider_messages, True),
    ):
        tell(name)
        fill = partial(_seed, messages=messages, orgs=plan.orgs, env=env)
        task: dict[str, Any] = {"kind": "job", "lanes": ["test" if env == "test" else "live:email"]}
        url = bench.make("memory", fill)
        if with_provider:
            with fake_provider(bench.folder, latency_ms=0) as (endpoint, _):
                worked = work([{**task, "url": url, "endpoint": endpoint, "settings": {"send_concurrency": 64}}])
        else:
            worked = work([{**task, "url": url}])
        bench.drop("memory")
        worst = max(worst, worked.memory_mib)
        section.rows.append((name, f"{worked.per_s:,.0f}", f"{worked.memory_mib:.1f}"))
    section.checks.append(Check("memory of a run above its start, MiB", worst, most=BOUND_MIB))
    return section


def _seed(conn: psycopg.Connection[Any], messages: int, orgs: int, env: str) -> None:
    seed.seed_due(conn, messages, orgs=orgs, env=env)
