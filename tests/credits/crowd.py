"""A crowd on few wallets: processes with colliding references that spend, grant and refund, killed at random.

`python -m tests.credits.crowd URL SEED SECONDS PROCESSES MUTANT KILL` forks the processes, kills and replaces them
until the time is over, and prints what PostgreSQL refused (by SQLSTATE) and how many calls were answered, as JSON:

- `none`      the ledger as it is
- `unlocked`  no row is locked, and each call waits between reading and writing: CHECKs and unique indexes must refuse
- `naked`     the same without the constraints: now the ledger must drift, or the audit would find nothing in any case
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg

from nightmail.ids import new_id
from nightmail.store import credit_expiry, credit_grants, credits
from nightmail.store.credit_grants import START, NewGrant
from nightmail.store.credits import Wallet
from nightmail.store.database import Connection
from nightmail.store.purchases import NewPurchase, create_purchase
from nightmail.store.queue import read_clock

WALLETS = 4
REFERENCES = 400
LOCKING = ("nm_credit_spend", "nm_credit_close", "nm_credit_settle", "nm_credit_grant", "nm_credit_refund",
           "nm_credit_claw_back")  # fmt: skip
LOCK = "FOR NO KEY UPDATE"
# Waiting where the lock was makes the races that it prevents happen. Only now and then, so that much else happens too.
GAP = "; PERFORM pg_sleep(0.004) WHERE random() < 0.3; PERFORM;"

DEFINITION = "SELECT pg_get_functiondef(oid) FROM pg_proc WHERE proname = ANY (%(names)s)"

RESERVED = """
SELECT account_id, reference, sum(amount)::bigint
FROM credit_reservations
GROUP BY account_id, reference
ORDER BY random()
LIMIT 5
"""

CONSTRAINTS = """
ALTER TABLE credit_accounts DROP CONSTRAINT credit_accounts_balance;
ALTER TABLE credit_batches DROP CONSTRAINT credit_batches_conserved;
ALTER TABLE credit_batches DROP CONSTRAINT credit_batches_positive;
ALTER TABLE credit_entries DROP CONSTRAINT credit_entries_balance;
DROP INDEX credit_entries_wallet;
CREATE INDEX credit_entries_wallet ON credit_entries (account_id, seq) WHERE seq IS NOT NULL;
DROP INDEX credit_transactions_reference;
CREATE INDEX credit_transactions_reference ON credit_transactions (account_id, kind, reference);
"""


def mutate(url: str, mutant: str) -> None:
    """Take the locks out of the schema's functions, and for `naked` the constraints out of its tables."""
    if mutant == "none":
        return
    with psycopg.connect(url, autocommit=True) as conn:
        for (text,) in conn.execute(DEFINITION, {"names": list(LOCKING)}).fetchall():
            assert LOCK + ";" in text
            conn.execute(text.replace(LOCK + ";", GAP))
        if mutant == "naked":
            conn.execute(CONSTRAINTS)


async def work(url: str, org_id: UUID, seed: int, until: float, answered: Callable[[str], object]) -> None:
    """Call the ledger until the time is over, and say how each call ended."""
    chance = random.Random(seed)
    conn: Connection = await psycopg.AsyncConnection.connect(url, autocommit=True)
    await conn.execute("SET lock_timeout = '2s'")
    while time.monotonic() < until:
        try:
            result = await _call(conn, org_id, chance)
        except psycopg.Error as error:
            answered(error.sqlstate or type(error).__name__)
        else:
            answered("answered" if result is not None else "nothing")
    await conn.close()


