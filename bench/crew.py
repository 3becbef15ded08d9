"""Worker processes from the parent's side: start them, let all go at once, collect what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report import ROOT

READY_LIMIT_S = 60


@dataclass(frozen=True, slots=True)
class Worked:
    """What all workers of one run did together; memory is the largest growth of one process."""

    items: int
    seconds: float
    memory_mib: float

    @property
    def per_s(self) -> float:
        """Return items a second over the wall time from the first start to the last end."""
        return self.items / self.seconds


def work(tasks: Sequence[Mapping[str, Any]]) -> Worked:
    """Run one worker process per task (see bench.worker), all started before any may begin."""
    crew = [_start(task) for task in tasks]
    try:
        for process in crew:
            _expect(process, "ready")
        for process in crew:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        results = [json.loads(_expect(process, "{")) for process in crew]
        for process in crew:
            process.wait(READY_LIMIT_S)
    finally:
        for process in crew:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
    return Worked(
        items=sum(result["items"] for result in results),
        seconds=max(result["ended"] for result in results) - min(result["began"] for result in results),
        memory_mib=max(result["memory_mib"] for result in results),
    )


def _start(task: Mapping[str, Any]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bench.worker", json.dumps(dict(task))],
        cwd=ROOT,
        env=os.environ | AWS_ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _expect(process: subprocess.Popen[str], prefix: str) -> str:
    """Return the next line with this prefix; a worker that ends without it has failed."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(prefix):
            return line
    raise RuntimeError(f"a worker ended early with status {process.wait()}; its error is above")


# For the real SES adapter against the fake provider; never real credentials.
AWS_ENVIRONMENT = {
    "AWS_REGION": "eu-west-1",
    "AWS_ACCESS_KEY_ID": "bench",
    "AWS_SECRET_ACCESS_KEY": "bench",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def fake_provider(folder: Path, *, latency_ms: float) -> Iterator[tuple[str, Path]]:
    """Yield the HTTP endpoint of a fake provider process and the path of its log."""
    log = folder / f"provider-{os.urandom(4).hex()}.log"
    command = [
        sys.executable, "-m", "nightmail.fakes.provider_server",
        "--log", str(log), "--latency-ms", str(latency_ms), "--exit-with-parent",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield _expect(process, "ready").split()[1], log
    finally:
        process.terminate()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()
        log.unlink(missing_ok=True)
