"""The credit jobs against the set-based floor and against a loop of one transaction per user; spending over HTTP.

The floors write the same rows to the same tables and indexes, with the same triggers, in chunks of the same size. What
they leave out: locks, the row's state under the lock, double grants, roll-over, events, resuming, failing rows.
"""

from __future__ import annotations

import asyncio
import json
import resource
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any
from uuid import UUID

import psycopg
import structlog

from bench import seed, service
from bench.plan import Plan, Tell, alternate
from bench.report import ROOT, Check, Rates, Section
from bench.server import Bench, Connection
from nightmail.engine.crash import CrashPoints
from nightmail.engine.deadline import Deadline
from nightmail.engine.job import JobContext, Run
from nightmail.ids import new_id
from nightmail.jobs import credits_expire, credits_grant
from nightmail.ports import Ports
from nightmail.providers.capture import CaptureSender
from nightmail.settings import load
from nightmail.store import credit_expiry, credit_grants
from nightmail.store.credit_grants import TUNE
from nightmail.store.database import Database

GRANT, EXPIRE = "credits_grant", "credits_expire"
ORG = UUID("00000000-0000-7000-8000-000000000001")
CHUNK = credits_grant.CHUNK

ACCOUNTS = """
INSERT INTO credit_accounts (org_id, env, user_id)
SELECT ('00000000-0000-7000-8000-' || lpad(to_hex(1 + i %% %(orgs)s), 12, '0'))::uuid, 'live', 'user-' || i
FROM generate_series(1, %(count)s) AS i
"""

# Months began over the last hour, in an order that is not that of the accounts.
PURCHASES = """
INSERT INTO purchases (id, org_id, env, account_id, plan_id, status, anchor, grants_from, next_period, next_grant_at)
SELECT nm_uuid7(), org_id, env, id, 'monthly', 'active', at, at, 0, at
FROM (
    SELECT a.*, now() - interval '1 hour' * ((a.id * 7919) % 100003) / 100003.0 AS at FROM credit_accounts AS a
) AS a
"""

BATCHES = """
INSERT INTO credit_batches (id, account_id, granted, remaining, source, issued_at, expires_at)
SELECT nm_uuid7(), id, 100, 100, 'bonus', now() - interval '1 day',
       now() - interval '1 hour' * ((id * 7919) % 100003) / 100003.0
FROM credit_accounts
"""
BALANCES = "UPDATE credit_accounts SET balance = 100"

FLOOR_GRANT = """
WITH due AS MATERIALIZED (
    SELECT p.id, p.account_id, p.anchor, p.next_period, p.next_grant_at AS period_start, n.credits, n.priority,
           nm_nth_id(base.id, row_number() OVER ()) AS new_id
    FROM purchases AS p
    JOIN plans AS n ON n.id = p.plan_id
    CROSS JOIN (SELECT nm_uuid7()::text AS id) AS base
    WHERE p.id = ANY (ARRAY(
        SELECT id FROM purchases
        WHERE (next_grant_at AT TIME ZONE 'UTC')::date <= (now() AT TIME ZONE 'UTC')::date
          AND next_grant_at <= now() AND (holds_from IS NULL OR next_grant_at < holds_from)
        ORDER BY (next_grant_at AT TIME ZONE 'UTC')::date, account_id
        LIMIT %(chunk)s
    ))
), given AS (
    INSERT INTO credit_grants (purchase_id, period_start, transaction_id, amount)
    SELECT id, period_start, new_id, credits FROM due
), batch AS (
    INSERT INTO credit_batches (
        id, account_id, granted, remaining, priority, source, issued_at, expires_at, purchase_id, period_start
    )
    SELECT new_id, account_id, credits, credits, priority, 'subscription', period_start,
           nm_period_start(anchor, next_period + 1), id, period_start
    FROM due
), header AS (
    INSERT INTO credit_transactions (id, account_id, kind, amount)
    SELECT new_id, account_id, 'grant', credits FROM due
), booked AS (
    UPDATE credit_accounts AS a
    SET balance = a.balance + d.credits, seq = a.seq + 1
    FROM due AS d
    WHERE a.id = d.account_id
    RETURNING d.new_id, a.id, a.seq, a.balance, d.credits
), entry AS (
    INSERT INTO credit_entries (transaction_id, line, account_id, account, seq, balance_after, batch_id, amount)
    SELECT new_id, 1, id, 'wallet', seq, balance, new_id, credits FROM booked
    UNION ALL
    SELECT new_id, 2, id, 'system:grant', NULL, NULL, NULL, -credits FROM booked
), moved AS (
    UPDATE purchases AS p
    SET next_period = d.next_period + 1, next_grant_at = nm_period_start(d.anchor, d.next_period + 1)
    FROM due AS d
    WHERE p.id = d.id
)
SELECT count(*) FROM due
"""

