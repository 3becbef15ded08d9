"""A wrong clock would expire credits and delete rows that nobody can bring back: such jobs refuse to run then."""

from __future__ import annotations

from datetime import timedelta

import pytest

from nightmail.clock import now
from nightmail.engine import runner
from nightmail.jobs.table import JOBS
from tests.credits.office import office

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("apart_s", [-400, 400])
async def test_a_destructive_job_refuses_while_host_and_database_disagree(
    database_url: str, monkeypatch: pytest.MonkeyPatch, apart_s: int
) -> None:
    async with office(database_url, wallets=1, ago="1 day") as desk:
        monkeypatch.setattr(runner, "now", lambda: now() + timedelta(seconds=apart_s))
        refused = await desk.place.engine.run("credits-expire", trigger="test")
        assert refused.state == "failed"
        assert refused.error is not None
        assert "s from this host's" in refused.error
        assert (await desk.run("credits-grant")).counts["successful"] == 1, "what gives can do so by the database alone"
        monkeypatch.setattr(runner, "now", lambda: now() + timedelta(seconds=apart_s / 2))
        assert (await desk.run("credits-expire")).state == "succeeded", "the lease was given back"


async def test_a_destructive_job_refuses_when_the_clock_has_gone_back(database_url: str) -> None:
    async with office(database_url, wallets=1) as desk:
        async with office(database_url, org_id=desk.org_id, clock_offset="2 hours") as ahead:
            await ahead.run("credits-expire")
        refused = await desk.place.engine.run("credits-expire", trigger="test")
        assert refused.error is not None
        assert "gone back: the last run began 7" in refused.error
        async with office(database_url, org_id=desk.org_id, clock_offset="116 minutes") as nearly:
            assert (await nearly.run("credits-expire")).state == "succeeded", "a few minutes are a correction"


def test_all_jobs_that_delete_or_expire_are_guarded() -> None:
    assert {spec.name for spec in JOBS if spec.destroys} == {"cleanup-idempotency", "retention", "credits-expire"}
