"""The operator's pages: jobs, runs, messages, inbox; dashboard_webhooks, _credits and _usage have the others.

They work without JavaScript, and run none that is not ours. Everything shown came from outside and is escaped by the
templates; the HTML of a mail is only ever the srcdoc of an iframe that may do nothing. What changes something is a POST
from a page of ours (admin_session).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

from starlette.responses import Response
from starlette.routing import BaseRoute, Mount
from starlette.staticfiles import StaticFiles

from nightmail.engine.job import JobSpec
from nightmail.engine.runner import Engine, RunOutcome
from nightmail.engine.schedule import next_slot
from nightmail.rules.messages import STATES
from nightmail.rules.webhooks import type_of
from nightmail.settings import LOOPBACK_HOSTS
from nightmail.store import messages, orgs, overview, webhook_overview
from nightmail.store.database import Connection
from nightmail.web import admin_session, charts
from nightmail.web.dashboard_credits import credit_pages
from nightmail.web.dashboard_usage import usage_pages
from nightmail.web.dashboard_webhooks import webhook_pages
from nightmail.web.pages import MAIL_POLICY, Dashboard, Page, address_of, uuid_of
from nightmail.web.services import Services

STATIC = Path(__file__).parent / "static"
OUR_PAGE = re.compile(r"/dashboard(/[A-Za-z0-9/_-]*)?(\?[!-~]*)?")
ORGS_LISTED = 200
SHOWN_STATES = (*STATES, "suppressed")
RUN_STATES = ("running", "succeeded", "failed", "deduplicated", "not_configured", "interrupted")


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job on the overview; `runs` are its newest, oldest first."""

    spec: JobSpec
    next_slot: datetime
    runs: Sequence[overview.RunView]
    spark: charts.Plot

    @property
    def last(self) -> overview.RunView | None:
        """Return the newest run, None when there is none."""
        return self.runs[-1] if self.runs else None

    @property
    def is_built(self) -> bool:
        """Return whether the job does anything in this version."""
        return self.spec.run is not None


def dashboard_routes(services: Services, engine: Engine) -> list[BaseRoute]:
    """Return the pages below /dashboard."""
    dashboard = Dashboard(services, engine)
    at = dashboard.route
    return [
        Mount("/dashboard/static", StaticFiles(directory=STATIC)),
        at("/login", show_login, is_public=True),
        at("/login", log_in, method="POST", is_public=True),
        at("/logout", log_out, method="POST", is_public=True),
        at("", show_overview),
        at("/runs", show_runs),
        at("/runs/{job_id}", show_run),
        at("/jobs/{name}/run", run_job, method="POST"),
        at("/messages", show_messages),
        at("/messages/{message_id}", show_message),
        at("/inbox", show_inbox),
        *webhook_pages(dashboard),
        *credit_pages(dashboard),
        *usage_pages(dashboard),
    ]


async def show_login(page: Page) -> Response:
    """GET /dashboard/login."""
    if admin_session.check_session(page.services, page.headers):
        return page.go("/dashboard")
    return page.show("login.html.j2", next=_safe_next(page.query("next")), error="")


async def log_in(page: Page) -> Response:
    """POST /dashboard/login: the token for a session."""
    admin_session.check_session(page.services, page.headers)  # refuses while there is no token to log in with
    form = await page.form()
    wanted = _safe_next(form.get("next", ""))
    if admin_session.check_token(page.services, form.get("token", "")):
        return page.go(wanted, admin_session.new_cookie(page.services, page.headers, page.request.url.scheme))
    failures = page.dashboard.failures
    if failures.is_over(page.address):
        return page.show("login.html.j2", status=429, next=wanted, error="Too many wrong tokens. Wait a minute.")
    failures.note(page.address)
    return page.show("login.html.j2", status=401, next=wanted, error="This is not the ADMIN_TOKEN.")


