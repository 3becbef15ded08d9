"""Lists as Resend's: newest first, `limit`, and `after` or `before` an id."""

from __future__ import annotations

from typing import Annotated, Generic, Literal, TypeVar
from uuid import UUID

import msgspec
from msgspec import Meta

from nightmail.web.problems import invalid

T = TypeVar("T")


class Page(msgspec.Struct, kw_only=True):
    """Which part of a list."""

    limit: Annotated[int, Meta(ge=1, le=100, description="How many, 1 to 100.")] = 20
    after: Annotated[UUID | None, Meta(description="Continue with what is older than this id.")] = None
    before: Annotated[UUID | None, Meta(description="Continue with what is newer than this id.")] = None

    def __post_init__(self) -> None:
        """Refuse two directions at once."""
        if self.after is not None and self.before is not None:
            raise invalid("Use either `after` or `before`, not both.")


class ListOf(msgspec.Struct, Generic[T], kw_only=True):
    """A part of a list; `has_more` says whether it goes on in the direction asked."""

    data: list[T]
    has_more: bool
    object: Literal["list"] = "list"
