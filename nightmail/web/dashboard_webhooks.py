"""The operator's pages about webhooks: endpoints of all orgs, their deliveries, each attempt; pause, test and replay.

The buttons do what the API's operations do, through the same functions of the store, as `admin` in the audit log. No
page shows a signing secret.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, TypeVar, cast
from uuid import UUID

import msgspec
from starlette.responses import Response
from starlette.routing import BaseRoute

from nightmail.rules.webhooks import DEFAULT_WAITS_S, LEGACY_ATTEMPTS, TYPES, Status, type_of
from nightmail.store import orgs, webhook_events, webhook_overview
from nightmail.store import webhook_endpoints as endpoints
from nightmail.store.database import Connection
from nightmail.store.overview import SCAN
from nightmail.store.webhook_overview import AttemptCounts, EndpointRow, Standing, caps_of
from nightmail.web import charts
from nightmail.web.pages import Dashboard, Page, address_of, uuid_of
from nightmail.web.problems import Problem
from nightmail.webhooks.stamp import make_body

T = TypeVar("T")

ACTOR = "admin"
ORGS_LISTED = 200
STATUSES = ("enabled", "failing", "paused", "disabled")
STATES = ("pending", "delivered", "failed")
ATTEMPTS_SHOWN = 50
# Below this a rate is shown in red.
GOOD_SHARE = 0.95
# Calls of the store that one press of "Replay failed" may take: each looks at 100,000 events.
REPLAY_CALLS = 5


@dataclass(frozen=True, slots=True)
class Rate:
    """Attempts that were answered with 2xx, of all made in a span of time."""

    delivered: int
    total: int

    @property
    def percent(self) -> str:
        """Return the share; some never rounds to all or nothing."""
        if not self.total:
            return "–"
        if self.delivered in (0, self.total):
            return "100 %" if self.delivered else "0 %"
        return f"{min(max(self.delivered / self.total * 100, 0.1), 99.9):.1f} %"

    @property
    def is_bad(self) -> bool:
        """Return whether more failed than a passing trouble explains."""
        return self.delivered < GOOD_SHARE * self.total


@dataclass(frozen=True, slots=True)
class EndpointStanding:
    """An endpoint with everything that the pages say of it."""

    row: EndpointRow
    standing: Standing
    attempts: AttemptCounts
    caps: webhook_overview.Caps
    now: datetime

    @property
    def pending(self) -> str:
        """Return how many deliveries wait, as a lower bound when the count stopped."""
        standing = self.standing
        is_cut = max(standing.fresh, standing.again) >= self.caps.pending
        return f"{standing.fresh + standing.again:,}{'+' if is_cut else ''}"

    @property
    def failed(self) -> str:
        """Return how many deliveries failed, as a lower bound when not all were looked at."""
        standing = self.standing
        is_cut = standing.failed and standing.looked_at >= self.caps.newest
        return f"{standing.failed:,}{'+' if is_cut else ''}"

    @property
    def day(self) -> Rate:
        """Return the success of the last 24 hours."""
        return self._rate(charts.DAY_HOURS)

    @property
    def week(self) -> Rate:
        """Return the success of the last 7 days."""
        return self._rate(webhook_overview.HOURS_DRAWN)

    @property
    def spark(self) -> charts.Plot:
        """Return the plot of the last 24 hours."""
        return charts.draw_day(self.attempts)

    @property
    def next_at(self) -> datetime | None:
        """Return when the next attempt may be made; None when none is planned."""
        if self.row.status != "enabled":
            return None
        due_at = self.now if self.standing.fresh else self.standing.next_due_at
        return max(due_at, self.row.blocked_until or due_at, self.now) if due_at is not None else None

    def _rate(self, hours: int) -> Rate:
        this_hour = self.attempts.this_hour
        made = [n for hour, n in self.attempts.by_hour.items() if (this_hour - hour).total_seconds() < hours * 3600]
        return Rate(sum(n[0] for n in made), sum(map(sum, made)))


def webhook_pages(dashboard: Dashboard) -> list[BaseRoute]:
    """Return the pages below /dashboard/webhooks."""
    at = dashboard.route
    return [
        at("/webhooks", show_endpoints),
        at("/webhooks/{id}", show_endpoint),
        at("/webhooks/{id}/status", set_status, method="POST"),
        at("/webhooks/{id}/test", send_test, method="POST"),
        at("/webhooks/{id}/replay", replay_failed, method="POST"),
        at("/webhooks/{id}/{event_id}", show_delivery),
        at("/webhooks/{id}/{event_id}/replay", replay_one, method="POST"),
    ]


# ── what is shown ──


async def show_endpoints(page: Page) -> Response:
    """GET /dashboard/webhooks: all orgs' endpoints, filtered; an id in the search box opens that endpoint."""
    search = page.query("q")
    endpoint_id = uuid_of(search)
    if endpoint_id is not None:
        return page.go(f"/dashboard/webhooks/{endpoint_id}")
    org_id = uuid_of(page.query("org"))
    status = page.query("status", STATUSES)
    wanted = webhook_overview.EndpointFilter(org_id=org_id, status=status or None, url=search.lower())
    before = uuid_of(page.query("before"))
    found, lines, counts = await page.read(
        partial(_read_endpoints, wanted=wanted, before=before, moment=page.now),
    )
    tenants, _ = await page.read(lambda conn: orgs.list_orgs(conn, limit=ORGS_LISTED))
    kept = {"q": search, "status": status, "org": str(org_id) if org_id else ""}
    older = address_of("/dashboard/webhooks", **kept, before=str(found.next_before)) if found.next_before else ""
    return page.show(
        "webhooks.html.j2", found=found, lines=lines, counts=counts, older=older, chosen=kept, orgs=tenants,
        statuses=STATUSES, is_first=before is None, scan=SCAN,
    )  # fmt: skip