FLOOR_EXPIRE = """
WITH ended AS (
    UPDATE credit_batches AS b
    SET expired = b.expired + b.remaining, remaining = 0
    WHERE b.id = ANY (ARRAY(
        SELECT id FROM credit_batches
        WHERE is_open AND (expires_at AT TIME ZONE 'UTC')::date <= (now() AT TIME ZONE 'UTC')::date
          AND expires_at <= now()
        ORDER BY (expires_at AT TIME ZONE 'UTC')::date, account_id
        LIMIT %(chunk)s
    ))
    RETURNING b.id, b.account_id, b.granted - b.consumed - b.reserved AS amount
), line AS MATERIALIZED (
    SELECT e.*, nm_nth_id(base.id, row_number() OVER ()) AS new_id
    FROM ended AS e
    CROSS JOIN (SELECT nm_uuid7()::text AS id) AS base
), header AS (
    INSERT INTO credit_transactions (id, account_id, kind, amount)
    SELECT new_id, account_id, 'expire', amount FROM line
), booked AS (
    UPDATE credit_accounts AS a
    SET balance = a.balance - l.amount, seq = a.seq + 1
    FROM line AS l
    WHERE a.id = l.account_id
    RETURNING l.new_id, l.id AS batch_id, a.id, a.seq, a.balance, l.amount
), entry AS (
    INSERT INTO credit_entries (transaction_id, line, account_id, account, seq, balance_after, batch_id, amount)
    SELECT new_id, 1, id, 'wallet', seq, balance, batch_id, -amount FROM booked
    UNION ALL
    SELECT new_id, 2, id, 'system:expiry', NULL, NULL, NULL, amount FROM booked
)
SELECT count(*) FROM line
"""

# What a loop does for each user, one statement after the other in a transaction.
LOOP_GRANT = (
    "SELECT 1 FROM credit_accounts WHERE id = %(account)s FOR UPDATE",
    "SELECT 1 FROM credit_grants WHERE purchase_id = %(id)s AND period_start = %(at)s",
    """INSERT INTO credit_grants (purchase_id, period_start, transaction_id, amount)
    VALUES (%(id)s, %(at)s, %(new)s, 1000)""",
    """INSERT INTO credit_batches (
        id, account_id, granted, remaining, source, issued_at, expires_at, purchase_id, period_start
    )
    VALUES (%(new)s, %(account)s, 1000, 1000, 'subscription', %(at)s, nm_period_start(%(at)s, 1), %(id)s, %(at)s)""",
    "INSERT INTO credit_transactions (id, account_id, kind, amount) VALUES (%(new)s, %(account)s, 'grant', 1000)",
    """INSERT INTO credit_entries (transaction_id, line, account_id, account, seq, balance_after, batch_id, amount)
    SELECT %(new)s, 1, id, 'wallet', seq + 1, balance + 1000, %(new)s, 1000 FROM credit_accounts WHERE id = %(account)s
    UNION ALL SELECT %(new)s, 2, %(account)s, 'system:grant', NULL, NULL, NULL, -1000""",
    "UPDATE credit_accounts SET balance = balance + 1000, seq = seq + 1 WHERE id = %(account)s",
    """UPDATE purchases SET next_period = next_period + 1, next_grant_at = nm_period_start(anchor, next_period + 1)
    WHERE id = %(id)s""",
)
LOOP_EXPIRE = (
    "SELECT 1 FROM credit_accounts WHERE id = %(account)s FOR UPDATE",
    "UPDATE credit_batches SET expired = expired + remaining, remaining = 0 WHERE id = %(id)s",
    "INSERT INTO credit_transactions (id, account_id, kind, amount) VALUES (%(new)s, %(account)s, 'expire', 100)",
    """INSERT INTO credit_entries (transaction_id, line, account_id, account, seq, balance_after, batch_id, amount)
    SELECT %(new)s, 1, id, 'wallet', seq + 1, balance - 100, %(id)s, -100 FROM credit_accounts WHERE id = %(account)s
    UNION ALL SELECT %(new)s, 2, %(account)s, 'system:expiry', NULL, NULL, NULL, 100""",
    "UPDATE credit_accounts SET balance = balance - 100, seq = seq + 1 WHERE id = %(account)s",
)
DUE = {
    GRANT: "SELECT id, account_id, next_grant_at FROM purchases WHERE next_grant_at <= now() LIMIT %(count)s",
    EXPIRE: "SELECT id, account_id, NULL FROM credit_batches WHERE is_open AND expires_at <= now() LIMIT %(count)s",
}


