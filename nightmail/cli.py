"""The command line.

Exit codes: 0 success, 1 a failed run or found violations, 2 bad usage or settings, 3 another holder has the slot.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import psycopg
import typer
import uvloop
from rich.table import Table

from nightmail import __version__
from nightmail.audit_command import audit_command
from nightmail.clock import now
from nightmail.credit_commands import credits_app, purchase_app
from nightmail.demo import run_demo
from nightmail.engine.runner import RunOutcome
from nightmail.engine.schedule import BadSlot, named_slot, next_slot
from nightmail.errors import (
    DatabaseAway,
    EmbeddedError,
    MigrationError,
    NightmailError,
    NotConfigured,
    SettingsError,
    UnknownPlan,
)
from nightmail.jobs.table import JOBS, jobs_for
from nightmail.log import configure_logging
from nightmail.main import Application, open_application, open_servers
from nightmail.schema.migrate import pending
from nightmail.serve import die_with_parent, listen, serve, serve_workers, url_of
from nightmail.settings import Settings, load
from nightmail.store.api_keys import NewApiKey, insert_api_key
from nightmail.store.doctor import examine
from nightmail.store.orgs import NewOrg, create_org, get_org
from nightmail.terminal import (
    Data,
    Exit,
    Json,
    choose,
    ensure_schema,
    fail,
    out,
    print_json,
    with_application,
)
from nightmail.web.cron import render_outcome, render_tick

app = typer.Typer(
    name="nightmail",
    help="Messages and money, on schedule: a self-hosted back end for email and SMS.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
org_app = typer.Typer(help="Make tenants.", no_args_is_help=True)
key_app = typer.Typer(help="Make API keys.", no_args_is_help=True)
app.add_typer(org_app, name="org")
app.add_typer(key_app, name="key")
app.add_typer(credits_app, name="credits")
app.add_typer(purchase_app, name="purchase")
app.command("audit")(audit_command)


def main() -> None:
    """Run the command line; known errors are one line on standard error and an exit code, never a traceback."""
    try:
        app()
    except (SettingsError, NotConfigured, EmbeddedError, MigrationError) as error:
        fail(str(error), Exit.USAGE)
    except DatabaseAway as error:
        fail(f"PostgreSQL is away: {error}", Exit.FAILED)
    except NightmailError as error:
        fail(str(error), Exit.FAILED)
    except psycopg.OperationalError as error:
        fail(f"PostgreSQL is away: {str(error).strip().splitlines()[0]}", Exit.FAILED)


@app.command("serve")
def serve_command(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8025,
    data: Data = None,
    no_scheduler: Annotated[bool, typer.Option("--no-scheduler", help="Answer calls only; fire no slots.")] = False,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes on the port.")] = 1,
    socket_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
    ready_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Serve the API, the job routes and the dashboard; run the embedded scheduler."""
    settings = load()
    configure_logging(settings)
    with ExitStack() as stack:
        inherited = socket.socket(fileno=socket_fd) if socket_fd is not None else None
        listener = stack.enter_context(inherited or listen(host, port))

        def say_ready() -> None:
            if ready_fd is not None:
                os.write(ready_fd, b".")
            else:
                print(f"Nightmail is ready at {url_of(listener)}", flush=True)

        servers = stack.enter_context(open_servers(settings, data))
        migrate_later: Callable[[], object] | None = partial(ensure_schema, settings, servers)
        if inherited is not None:
            die_with_parent()
        else:
            try:
                ensure_schema(settings, servers)
                migrate_later = None
            except DatabaseAway as error:
                print(f"nightmail: PostgreSQL is away, serving 503 until it is back: {error}", file=sys.stderr)
        if workers > 1:
            arguments = ["serve", *(["--no-scheduler"] if no_scheduler else [])]
            if data is not None:
                arguments += ["--data", str(data)]
            raise SystemExit(serve_workers(arguments, listener, workers, say_ready))
        serve(settings, servers, listener, scheduler=not no_scheduler, on_ready=say_ready, migrate=migrate_later)


