"""Fields that emails and SMS share: recipients, tags, times, and the replies of send and batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from nightmail import clock
from nightmail.rules.addresses import BadAddress, format_mailbox, parse_mailbox
from nightmail.rules.schedule_text import BadSchedule, parse_schedule
from nightmail.store.accept import NewMessage
from nightmail.web.bodies import convert
from nightmail.web.problems import Problem, invalid

MAX_RECIPIENTS = 50
MAX_BATCH = 100
# SES takes 50 tags a message; one is ours.
MAX_TAGS = 49

_TAG_TEXT = re.compile(r"[A-Za-z0-9_-]{1,256}")
TagText = Annotated[str, Meta(max_length=256, pattern="^[A-Za-z0-9_-]*$")]
Mailboxes = (
    Annotated[str, Meta(min_length=1, max_length=1000)]
    | Annotated[list[Annotated[str, Meta(min_length=1, max_length=1000)]], Meta(max_length=MAX_RECIPIENTS)]
)
ScheduleText = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=64,
        description="ISO 8601 with a zone, or `in N minutes|hours|days`; 366 days at most.",
    ),
]


class Tag(msgspec.Struct, forbid_unknown_fields=True):
    """A name and a value that come back in events."""

    name: TagText
    value: TagText | None = None


class Accepted(msgspec.Struct):
    """The id of an accepted message."""

    id: str


class BatchError(msgspec.Struct):
    """Why one message of a permissive batch was not accepted; `index` is its place in the request."""

    index: int
    message: str


class BatchAccepted(msgspec.Struct, omit_defaults=True):
    """The ids in the order of the request; with `x-batch-validation: permissive` also what was refused."""

    data: list[Accepted]
    errors: list[BatchError] | None = None


class Reschedule(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """When to send instead; the `id` that the Python SDK repeats here is ignored."""

    scheduled_at: ScheduleText
    id: str | None = None


class Release(msgspec.Struct, forbid_unknown_fields=True):
    """What to do with a message that may or may not have been sent."""

    action: Literal["resend", "mark_sent", "cancel"]


class EventItem(msgspec.Struct, kw_only=True):
    """A fact in a message's life; `recipient` is empty when it concerns the whole message."""

    type: str
    recipient: str
    created_at: datetime
    data: dict[str, Any]


@lru_cache(maxsize=8192)
def read_mailbox(entry: str) -> tuple[str, str]:
    """Return (canonical mailbox text, normalised address). Raises BadAddress."""
    name, address = parse_mailbox(entry)
    return format_mailbox(name, address), address


def read_mailboxes(given: str | list[str] | None, field: str, seen: dict[str, None] | None) -> list[str]:
    """Return canonical mailbox texts; with `seen` only those whose address is not in it yet. Raises Problem."""
    if not given:
        return []
    texts = []
    for index, entry in enumerate([given] if isinstance(given, str) else given):
        try:
            text, address = read_mailbox(entry)
        except BadAddress as error:
            where = field if isinstance(given, str) else f"{field}[{index}]"
            raise invalid(f"Invalid `{where}` field: {error}.") from None
        if seen is None:
            texts.append(text)
        elif address not in seen:
            seen[address] = None
            texts.append(text)
    return texts


def read_name(text: str) -> str:
    """Return a name for people, without the spaces around it. Raises Problem: it is shown in terminals and pages."""
    name = text.strip()
    if not name or not name.isprintable():
        raise invalid("Invalid `name` field: must not be blank or hold line ends and control characters.")
    return name


def read_tags(tags: Sequence[Tag] | None) -> list[dict[str, str]]:
    """Return tags as they are stored. Raises Problem."""
    if not tags:
        return []
    stored = {tag.name: tag.value or "" for tag in tags}
    if len(stored) != len(tags):
        raise invalid("Invalid `tags` field: a name occurs twice.")
    for name, value in stored.items():
        if not _TAG_TEXT.fullmatch(name) or (value and not _TAG_TEXT.fullmatch(value)):
            raise invalid("Invalid `tags` field: names and values may hold ASCII letters, digits, `_` and `-` only.")
    return [{"name": name, "value": value} for name, value in stored.items()]


def read_schedule(text: str | None) -> datetime | None:
    """Return when to send, None for now. Raises Problem."""
    if text is None:
        return None
    try:
        return parse_schedule(text, now=clock.now())
    except BadSchedule as error:
        raise invalid(f"Invalid `scheduled_at` field: {error}.") from None


def read_batch_mode(headers: Any) -> Literal["strict", "permissive"]:
    """Return how a batch treats messages that are refused. Raises Problem."""
    mode = headers.get(b"x-batch-validation", b"strict")
    if mode == b"permissive":
        return "permissive"
    if mode == b"strict":
        return "strict"
    raise invalid("The header `x-batch-validation` must be `strict` or `permissive`.")


def read_batch(
    raw: Any, kind: Any, build: Callable[[Any], NewMessage], *, permissive: bool
) -> tuple[list[NewMessage], list[BatchError]]:
    """Return the batch's messages and, when permissive, what was refused. Raises Problem.

    What makes the whole request too large is never a matter of one message.
    """
    if not isinstance(raw, list):
        raise invalid("The request body must be an array.")
    if not 1 <= len(raw) <= MAX_BATCH:
        raise invalid(f"A batch must hold 1 to {MAX_BATCH} messages.")
    messages, errors = [], []
    for index, item in enumerate(raw):
        try:
            messages.append(build(convert(item, kind)))
        except Problem as problem:
            if problem.status == 413:
                raise
            if not permissive:
                message = f"Message {index} of the batch: {problem.message}"
                raise Problem(problem.status, problem.name, message) from None
            errors.append(BatchError(index, problem.message))
    return messages, errors


def batch_reply(messages: Iterable[NewMessage], errors: list[BatchError], *, permissive: bool) -> BatchAccepted:
    """Return the reply of a batch."""
    return BatchAccepted([Accepted(str(m.id)) for m in messages], errors if permissive else None)
