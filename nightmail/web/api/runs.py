"""/runs: what the jobs did. Bearer ADMIN_TOKEN."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from msgspec import Meta

from nightmail.store import overview
from nightmail.store.database import Connection
from nightmail.store.overview import RunView
from nightmail.web.operation import Call, Operation, Reply
from nightmail.web.paging import ListOf, Page
from nightmail.web.problems import invalid, not_found

RunState = Literal["running", "succeeded", "failed", "deduplicated", "not_configured", "interrupted"]


class RunPage(Page, kw_only=True):
    """Which runs."""

    job: Annotated[str, Meta(min_length=1, max_length=100, pattern=r"^[a-z0-9/_-]+\Z")] | None = None
    state: Annotated[
        RunState | None,
        Meta(description=f"In this state only; looked for among {overview.SCAN:,} runs from where the page begins."),
    ] = None


class RunItem(msgspec.Struct, kw_only=True):
    """A call of a job; `finished_at` and `duration_ms` are null while it runs."""

    id: str
    job: str
    slot: datetime
    trigger: str
    host: str
    state: str
    started_at: datetime
    finished_at: datetime | None
    deadline_s: float
    duration_ms: int | None
    results: dict[str, Any]
    more: bool
    error: str | None
    object: Literal["run"] = "run"


async def list_runs(call: Call[None]) -> Reply:
    """List runs, newest first."""
    page: RunPage = call.query
    async with call.services.database.connection() as conn:
        runs, has_more = await _read(conn, page)
    return Reply(ListOf(data=[_item(run) for run in runs], has_more=has_more))


async def get_run(call: Call[None]) -> Reply:
    """Return a run."""
    async with call.services.database.connection() as conn:
        run = await overview.get_run(conn, call.ids["jobId"])
    if run is None:
        raise not_found("Run")
    return Reply(_item(run))


def _towards_newer(statement: str) -> str:
    """Return the statement that reads the other way, along the same index."""
    return statement.replace("(started_at, job_id) <", "(started_at, job_id) >").replace(" DESC", " ASC")


NEWER_RUNS = _towards_newer(overview.LIST_RUNS)
NEWER_RUNS_OF_JOB = _towards_newer(overview.LIST_RUNS_OF_JOB)


async def _read(conn: Connection, page: RunPage) -> tuple[list[RunView], bool]:
    """Return a page, newest first, and whether there is more in the direction asked. Raises Problem (422)."""
    start: UUID | None = page.after or page.before
    if start is not None and await overview.get_run(conn, start) is None:
        raise invalid("There is no run with the id to continue from.")
    is_back = page.before is not None
    if page.job is None:
        statement = NEWER_RUNS if is_back else overview.LIST_RUNS
    else:
        statement = NEWER_RUNS_OF_JOB if is_back else overview.LIST_RUNS_OF_JOB
    arguments = {
        "job": page.job,
        "state": page.state,
        "before": start or overview.NEWEST,
        "scan": overview.SCAN,
        "limit": page.limit + 1,
    }
    cursor = await conn.execute(statement, arguments)
    runs = [RunView(*row) for row in await cursor.fetchall()]
    shown = runs[: page.limit]
    return (shown[::-1] if is_back else shown), len(runs) > page.limit


def _item(run: RunView) -> RunItem:
    return RunItem(
        id=str(run.job_id),
        job=run.job,
        slot=run.slot.astimezone(UTC),
        trigger=run.trigger,
        host=run.host,
        state=run.state,
        started_at=run.started_at.astimezone(UTC),
        finished_at=run.finished_at and run.finished_at.astimezone(UTC),
        deadline_s=float(run.deadline_s),
        duration_ms=run.duration_ms,
        results=run.results,
        more=run.more,
        error=run.error,
    )


OPERATIONS = (
    Operation(
        method="GET", path="/runs", handler=list_runs, summary="List job runs", access="admin", tag="Runs (admin)",
        query=RunPage, reply=ListOf[RunItem],
    ),
    Operation(
        method="GET", path="/runs/{jobId}", handler=get_run, summary="Get a job run", access="admin",
        tag="Runs (admin)", path_kinds={"jobId": "uuid"}, reply=RunItem, errors=(404,),
    ),
)  # fmt: skip
