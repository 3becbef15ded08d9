"""`nightmail credits …` and `nightmail purchase …`: the ledger by the operator's hand, through the API's own functions.

With --json each prints what the API answers. A refusal of the ledger is exit code 1, wrong usage 2.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar
from uuid import UUID

import msgspec
import typer

from nightmail.clock import now
from nightmail.main import Application
from nightmail.rules.credits import MAX_AMOUNT, UNNAMED_SERVICE
from nightmail.store import credit_accounts, credit_grants, credit_history, credits, purchases
from nightmail.store.credit_grants import NewGrant
from nightmail.store.credits import Done, Insufficient, Wallet
from nightmail.store.database import Connection
from nightmail.store.orgs import get_org
from nightmail.store.purchases import NewPurchase, PurchaseView
from nightmail.terminal import Data, Exit, Json, choose, fail, out, print_json, with_application
from nightmail.web.api.credit_fields import (
    read_own_reference,
    read_reason,
    read_reference,
    read_time,
    read_user,
    refusal,
)
from nightmail.web.api.credit_items import balance_item, entry_item, explained_item
from nightmail.web.api.purchases import purchase_item
from nightmail.web.problems import Problem

T = TypeVar("T")

credits_app = typer.Typer(help="Give, spend, give back and explain credits.", no_args_is_help=True)
purchase_app = typer.Typer(help="Make and show purchases.", no_args_is_help=True)

User = Annotated[str, typer.Argument(help="The user, by your own id.")]
Amount = Annotated[int, typer.Argument(min=1, max=MAX_AMOUNT, help="Credits.")]
Org = Annotated[str, typer.Option("--org", help="The org's id.")]
Env = Annotated[str, typer.Option(help="live or test.")]
Reference = Annotated[
    str | None,
    typer.Option("--reference", help="Your id for this; the same one again does nothing new. A new one when left out."),
]
Reason = Annotated[str | None, typer.Option(help="Why, for the history.")]
Service = Annotated[str, typer.Option(help="What it is spent on.")]


@credits_app.command("list")
def list_command(
    org: Org,
    env: Env = "live",
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    after: Annotated[str | None, typer.Option(help="Continue after this user.")] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """List an org's users that have a wallet."""
    org_id, env = _org_of(org), choose("--env", env, ("live", "test"))
    last = _checked(lambda text: read_user(text, "after"), after) if after is not None else None

    async def work(conn: Connection) -> Any:
        return await credit_accounts.list_accounts(conn, org_id=org_id, env=env, limit=limit, after=last)

    views, has_more = _run(data, org_id, work)
    if as_json:
        print_json({"data": msgspec.to_builtins(views), "has_more": has_more})
        return
    for view in views:
        out.print(f"{view.balance:>15,}  {view.user_id}", soft_wrap=True, markup=False)
    if has_more:
        out.print("There are more: use --after with the last one.")


@credits_app.command("balance")
def balance_command(user: User, org: Org, env: Env = "live", data: Data = None, as_json: Json = False) -> None:
    """Show what a user can spend, by batch."""
    wallet = _wallet(org, env, user)
    view = _run(data, wallet.org_id, lambda conn: credit_history.get_balance(conn, wallet))
    if view is None:
        fail(f"{user} has no credits there, and never had", Exit.FAILED)
    item = balance_item(view)
    if as_json:
        print_json(msgspec.to_builtins(item))
        return
    out.print(f"{item.user_id} can spend {item.balance:,}; {item.reserved:,} are set aside", markup=False)
    for batch in item.batches:
        ends = f"until {_short(batch.expires_at)}" if batch.expires_at else "without end"
        out.print(f"{batch.remaining:>15,} of {batch.granted:,}  {batch.source:<12} {ends}")
    if item.next_grant:
        out.print(f"{item.next_grant.amount:>15,} more on {_short(item.next_grant.at)}")


