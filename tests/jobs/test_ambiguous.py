"""Ambiguous messages are decided by a person."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from nightmail.ids import new_claim_id
from nightmail.store.messages import get_message, release_message
from tests.crash.world import World
from tests.jobs.test_send_scheduled import AFTER_BACKOFF, to

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("action", "state", "used"), [("resend", "sent", 1), ("mark_sent", "sent", 1), ("cancel", "canceled", 0)]
)
async def test_an_ambiguous_message_is_released_by_hand(world: World, action: Any, state: str, used: int) -> None:
    (message,) = await world.accept(to=partial(to, "reset-after-once"), policy="at_most_once")
    where: dict[str, Any] = {"org_id": world.org_id, "env": "live", "channel": "email", "message_id": message}
    async with world.database() as database, database.connection() as conn:
        assert await release_message(conn, **where, action=action) == "not_ambiguous"
        await world.run()
        await world.run(offset=AFTER_BACKOFF)
        assert await release_message(conn, **{**where, "org_id": new_claim_id()}, action=action) == "not_found"
        assert await release_message(conn, **where, action=action) == "released"
        await world.run()
        assert await release_message(conn, **where, action=action) == "not_ambiguous"
        view = await get_message(conn, **where)
    assert view is not None
    assert view.state == state
    account = world.account()
    assert account.calls == (2 if action == "resend" else 1)
    assert (account.usage[0], account.reserved_left, account.queue_left) == (used, 0, 0)
    assert not account.wrong_events
