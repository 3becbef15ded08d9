"""The receivers of the two sample orgs: what they subscribe to, and whether every fact reached them.

They live in a server of this process that keeps what it is told. Each checks signatures as a customer would, in a few
lines of its own; what should have come is asked of the database.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg

from nightmail.clock import monotonic
from nightmail.demo.screen import Expectation
from nightmail.fakes.webhook_receiver import Received, Receiver
from nightmail.rules.webhooks import MESSAGE_KINDS, RESEND_TYPES, Dialect, topics_of, type_of

# Endpoints with this description are of an earlier run on the same folder, whose receiver is gone.
DESCRIPTION = "demonstration"
OURS = [f"message.{kind}" for kind in MESSAGE_KINDS]
RESENDS = [name for name in RESEND_TYPES if name.startswith("email.")]
FLAKY = "/clinic/pager"
FLAKY_SCRIPT = "fail 2 503"
# What is told late is told within this: the flaky receiver's two waits, and what the machine needs.
ARRIVE_S = 15.0
POLL_S = 0.1

Call = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Hook:
    """An endpoint of the demonstration; `key` is the API key that made it."""

    id: str
    key: str
    env: str
    org_id: str
    path: str
    secret: str
    dialect: Dialect
    topics: Collection[str]


@dataclass(slots=True)
class Webhooks:
    """The receivers and what they were told; `call` asks the public API and returns the JSON of a success."""

    receiver: Receiver
    database_url: str
    call: Call
    hooks: list[Hook] = field(default_factory=list)

    async def subscribe(
        self, org_id: str, key: str, env: str, path: str, events: Sequence[str], dialect: Dialect, **more: Any
    ) -> None:
        """Make an endpoint through the public API; those that an earlier run left with this key's org are removed."""
        for old in (await self.call("GET", "/webhooks", key))["data"]:
            if old["description"] == DESCRIPTION and old["id"] not in {hook.id for hook in self.hooks}:
                await self.call("DELETE", f"/webhooks/{old['id']}", key)
        body = {"endpoint": self.receiver.url(path), "events": list(events), "description": DESCRIPTION, **more}
        made = await self.call("POST", "/webhooks", key, body)
        topics = topics_of(dialect, events)
        self.hooks.append(Hook(made["id"], key, env, org_id, path, made["signing_secret"], dialect, topics))

    @property
    def arrived(self) -> int:
        """Return how many events have arrived so far, each counted once per receiver."""
        return len({(request.path, request.webhook_id) for request in self.receiver.requests})

    async def settle(self, message_ids: Collection[str]) -> None:
        """Wait until every fact about these messages has arrived, or time is up."""
        facts = sum((await self._facts(message_ids)).values())
        give_up_at = monotonic() + ARRIVE_S
        while monotonic() < give_up_at:
            attempts = len(self.receiver.received(FLAKY))
            if self.arrived >= facts and attempts >= 3:
                return
            await asyncio.sleep(POLL_S)

    async def check(self, message_ids: Collection[str]) -> list[Expectation]:
        """Return what was expected of the webhooks, and what was seen. Raises StoryError."""
        told = self._told()
        facts = await self._facts(message_ids)
        missing, extra = facts - Counter(told.values()), Counter(told.values()) - facts
        requests = list(self.receiver.requests)
        secrets = {hook.path: hook.secret for hook in self.hooks}
        signed = sum(is_signed(request, secrets[request.path]) for request in requests)
        forged = sum(is_signed(request, secrets[request.path], body=request.body + b" ") for request in requests)
        return [
            Expectation(
                "Every fact in the database was told to the webhooks of its org, none else",
                bool(facts) and not missing and not extra,
                f"{sum(facts.values())} facts, {len(told)} told, {missing.total()} missing, {extra.total()} too many",
            ),
            Expectation(
                "Every request is signed, and no signature fits another body",
                signed == len(requests) and not forged,
                f"{signed} of {len(requests)} verified with each webhook's secret",
            ),
            await self._check_flaky(),
            await self._check_pull(),
        ]

    def _told(self) -> dict[tuple[str, str], tuple[str, str, str]]:
        """Return what each receiver was told, by path and webhook-id: path, message and type."""
        told = {}
        for request in self.receiver.requests:
            body = request.json()
            message_id = body["data"].get("email_id") or body["data"].get("id")
            told[request.path, request.webhook_id] = (request.path, message_id, body["type"])
        return told

    async def _check_flaky(self) -> Expectation:
        """Look at the receiver that answers 503 twice."""
        requests = self.receiver.received(FLAKY)
        hook = next(hook for hook in self.hooks if hook.path == FLAKY)
        [event, *others] = (await self.call("GET", f"/webhooks/{hook.id}/events", hook.key))["data"] or [{"id": ""}]
        path = f"/webhooks/{hook.id}/events/{event['id']}/attempts"
        attempts = (await self.call("GET", path, hook.key))["data"] if event["id"] else []
        statuses = [attempt["http_status_code"] for attempt in reversed(attempts)]
        is_same = len({(request.webhook_id, request.body) for request in requests}) == 1
        return Expectation(
            "A receiver that fails twice is told again: same id, same body, fresh signature",
            statuses == [503, 503, 200] and len(requests) == 3 and is_same and not others,
            f"{', '.join(map(str, statuses))}; {event.get('status', 'no event')}",
        )

    async def _check_pull(self) -> Expectation:
        """Pull what one receiver was told, by number."""
        hook = self.hooks[0]
        numbers: list[int] = []
        page: Mapping[str, Any] = {"has_more": True, "last_seq": 0}
        while page["has_more"]:
            page = await self.call("GET", f"/webhooks/{hook.id}/events?limit=100&after={page['last_seq']}", hook.key)
            numbers += [item["seq"] for item in page["data"]]
        told = sum(path == hook.path for path, _ in self._told())
        return Expectation(
            "A receiver that lost everything can pull it, numbered without a gap",
            numbers == list(range(1, told + 1)),
            f"{len(numbers)} events pulled" + (f", numbers 1 to {numbers[-1]}" if numbers else ""),
        )

    async def _facts(self, message_ids: Collection[str]) -> Counter[tuple[str, str, str]]:
        """Return what should have been told: path, message and type."""
        rows = await read_facts(self.database_url, message_ids)
        return Counter(
            (hook.path, message_id, type_of(hook.dialect, topic))
            for org_id, env, message_id, topic in rows
            for hook in self.hooks
            if (hook.org_id, hook.env) == (org_id, env) and topic in hook.topics
        )


def is_signed(request: Received, secret: str, body: bytes | None = None) -> bool:
    """Return whether one of the request's signatures is that of the secret over its id, its time and its body."""
    headers = request.headers
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode()
    signed += request.body if body is None else body
    expected = "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return any(hmac.compare_digest(one, expected) for one in headers["webhook-signature"].split(" "))


FACTS = """
SELECT m.org_id::text, m.env, m.id::text, m.channel || '.' || e.kind
FROM message_events AS e
JOIN messages AS m ON m.id = e.message_id
WHERE e.message_id = ANY (%(message_ids)s::uuid[])
"""


async def read_facts(database_url: str, message_ids: Collection[str]) -> list[tuple[str, str, str, str]]:
    """Return the facts about these messages: org, env, message, topic."""
    async with await psycopg.AsyncConnection.connect(database_url) as conn:
        cursor = await conn.execute(FACTS, {"message_ids": list(message_ids)})
        return list(await cursor.fetchall())
