"""Random histories of spends against the oracle, many at once: which batch pays how much."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import psycopg

from nightmail.ids import new_id
from tests.credits.oracle import NEVER, Oracle
from tests.credits.seeds import seed_wallets

WALLETS = "SELECT id, user_id FROM credit_accounts WHERE org_id = %(org_id)s ORDER BY id"

SPEND = """
SELECT s.nth, spent.outcome, spent.answer
FROM unnest(%(users)s::text[], %(references)s::text[], %(amounts)s::bigint[])
     WITH ORDINALITY AS s (user_id, reference, amount, nth)
CROSS JOIN LATERAL nm_credit_spend(
    'consume', %(org_id)s, 'live', s.user_id, s.reference, '', s.amount, 'x', true
) AS spent
ORDER BY s.nth
"""


def compare_histories(url: str, count: int, seed: int) -> int:
    """Make `count` wallets with random batches, spend from them at random; return how many spends were compared."""
    chance = random.Random(seed)
    with psycopg.connect(url, autocommit=True) as conn:
        org_id = seed_wallets(conn, count)
        wallets = conn.execute(WALLETS, {"org_id": org_id}).fetchall()
        now = _now(conn)
        oracles = [_seed(chance) for _ in wallets]
        ids = _copy(conn, wallets, oracles, now)
        calls = [(number, f"r{turn}", chance.randint(1, 120))
                 for turn in range(6) for number in range(len(wallets))]  # fmt: skip
        answers = conn.execute(
            SPEND,
            {
                "org_id": org_id,
                "users": [wallets[number][1] for number, _, _ in calls],
                "references": [reference for _, reference, _ in calls],
                "amounts": [amount for _, _, amount in calls],
            },
        ).fetchall()
    assert len(answers) == len(calls)
    for (number, reference, amount), (_, outcome, answer) in zip(calls, answers, strict=True):
        expected = oracles[number].spend("consume", reference, amount, "x")
        if expected == "done":
            lines = [(ids[number][batch.made], taken) for batch, taken in oracles[number].spends[reference].lines]
            assert outcome == "done", (seed, number, reference, answer)
            assert [(part["id"], part["amount"]) for part in answer["batches"]] == lines, (seed, number, reference)
        else:
            found = outcome, (answer["available"], answer["missing"])
            assert found == ("insufficient", expected), (seed, number, reference)
    return len(calls)


def _seed(chance: random.Random) -> Oracle:
    """Return a wallet with up to 12 batches, with many ties in priority, expiry and issue; some have ended."""
    oracle = Oracle(now=0)
    for _ in range(chance.randint(0, 12)):
        expires = chance.choice([-3.0, -0.1, 0.5, 1.0, 1.0, 30.0, NEVER])
        issued = chance.choice([-40.0, -40.0, -20.0, -10.0])
        oracle.add(
            chance.randint(1, 60), "bonus", priority=chance.choice([1, 100, 100]), expires=expires, issued=issued
        )
    return oracle


def _copy(
    conn: psycopg.Connection[Any], wallets: Sequence[Any], oracles: Sequence[Oracle], now: datetime
) -> list[list[str]]:
    """Insert the batches in a random order of rows; return their ids by wallet in the order they were made."""
    day = timedelta(days=1)
    ids = [sorted(str(new_id()) for _ in oracle.batches) for oracle in oracles]
    rows = [
        (ids[number][batch.made], wallets[number][0], batch.granted, batch.granted, batch.priority, "bonus",
         now + batch.issued * day, None if batch.expires == NEVER else now + batch.expires * day)
        for number, oracle in enumerate(oracles)
        for batch in oracle.batches
    ]  # fmt: skip
    random.Random(len(rows)).shuffle(rows)
    columns = "id, account_id, granted, remaining, priority, source, issued_at, expires_at"
    with conn.cursor().copy(f"COPY credit_batches ({columns}) FROM STDIN") as copy:
        for row in rows:
            copy.write_row(row)
    balances = [(oracle.booked, wallets[number][0]) for number, oracle in enumerate(oracles)]
    conn.cursor().executemany("UPDATE credit_accounts SET balance = %s WHERE id = %s", balances)
    return ids


def _now(conn: psycopg.Connection[Any]) -> datetime:
    row = conn.execute("SELECT nm_now()").fetchone()
    assert row is not None
    at: datetime = row[0]
    return at