def run(bench: Bench, plan: Plan, tell: Tell) -> Section:
    """Measure grant, expiry and spending."""
    users = plan.credit_users
    rows: list[Sequence[str]] = []
    checks: list[Check] = []
    seen: dict[str, JobTimes] = {}

    def job(name: str, seeds: Callable[[Connection], None], work: Run) -> float:
        with (
            bench.seeded(name, seeds) as url,
            _watched_chunks(lambda done: tell(f"{name}, {done:,} of {users:,}")) as chunks,
        ):
            times = asyncio.run(_run_twice(url, name, work))
        times.chunk_s = max(chunks)
        seen[name] = times.worse(seen.get(name, times))
        return users / times.seconds

    def floor(name: str, seeds: Callable[[Connection], None], statement: Any) -> float:
        with bench.seeded(name, seeds) as url, psycopg.connect(url, autocommit=True, prepare_threshold=0) as conn:
            started = time.monotonic()
            done = 0
            while True:
                with conn.transaction():
                    conn.execute(TUNE)
                    row = conn.execute(statement, {"chunk": CHUNK}).fetchone()
                if row is None or row[0] == 0:
                    break
                done += row[0]
            assert done == users, done
            return users / (time.monotonic() - started)

    def loop(name: str, seeds: Callable[[Connection], None]) -> float:
        count = min(plan.credit_loop, users)
        with bench.seeded(name, seeds) as url:
            return count / _loop(url, name, count)

    def seed_grant(conn: Connection) -> None:
        _seed_accounts(conn, plan)
        conn.execute(PURCHASES)

    def seed_expire(conn: Connection) -> None:
        _seed_accounts(conn, plan)
        conn.execute(BATCHES)
        conn.execute(BALANCES)

    for title, name, seeds, work, statement in (
        ("grant", GRANT, seed_grant, credits_grant.run, FLOOR_GRANT),
        ("expiry", EXPIRE, seed_expire, credits_expire.run, FLOOR_EXPIRE),
    ):
        contenders: dict[str, Callable[[], float]] = {
            "job": partial(job, name, seeds, work),
            "floor": partial(floor, name, seeds, statement),
            "loop": partial(loop, name, seeds),
        }
        rates = alternate(contenders, plan.credit_rounds, partial(_tell_about, tell, title))
        bench.drop(name)
        rows += [(f"{title}, {contender}", rate.text()) for contender, rate in rates.items()]
        ours = rates["job"].median
        checks += [
            Check(f"{title} of {users:,} users, of the floor", ours / rates["floor"].median, least=0.7),
            Check(f"{title}, times the loop", ours / rates["loop"].median, least=40),
            Check(f"{title}, a second run with nothing due, s", seen[name].again_s, most=2),
            Check(f"{title}, the longest chunk (its locks), s", seen[name].chunk_s, most=1),
            Check(f"{title}, memory grown, MiB", seen[name].grown_mib, most=30),
        ]
    spent, bare = _spending(bench, plan, tell)
    rows += [("consume over HTTP", spent.text()), ("bare one-row update over HTTP", bare.text())]
    checks.append(Check("consume over HTTP, of the bare update", spent.median / bare.median, least=0.4))
    return Section(
        title="Credits",
        columns=("contender", "users/s, requests/s"),
        rows=rows,
        lines=[
            f"{users:,} users with one subscription, or one batch, each; chunks of {CHUNK:,}, in {credits_grant.LANES} "
            "lanes. The floor is one connection, and writes the same rows in as few statements, with nothing beside.",
            f"The loop is one transaction per user on one connection, as a starter kit would, timed on "
            f"{min(plan.credit_loop, users):,} users. Consume: 32 connections, 1,000 wallets, one uvicorn worker.",
        ],
        checks=checks,
    )


def _seed_accounts(conn: Connection, plan: Plan) -> None:
    seed.seed_orgs(conn, plan.orgs)
    conn.execute(ACCOUNTS, {"orgs": plan.orgs, "count": plan.credit_users})


