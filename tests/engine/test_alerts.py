"""Alerts are opened once, closed once, told on every channel, and never in the way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from hashlib import sha256

import pytest
import structlog
from aiohttp import web

from nightmail.engine.job import JobContext, JobResult
from nightmail.errors import Retryable
from nightmail.store import cron_secrets
from tests.engine.place import SECRET, Place, counting, job, place

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def listener(status: int = 200) -> AsyncIterator[tuple[str, list[tuple[str, object]]]]:
    """A server on loopback that keeps what it is sent."""
    seen: list[tuple[str, object]] = []

    async def handle(request: web.Request) -> web.Response:
        text = await request.text()
        seen.append((request.path_qs, json.loads(text) if text else None))
        return web.Response(status=status)

    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", seen
    finally:
        await runner.cleanup()


def open_alerts(here: Place) -> list[tuple[str, str]]:
    return here.rows("SELECT preset, job FROM alerts WHERE closed_at IS NULL ORDER BY 1, 2")


async def run(here: Place, name: str) -> None:
    await here.engine.run(name, trigger="test")
    await here.settled()


class Switch:
    """A job that fails while it is told to."""

    def __init__(self) -> None:
        self.is_broken = True

    async def __call__(self, ctx: JobContext) -> JobResult:
        if self.is_broken:
            raise ValueError(f"<no> {SECRET}")
        return JobResult({"claimed": 1, "failed": 0})


async def test_a_failed_run_opens_one_alert_and_a_success_closes_it_on_every_channel(database_url: str) -> None:
    switch = Switch()
    async with (
        listener() as (base, seen),
        place(
            database_url,
            [job("grant", switch)],
            alert_webhook_url=f"{base}/hook/secret-token",
            alert_email="ops@example.com",
            alert_email_from="Nightmail <alerts@example.com>",
        ) as here,
    ):
        with structlog.testing.capture_logs() as lines:
            await run(here, "grant")
            await run(here, "grant")
            switch.is_broken = False
            await run(here, "grant")
            await run(here, "grant")
        rows = here.rows("SELECT preset, job, closed_at IS NULL FROM alerts")
    assert rows == [("run_failed", "grant", False)]
    bodies = [body for path, body in seen if path == "/hook/secret-token"]
    assert [body["type"] for body in bodies] == ["alert.opened", "alert.closed"]  # type: ignore[index]
    assert bodies[0]["text"] == "[Nightmail] ALERT: grant failed: ValueError: &lt;no&gt; [hidden]"  # type: ignore[index]
    assert bodies[0]["alert"]["preset"] == "run_failed"  # type: ignore[index]
    assert [email.subject[:21] for email in here.outbox.emails] == ["[Nightmail] ALERT: gr", "[Nightmail] resolved:"]
    assert here.outbox.emails[0].sender == "Nightmail <alerts@example.com>"
    assert list(here.outbox.emails[0].to) == ["ops@example.com"]
    events = [line["event"] for line in lines if str(line["event"]).startswith("alert.")]
    assert events == ["alert.opened", "alert.closed"]
    assert "secret-token" not in str(lines)


async def test_channels_that_fail_or_hang_neither_fail_nor_delay_the_run(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        listener(status=500) as (base, seen),
        place(
            database_url,
            [job("grant", Switch())],
            alert_webhook_url=base,
            alert_email="a@b.c",
            healthchecks_ping_url=base,
        ) as here,
    ):

        async def refuse(*args: object, **kwargs: object) -> None:
            await asyncio.sleep(0.05)
            raise Retryable("away", "no route")

        monkeypatch.setattr(here.outbox, "send_email", refuse)
        outcome = await here.engine.run("grant", trigger="test")
        await here.settled()
        assert outcome.state == "failed"
        assert open_alerts(here) == [("run_failed", "grant")]
        assert len(seen) == 3


async def test_each_run_pings_start_and_end_with_its_id_in_order(database_url: str) -> None:
    switch = Switch()
    async with (
        listener() as (base, seen),
        place(database_url, [job("grant", switch), job("later", None)], healthchecks_ping_url=base + "/p/") as here,
    ):
        failed = await here.engine.run("grant", trigger="test")
        await here.settled()
        switch.is_broken = False
        good = await here.engine.run("grant", trigger="test")
        await here.engine.run("grant", trigger="test", dry=True)
        await here.engine.run("later", trigger="test")
        await here.settled()
    assert [path for path, _ in seen] == [
        f"/p/grant/start?rid={failed.job_id}",
        f"/p/grant/fail?rid={failed.job_id}",
        f"/p/grant/start?rid={good.job_id}",
        f"/p/grant?rid={good.job_id}",
    ]


async def test_a_slow_run_of_a_whole_table_job_and_one_over_its_deadline_are_told(database_url: str) -> None:
    calls: list[str] = []
    jobs = [job("whole", counting(calls, "whole"), holds="table"), job("rows", counting(calls, "rows"))]
    async with place(database_url, jobs) as here:
        await run(here, "whole")
        await run(here, "rows")
        here.execute("UPDATE job_runs SET duration_ms = 5001")
        await evaluate(here)
        assert open_alerts(here) == [("run_slow", "whole")]
        here.execute("UPDATE job_runs SET duration_ms = 25001")
        await evaluate(here)
        assert open_alerts(here) == [("run_slow", "rows"), ("run_slow", "whole")]
        await run(here, "whole")
        assert open_alerts(here) == [("run_slow", "rows")]


async def evaluate(here: Place) -> None:
    assert here.engine.alerts is not None
    here.engine.alerts.evaluate_soon()
    await here.settled()


@pytest.mark.parametrize(
    ("total", "failed", "is_open"), [(100, 1, False), (100, 2, True), (99, 99, False), (100_000, 1001, True)]
)
async def test_over_one_percent_of_a_hundred_items_is_told(
    database_url: str, total: int, failed: int, is_open: bool
) -> None:
    counts = {"claimed": total, "failed": failed}
    async with place(database_url, [job("send", counting([], "send", counts=counts))]) as here:
        await run(here, "send")
        assert open_alerts(here) == ([("items_failing", "send")] if is_open else [])
        here.execute("UPDATE job_runs SET started_at = started_at - interval '2 hours'")
        await evaluate(here)
        assert open_alerts(here) == []


async def test_no_success_is_told_a_day_after_the_slot_that_was_due(database_url: str) -> None:
    calls: list[str] = []
    jobs = [
        job("daily", counting(calls, "daily")),
        job("monthly", counting(calls, "monthly"), schedule="0 6 1 * *"),
        job("later", None),
    ]
    async with place(database_url, jobs) as here:
        for name in ("daily", "monthly", "later"):
            await run(here, name)
        assert open_alerts(here) == []
    async with place(database_url, jobs, clock_offset="47 hours") as here:
        await evaluate(here)
        await run(here, "daily")
        assert open_alerts(here) == []
    async with place(database_url, jobs, clock_offset="120 hours") as here:
        await evaluate(here)
        assert ("no_success", "daily") in open_alerts(here)
        assert ("no_success", "later") not in open_alerts(here)
        await run(here, "daily")
        assert ("no_success", "daily") not in open_alerts(here)
    async with place(database_url, jobs, clock_offset="40 days") as here:
        await evaluate(here)
        assert ("no_success", "monthly") in open_alerts(here)


async def test_an_old_secret_is_told_until_it_is_rotated_out(database_url: str) -> None:
    async with place(database_url, [job("any", counting([], "any"))]) as here:
        await here.database.run(partial(cron_secrets.note_use, sha256=sha256(SECRET.encode()).digest()))
        await run(here, "any")
        assert open_alerts(here) == []
        here.execute("UPDATE cron_secrets SET first_seen = first_seen - interval '91 days'")
        await evaluate(here)
        assert open_alerts(here) == [("old_secret", "")]
    async with place(database_url, [job("any", None)], cron_secret="another-secret-of-ours-9281") as here:
        await evaluate(here)
        assert open_alerts(here) == []


async def test_many_evaluations_at_once_open_and_tell_once(database_url: str) -> None:
    switch = Switch()
    async with place(database_url, [job("grant", switch)], alert_email="a@b.c") as here:
        outcomes = await asyncio.gather(*(here.engine.run("grant", trigger="test") for _ in range(8)))
        await here.settled()
        assert {outcome.state for outcome in outcomes} == {"failed"}
        assert here.rows("SELECT count(*) FROM alerts") == [(1,)]
        assert len(here.outbox.emails) == 1
