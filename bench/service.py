"""`nightmail serve` as a process of its own, over a database of the bench's server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import psycopg

from bench.crew import AWS_ENVIRONMENT
from bench.report import ROOT
from nightmail.ids import new_api_key, new_id, sha256

ORG = "00000000-0000-7000-8000-000000000001"
STOP_LIMIT_S = 15

KEY = """
INSERT INTO api_keys (id, org_id, name, env, token_sha256, last_four)
VALUES (%(id)s, %(org_id)s, 'bench', %(env)s, %(token_sha256)s, %(last_four)s)
"""


def make_key(url: str, env: str) -> str:
    """Insert an API key of the first org and return its token."""
    token = new_api_key(env)
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(
            KEY,
            {
                "id": new_id(),
                "org_id": ORG,
                "env": env,
                "token_sha256": sha256(token),
                "last_four": token[-4:],
            },
        )
    return token


@contextmanager
def process(command: Sequence[str], marker: str, environment: Mapping[str, str]) -> Iterator[str]:
    """Run a Python module and yield the http:// address on the line that begins with `marker`."""
    server = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, **AWS_ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        line = next((line for line in server.stdout if line.startswith(marker)), None)
        if line is None:
            raise RuntimeError(f"{command[0]} ended with status {server.wait()} before it was ready")
        yield line[line.index("http://") :].strip()
    finally:
        server.terminate()
        try:
            server.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        assert server.stdout is not None
        server.stdout.close()


@contextmanager
def nightmail(
    url: str, valkey_url: str | None, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Yield the address of `nightmail serve`."""
    settings = {"DATABASE_URL": url, "API_RATE_PER_S": "100000", **(environment or {})}
    if valkey_url is not None:
        settings["VALKEY_URL"] = valkey_url
    with process(["nightmail", "serve", "--port", "0", *options], "Nightmail is ready", settings) as address:
        yield address
