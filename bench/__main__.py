"""`python -m bench [NAME …] [--quick | --full] [--output FILE]`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from bench import (
    accept,
    arrival,
    claim_latency,
    credits,
    deliver,
    dispatch,
    fan_out,
    memory,
    queue_shape,
    send_live,
    send_test,
    starve,
)
from bench.plan import FULL, NORMAL, QUICK, Plan, Tell
from bench.report import OUTPUT, Section, merge, show, to_markdown
from bench.server import Bench, open_bench

Benchmark = Callable[[Bench, Plan, Tell], Section]

BENCHMARKS: dict[str, Benchmark] = {
    "send-test": send_test.run,
    "send-live": send_live.run,
    "claims": claim_latency.run,
    "memory": memory.run,
    "accept": accept.run,
    "credits": credits.run,
    "dispatch": dispatch.run,
    "fan-out": fan_out.run,
    "deliver": deliver.run,
    "starve": starve.run,
    "arrival": arrival.run,
    "queue-shape": queue_shape.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen benchmarks; the exit code is 1 when a bound is not met (never with --quick)."""
    options = _read_options(arguments)
    plan = QUICK if options.quick else FULL if options.full else NORMAL
    chosen = options.names or list(BENCHMARKS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))  # so that server and folder go away
    console = Console(width=None if sys.stdout.isatty() else 150)
    load, began = os.getloadavg()[0], time.monotonic()
    sections: list[Section] = []
    with open_bench() as bench:
        for name in chosen:
            with console.status(name) as status:
                section = BENCHMARKS[name](bench, plan, lambda text, name=name: status.update(f"{name}: {text}"))  # type: ignore[misc]
            sections.append(section)
            show(console, section)
    seconds = time.monotonic() - began
    if options.output is not None:
        command = " ".join(["python -m bench", *(arguments if arguments is not None else sys.argv[1:])])
        report = to_markdown(sections, command=command, seconds=seconds, load=load)
        if options.merge and options.output.exists():
            report = merge(options.output.read_text(), report)
        options.output.write_text(report)
        console.print(f"written to {options.output}")
    unmet = [check for section in sections for check in section.checks if not check.is_met]
    console.print(f"{seconds:.0f} s, {len(unmet)} bounds not met")
    return 1 if unmet and not plan.is_quick else 0


def _read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="seconds instead of minutes: does it still run?")
    size.add_argument("--full", action="store_true", help="also with ten million stored rows")
    parser.add_argument("--output", type=Path, help="write the report here; docs/benchmarks.md when all run")
    parser.add_argument("--merge", action="store_true", help="keep what FILE says of benchmarks that do not run now")
    options = parser.parse_args(arguments)
    if options.output is None and not options.names and not options.quick:
        options.output = OUTPUT
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