async def log_out(page: Page) -> Response:
    """POST /dashboard/logout."""
    return page.go("/dashboard/login", admin_session.end_cookie(page.services, page.headers, page.request.url.scheme))


async def show_overview(page: Page) -> Response:
    """GET /dashboard."""
    values: dict[str, Any] = await page.read(partial(_read_overview, engine=page.engine, moment=page.now))
    return page.show("overview.html.j2", **values)


async def _read_overview(conn: Connection, engine: Engine, moment: datetime) -> dict[str, Any]:
    runs = await overview.newest_runs(conn, list(engine.jobs))
    minute, counts = await overview.sent_by_minute(conn)
    lanes, in_flight = await overview.read_backlog(conn)
    newest = await overview.list_messages(conn, overview.MessageFilter())
    return {
        "jobs": [
            JobRow(spec, next_slot(spec.schedule, moment), runs[name], charts.draw_runs(runs[name]))
            for name, spec in engine.jobs.items()
        ],
        "totals": await overview.count_by_state(conn),
        "minutes": charts.draw_minutes(minute, counts),
        "first_minute": minute,
        "lanes": lanes,
        "in_flight": in_flight,
        "alerts": await overview.open_alerts(conn),
        "newest": newest.lines[:10],
    }


async def show_runs(page: Page) -> Response:
    """GET /dashboard/runs: the calls of all jobs or one."""
    job = page.query("job", tuple(page.engine.jobs))
    state = page.query("state", RUN_STATES)
    before = uuid_of(page.query("before"))
    found, has_more = await page.read(
        lambda conn: overview.list_runs(conn, job=job or None, state=state or None, before=before)
    )
    runs = [_in_order(run, page.engine) for run in found]
    older = address_of("/dashboard/runs", job=job, state=state, before=str(runs[-1].job_id)) if has_more else ""
    return page.show(
        "runs.html.j2", runs=runs, older=older, job=job, state=state, jobs=list(page.engine.jobs), states=RUN_STATES,
        is_first=before is None,
    )  # fmt: skip


async def show_run(page: Page) -> Response:
    """GET /dashboard/runs/{jobId}."""
    job_id = uuid_of(page.request.path_params["job_id"])
    run = await page.read(lambda conn: overview.get_run(conn, job_id)) if job_id else None
    if run is None:
        return page.refuse(404, "There is no run with this id, or it is no longer kept.")
    calls = await page.read(lambda conn: overview.runs_of_slot(conn, job=run.job, slot=run.slot))
    return page.show(
        "run.html.j2",
        run=_in_order(run, page.engine),
        calls=[_in_order(call, page.engine) for call in calls],
        spec=page.engine.jobs.get(run.job),
    )


def _in_order(run: overview.RunView, engine: Engine) -> overview.RunView:
    """Return the run with its results in the job's own order, which jsonb does not keep."""
    keys = engine.jobs[run.job].keys if run.job in engine.jobs else ()
    ordered = {key: run.results[key] for key in keys if key in run.results}
    return replace(run, results=ordered | run.results)


async def run_job(page: Page) -> Response:
    """POST /dashboard/jobs/{name}/run: run it now, or dry; the page waits for the end, at most JOB_DEADLINE_S."""
    spec = page.engine.jobs.get(page.request.path_params["name"])
    if spec is None:
        return page.refuse(404, "There is no job of this name.")
    if spec.run is None:
        return page.refuse(501, f"{spec.name} is not built in this version.")
    is_dry = (await page.form()).get("dry") == "1"
    outcome: RunOutcome = await page.engine.run(spec.name, trigger="dashboard", dry=is_dry)
    if is_dry or outcome.state in ("away", "not_configured"):
        return page.show("outcome.html.j2", spec=spec, outcome=outcome, is_dry=is_dry)
    return page.go(f"/dashboard/runs/{outcome.job_id}")


