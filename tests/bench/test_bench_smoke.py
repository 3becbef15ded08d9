"""The benchmarks still run: one process, small sizes, a report that names every bound."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import BENCHMARKS
from bench.report import Check, Rates, Section, to_markdown

LIMIT_S = 170


@pytest.mark.timeout(LIMIT_S + 10)
@pytest.mark.parametrize(
    "names", [("send-test", "send-live"), ("claims", "memory", "queue-shape"), ("accept", "dispatch")]
)
def test_quick_benchmarks_run_and_write_a_report(names: tuple[str, ...], tmp_path: Path) -> None:
    output = tmp_path / "benchmarks.md"
    done = subprocess.run(
        [sys.executable, "-m", "bench", *names, "--quick", "--output", str(output)],
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


def test_every_benchmark_is_in_the_smoke_test() -> None:
    assert set(BENCHMARKS) == {"send-test", "send-live", "claims", "memory", "queue-shape", "accept", "dispatch"}


def test_report_says_which_bounds_are_not_met() -> None:
    checks = [Check("slow", 0.5, least=0.6), Check("small", 3.0, most=5.0)]
    section = Section(title="Speed", columns=("what", "rate"), rows=[("a", Rates([3, 1, 2]).text())], checks=checks)
    text = to_markdown([section], command="python -m bench", seconds=1.0, load=0.0)
    assert "| slow | 0.50 | ≥ 0.6 | **no** |" in text
    assert "| small | 3.00 | ≤ 5 | yes |" in text
    assert "| a | 2 (1–3) |" in text