@dataclass(slots=True)
class JobTimes:
    """What a run took, in seconds and memory; `again_s` the next one, `chunk_s` its longest chunk."""

    seconds: float
    grown_mib: float
    again_s: float
    chunk_s: float = 0.0

    def worse(self, other: JobTimes) -> JobTimes:
        """Return the larger of each."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return JobTimes(*(max(pair) for pair in pairs))


@contextmanager
def _watched_chunks(tell: Callable[[int], None]) -> Iterator[list[float]]:
    """Time each chunk of the jobs, which is how long it holds its locks; say how many rows are done."""
    times: list[float] = [0.0]
    done = 0

    def watch(chunk: Callable[..., Awaitable[Any]], count: str) -> Callable[..., Awaitable[Any]]:
        async def timed(*arguments: Any, **named: Any) -> Any:
            nonlocal done
            started = time.monotonic()
            result = await chunk(*arguments, **named)
            times.append(time.monotonic() - started)
            if result is not None:
                done += getattr(result, count)
                tell(done)
            return result

        return timed

    # The shipped functions are wrapped where the jobs look them up, hence the assignments to names of another module.
    kept = credit_grants.grant_chunk, credit_expiry.expire_chunk
    credit_grants.grant_chunk = watch(kept[0], "processed")  # type: ignore[assignment]
    credit_expiry.expire_chunk = watch(kept[1], "batches")  # type: ignore[assignment]
    try:
        yield times
    finally:
        credit_grants.grant_chunk, credit_expiry.expire_chunk = kept


def _tell_about(tell: Tell, title: str, text: str) -> None:
    tell(f"{title}, {text}")


async def _run_twice(url: str, name: str, work: Run) -> JobTimes:
    """Run the job until nothing is left and once more."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    database = Database(url)
    await database.open()
    sender = CaptureSender()
    # Neither job calls anybody: they get no other ports.
    ports = Ports(sender, sender, None, None, None, None)  # type: ignore[arg-type]
    settings = load({"nightmail_env": "test"})

    async def once() -> float:
        started = time.monotonic()
        deadline = Deadline.after(3600)
        ctx = JobContext(
            new_id(), name, database, ports, settings, deadline, "bench", structlog.get_logger(), crash=CrashPoints()
        )
        result = await work(ctx)
        assert not result.more
        return time.monotonic() - started

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = await once()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    again = await once()
    await database.close()
    return JobTimes(seconds, grown, again)


def _loop(url: str, name: str, count: int) -> float:
    """Work user by user, each in a transaction of its own; return the seconds."""
    with psycopg.connect(url, autocommit=True, prepare_threshold=1) as conn:
        due = conn.execute(DUE[name], {"count": count}).fetchall()
        assert len(due) == count
        started = time.monotonic()
        for id, account, at in due:
            arguments = {"id": id, "account": account, "at": at, "new": new_id()}
            with conn.transaction():
                for statement in LOOP_GRANT if name == GRANT else LOOP_EXPIRE:
                    conn.execute(statement, arguments)
        return time.monotonic() - started


def _spending(bench: Bench, plan: Plan, tell: Tell) -> tuple[Rates, Rates]:
    """Measure requests a second of POST /credits/{user}/consume, and of a handler that updates one row."""

    def seeds(conn: Connection) -> None:
        seed.seed_orgs(conn, 1)
        conn.execute(ACCOUNTS, {"orgs": 1, "count": 1000})
        conn.execute(
            "SELECT nm_credit_grant('grant', org_id, env, user_id, 'seed', '', 1000000000, 'bonus',"
            " 100::smallint, NULL, now() + interval '9 days', 'system:grant', NULL, NULL, NULL, NULL)"
            " FROM credit_accounts"
        )

    def load(address: str, token: str) -> float:
        arguments = (address, token, str(plan.accept_seconds), str(plan.accept_warm_s))
        done = subprocess.run(
            [sys.executable, "-m", "bench.credits_load", *arguments],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        result = json.loads(done.stdout)
        assert result["failed"] == 0, result
        return float(result["requests"] / result["seconds"])

    def ours() -> float:
        with bench.seeded("credits_consume", seeds) as url:
            token = service.make_key(url, "live")
            with service.nightmail(url, bench.valkey_url, "--no-scheduler") as address:
                return load(address, token)

    def bare() -> float:
        with bench.seeded("credits_consume", seeds) as url:
            with service.process(["bench.credits_raw", url], "ready", {}) as address:
                return load(address, "none")

    rates = alternate({"consume": ours, "bare": bare}, plan.rounds, lambda text: tell(f"consume, {text}"))
    bench.drop("credits_consume")
    return rates["consume"], rates["bare"]
