"""Processes from the parent's side: workers, let go at once and asked what they measured, and fakes they talk to."""

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
from urllib.request import urlopen

from bench.report import ROOT

READY_LIMIT_S = 60


@dataclass(frozen=True, slots=True)
class Worked:
    """What all workers of one run did together; memory is the largest growth of one process.

    `claims_ms` are the times of their single claims, where the kind of worker measures them.
    """

    items: int
    seconds: float
    memory_mib: float
    claims_ms: Sequence[float] = ()

    @classmethod
    def of(cls, results: Sequence[Mapping[str, Any]]) -> Worked:
        """Return the sum of what the workers reported."""
        return cls(
            items=sum(result["items"] for result in results),
            seconds=max(result["ended"] for result in results) - min(result["began"] for result in results),
            memory_mib=max(result["memory_mib"] for result in results),
            claims_ms=[each for result in results for each in result.get("claims_ms", ())],
        )

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
    return Worked.of(results)


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
    options = ("--log", str(log), "--latency-ms", str(latency_ms))
    try:
        with _fake("nightmail.fakes.provider_server", *options) as address:
            yield address, log
    finally:
        log.unlink(missing_ok=True)


@contextmanager
def webhook_sink(log: Path | None = None) -> Iterator[str]:
    """Yield the address of a process that answers every POST with 200 and counts them, and notes them in `log`."""
    options = ("--log", str(log)) if log is not None else ()
    with _fake("nightmail.fakes.webhook_receiver", "--count-only", *options) as address:
        yield address


def count_received(sink: str) -> tuple[int, int]:
    """Return how many events a sink has got, and how many requests beyond the first of each."""
    with urlopen(f"{sink}/_summary", timeout=10) as answer:
        summary = json.load(answer)
    return summary["distinct"], summary["doubles"]


@contextmanager
def _fake(module: str, *options: str) -> Iterator[str]:
    command = [sys.executable, "-m", module, *options, "--exit-with-parent"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield _expect(process, "ready").split()[1]
    finally:
        process.terminate()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()