@app.command("run")
def run_command(
    job: Annotated[str, typer.Argument(help="One of the thirteen; see `nightmail jobs`.")],
    dry: Annotated[bool, typer.Option("--dry", help="Report what would happen; change nothing.")] = False,
    deadline: Annotated[float | None, typer.Option(help="Seconds until the run must have answered.")] = None,
    slot: Annotated[str | None, typer.Option(help="The slot this run is for, ISO 8601 with zone.")] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Run one job once and print its reply."""
    spec = next((spec for spec in JOBS if spec.name == job), None)
    if spec is None:
        fail(f"no job named {job!r}; the jobs are: {', '.join(spec.name for spec in JOBS)}", Exit.USAGE)
    settings = load()
    spec = next(spec for spec in jobs_for(settings) if spec.name == job)
    check_deadline(deadline, settings)
    try:
        named: datetime | None = named_slot(spec.schedule, slot, now()) if slot else None
    except BadSlot as error:
        fail(str(error), Exit.USAGE)

    async def work(application: Application) -> RunOutcome:
        return await application.engine.run(job, slot=named, trigger="cli", deadline_s=deadline, dry=dry)

    outcome = with_application(data, work)
    _, body = render_outcome(outcome)
    if as_json:
        print_json(body)
    else:
        print_outcome(outcome, body)
    raise SystemExit(int(exit_of(outcome)))


def check_deadline(deadline: float | None, settings: Settings) -> None:
    """End with exit code 2 when the deadline is out of range."""
    if deadline is not None and not 1 <= deadline <= settings.job_deadline_max_s:
        fail(f"--deadline must be between 1 and {settings.job_deadline_max_s:g} seconds", Exit.USAGE)


def exit_of(outcome: RunOutcome) -> Exit:
    """Return the exit code of a run."""
    if outcome.state == "succeeded":
        return Exit.OK
    if outcome.state == "deduplicated":
        return Exit.HELD
    return Exit.USAGE if outcome.state == "not_configured" else Exit.FAILED


def print_outcome(outcome: RunOutcome, body: dict[str, Any]) -> None:
    """Print a run for people."""
    table = Table("result", "count", box=None, pad_edge=False)
    for key, value in body.get("results", {}).items():
        table.add_row(key, f"{value:,}" if isinstance(value, int) else str(value))
    out.print(f"{outcome.job}: {outcome.state.replace('_', ' ')} in {outcome.duration_ms} ms, job {outcome.job_id}")
    for line in [*body.get("missing", []), *([body["error"]] if "error" in body else [])]:
        out.print(f"  {line}")
    if body.get("results"):
        out.print(table)
    if outcome.more:
        out.print("Work was left at the deadline: run it again.")


@app.command("tick")
def tick_command(
    deadline: Annotated[float | None, typer.Option(help="Seconds until the tick must have answered.")] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Run every job whose newest slot has not succeeded."""

    check_deadline(deadline, load())

    async def work(application: Application) -> dict[str, Any]:
        return render_tick(await application.ticker.tick(trigger="cli", deadline_s=deadline))

    body = with_application(data, work)
    if as_json:
        print_json(body)
    else:
        for ran in body["results"]["ran"]:
            out.print(f"{ran['job']:<26} {ran['status']}")
        out.print(f"waiting: {body['results']['waiting']}")
    raise SystemExit(
        int(Exit.FAILED if any(r["status"] in ("failed", "away") for r in body["results"]["ran"]) else Exit.OK)
    )


@app.command("jobs")
def jobs_command(data: Data = None, as_json: Json = False) -> None:
    """List the thirteen jobs, their paths and when they run next; needs no database, so --data changes nothing."""
    jobs = jobs_for(load())
    rows = [
        {
            "job": spec.name,
            "path": spec.path,
            "schedule": spec.schedule,
            "next": next_slot(spec.schedule, now()).isoformat(),
            "built": spec.run is not None,
        }
        for spec in jobs
    ]
    if as_json:
        print_json(rows)
        return
    width = max(len(spec.path) for spec in jobs)
    out.print(f"{'job':<24} {'path':<{width}} {'schedule (UTC)':<14} {'next':<12}", soft_wrap=True)
    for spec in jobs:
        when = f"{next_slot(spec.schedule, now()):%d %b %H:%M}"
        state = "" if spec.run is not None else "not built yet, answers 501"
        out.print(f"{spec.name:<24} {spec.path:<{width}} {spec.schedule:<14} {when:<12} {state}", soft_wrap=True)


@app.command("migrate")
def migrate_command(data: Data = None, as_json: Json = False) -> None:
    """Bring the schema up to date."""
    settings = load()
    with open_servers(settings, data) as servers:
        applied = ensure_schema(settings, servers)
    if as_json:
        print_json({"applied": applied})
    else:
        out.print("\n".join(f"applied {name}" for name in applied) or "The schema is up to date.")


@app.command("doctor")
def doctor_command(data: Data = None, as_json: Json = False) -> None:
    """Say what is configured, what is missing and what looks wrong."""
    settings = load()
    with open_servers(settings, data) as servers:
        waiting = pending(servers.database_url)

        async def body() -> list[dict[str, str]]:
            async with open_application(settings, servers) as application:
                return [asdict(check) for check in await application.database.run(examine)]

        checks = uvloop.run(body())
    checks.insert(
        0, {"name": "nightmail", "state": "ok", "detail": f"{__version__}, Python {platform.python_version()}"}
    )
    checks.append(
        {
            "name": "schema",
            "state": "warn" if waiting else "ok",
            "detail": f"pending: {', '.join(waiting)}; run `nightmail migrate`" if waiting else "up to date",
        }
    )
    checks += settings_checks(settings)
    if as_json:
        print_json({"ok": all(check["state"] != "bad" for check in checks), "checks": checks})
    else:
        marks = {"ok": "[green]✓[/green]", "warn": "[yellow]![/yellow]", "bad": "[red]✗[/red]"}
        for check in checks:
            out.print(f"{marks[check['state']]} {check['name']:<18} {check['detail']}")
    raise SystemExit(int(Exit.FAILED if any(check["state"] == "bad" for check in checks) else Exit.OK))


def settings_checks(settings: Settings) -> list[dict[str, str]]:
    """Return what the settings alone tell."""

    def check(name: str, state: str, detail: str) -> dict[str, str]:
        return {"name": name, "state": state, "detail": detail}

    checks = [check("environment", "ok", settings.nightmail_env)]
    if settings.cron_secret:
        checks.append(check("CRON_SECRET", "ok", f"{len(settings.cron_secret)} set"))
    else:
        checks.append(check("CRON_SECRET", "warn", "not set: job routes are open on loopback, closed elsewhere"))
    if settings.admin_token is None:
        checks.append(check("ADMIN_TOKEN", "warn", "not set: admin API and dashboard are open on loopback only"))
    else:
        checks.append(check("ADMIN_TOKEN", "ok", "set"))
    checks.append(check("email", "ok", settings.email_provider))
    checks.append(check("sms", "ok", settings.sms_provider))
    checks += stripe_checks(settings)
    if not settings.evidence_configured and "capture" not in (settings.email_provider, settings.sms_provider):
        checks.append(
            check(
                "double sends",
                "warn",
                "no evidence channel (SES_CONFIGURATION_SET and SNS_TOPIC_ARNS): a call whose end is unknown is sent"
                " again unless the org's policy is at_most_once",
            )
        )
    return checks


def stripe_checks(settings: Settings) -> list[dict[str, str]]:
    """Return what is set for Stripe, what is missing, and which way of reporting overage fits."""
    names = ("stripe_api_key", "stripe_email_overage_meter_event", "stripe_sms_overage_meter_event")
    missing = settings.missing_for_overage
    fits = {
        "monthly": "monthly: each month is reported on the 1st at 06:00. It fits invoices that stay drafts for longer,"
        " such as with a grace period of a day; Stripe's default is one hour after the month, and then what is"
        " reported is not on that invoice: use OVERAGE_REPORTING=daily",
        "daily": "daily: what a day added is reported at 00:15, on the 1st what closes the month, while an invoice of"
        " the calendar month (UTC) is still a draft. Let the platform call report-overage or tick at 00:15 every day",
    }[settings.overage_reporting]
    if len(missing) == len(names):
        overage = {"name": "overage", "state": "ok", "detail": "not reported: no STRIPE_ variable is set for it"}
    elif missing:
        detail = f"report-overage answers 501, and months stay open: set {', '.join(missing)}"
        overage = {"name": "overage", "state": "bad", "detail": detail}
    else:
        overage = {"name": "overage", "state": "ok", "detail": fits}
    count = len(settings.stripe_webhook_secret)
    detail = f"STRIPE_WEBHOOK_SECRET: {count} set" if count else "no STRIPE_WEBHOOK_SECRET: /inbound/stripe answers 501"
    return [overage, {"name": "Stripe's events", "state": "ok", "detail": detail}]


@app.command("demo")
def demo_command(
    once: Annotated[
        bool, typer.Option("--once", help="Check every expectation and end; exit 1 if one failed.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; the next free one when it is taken.")] = 8025,
    data: Annotated[Path, typer.Option(help="Folder of the demo's embedded server.")] = Path(".nightmail/demo"),
) -> None:
    """Start everything with two sample orgs, send a few hundred messages and show where they went."""
    raise SystemExit(run_demo(data=data, port=port, once=once))


@org_app.command("create")
def org_create(
    name: Annotated[str, typer.Argument(help="What people call the org.")],
    plan: Annotated[str, typer.Option(help="A message plan: free, pro, or one of your own.")] = "free",
    billing: Annotated[
        str | None, typer.Option(help="quota, prepaid or metered; free is quota, others are metered.")
    ] = None,
    stripe_customer: Annotated[str | None, typer.Option(help="Stripe customer id, for overage.")] = None,
    send_policy: Annotated[str, typer.Option(help="at_least_once or at_most_once.")] = "at_least_once",
    billing_user: Annotated[str, typer.Option(help="Whose credits pay for the org's messages.")] = "billing",
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Make an org with a live and a test key; the keys are shown this once."""
    billing = choose(
        "--billing", billing or ("quota" if plan == "free" else "metered"), ("quota", "prepaid", "metered")
    )
    choose("--send-policy", send_policy, ("at_least_once", "at_most_once"))
    if not 1 <= len(name) <= 200 or "\0" in name or not name.isprintable():
        fail("NAME must have 1 to 200 printable characters", Exit.USAGE)
    if not 1 <= len(billing_user) <= 200 or not billing_user.isprintable() or "/" in billing_user:
        fail("--billing-user must have 1 to 200 printable characters, without `/`", Exit.USAGE)
    new = NewOrg(name, plan, billing, stripe_customer, send_policy, billing_user)

    async def work(application: Application) -> dict[str, str]:
        view, live, test = await application.database.run(lambda conn: create_org(conn, new, actor="cli"))
        return {"id": str(view.id), "live_key": live, "test_key": test}

    try:
        made = with_application(data, work)
    except UnknownPlan as error:
        fail(f"--plan: {error}", Exit.USAGE)
    if as_json:
        print_json(made)
    else:
        out.print(f"Org {name} is {made['id']}")
        out.print(f"live key  {made['live_key']}\ntest key  {made['test_key']}")
        out.print("The keys are not shown again.")


@key_app.command("create")
def key_create(
    org: Annotated[str, typer.Argument(help="The org's id.")],
    env: Annotated[str, typer.Option(help="live or test.")] = "live",
    permission: Annotated[str, typer.Option(help="full_access or sending_access.")] = "full_access",
    name: Annotated[str, typer.Option(help="What the key is for.")] = "made on the command line",
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Make an API key for an org; it is shown this once."""
    choose("--env", env, ("live", "test"))
    choose("--permission", permission, ("full_access", "sending_access"))
    try:
        org_id = UUID(org)
    except ValueError:
        fail("ORG must be the org's id, a UUID as `nightmail org create` printed it", Exit.USAGE)

    async def work(application: Application) -> dict[str, str] | None:
        async with application.database.connection() as conn:
            if await get_org(conn, org_id) is None:
                return None
            view, token = await insert_api_key(conn, org_id=org_id, key=NewApiKey(name, env, permission), actor="cli")
            return {"id": str(view.id), "key": token}

    made = with_application(data, work)
    if made is None:
        fail(f"no org has the id {org}", Exit.USAGE)
    if as_json:
        print_json(made)
    else:
        out.print(f"{made['key']}\nThe key is not shown again.")
