"""The field `one_click_unsubscribe`: List-Unsubscribe headers with a link that is the recipient's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from nightmail.rules.unsubscribe import make_token, unsubscribe_headers
from nightmail.store.unsubscribes import read_unsubscribe_secret
from nightmail.web.operation import Call
from nightmail.web.problems import invalid


@dataclass(frozen=True, slots=True)
class UnsubscribeLinks:
    """What unsubscribe links are made from; `public_url` None when this server does not know its own address."""

    public_url: str | None
    secret: bytes


async def load_links(call: Call[Any], items: Any) -> UnsubscribeLinks | None:
    """Return what links are made from, None when none of the emails (as plain values) asks for one."""
    if not isinstance(items, list) or not any(
        isinstance(item, dict) and item.get("one_click_unsubscribe") for item in items
    ):
        return None
    settings = call.services.settings
    url = settings.public_url
    # RFC 8058 wants https; only who tries things out on one machine may do without.
    is_usable = url is not None and (url.startswith("https://") or settings.nightmail_env != "production")
    return UnsubscribeLinks(url if is_usable else None, await call.services.database.run(read_unsubscribe_secret))


def one_click_headers(
    message_id: UUID, headers: Sequence[tuple[str, str]], recipients: int, links: UnsubscribeLinks | None
) -> list[tuple[str, str]]:
    """Return the headers of one-click unsubscribe. Raises Problem."""
    if links is None or links.public_url is None:
        raise invalid("`one_click_unsubscribe` needs the setting PUBLIC_URL, with https in production.")
    if recipients != 1:
        raise invalid("`one_click_unsubscribe` needs exactly one recipient in all: the link is that person's own.")
    if any(name.lower() in ("list-unsubscribe", "list-unsubscribe-post") for name, _ in headers):
        raise invalid("Use either `one_click_unsubscribe` or List-Unsubscribe headers of your own, not both.")
    return unsubscribe_headers(links.public_url, make_token(links.secret, message_id))
