"""A large backlog of one org holds up nobody else's messages."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from nightmail.jobs.send_scheduled import work_lanes
from tests.crash.world import World

pytestmark = pytest.mark.anyio


async def test_ten_messages_do_not_wait_for_the_twenty_thousand_of_another_org(world: World) -> None:
    other = await world.add_org()
    earlier = datetime.now(UTC) - timedelta(minutes=5)
    await world.accept(20_000, env="test", at=earlier)
    few = await world.accept(10, env="test", org_id=other)
    async with world.database() as database:
        ctx = world.context(database, send_batch=20, crash="send-scheduled:test_set_recorded:raise:2")
        with pytest.raises(Exception, match="test_set_recorded"):
            await work_lanes(ctx, ("test",))
    assert {world.state(message)[0] for message in few} == {"sent"}
