"""Apply the numbered SQL files of this folder, each exactly once, whoever and however many run this.

A file is `NNNN_name.sql`, applied in the order of its number and in one transaction together with its row in
`schema_migrations`. It is never edited later: its checksum is kept and compared.

A file whose first line is `-- no-transaction` is for CREATE INDEX CONCURRENTLY and the like. Its statements
run one by one on a connection of their own while another holds the lock. Each statement ends with `;` at the
end of a line, and the file must be fit to run again from its start, as it is recorded after the last
statement: `DROP INDEX CONCURRENTLY IF EXISTS` goes before `CREATE INDEX CONCURRENTLY`, since a failed one
leaves an invalid index behind.

The lock is a transaction-level advisory lock, so that it works through a pooler and ends with its connection.
It is tried again and again, not waited for: a session that waits holds a snapshot, CREATE INDEX CONCURRENTLY
waits for that snapshot, and PostgreSQL would not see the deadlock because one side of it is in this process.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus

from nightmail.errors import MigrationError

DIRECTORY = Path(__file__).parent
NO_TRANSACTION = "-- no-transaction"
FILE_NAME = re.compile(r"(\d{4})_(\w+)\.sql")

# Any fixed number that nothing else in the database uses.
LOCK_KEY = 0x6E69676874
LOCK_POLL_S = 0.1
LOCK_LIMIT_S = 3600.0  # a large index takes its time

# Limits meant for jobs; names that this server does not know are left out (transaction_timeout came with 17).
LIFT_LIMITS = """
SELECT set_config(name, '0', %(local)s)
FROM pg_settings
WHERE name IN (
  'statement_timeout', 'lock_timeout', 'transaction_timeout', 'idle_in_transaction_session_timeout'
)
"""

TRY_LOCK = "SELECT pg_try_advisory_xact_lock(%(key)s)"

TABLE_EXISTS = "SELECT to_regclass('schema_migrations') IS NOT NULL"

CREATE_TABLE = """
CREATE TABLE IF NOT EXISTS schema_migrations (
  number integer PRIMARY KEY,
  name text NOT NULL,
  sha256 text NOT NULL,
  applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
)
"""

LIST_APPLIED = "SELECT number, name, sha256 FROM schema_migrations ORDER BY number"

INSERT_APPLIED = """
INSERT INTO schema_migrations (number, name, sha256)
VALUES (%(number)s, %(name)s, %(sha256)s)
"""

Connection = psycopg.Connection[tuple[object, ...]]


@dataclass(frozen=True, slots=True)
class Migration:
    """One SQL file; `name` is the file's name without `.sql`."""

    number: int
    name: str
    text: str

    @property
    def sha256(self) -> str:
        """Return the checksum that is kept in the database."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def in_transaction(self) -> bool:
        """Return whether the file runs in one transaction."""
        return self.text.split("\n", 1)[0].strip() != NO_TRANSACTION


def migrate(conninfo: str, *, directory: Path = DIRECTORY) -> list[str]:
    """Apply all pending files and return the names of those applied by this call; raises MigrationError."""
    migrations = read_migrations(directory)
    applied: list[str] = []
    with _connect(conninfo) as connection:
        while (name := _apply_next(connection, conninfo, migrations)) is not None:
            applied.append(name)
    return applied


def pending(conninfo: str, *, directory: Path = DIRECTORY) -> list[str]:
    """Return the names of the files not applied yet, changing nothing; raises as `migrate` does."""
    migrations = read_migrations(directory)
    with _connect(conninfo) as connection:
        exists = connection.execute(TABLE_EXISTS).fetchone()
        if exists is None or not exists[0]:
            return [migration.name for migration in migrations]
        return [migration.name for migration in _list_pending(connection, migrations)]


def read_migrations(directory: Path) -> list[Migration]:
    """Return the files in order; a name that does not fit or a number used twice is an error."""
    found: dict[int, Migration] = {}
    for path in sorted(directory.glob("*.sql")):
        match = FILE_NAME.fullmatch(path.name)
        if match is None:
            raise MigrationError(f"{path.name}: a migration is named NNNN_name.sql")
        number = int(match[1])
        if number in found:
            raise MigrationError(f"{path.name} and {found[number].name}.sql have the same number")
        found[number] = Migration(number, path.stem, path.read_text(encoding="utf-8"))
    return [found[number] for number in sorted(found)]


def split_statements(text: str) -> list[str]:
    """Split the text of a no-transaction file: a statement ends with `;` at the end of a line."""
    if "$$" in text:
        raise MigrationError("a no-transaction file cannot contain $$: put functions into a file of their own")
    lines = (line for line in text.splitlines() if not line.lstrip().startswith("--"))
    statements = re.split(r";[ \t]*$", "\n".join(lines), flags=re.MULTILINE)
    return [statement.strip() for statement in statements if statement.strip()]


def _apply_next(connection: Connection, conninfo: str, migrations: Sequence[Migration]) -> str | None:
    """Apply the first pending file under the lock and return its name; None when nothing is pending."""
    _begin_locked(connection)
    try:
        connection.execute(CREATE_TABLE)
        todo = _list_pending(connection, migrations)
        if todo:
            _run(connection, conninfo, todo[0])
            connection.execute(INSERT_APPLIED, _row(todo[0]))
        connection.execute("COMMIT")
    except BaseException:
        with suppress(psycopg.Error):  # the connection may be the reason
            connection.execute("ROLLBACK")
        raise
    return todo[0].name if todo else None


def _begin_locked(connection: Connection) -> None:
    """Begin a transaction that holds the advisory lock, trying in short transactions until it is free."""
    deadline = time.monotonic() + LOCK_LIMIT_S
    while True:
        connection.execute("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE")
        connection.execute(LIFT_LIMITS, {"local": True})
        got = connection.execute(TRY_LOCK, {"key": LOCK_KEY}).fetchone()
        if got is not None and got[0]:
            return
        connection.execute("ROLLBACK")
        if time.monotonic() > deadline:
            raise MigrationError(f"another process has been migrating for {LOCK_LIMIT_S:.0f} s")
        time.sleep(LOCK_POLL_S)


def _list_pending(connection: Connection, migrations: Sequence[Migration]) -> list[Migration]:
    """Compare the files with the table and return those not applied; a disagreement is an error."""
    known = {migration.number: migration for migration in migrations}
    last = 0
    for number, name, sha256 in connection.execute(LIST_APPLIED):
        assert isinstance(number, int)
        migration = known.pop(number, None)
        if migration is None:
            raise MigrationError(f"the database has migration {name}, unknown to this version: run a newer Nightmail")
        if migration.sha256 != sha256:
            raise MigrationError(f"{migration.name}.sql was edited after it was applied: undo that and add a new file")
        last = number
    late = [migration.name for migration in known.values() if migration.number < last]
    if late:
        raise MigrationError(f"{late[0]}.sql comes before {last:04}, which is applied already: give it a new number")
    return list(known.values())


def _run(connection: Connection, conninfo: str, migration: Migration) -> None:
    """Run one file; an error names the file, and the transaction around it is still open afterwards."""
    try:
        if migration.in_transaction:
            connection.execute(migration.text.encode())
        else:
            _run_without_transaction(conninfo, migration)
    except psycopg.Error as error:
        raise MigrationError(f"{migration.name}.sql: {error}") from error
    if connection.info.transaction_status != TransactionStatus.INTRANS:
        raise MigrationError(f"{migration.name}.sql ends its own transaction; remove COMMIT or ROLLBACK")


def _run_without_transaction(conninfo: str, migration: Migration) -> None:
    with _connect(conninfo) as connection:
        connection.execute(LIFT_LIMITS, {"local": False})
        for statement in split_statements(migration.text):
            connection.execute(statement.encode())


def _connect(conninfo: str) -> psycopg.Connection[Any]:
    """Return a connection that also works through a transaction pooler; an unreachable server costs 5 s."""
    return psycopg.connect(conninfo, autocommit=True, connect_timeout=5, prepare_threshold=None)


def _row(migration: Migration) -> dict[str, object]:
    return {
        "number": migration.number,
        "name": migration.name,
        "sha256": migration.sha256,
    }
