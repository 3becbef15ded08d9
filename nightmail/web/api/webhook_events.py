"""/webhooks/{id}/events: what an endpoint was or will be told, how each attempt ended, replays, and pull.

`status` in Resend's words: `attempting` while an attempt is being made, `pending` while the first or the next one is
waited for, then `success` or `failed`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from msgspec import UNSET, Meta, UnsetType

from nightmail.rules.webhooks import TEST_TOPIC, TYPES, type_of
from nightmail.store import webhook_events as store
from nightmail.store.database import Connection
from nightmail.store.webhook_endpoints import EndpointView
from nightmail.store.webhook_events import REPLAY_LIMIT, AttemptView, EventView, ReplayFilter
from nightmail.web.api.webhooks import WEBHOOK_ID, EventNames, find_endpoint, lock_endpoint
from nightmail.web.operation import Call, Operation, PathKind, Reply
from nightmail.web.paging import ListOf, Page
from nightmail.web.problems import Problem, invalid, not_found
from nightmail.webhooks.stamp import make_body, stamp_fresh

SeqOrId = Annotated[str, Meta(pattern="^([0-9]{1,18}|[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})$")]
Moment = Annotated[datetime, Meta(tz=True)]
# The stored text as it is, not read and written again.
Payload = Annotated[msgspec.Raw, Meta(extra_json_schema={"type": "object"})]
EventStatus = Literal["pending", "attempting", "success", "failed"]


class WebhookEventPage(msgspec.Struct, kw_only=True):
    """Which part of the events; a number in `after` asks for the events after it in the order of their numbers."""

    limit: Annotated[int, Meta(ge=1, le=100, description="How many, 1 to 100.")] = 20
    after: Annotated[
        SeqOrId | None,
        Meta(
            description="An id: continue with what is older. A number (`0` to begin): pull what comes after it, "
            "oldest first, with payloads.",
        ),
    ] = None
    before: Annotated[UUID | None, Meta(description="Continue with what is newer than this id.")] = None

    def __post_init__(self) -> None:
        """Refuse two directions at once, and the line end that a pattern's `$` lets pass."""
        if self.after is not None and self.before is not None:
            raise invalid("Use either `after` or `before`, not both.")
        if self.after is not None and self.after.endswith("\n"):
            raise invalid("Invalid `after` parameter.")


class ReplayWebhook(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, rename={"start": "from", "end": "to"}):
    """Which events to deliver again: those that happened from `from` to just before `to`, failed ones by default."""

    start: Moment | None = None
    end: Moment | None = None
    status: Literal["failed", "delivered"] | None = None
    types: EventNames | None = None
    after: Annotated[UUID | None, Meta(description="The `next_after` of the reply before.")] = None


class WebhookEventItem(msgspec.Struct, kw_only=True):
    """An event for an endpoint; `seq` is its number, once it has one. `payload` comes with pull only."""

    id: str
    type: str
    created_at: datetime
    status: EventStatus
    seq: int | None
    payload: Payload | UnsetType = UNSET


class WebhookEventList(msgspec.Struct, kw_only=True):
    """A part of the events. With pull: `last_seq` is the next `after`, `oldest_seq` the lowest number still kept."""

    data: list[WebhookEventItem]
    has_more: bool
    oldest_seq: int | UnsetType | None = UNSET
    last_seq: int | UnsetType = UNSET
    object: Literal["list"] = "list"


class WebhookEventDetail(msgspec.Struct, kw_only=True):
    """An event for an endpoint; `attempts` counts since the last replay, `reason` is that of the last failure."""

    id: str
    type: str
    created_at: datetime
    status: EventStatus
    next_attempt_at: datetime | None
    payload: Payload
    seq: int | None
    attempts: int
    reason: str | None
    object: Literal["webhook_event"] = "webhook_event"


class WebhookAttemptItem(msgspec.Struct, kw_only=True):
    """One POST; without an answer `http_status_code` is 0 and `error` says why."""

    id: str
    http_status_code: int
    response: str
    sent_at: datetime
    duration_ms: int
    error: str | None


class WebhookEventQueued(msgspec.Struct):
    """The event that is delivered next."""

    id: str
    object: Literal["webhook_event"] = "webhook_event"


class WebhookReplayed(msgspec.Struct, kw_only=True):
    """How many events are delivered again; with `has_more` repeat the request with `after` set to `next_after`."""

    id: str
    replayed: int
    has_more: bool
    next_after: str | None
    object: Literal["webhook_replay"] = "webhook_replay"


async def list_webhook_events(call: Call[None]) -> Reply:
    """List events, newest first; or pull them by number."""
    page: WebhookEventPage = call.query
    if page.after is not None and page.after.isdigit():
        after_seq = int(page.after)
        return Reply(await call.services.database.run(lambda conn: _pull(call, conn, after_seq, page.limit)))
    async with call.services.database.connection() as conn:
        endpoint = await find_endpoint(call, conn)
        views, has_more = await store.list_events(
            conn,
            endpoint.id,
            limit=page.limit,
            after=UUID(page.after) if page.after is not None else None,
            before=page.before,
        )
    return Reply(WebhookEventList(data=[_item(endpoint, view) for view in views], has_more=has_more))


