"""The first attempt follows the fact: at the end of any job, and at once where a dispatcher watches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from nightmail.engine.crash import CrashPoints
from nightmail.engine.runner import Engine
from nightmail.engine.scheduler import Dispatcher
from nightmail.ids import new_id
from nightmail.jobs.table import JOBS
from nightmail.settings import load
from nightmail.store.accept import NewMessage, accept_messages
from nightmail.webhooks import deliver
from tests.webhooks.desk import Desk

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def engine(desk: Desk, **options: object) -> AsyncIterator[Engine]:
    """An engine over the real jobs, without alerts."""
    settings = load({"nightmail_env": "test", **options})
    one = Engine(JOBS, desk.database, desk.ports, settings, "test", asyncio.Event(), CrashPoints())
    try:
        yield one
    finally:
        await one.close(2.0)


async def accept_test_email(desk: Desk) -> None:
    message = NewMessage(
        id=new_id(),
        channel="email",
        sender="post@sender.test",
        subject="Night mail",
        addresses=["ada@example.org"],
        to=["ada@example.org"],
        cc=[],
        bcc=[],
        reply_to=[],
        html=None,
        text="Past cotton-grass",
        headers=[],
        tags=[],
        attachments=(),
        units=1,
        scheduled_at=None,
    )
    answer = await accept_messages(desk.database, org_id=desk.org_id, env="test", messages=[message], idempotency=None)
    assert answer == "accepted"


async def test_a_job_delivers_what_it_told_before_it_answers(desk: Desk) -> None:
    desk.add_endpoint(env="test")
    await accept_test_email(desk)
    async with engine(desk) as one:
        one.after_run = deliver.deliver_after
        outcome = await one.run("send-scheduled", trigger="test")
    assert (outcome.state, outcome.counts["sent"]) == ("succeeded", 1)
    assert [request.json()["type"] for request in desk.receiver.requests] == ["message.sent"]
    assert desk.states() == {"delivered": 1}


async def test_what_follows_a_job_leaves_failing_endpoints_to_retry_webhooks(desk: Desk) -> None:
    """One that hangs may hold up one answer, not each; what it costs is never the job's failure."""
    endpoint = desk.add_endpoint("/hang", env="test")
    desk.execute("UPDATE webhook_endpoints SET failures = 1 WHERE id = %s", [endpoint])
    await accept_test_email(desk)
    async with engine(desk) as one:
        one.after_run = deliver.deliver_after
        outcome = await one.run("send-scheduled", trigger="test")
        assert outcome.state == "succeeded"
        assert not desk.receiver.requests
        desk.receiver.behave("/hang", "ok")
        outcome = await one.run("retry-webhooks", trigger="test")
    assert (outcome.state, outcome.counts["delivered"]) == ("succeeded", 1)


async def test_the_dispatcher_delivers_without_any_slot(desk: Desk) -> None:
    """Fresh ones and repeats; another one's hanging endpoint does not keep it from looking."""
    desk.add_endpoint("/ok", types=["domain.verified"])
    desk.add_endpoint("/again", types=["domain.failed"], schedule="1s")
    desk.add_endpoint("/hang", types=["domain.created"])
    desk.receiver.behave("/again", "status 500", "ok")
    async with engine(desk, webhook_timeout_s=5) as one:
        dispatcher = Dispatcher(one, "retry-webhooks", deliver.work, one.stopping, probe=deliver.Probe(), deadline_s=60)
        watching = asyncio.create_task(dispatcher.run())
        await desk.tell(topic="domain.created")
        await desk.receiver.wait_for(1)
        await desk.tell()
        await desk.tell(topic="domain.failed")
        await desk.receiver.wait_for(4)
        one.stopping.set()
        await watching
    assert len(desk.receiver.received("/ok")) == 1
    assert len({request.webhook_id for request in desk.receiver.received("/again")}) == 1
    assert len(desk.receiver.received("/again")) == 2
    assert desk.states() == {"delivered": 2, "pending": 1}
    assert desk.ask("SELECT attempts, claim_id FROM webhook_deliveries WHERE state = 'pending'") == [(0, None)]