async def _read_endpoints(
    conn: Connection, wanted: webhook_overview.EndpointFilter, before: UUID | None, moment: datetime
) -> tuple[webhook_overview.EndpointPage, list[EndpointStanding], dict[str, int]]:
    found = await webhook_overview.list_endpoints(conn, wanted, before=before)
    ids = [row.id for row in found.rows]
    caps = caps_of(len(ids))
    standings = await webhook_overview.read_standings(conn, ids, caps)
    attempts = await webhook_overview.count_attempts(conn, ids, caps)
    lines = [EndpointStanding(row, standings[row.id], attempts[row.id], caps, moment) for row in found.rows]
    return found, lines, await webhook_overview.count_endpoints(conn)


async def show_endpoint(page: Page) -> Response:
    """GET /dashboard/webhooks/{id}: how it fares, and what it was told."""
    endpoint_id = uuid_of(page.request.path_params["id"])
    state = page.query("state", STATES)
    before = uuid_of(page.query("before"))
    values = (
        await page.read(
            partial(_read_endpoint, endpoint_id=endpoint_id, state=state or None, before=before, moment=page.now)
        )
        if endpoint_id
        else None
    )
    if values is None:
        return page.refuse(404, "There is no webhook with this id; it may have been removed.")
    next_before = values["found"].next_before
    here = f"/dashboard/webhooks/{endpoint_id}"
    replayed = page.query("replayed")
    return page.show(
        "webhook.html.j2", **values, here=here, state=state, states=STATES, is_first=before is None, scan=SCAN,
        older=address_of(here, state=state, before=str(next_before)) if next_before else "",
        replayed=int(replayed) if replayed.isascii() and replayed.isdigit() and len(replayed) < 9 else None,
        replay_after=uuid_of(page.query("after")), is_done=page.query("done", tuple(NOTICES)), notices=NOTICES,
    )  # fmt: skip


