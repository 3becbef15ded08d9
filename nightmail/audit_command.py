"""The command `nightmail audit`: check every invariant, or tell why something costs what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn
from uuid import UUID

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from nightmail.engine.audit import Auditor, Pass
from nightmail.main import Application
from nightmail.rules.explain import tell_message, tell_org, tell_wallet
from nightmail.store.audit import SAMPLE, Finding, Progress, audit
from nightmail.store.audit.marks import OpenFinding, list_open
from nightmail.store.credits import Wallet
from nightmail.store.explain_message import explain_message
from nightmail.store.explain_org import explain_org, explain_wallet
from nightmail.terminal import Data, Exit, Json, choose, fail, out, print_json, with_application

# An incremental audit by hand takes its time.
INCREMENTAL_S = 3600.0


def audit_command(
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="MESSAGE|ORG|ORG/USER",
            help="Tell the story of a message, of an org (by their ids) or of a user's credits instead of checking.",
        ),
    ] = None,
    env: Annotated[str, typer.Option(help="live or test: whose credits of ORG/USER to explain.")] = "live",
    incremental: Annotated[
        bool, typer.Option("--incremental", help="Do now what every tick does once an hour: what is new since.")
    ] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Check every invariant, reading only; exit code 1 when one is violated. --explain tells why things cost."""
    choose("--env", env, ("live", "test"))
    if explain is not None:
        explain_command(explain, env, data, as_json)
        return
    if incremental:
        audit_new(data, as_json)

    async def work(application: Application) -> list[Finding]:
        with audit_progress() as progress:
            async with application.database.connection() as conn:
                return await audit(conn, progress)

    findings = with_application(data, work)
    is_clean = not any(finding.violations for finding in findings)
    if as_json:
        print_json({"clean": is_clean, "invariants": [asdict(finding) for finding in findings]})
    else:
        print_findings(findings)
    raise SystemExit(int(Exit.OK if is_clean else Exit.FAILED))


def audit_new(data: Path | None, as_json: bool) -> NoReturn:
    """Do the hourly pass now; ends with exit code 1 when a finding is open, 3 when another process is at it."""

    async def work(application: Application) -> tuple[Pass | None, list[OpenFinding]]:
        auditor = Auditor(application.database, application.stopping)
        done = await auditor.audit_if_due(pass_s=INCREMENTAL_S, is_early=True)
        return done, await application.database.run(list_open)

    done, found = with_application(data, work)
    if done is None:
        fail("another process is auditing now", Exit.HELD)
    if as_json:
        body = {"clean": not found, "checked": done.checked, "complete": done.is_done}
        print_json({**body, "findings": [asdict(finding) for finding in found]})
    else:
        out.print(f"{done.checked:,} checked, {len(found):,} findings open")
        for finding in found[:SAMPLE]:
            out.print(escape(f"    {finding.invariant}: {finding.offender}"), soft_wrap=True)
    raise SystemExit(int(Exit.FAILED if found else Exit.OK))


@contextmanager
def audit_progress() -> Iterator[Progress]:
    """Show a bar for each scope while it is audited, on a terminal, beside the output."""
    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    error = Console(stderr=True)
    with RichProgress(*columns, console=error, transient=True, disable=not error.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def show(scope: str, done: int, total: int | None) -> None:
            if scope not in tasks:
                tasks[scope] = bars.add_task(scope, total=total)
            # The total is an estimate: a bar is not to end before its scope does.
            bars.update(tasks[scope], completed=done, total=None if total is None else max(total, done))

        yield show


def print_findings(findings: Sequence[Finding]) -> None:
    """Print how the invariants fared, for people."""
    table = Table("", "invariant", "checked", "violations", "what must be true", box=None, pad_edge=False)
    for finding in findings:
        mark = "[red]✗[/red]" if finding.violations else "[green]✓[/green]"
        counts = (f"{finding.checked:,}", f"{finding.violations:,}")
        table.add_row(mark, finding.name, *counts, finding.sentence)
    out.print(table)
    for finding in findings:
        if finding.violations:
            out.print(f"[red]✗[/red] {finding.name}: {finding.violations:,} violations, the first:")
            for offender in finding.first:
                out.print(f"    {escape(offender)}", soft_wrap=True)


def explain_command(what: str, env: str, data: Path | None, as_json: bool) -> None:
    """Tell the story of a message, an org or a user's credits; ends with exit code 2 when there is none."""
    first, is_user, user = what.partition("/")
    try:
        id = UUID(first)
    except ValueError:
        fail("--explain takes the id of a message or of an org, or ORG/USER with the org's id", Exit.USAGE)
    if is_user and (not 1 <= len(user) <= 200 or not user.isprintable()):
        fail("--explain ORG/USER: USER must have 1 to 200 printable characters", Exit.USAGE)

    async def work(application: Application) -> tuple[Any, list[str]] | None:
        async with application.database.connection() as conn:
            if is_user:
                wallet = await explain_wallet(conn, Wallet(id, env, user))
                return (wallet, tell_wallet(wallet)) if wallet else None
            message = await explain_message(conn, id)
            if message is not None:
                return message, tell_message(message)
            org = await explain_org(conn, id)
            return (org, tell_org(org)) if org else None

    told = with_application(data, work)
    if told is None:
        noun = (
            f"user {user!r} of the org {first} has no wallet in {env}" if is_user else f"no message or org is {first}"
        )
        fail(noun, Exit.USAGE)
    story, sentences = told
    if as_json:
        print(msgspec.json.encode({"sentences": sentences, "story": story}).decode())
    else:
        for sentence in sentences:
            out.print(escape(sentence), soft_wrap=True)
