"""Migrations against a real server, with folders of the tests' own SQL."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from nightmail.errors import MigrationError
from nightmail.schema.migrate import LOCK_KEY, migrate, pending, split_statements


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write(tmp_path, "0001_first", "CREATE TABLE first (id int); INSERT INTO first VALUES (1);")
    write(tmp_path, "0002_second", "CREATE TABLE second (id int);")
    return tmp_path


def write(directory: Path, name: str, text: str) -> None:
    (directory / f"{name}.sql").write_text(text)


def fetch(url: str, query: str) -> list[Any]:
    with psycopg.connect(url) as connection:
        return [row[0] for row in connection.execute(query.encode()).fetchall()]


def test_pending_files_are_applied_in_order_and_once(empty_database_url: str, directory: Path) -> None:
    assert pending(empty_database_url, directory=directory) == ["0001_first", "0002_second"]
    assert migrate(empty_database_url, directory=directory) == ["0001_first", "0002_second"]
    assert migrate(empty_database_url, directory=directory) == []
    assert pending(empty_database_url, directory=directory) == []
    assert fetch(empty_database_url, "SELECT name FROM schema_migrations ORDER BY number") == [
        "0001_first",
        "0002_second",
    ]
    write(directory, "0005_third", "DROP TABLE second")
    assert pending(empty_database_url, directory=directory) == ["0005_third"]
    assert migrate(empty_database_url, directory=directory) == ["0005_third"]


def test_pending_changes_nothing(empty_database_url: str, directory: Path) -> None:
    pending(empty_database_url, directory=directory)
    assert fetch(empty_database_url, "SELECT relname FROM pg_class WHERE relname = 'schema_migrations'") == []


def test_eight_processes_at_once_apply_each_file_once(empty_database_url: str, directory: Path) -> None:
    slow = "SELECT pg_sleep(0.02); INSERT INTO first VALUES ({0});"
    for number in range(3, 9):
        write(directory, f"{number:04}_step", slow.format(number))
    script = (
        "import sys; from pathlib import Path; from nightmail.schema.migrate import migrate\n"
        "sys.stdin.readline(); print(*migrate(sys.argv[1], directory=Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", script, empty_database_url, str(directory)]
    users = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    for user in users:
        assert user.stdin is not None
        user.stdin.write("\n")
        user.stdin.flush()
    outputs = [user.communicate(timeout=60)[0] for user in users]
    assert [user.returncode for user in users] == [0] * 8
    assert sorted(name for output in outputs for name in output.split()) == [
        path.stem for path in sorted(directory.glob("*.sql"))
    ]
    assert fetch(empty_database_url, "SELECT id FROM first ORDER BY id") == [1, 3, 4, 5, 6, 7, 8]


def test_edited_file_is_refused(empty_database_url: str, directory: Path) -> None:
    migrate(empty_database_url, directory=directory)
    write(directory, "0001_first", "CREATE TABLE first (id bigint)")
    write(directory, "0003_third", "CREATE TABLE third (id int)")
    for call in (migrate, pending):
        with pytest.raises(MigrationError, match=r"0001_first\.sql was edited"):
            call(empty_database_url, directory=directory)
    assert fetch(empty_database_url, "SELECT to_regclass('third')::text") == [None]


def test_line_endings_are_no_edit(empty_database_url: str, directory: Path) -> None:
    write(directory, "0003_third", "SELECT 1;\nSELECT 2;\n")
    migrate(empty_database_url, directory=directory)
    (directory / "0003_third.sql").write_bytes(b"SELECT 1;\r\nSELECT 2;\r\n")
    assert migrate(empty_database_url, directory=directory) == []


def test_old_code_on_a_newer_schema_is_refused(empty_database_url: str, directory: Path) -> None:
    migrate(empty_database_url, directory=directory)
    (directory / "0002_second.sql").unlink()
    with pytest.raises(MigrationError, match="0002_second, unknown to this version"):
        migrate(empty_database_url, directory=directory)


def test_file_numbered_before_an_applied_one_is_refused(empty_database_url: str, directory: Path) -> None:
    write(directory, "0004_fourth", "SELECT 1")
    migrate(empty_database_url, directory=directory)
    write(directory, "0003_third", "SELECT 1")
    with pytest.raises(MigrationError, match=r"0003_third\.sql comes before 0004"):
        migrate(empty_database_url, directory=directory)


def test_failed_file_leaves_nothing_and_keeps_the_earlier_ones(empty_database_url: str, directory: Path) -> None:
    write(directory, "0003_broken", "CREATE TABLE third (id int); SELECT 1/0;")
    with pytest.raises(MigrationError, match=r"0003_broken\.sql: division by zero"):
        migrate(empty_database_url, directory=directory)
    assert fetch(empty_database_url, "SELECT max(number) FROM schema_migrations") == [2]
    assert fetch(empty_database_url, "SELECT to_regclass('third')::text") == [None]


def test_file_that_commits_is_refused(empty_database_url: str, directory: Path) -> None:
    write(directory, "0003_commits", "SELECT 1; COMMIT;")
    with pytest.raises(MigrationError, match="ends its own transaction"):
        migrate(empty_database_url, directory=directory)


def test_bad_file_names_are_refused(empty_database_url: str, directory: Path) -> None:
    write(directory, "0002_twice", "SELECT 1")
    with pytest.raises(MigrationError, match="same number"):
        migrate(empty_database_url, directory=directory)
    (directory / "0002_twice.sql").rename(directory / "3_short.sql")
    with pytest.raises(MigrationError, match="NNNN_name"):
        migrate(empty_database_url, directory=directory)


def test_concurrent_index_is_built_while_others_wait_for_the_lock(empty_database_url: str, directory: Path) -> None:
    """With waiting sessions that hold a snapshot this would be a deadlock PostgreSQL cannot see."""
    write(
        directory,
        "0003_index",
        "-- no-transaction\n-- a comment; with a semicolon\n"
        "DROP INDEX CONCURRENTLY IF EXISTS first_id_idx;\n"
        "CREATE INDEX CONCURRENTLY first_id_idx ON first (id);\n",
    )
    with ThreadPoolExecutor(4) as pool:
        barrier = threading.Barrier(4)

        def run(_: int) -> list[str]:
            barrier.wait()
            return migrate(empty_database_url, directory=directory)

        applied = [name for names in pool.map(run, range(4)) for name in names]
    assert sorted(applied) == ["0001_first", "0002_second", "0003_index"]
    valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'first_id_idx'::regclass"
    assert fetch(empty_database_url, valid) == [True]


def test_interrupted_no_transaction_file_runs_again(empty_database_url: str, directory: Path) -> None:
    broken = "-- no-transaction\nCREATE TABLE IF NOT EXISTS kept (id int);\nSELECT 1/0;\n"
    write(directory, "0003_index", broken)
    with pytest.raises(MigrationError, match="division by zero"):
        migrate(empty_database_url, directory=directory)
    write(directory, "0003_index", broken.replace("1/0", "1"))
    assert migrate(empty_database_url, directory=directory) == ["0003_index"]


def test_statements_end_with_a_semicolon_at_the_end_of_a_line() -> None:
    text = "-- no-transaction\nSELECT ';' AS a,\n  2;  \n\n-- comment;\nSELECT 3"
    assert split_statements(text) == ["SELECT ';' AS a,\n  2", "SELECT 3"]
    with pytest.raises(MigrationError, match=r"\$\$"):
        split_statements("DO $$ BEGIN END $$;")


def test_limits_of_the_role_do_not_stop_a_migration(empty_database_url: str, directory: Path) -> None:
    write(directory, "0003_slow", "SELECT pg_sleep(0.3)")
    write(directory, "0004_slow", "-- no-transaction\nSELECT pg_sleep(0.3);\n")
    limits = "-c statement_timeout=100 -c transaction_timeout=100 -c idle_in_transaction_session_timeout=100"
    limited = f"{empty_database_url}&options={limits.replace(' ', '%20').replace('=', '%3D')}"
    assert migrate(limited, directory=directory)[2:] == ["0003_slow", "0004_slow"]


def test_lock_of_a_dead_process_is_free(empty_database_url: str, directory: Path) -> None:
    other = psycopg.connect(empty_database_url)
    with closing(other), ThreadPoolExecutor(1) as pool:
        other.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK_KEY])
        waiting = pool.submit(migrate, empty_database_url, directory=directory)
        with psycopg.connect(empty_database_url, autocommit=True) as killer:
            killer.execute("SELECT pg_terminate_backend(%s)", [other.info.backend_pid])
        assert waiting.result(timeout=10) == ["0001_first", "0002_second"]


def test_the_files_of_this_version_apply(database_url: str) -> None:
    assert pending(database_url) == []