async def _read_endpoint(
    conn: Connection, endpoint_id: UUID, state: str | None, before: UUID | None, moment: datetime
) -> dict[str, Any] | None:
    row = await webhook_overview.get_endpoint(conn, endpoint_id)
    if row is None:
        return None
    caps = caps_of(1)
    standings = await webhook_overview.read_standings(conn, [endpoint_id], caps)
    attempts = await webhook_overview.count_attempts(conn, [endpoint_id], caps)
    return {
        "line": EndpointStanding(row, standings[endpoint_id], attempts[endpoint_id], caps, moment),
        "week": charts.draw_week(attempts[endpoint_id]),
        "schedule": _schedule_words(row.schedule),
        "knows_all": len(row.types) == len(TYPES[row.dialect]),
        "found": await webhook_overview.list_deliveries(conn, endpoint_id, state=state, before=before),
        "type_of": type_of,
    }


async def show_delivery(page: Page) -> Response:
    """GET /dashboard/webhooks/{id}/{event_id}: the body, and every attempt to deliver it."""
    endpoint_id = uuid_of(page.request.path_params["id"])
    event_id = uuid_of(page.request.path_params["event_id"])
    values = (
        await page.read(partial(_read_delivery, endpoint_id=endpoint_id, event_id=event_id))
        if endpoint_id and event_id
        else None
    )
    if values is None:
        return page.refuse(404, "There is no such delivery; it, or its webhook, may have been removed.")
    return page.show("delivery.html.j2", **values, shown=ATTEMPTS_SHOWN)


async def _read_delivery(conn: Connection, endpoint_id: UUID, event_id: UUID) -> dict[str, Any] | None:
    endpoint = await webhook_overview.get_endpoint(conn, endpoint_id)
    found = await webhook_overview.get_delivery(conn, endpoint_id, event_id)
    if endpoint is None or found is None:
        return None
    row, body = found
    if body is None:
        unstamped = await webhook_events.get_unstamped(conn, endpoint_id, event_id)
        draft = make_body(unstamped, endpoint.dialect) if unstamped is not None else "{}"
    attempts, has_more = await webhook_events.list_attempts(
        conn, endpoint_id, event_id, limit=ATTEMPTS_SHOWN, after=None, before=None
    )
    return {
        "endpoint": endpoint,
        "delivery": row,
        "type": type_of(endpoint.dialect, row.topic),
        "is_draft": body is None,
        "body": _pretty(draft if body is None else body),
        "attempts": attempts,
        "has_more_attempts": has_more,
    }


# ── what is changed ──

NOTICES = {
    "enabled": "Enabled: what is pending is delivered from now on. What failed stays failed until it is replayed.",
    "paused": "Paused: events are kept, and delivered once it is enabled again.",
}


async def set_status(page: Page) -> Response:
    """POST /dashboard/webhooks/{id}/status: enable or pause it."""
    status = (await page.form()).get("status", "")
    if status not in NOTICES:
        return page.refuse(422, "A webhook can be `enabled` or `paused` here.")

    async def change(conn: Connection, endpoint: endpoints.EndpointView, row: EndpointRow) -> None:
        await endpoints.change_endpoint(
            conn,
            org_id=row.org_id,
            endpoint=endpoint,
            change=endpoints.EndpointChange(status=cast(Status, status)),
            actor=ACTOR,
        )

    endpoint_id, _ = await _change(page, change, needs_enabled=False)
    return page.go(f"/dashboard/webhooks/{endpoint_id}?done={status}")


async def send_test(page: Page) -> Response:
    """POST /dashboard/webhooks/{id}/test: a test event for this endpoint, and its page."""

    async def change(conn: Connection, endpoint: endpoints.EndpointView, row: EndpointRow) -> UUID:
        return await webhook_events.insert_test_event(conn, endpoint.id, org_id=row.org_id, actor=ACTOR)

    endpoint_id, event_id = await _change(page, change)
    return page.go(f"/dashboard/webhooks/{endpoint_id}/{event_id}")