def _call(conn: Connection, org_id: UUID, chance: random.Random) -> Awaitable[Any]:
    wallet = Wallet(org_id, "live", f"user-{chance.randint(1, WALLETS):07}")
    reference, amount = f"r{chance.randint(1, REFERENCES)}", chance.randint(1, 30)
    match chance.randint(0, 13):
        case 0 | 1:
            lasts = chance.choice([None, None, 0.05, 0.3])
            return _grant(conn, wallet, reference, amount, lasts)
        case 2 | 3 | 4:
            return credits.consume(conn, wallet, amount=amount, reference=reference)
        case 5 | 6:
            return credits.reserve(conn, wallet, amount=amount, reference=reference)
        case 7:
            return credits.capture(conn, wallet, reference=reference)
        case 8:
            return credits.release(conn, wallet, reference=reference)
        case 9:
            return credit_grants.refund(conn, wallet, reference=f"f{reference}", of=reference)
        case 10:
            return _claw_back(conn, wallet, reference)
        case 11:
            return _settle(conn, chance)
        case 12:
            new = NewPurchase(chance.choice(["pack-1000", "monthly"]), external_ref=f"{wallet.user_id}-{reference}")
            return create_purchase(conn, wallet, new, actor="crowd")
        case _:
            return _jobs(conn)


async def _grant(conn: Connection, wallet: Wallet, reference: str, amount: int, lasts: float | None) -> Any:
    """Grant credits that may last only for a moment."""
    ends = None
    if lasts is not None:
        row = await (await conn.execute("SELECT nm_clock() + make_interval(secs => %s)", [lasts])).fetchone()
        ends = row[0] if row else None
    return await credit_grants.grant(conn, wallet, NewGrant(amount, reference, expires_at=ends))


async def _claw_back(conn: Connection, wallet: Wallet, reference: str) -> Any:
    """Take back what is left of a grant, if there was one of this reference."""
    batch_id = await credit_grants.find_batch(conn, wallet, reference)
    if batch_id is None:
        return None
    return await credit_grants.claw_back(conn, wallet, reference=reference, batch_id=batch_id, reason="crowd")


async def _settle(conn: Connection, chance: random.Random) -> Any:
    """Settle what some wallets have reserved, in one transaction and in any order, as the record step does."""
    rows = await (await conn.execute(RESERVED)).fetchall()
    chosen = [credits.Settlement(account, reference, chance.choice([0, held])) for account, reference, held in rows]
    async with conn.transaction():
        return await credits.settle(conn, chosen)


async def _jobs(conn: Connection) -> Any:
    """Grant and expire a chunk."""
    until = await read_clock(conn)
    await credit_grants.grant_chunk(conn, job_id=new_id(), after=START, limit=3)
    return await credit_expiry.expire_chunk(conn, until=until, after=START, limit=5)


def main() -> None:
    """Fork, kill, replace; then print what happened."""
    url, seed, seconds, processes, mutant, kill = sys.argv[1:]
    with psycopg.connect(url) as conn:
        [(org_id,)] = conn.execute("SELECT org_id FROM credit_accounts LIMIT 1").fetchall()
    mutate(url, mutant)
    if mutant != "none":
        for module, name in ((credit_grants, "GRANT_CHUNK"), (credit_expiry, "EXPIRE_CHUNK")):
            setattr(
                module,
                name,
                getattr(module, name).replace(LOCK + " OF a", "").replace(LOCK, "").replace("FOR UPDATE", ""),
            )
    chance = random.Random(int(seed))
    until = time.monotonic() + float(seconds)
    crew: dict[int, float] = {}
    tallies = Path(os.environ.get("TMPDIR", "/tmp")) / f"crowd-{os.getpid()}.txt"
    killed = 0
    while time.monotonic() < until:
        while len(crew) < int(processes):
            crew[_fork(url, org_id, chance.getrandbits(30), until, tallies)] = time.monotonic() + chance.uniform(
                0.05, 0.4
            )
        time.sleep(0.01)
        for pid, dies_at in list(crew.items()):
            if kill == "kill" and time.monotonic() > dies_at:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                del crew[pid]
                killed += 1
    for pid in crew:
        os.waitpid(pid, 0)
    counts = Counter(tallies.read_text().split())
    tallies.unlink()
    print(json.dumps({"killed": killed, **counts}))


def _fork(url: str, org_id: UUID, seed: int, until: float, tallies: Path) -> int:
    pid = os.fork()
    if pid == 0:
        file = os.open(tallies, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        status = 1
        try:
            asyncio.run(work(url, org_id, seed, until, lambda how: os.write(file, how.encode() + b"\n")))
            status = 0
        finally:
            os._exit(status)
    return pid


if __name__ == "__main__":
    main()
