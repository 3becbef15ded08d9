"""What every command shares: its options, how it reaches the database, how it ends."""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import psycopg
import typer
import uvloop
from rich.console import Console

from nightmail.errors import DatabaseAway
from nightmail.log import configure_logging
from nightmail.main import Application, Servers, open_application, open_servers
from nightmail.schema.migrate import migrate
from nightmail.settings import Settings, load

T = TypeVar("T")


class Exit(IntEnum):
    """What the exit code tells a script."""

    OK = 0
    FAILED = 1
    USAGE = 2
    HELD = 3


Data = Annotated[
    Path | None,
    typer.Option(help="Folder of the embedded server; without it DATABASE_URL, else ./.nightmail", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]

out = Console(highlight=False)


def fail(message: str, code: Exit) -> NoReturn:
    """Print why and end the process."""
    for line in message.splitlines():
        print(f"nightmail: {line}", file=sys.stderr)
    raise SystemExit(int(code))


def with_application(data: Path | None, work: Callable[[Application], Awaitable[T]]) -> T:
    """Open servers, bring the schema up to date, and run `work` with an application over them."""
    settings = load()
    configure_logging(settings)
    with open_servers(settings, data) as servers:
        ensure_schema(settings, servers)

        async def body() -> T:
            async with open_application(settings, servers) as application:
                return await work(application)

        return uvloop.run(body())


def ensure_schema(settings: Settings, servers: Servers) -> list[str]:
    """Apply pending migrations, over the direct connection when there is one. Raises DatabaseAway."""
    direct = settings.migrate_database_url
    url = direct.get_secret_value() if direct else servers.database_url
    try:
        return migrate(url)
    except psycopg.OperationalError as error:
        raise DatabaseAway(str(error).strip().splitlines()[0]) from error


def print_json(value: Any) -> None:
    """Print one line of JSON."""
    print(json.dumps(value, default=str, ensure_ascii=False))


def choose(option: str, value: str, allowed: tuple[str, ...]) -> str:
    """Return the value if it is allowed, else end with exit code 2."""
    if value not in allowed:
        fail(f"{option} must be {' or '.join(allowed)}, not {value!r}", Exit.USAGE)
    return value