async def show_messages(page: Page) -> Response:
    """GET /dashboard/messages: all orgs' messages, filtered; an id in the search box opens that message."""
    search = page.query("q")
    message_id = uuid_of(search)
    if message_id is not None:
        return page.go(f"/dashboard/messages/{message_id}")
    org_id = uuid_of(page.query("org"))
    chosen = {
        "env": page.query("env", ("live", "test")),
        "channel": page.query("channel", ("email", "sms")),
        "state": page.query("state", SHOWN_STATES),
    }
    wanted = overview.MessageFilter(
        org_id=org_id,
        env=chosen["env"] or None,
        channel=chosen["channel"] or None,
        state=chosen["state"] or None,
        recipient=search.lower(),
    )
    before = uuid_of(page.query("before"))
    found = await page.read(lambda conn: overview.list_messages(conn, wanted, before=before))
    tenants, _ = await page.read(lambda conn: orgs.list_orgs(conn, limit=ORGS_LISTED))
    kept = {**chosen, "q": search, "org": str(org_id) if org_id else ""}
    older = address_of("/dashboard/messages", **kept, before=str(found.next_before)) if found.next_before else ""
    return page.show(
        "messages.html.j2", found=found, older=older, chosen=kept, orgs=tenants, states=SHOWN_STATES,
        is_first=before is None, scan=overview.SCAN,
    )  # fmt: skip


async def show_message(page: Page) -> Response:
    """GET /dashboard/messages/{id}: where it stands, its timeline, its content."""
    message_id = uuid_of(page.request.path_params["message_id"])
    values = await page.read(partial(_read_message, message_id=message_id)) if message_id else None
    if values is None:
        return page.refuse(404, "There is no message with this id.")
    return page.show("message.html.j2", policy=MAIL_POLICY, **values)


async def _read_message(conn: Connection, message_id: UUID) -> dict[str, Any] | None:
    message = await overview.get_message(conn, message_id)
    if message is None:
        return None
    owner = {"org_id": message.org_id, "message_id": message_id}
    return {
        "message": message,
        "events": await messages.get_events(conn, **owner),
        "outcomes": await overview.recipient_outcomes(conn, message_id),
        "attachments": await messages.list_attachments(conn, env=message.env, **owner),
        "deliveries": await webhook_overview.deliveries_of_message(conn, message_id),
        "type_of": type_of,
    }


async def show_inbox(page: Page) -> Response:
    """GET /dashboard/inbox: what a provider without outside effect took, as its readers would see it."""
    settings = page.services.settings
    smtp = urlsplit(settings.smtp_url.get_secret_value()) if settings.smtp_url is not None else None
    is_local_smtp = settings.email_provider == "smtp" and smtp is not None and smtp.hostname in LOOPBACK_HOSTS
    channels = ["email"] if settings.email_provider == "capture" or is_local_smtp else []
    channels += ["sms"] if settings.sms_provider == "capture" else []
    channel = page.query("channel", channels) or (channels[0] if len(channels) == 1 else "")
    before = uuid_of(page.query("before"))
    found = overview.MessagePage()
    if channels:
        wanted = overview.MessageFilter(channel=channel or None, captured=True)
        found = await page.read(lambda conn: overview.list_messages(conn, wanted, before=before))
    dropped = await page.read(lambda conn: overview.dropped_recipients(conn, [line.id for line in found.lines]))
    older = address_of("/dashboard/inbox", channel=channel, before=str(found.next_before)) if found.next_before else ""
    return page.show(
        "inbox.html.j2", found=found, dropped=dropped, older=older, channel=channel, channels=channels,
        email_taker=f"SMTP at {smtp.hostname}:{smtp.port}" if is_local_smtp and smtp else settings.email_provider,
        sms_taker=settings.sms_provider, is_first=before is None,
    )  # fmt: skip


def _safe_next(text: str) -> str:
    """Return a page of ours to go to after the login, never another site."""
    return text if OUR_PAGE.fullmatch(text) else "/dashboard"