@credits_app.command("grant")
def grant_command(
    user: User,
    amount: Amount,
    org: Org,
    env: Env = "live",
    reference: Reference = None,
    days: Annotated[int | None, typer.Option(min=1, max=36_600, help="They end after so many days.")] = None,
    ends: Annotated[datetime | None, typer.Option(help="They end then, in UTC.")] = None,
    priority: Annotated[int, typer.Option(min=0, max=1000, help="Smaller ones are spent first.")] = 100,
    reason: Reason = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Give credits to a user."""
    wallet = _wallet(org, env, user)
    if days is not None and ends is not None:
        fail("use either --days or --ends", Exit.USAGE)
    if ends is not None and ends.replace(tzinfo=UTC) <= now():
        fail("--ends must lie in the future", Exit.USAGE)
    _checked(lambda at: read_time(at, "ends"), ends)
    name, why = _checked(_reference, reference), _checked(read_reason, reason)

    async def work(conn: Connection) -> Any:
        until = ends.replace(tzinfo=UTC) if ends is not None else await credit_accounts.days_from_now(conn, days)
        return await credit_grants.grant(
            conn, wallet, NewGrant(amount, name, priority=priority, expires_at=until, reason=why)
        )

    _tell(_run(data, wallet.org_id, work), as_json, f"{amount:,} credits given to {user}", "Credit account")


@credits_app.command("consume")
def consume_command(
    user: User,
    amount: Amount,
    org: Org,
    env: Env = "live",
    reference: Reference = None,
    service: Service = UNNAMED_SERVICE,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Spend a user's credits; exit code 1 when there are not enough."""
    wallet, name = _wallet(org, env, user), _checked(_reference, reference)
    if not service or not service.isascii() or not service.isprintable() or len(service) > 64 or " " in service:
        fail("--service must have 1 to 64 characters without spaces", Exit.USAGE)

    async def work(conn: Connection) -> Any:
        return await credits.consume(conn, wallet, amount=amount, reference=name, service=service)

    _tell(_run(data, wallet.org_id, work), as_json, f"{amount:,} credits of {user} spent", "Credit account")


@credits_app.command("refund")
def refund_command(
    user: User,
    of: Annotated[str, typer.Option("--of", help="The reference of the spend.")],
    org: Org,
    env: Env = "live",
    amount: Annotated[int | None, typer.Option(min=1, max=MAX_AMOUNT, help="All that is left of it.")] = None,
    reference: Reference = None,
    reason: Reason = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Give back what a spend took."""
    wallet, name, why = _wallet(org, env, user), _checked(_reference, reference), _checked(read_reason, reason)
    spend = _checked(lambda text: read_reference(text, "of"), of)

    async def work(conn: Connection) -> Any:
        return await credit_grants.refund(conn, wallet, reference=name, of=spend, amount=amount, reason=why)

    _tell(_run(data, wallet.org_id, work), as_json, f"Credits of {of} given back to {user}", "Spend")


@credits_app.command("history")
def history_command(
    user: User,
    org: Org,
    env: Env = "live",
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    after: Annotated[int | None, typer.Option(min=1, help="Continue with what is older than this entry.")] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Show what became of a user's credits, newest first."""
    wallet = _wallet(org, env, user)

    async def work(conn: Connection) -> Any:
        return await credit_history.list_history(conn, wallet, limit=limit, after=after)

    views, has_more = _run(data, wallet.org_id, work)
    items = [entry_item(view) for view in views]
    if as_json:
        print_json({"data": msgspec.to_builtins(items), "has_more": has_more})
        return
    for item in items:
        line = f"{item.id:>6}  {_short(item.created_at)}  {item.kind:<9} {item.amount:>+15,} → {item.balance_after:,}"
        out.print(f"{line}  {item.reference_id}", soft_wrap=True, markup=False)
    if has_more:
        out.print("There are more: use --after with the last one.")


@credits_app.command("explain")
def explain_command(
    user: User,
    entry: Annotated[int, typer.Argument(min=1, help="The entry's number, as `history` shows it.")],
    org: Org,
    env: Env = "live",
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Say why an entry is there: the whole transaction, whose lines sum to zero."""
    wallet = _wallet(org, env, user)
    found = _run(data, wallet.org_id, lambda conn: credit_history.explain_entry(conn, wallet, entry))
    if found is None:
        fail(f"{user} has no entry {entry}", Exit.FAILED)
    item = explained_item(wallet, found)
    if as_json:
        print_json(msgspec.to_builtins(item))
        return
    out.print(item.explanation, soft_wrap=True, markup=False)
    for line in item.lines:
        out.print(f"{line.amount:>+15,}  {line.account}", soft_wrap=True, markup=False)


@purchase_app.command("create")
def purchase_create(
    user: User,
    plan: Annotated[str, typer.Argument(help="What is bought: a plan's id.")],
    org: Org,
    env: Env = "live",
    external_ref: Annotated[str | None, typer.Option(help="The payment system's id; one is bought once.")] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Make a purchase and give what is due at once."""
    wallet = _wallet(org, env, user)
    ref = _checked(lambda text: read_reference(text, "external_ref"), external_ref) if external_ref else None
    if ref is not None and len(ref) > 255:
        fail("--external-ref must have at most 255 characters", Exit.USAGE)
    if not plan.isascii():  # what the shell could not decode, the database could not take
        fail(f"there is no plan {plan!r}", Exit.USAGE)

    async def work(conn: Connection) -> Any:
        return await purchases.create_purchase(conn, wallet, NewPurchase(plan, ref), actor="cli")

    made = _run(data, wallet.org_id, work)
    if made == "unknown_plan":
        fail(f"there is no plan {plan!r}", Exit.USAGE)
    if not isinstance(made, PurchaseView):
        fail("this --external-ref is of another user, plan or quantity", Exit.FAILED)
    if as_json:
        print_json(msgspec.to_builtins(purchase_item(made)))
    else:
        out.print(f"{user} has bought {plan}: {made.id}", markup=False)


@purchase_app.command("list")
def purchase_list(
    org: Org,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """List an org's purchases, newest first."""
    org_id = _org_of(org)

    async def work(conn: Connection) -> Any:
        return await purchases.list_purchases(conn, org_id=org_id, limit=limit, after=None, before=None)

    views, has_more = _run(data, org_id, work)
    if as_json:
        items = [msgspec.to_builtins(purchase_item(view)) for view in views]
        print_json({"data": items, "has_more": has_more})
        return
    for view in views:
        following = f"next {_short(view.next_grant_at)}" if view.next_grant_at else ""
        out.print(f"{view.id}  {view.status:<9} {view.plan_id:<12} {view.user_id}  {following}", markup=False)


def _run(data: Any, org_id: UUID, work: Callable[[Connection], Awaitable[T]]) -> T:
    """Run one call of the store in a known org; end with exit code 2 when there is no such org."""

    async def body(application: Application) -> tuple[T] | None:
        async with application.database.connection() as conn:
            if await get_org(conn, org_id) is None:
                return None
        return (await application.database.run(work),)

    found = with_application(data, body)
    if found is None:
        fail(f"no org has the id {org_id}", Exit.USAGE)
    return found[0]


def _tell(result: Any, as_json: bool, text: str, what: str) -> None:
    """Print what was done, or end with exit code 1 and why it was refused."""
    if isinstance(result, Insufficient):
        fail(
            f"{result.required} credits are needed and {result.available} can be spent: {result.missing} missing",
            Exit.FAILED,
        )
    if not isinstance(result, Done):
        fail(refusal(result, what).message, Exit.FAILED)
    if as_json:
        print_json({**result.answer, "replayed": result.is_replay})
    else:
        again = ", before now: nothing was done again" if result.is_replay else ""
        out.print(f"{text}{again} (reference {result.answer['reference_id']})", soft_wrap=True, markup=False)


def _wallet(org: str, env: str, user: str) -> Wallet:
    choose("--env", env, ("live", "test"))
    return Wallet(_org_of(org), env, _checked(lambda text: read_user(text, "user"), user))


def _org_of(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        fail("--org must be the org's id, a UUID as `nightmail org create` printed it", Exit.USAGE)


def _reference(text: str | None) -> str:
    if text is not None and len(text) > 256:
        fail("--reference must have at most 256 characters", Exit.USAGE)
    return read_own_reference(text) if text is not None else f"cli-{secrets.token_hex(8)}"


def _checked(read: Callable[[Any], T], text: Any) -> T:
    """Return what the API's own check makes of an argument, or end with exit code 2 and its words."""
    try:
        return read(text)
    except Problem as problem:
        fail(problem.message, Exit.USAGE)


def _short(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M}"