async def get_webhook_event(call: Call[None]) -> Reply:
    """Return one event with its payload."""
    async with call.services.database.connection() as conn:
        endpoint = await find_endpoint(call, conn)
        view = await store.get_event(conn, endpoint.id, call.ids["event_id"])
        if view is None:
            raise not_found("Webhook event")
        body = view.body if view.body is not None else await _draft_body(conn, endpoint, view)
    return Reply(
        WebhookEventDetail(
            id=str(view.event_id),
            type=type_of(endpoint.dialect, view.topic),
            created_at=view.occurred_at.astimezone(UTC),
            status=_status(view),
            next_attempt_at=_next_attempt(endpoint, view),
            payload=msgspec.Raw(body.encode()),
            seq=view.seq,
            attempts=view.attempts,
            reason=view.reason,
        )
    )


async def list_webhook_attempts(call: Call[None]) -> Reply:
    """List the attempts of one event, newest first."""
    page: Page = call.query
    async with call.services.database.connection() as conn:
        endpoint = await find_endpoint(call, conn)
        event = await store.get_event(conn, endpoint.id, call.ids["event_id"])
        if event is None:
            raise not_found("Webhook event")
        views, has_more = await store.list_attempts(
            conn, endpoint.id, event.event_id, limit=page.limit, after=page.after, before=page.before
        )
    return Reply(ListOf(data=[_attempt(view) for view in views], has_more=has_more))


async def replay_webhook_event(call: Call[None]) -> Reply:
    """Deliver one event again, under the same webhook-id."""
    event_id: UUID = call.ids["event_id"]

    async def replay(conn: Connection) -> None:
        async with conn.transaction():
            endpoint = await _lock_enabled(call, conn)
            if await store.replay_event(conn, endpoint.id, event_id, org_id=call.key.org_id, actor=call.actor):
                return
            if await store.get_event(conn, endpoint.id, event_id) is None:
                raise not_found("Webhook event")
            raise Problem(409, "attempt_in_progress", "An attempt is being made; look again when it has ended.")

    await call.services.database.run(replay)
    return Reply(WebhookEventQueued(str(event_id)))


async def replay_webhook_events(call: Call[ReplayWebhook]) -> Reply:
    """Deliver finished events again, up to 10,000 a call."""
    wanted = _read_replay(call.body)

    async def replay(conn: Connection) -> tuple[int, UUID | None]:
        async with conn.transaction():
            endpoint = await _lock_enabled(call, conn)
            return await store.replay_events(conn, endpoint.id, wanted, org_id=call.key.org_id, actor=call.actor)

    replayed, next_after = await call.services.database.run(replay)
    return Reply(
        WebhookReplayed(
            id=str(call.ids["id"]),
            replayed=replayed,
            has_more=next_after is not None,
            next_after=str(next_after) if next_after is not None else None,
        )
    )


async def test_webhook(call: Call[None]) -> Reply:
    """Send a `webhook.test` event to one endpoint, subscribed or not."""

    async def insert(conn: Connection) -> UUID:
        async with conn.transaction():
            endpoint = await _lock_enabled(call, conn)
            return await store.insert_test_event(conn, endpoint.id, org_id=call.key.org_id, actor=call.actor)

    return Reply(WebhookEventQueued(str(await call.services.database.run(insert))), 201)


async def _pull(call: Call[None], conn: Connection, after_seq: int, limit: int) -> WebhookEventList:
    """Return the events after a number, giving numbers to fresh ones as far as this page needs them."""
    endpoint = await find_endpoint(call, conn)
    views = await store.pull_events(conn, endpoint.id, after_seq=after_seq, limit=limit + 1)
    if len(views) <= limit:
        async with conn.transaction():
            stamped = await stamp_fresh(conn, endpoint.id, limit=limit + 1 - len(views))
        if stamped:
            views = await store.pull_events(conn, endpoint.id, after_seq=after_seq, limit=limit + 1)
    page = views[:limit]
    return WebhookEventList(
        data=[_item(endpoint, view) for view in page],
        has_more=len(views) > limit,
        oldest_seq=await store.get_oldest_seq(conn, endpoint.id),
        last_seq=(page[-1].seq or after_seq) if page else after_seq,
    )


async def _draft_body(conn: Connection, endpoint: EndpointView, view: EventView) -> str:
    """Return the body that a fresh event would get now. Raises Problem (404)."""
    unstamped = await store.get_unstamped(conn, endpoint.id, view.event_id)
    if unstamped is None:
        raise not_found("Webhook event")
    return make_body(unstamped, endpoint.dialect)


async def _lock_enabled(call: Call[Any], conn: Connection) -> EndpointView:
    """Return the caller's endpoint, locked. Raises Problem: 404, or 409 when nothing would be delivered to it."""
    endpoint = await lock_endpoint(call, conn)
    if endpoint.status == "disabled":
        raise Problem(409, "webhook_disabled", "The webhook is disabled; enable it first (PATCH `status`: `enabled`).")
    return endpoint


