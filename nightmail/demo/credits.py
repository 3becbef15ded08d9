"""The wallets of a third sample org: its readers buy a pack and a subscription, spend, and let a gift run out.

It knows the ledger by the public API alone. Users are new with each run, so that a folder can be used again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Any

from nightmail.clock import now
from nightmail.demo.screen import Expectation
from nightmail.ids import new_id

PRESS = "Lantern Press"
PRICES = {"article": 2, "audio": 15}
READS, LISTENS = 40, 6
GIFT, GIFT_SPENT = 50, 20
# The gift ends, and the subscription's first month begins, while the messages of the others are on their way.
GIFT_LASTS_S, MONTH_BEGINS_S = 8.0, 5.0
GRANT_PATH, EXPIRE_PATH = "/api/jobs/credits/grant", "/api/jobs/credits/expire"

Call = Callable[..., Awaitable[Any]]
Try = Callable[..., Awaitable[tuple[int, Any]]]


class Credits:
    """What the readers do; `call` returns the JSON of a success, `attempt` status and JSON of whatever comes."""

    def __init__(self, org_id: str, key: str, secret: str, call: Call, attempt: Try) -> None:
        self._org_id = org_id
        self._key = key
        self._secret = secret
        self._call = call
        self._try = attempt
        tag = str(new_id())[-4:]
        self.ada, self.ben, self.cleo = (f"{name}-{tag}" for name in ("ada", "ben", "cleo"))
        self._gift = ""
        self._gift_ends: datetime
        self._month_begins: datetime

    async def begin(self) -> list[Expectation]:
        """Buy, give and spend; return what was expected of it and seen. Raises StoryError."""
        for service, price in PRICES.items():
            await self._call("PUT", f"/credit-prices/{service}", self._key, {"credits": price})
        self._gift_ends = now() + timedelta(seconds=GIFT_LASTS_S)
        self._month_begins = now() + timedelta(seconds=MONTH_BEGINS_S)
        await self._buy(self.ada, "pack-1000")
        await self._buy(self.ada, "monthly", anchor=self._month_begins.isoformat())
        await self._buy(self.ben, "monthly")
        gift = {"amount": GIFT, "priority": 50, "expires_at": self._gift_ends.isoformat(), "reason": "a taste of audio"}
        self._gift = (await self._give(self.ada, "gift", **gift))["batch_id"]
        await self._give(self.cleo, "welcome", amount=25, reason="welcome")
        return [await self._spend_in_order(), await self._spend_too_much(), await self._spend_ordinary()]

    async def _spend_in_order(self) -> Expectation:
        """Spend a part of the gift, twice under one reference."""
        body = {"amount": GIFT_SPENT, "reference_id": "first-listen"}
        first = await self._call("POST", f"/credits/{self.ada}/consume", self._key, body)
        second = await self._call("POST", f"/credits/{self.ada}/consume", self._key, body)
        taken = [batch["id"] for batch in first["batches"]]
        return Expectation(
            "A spend takes what is to be used first, and one reference is one spend",
            taken == [self._gift] and first == second and first["balance"] == 1000 + GIFT - GIFT_SPENT,
            f"{GIFT_SPENT} of the gift, sent twice, {first['balance']} left",
        )

    async def _spend_too_much(self) -> Expectation:
        """Spend more than there is."""
        status, refusal = await self._try(
            "POST", f"/credits/{self.cleo}/consume", self._key, {"amount": 30, "reference_id": "too-much"}
        )
        left = (await self._wallet(self.cleo))["balance"]
        return Expectation(
            "More than a wallet holds is refused, and nothing has changed",
            (status, refusal.get("missing"), left) == (402, 5, 25),
            f"{status}, {refusal.get('missing')} missing, still {left}",
        )

    async def _spend_ordinary(self) -> Expectation:
        """Let one reader use services at once, and set aside what a longer piece of work may cost."""
        spends = [self._consume(self.ben, "article", n) for n in range(READS)]
        spends += [self._consume(self.ben, "audio", n) for n in range(LISTENS)]
        await asyncio.gather(*spends)
        path = f"/credits/{self.ben}"
        for name in ("print", "canceled", "waiting"):
            await self._call("POST", f"{path}/reserve", self._key, {"amount": 100, "reference_id": name})
        await self._call("POST", f"{path}/capture", self._key, {"amount": 60, "reference_id": "print"})
        await self._call("POST", f"{path}/release", self._key, {"reference_id": "canceled"})
        wallet = await self._wallet(self.ben)
        spent = READS * PRICES["article"] + LISTENS * PRICES["audio"] + 60
        return Expectation(
            "Services used at the same time, and what was set aside, are charged exactly",
            (wallet["balance"], wallet["reserved"]) == (1000 - spent - 100, 100),
            f"{spent} of 1000 spent, {wallet['reserved']} reserved, {wallet['balance']} left",
        )

    async def check(self) -> list[Expectation]:
        """Run the two jobs twice each and look what they left. Raises StoryError."""
        await asyncio.sleep(max(0.0, (max(self._gift_ends, self._month_begins) - now()).total_seconds()))
        unbooked = await self._wallet(self.ada)
        for path in (EXPIRE_PATH, GRANT_PATH, EXPIRE_PATH, GRANT_PATH):
            await self._call("GET", path, None, None, {"Authorization": f"Bearer {self._secret}"})
        entries = await self._history(self.ada)
        booked = [entry["amount"] for entry in entries if entry["kind"] == "expire"]
        months = [
            entry["amount"] for entry in entries if entry["kind"] == "grant" and "grant:" in entry["reference_id"]
        ]
        after = await self._wallet(self.ada)
        return [
            Expectation(
                "What has ended cannot be spent even before the job books it, which it does once",
                self._gift not in {batch["id"] for batch in unbooked["batches"]} and booked == [GIFT_SPENT - GIFT],
                f"{GIFT - GIFT_SPENT} left of the gift; booked: {', '.join(map(str, booked)) or 'nothing'}",
            ),
            Expectation(
                "A subscription's month is granted once, however often the job runs",
                months == [1000] and after["balance"] == 2000,
                f"{', '.join(map(str, months)) or 'nothing'} granted, {after['balance']} can be spent",
            ),
            await self._check_sums(),
        ]

    async def _check_sums(self) -> Expectation:
        """Add up every wallet's movements."""
        counted, wrong = 0, []
        for user in (self.ada, self.ben, self.cleo):
            wallet, entries = await self._wallet(user), await self._history(user)
            counted += len(entries)
            if sum(entry["amount"] for entry in entries) != wallet["balance"] + wallet["reserved"]:
                wrong.append(user)
        return Expectation(
            "The movements of each wallet add up to its balance",
            not wrong and counted > READS,
            f"3 wallets, {counted} movements" + (f", wrong: {', '.join(wrong)}" if wrong else ""),
        )

    # ── requests ──

    async def _buy(self, user: str, plan: str, **more: Any) -> None:
        await self._call("POST", f"/purchases?org={self._org_id}", None, {"user_id": user, "plan": plan, **more})

    async def _give(self, user: str, reference: str, **fields: Any) -> Any:
        body = {"reference_id": reference, **fields}
        return await self._call("POST", f"/credits/{user}/grant?org={self._org_id}", None, body)

    async def _consume(self, user: str, service: str, number: int) -> None:
        body = {"service": service, "reference_id": f"{service}-{number + 1}"}
        await self._call("POST", f"/credits/{user}/consume", self._key, body)

    async def _wallet(self, user: str) -> Any:
        return await self._call("GET", f"/credits/{user}", self._key)

    async def _history(self, user: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = []
        page: dict[str, Any] = {"has_more": True}
        while page["has_more"]:
            after = f"&after={entries[-1]['id']}" if entries else ""
            page = await self._call("GET", f"/credits/{user}/history?limit=100{after}", self._key)
            entries += page["data"]
        return entries