async def replay_failed(page: Page) -> Response:
    """POST /dashboard/webhooks/{id}/replay: deliver what failed again, oldest first, as much as one press may."""
    after = uuid_of((await page.form()).get("after", ""))
    replayed, endpoint_id = 0, None
    for _ in range(REPLAY_CALLS):
        wanted = webhook_events.ReplayFilter(state="failed", after=after)

        async def change(
            conn: Connection,
            endpoint: endpoints.EndpointView,
            row: EndpointRow,
            wanted: webhook_events.ReplayFilter = wanted,
        ) -> tuple[int, UUID | None]:
            return await webhook_events.replay_events(conn, endpoint.id, wanted, org_id=row.org_id, actor=ACTOR)

        endpoint_id, (count, after) = await _change(page, change)
        replayed += count
        if after is None or replayed >= webhook_events.REPLAY_LIMIT:
            break
    return page.go(
        address_of(f"/dashboard/webhooks/{endpoint_id}", replayed=str(replayed), after=str(after) if after else "")
    )


async def replay_one(page: Page) -> Response:
    """POST /dashboard/webhooks/{id}/{event_id}/replay: deliver it again, under the same webhook-id."""
    event_id = uuid_of(page.request.path_params["event_id"])

    async def change(conn: Connection, endpoint: endpoints.EndpointView, row: EndpointRow) -> Problem | None:
        if event_id is None or await webhook_overview.get_delivery(conn, endpoint.id, event_id) is None:
            return Problem(404, "not_found", "There is no such delivery.")
        if not await webhook_events.replay_event(conn, endpoint.id, event_id, org_id=row.org_id, actor=ACTOR):
            return Problem(409, "attempt_in_progress", "An attempt is being made; look again when it has ended.")
        return None

    endpoint_id, _ = await _change(page, change)
    return page.go(f"/dashboard/webhooks/{endpoint_id}/{event_id}")


Change = Callable[[Connection, endpoints.EndpointView, EndpointRow], Awaitable[T | Problem]]


async def _change(page: Page, change: Change[T], *, needs_enabled: bool = True) -> tuple[UUID, T]:
    """Do it in a transaction that has locked the endpoint of the path; return the endpoint's id and what came of it.

    Raises Problem: 404, 409 when nothing would be delivered to it, or what `change` returns, which has then written
    nothing. It is raised out here: where it ends a step, its log may show the endpoint with its whole URL.
    """
    endpoint_id = uuid_of(page.request.path_params["id"])

    async def step(conn: Connection) -> T | Problem:
        async with conn.transaction():
            row = await webhook_overview.get_endpoint(conn, endpoint_id) if endpoint_id else None
            locked = (
                await endpoints.lock_endpoint(conn, org_id=row.org_id, env=row.env, endpoint_id=row.id)
                if row is not None
                else None
            )
            if row is None or locked is None:
                return Problem(404, "not_found", "There is no webhook with this id; it may have been removed.")
            if needs_enabled and locked.status == "disabled":
                return Problem(409, "webhook_disabled", "The webhook is disabled: enable it first.")
            return await change(conn, locked, row)

    done = await page.read(step)
    if isinstance(done, Problem):
        raise done
    assert endpoint_id is not None, "the step has found it"
    return endpoint_id, cast(T, done)


# ── words ──


def _pretty(body: str) -> str:
    """Return the JSON as people read it."""
    return msgspec.json.format(body.encode(), indent=2).decode()


def _schedule_words(schedule: str) -> str:
    """Return when attempts are made again."""
    match schedule:
        case "default":
            hours = int(sum(DEFAULT_WAITS_S) // 3600)
            return f"default: {1 + len(DEFAULT_WAITS_S)} attempts in {hours} h"
        case "legacy":
            return f"legacy: {LEGACY_ATTEMPTS} attempts, 2 to 16 s apart"
        case _:
            return f"{1 + len(schedule.split())} attempts, then after {schedule}"