def _read_replay(body: ReplayWebhook) -> ReplayFilter:
    """Return which events are meant. Raises Problem (422)."""
    if (body.start, body.end, body.status, body.types) == (None, None, None, None):
        raise invalid("Say what to replay: give `from`, `to`, `status` or `types`.")
    if body.start is not None and body.end is not None and body.end <= body.start:
        raise invalid("Invalid `to` field: must be later than `from`.")
    topics: set[str] | None = None
    if body.types is not None:
        known = {**TYPES["nightmail"], **TYPES["resend"], TEST_TOPIC: (TEST_TOPIC,)}
        unknown = [name for name in body.types if name not in known]
        if unknown:
            raise invalid(f"Invalid `types` field: unknown event type: {', '.join(unknown)}.")
        topics = {topic for name in body.types for topic in known[name]}
    return ReplayFilter(
        state=body.status or "failed",
        start=body.start,
        end=body.end,
        topics=sorted(topics) if topics is not None else None,
        after=body.after,
    )


def _item(endpoint: EndpointView, view: EventView) -> WebhookEventItem:
    return WebhookEventItem(
        id=str(view.event_id),
        type=type_of(endpoint.dialect, view.topic),
        created_at=view.occurred_at.astimezone(UTC),
        status=_status(view),
        seq=view.seq,
        payload=msgspec.Raw(view.body.encode()) if view.body is not None else UNSET,
    )


def _attempt(view: AttemptView) -> WebhookAttemptItem:
    return WebhookAttemptItem(
        id=str(view.id),
        http_status_code=view.http_status or 0,
        response=view.response or "",
        sent_at=view.sent_at.astimezone(UTC),
        duration_ms=view.duration_ms,
        error=view.error,
    )


def _status(view: EventView) -> EventStatus:
    if view.state == "pending":
        return "attempting" if view.is_claimed else "pending"
    return "success" if view.state == "delivered" else "failed"


def _next_attempt(endpoint: EndpointView, view: EventView) -> datetime | None:
    """Return when the next attempt may be made, None when none is planned or one is being made."""
    if view.state != "pending" or view.is_claimed or endpoint.status != "enabled":
        return None
    return max(view.due_at, endpoint.blocked_until or view.due_at).astimezone(UTC)


_EVENT_ID: dict[str, PathKind] = {**WEBHOOK_ID, "event_id": "uuid"}

OPERATIONS = (
    Operation(
        method="POST", path="/webhooks/{id}/test", handler=test_webhook, summary="Send a test event", access="full",
        tag="Webhooks", path_kinds=WEBHOOK_ID, reply=WebhookEventQueued, status=201, errors=(404, 409),
        description="A `webhook.test` event for this webhook alone, subscribed or not, delivered and retried as any "
        "other.",
    ),
    Operation(
        method="POST", path="/webhooks/{id}/replay", handler=replay_webhook_events, summary="Replay events",
        access="full", tag="Webhooks", path_kinds=WEBHOOK_ID, body=ReplayWebhook, reply=WebhookReplayed,
        errors=(404, 409), example={"from": "2026-01-01T00:00:00Z", "status": "failed"},
        description=f"Failed events (or delivered ones) are delivered again, oldest first, up to {REPLAY_LIMIT} a "
        "call. While `has_more` is true, repeat the request with `after` set to `next_after`.",
    ),
    Operation(
        method="GET", path="/webhooks/{id}/events", handler=list_webhook_events, summary="List or pull events",
        access="full", tag="Webhooks", path_kinds=WEBHOOK_ID, query=WebhookEventPage, reply=WebhookEventList,
        errors=(404,),
        description="Newest first; `after` and `before` take ids. Pull: with a number in `after`, `0` to begin, the "
        "events after it come in the order of their numbers, with payloads. The numbers of a webhook have no gap, and "
        "none appears below one that was seen: ask again with `after` set to `last_seq`. When `oldest_seq` is greater "
        "than your `after` plus one, what lies between was removed after its retention. Pulled events are delivered "
        "all the same.",
    ),
    Operation(
        method="GET", path="/webhooks/{id}/events/{event_id}", handler=get_webhook_event, access="full",
        tag="Webhooks", summary="Get an event with its payload", path_kinds=_EVENT_ID, reply=WebhookEventDetail,
        errors=(404,),
    ),
    Operation(
        method="POST", path="/webhooks/{id}/events/{event_id}/replay", handler=replay_webhook_event, access="full",
        tag="Webhooks", summary="Replay an event", path_kinds=_EVENT_ID, reply=WebhookEventQueued, errors=(404, 409),
        description="One more delivery, with all its attempts, under the same webhook-id; delivered events too.",
    ),
    Operation(
        method="GET", path="/webhooks/{id}/events/{event_id}/attempts", handler=list_webhook_attempts, access="full",
        tag="Webhooks", summary="List the attempts of an event", path_kinds=_EVENT_ID, query=Page,
        reply=ListOf[WebhookAttemptItem], errors=(404,),
    ),
)  # fmt: skip
