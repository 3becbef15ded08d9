"""The benchmarks still run: small sizes, and a report that names every bound.

One is run as people run it. The others run in this process, on the tests' server and without a process per worker:
starting those is most of what a quick benchmark takes.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench import crew, deliver, dispatch, fan_out, memory, send_live, send_test, server, starve, worker
from bench.report import Check, Rates, Section, to_markdown
from bench.server import Bench
from nightmail.clock import monotonic
from nightmail.embedded import EmbeddedServers

pytestmark = pytest.mark.bench

LIMIT_S = 100
IN_A_PROCESS = "queue-shape"
# Stay processes: the peer handles signals.
PROCESSES = ("peer",)


class Watch(worker.Stopwatch):
    """A stopwatch that waits for nobody."""

    async def ready(self) -> None:
        self.began = monotonic()


def work(tasks: Sequence[Mapping[str, Any]], really: Callable[..., crew.Worked] = crew.work) -> crew.Worked:
    """Do the tasks in threads."""
    if tasks[0]["kind"] in PROCESSES:
        return really(tasks)

    async def report(task: Mapping[str, Any]) -> str:
        return await worker.KINDS[task["kind"]](dict(task), Watch())

    def do(task: Mapping[str, Any]) -> dict[str, Any]:
        said: dict[str, Any] = json.loads(asyncio.run(report(task)))
        return said

    with ThreadPoolExecutor(len(tasks)) as threads:
        done = list(threads.map(do, tasks))
    return crew.Worked.of(done)


@pytest.fixture
def shared_server(
    embedded_servers: EmbeddedServers, tmp_path: Path, worker_id: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    @contextmanager
    def open_bench() -> Iterator[Bench]:
        bench = Bench(embedded_servers, tmp_path)
        try:
            yield bench
        finally:
            bench.drop(server.EMPTY)

    monkeypatch.setattr(server, "EMPTY", f"bench_{worker_id}")  # all other names differ by benchmark
    monkeypatch.setattr(command, "open_bench", open_bench)
    for module in (send_test, send_live, memory, fan_out, deliver, starve):
        monkeypatch.setattr(module, "work", work)
    monkeypatch.setattr(send_live, "CONCURRENCIES", (32,))
    monkeypatch.setattr(dispatch, "LEAD_S", 1.0)
    monkeypatch.setattr("nightmail.webhooks.deliver.STOP_S", 0.1)  # what hangs hangs for ever
    for name, value in crew.AWS_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize("name", [name for name in command.BENCHMARKS if name != IN_A_PROCESS])
def test_a_quick_benchmark_runs_and_writes_a_report(name: str, shared_server: None, tmp_path: Path) -> None:
    output = tmp_path / "benchmarks.md"
    assert command.main([name, "--quick", "--output", str(output)]) == 0
    text = output.read_text()
    assert text.startswith("# Benchmarks")
    assert text.count("\n## ") == 2  # the bounds and the section


def test_benchmarks_run_as_a_command_and_leave_nothing_behind(tmp_path: Path) -> None:
    output = tmp_path / "benchmarks.md"
    done = subprocess.run(
        [sys.executable, "-m", "bench", IN_A_PROCESS, "--quick", "--output", str(output)],
        check=False,
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert output.read_text().startswith("# Benchmarks")
    assert not list(tmp_path.glob("nightmail-bench-*")), "the server's folder is left behind"


def test_report_says_which_bounds_are_not_met() -> None:
    checks = [Check("slow", 0.5, least=0.6), Check("small", 3.0, most=5.0)]
    section = Section(title="Speed", columns=("what", "rate"), rows=[("a", Rates([3, 1, 2]).text())], checks=checks)
    text = to_markdown([section], command="python -m bench", seconds=1.0, load=0.0)
    assert "| slow | 0.50 | ≥ 0.6 | **no** |" in text
    assert "| small | 3.00 | ≤ 5 | yes |" in text
    assert "| a | 2 (1–3) |" in text
