"""The operator's pages about credits: wallets of all orgs, one wallet with its ledger; give credits, take them back.

The buttons do what the API's operations do, through the same functions of the store, as `admin` in the audit log. Each
form carries a reference of its own, so that one sent twice acts once.
"""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, time
from functools import partial
from typing import Any
from uuid import UUID

from starlette.responses import Response
from starlette.routing import BaseRoute

from nightmail.ids import new_id
from nightmail.rules.credits import MAX_AMOUNT
from nightmail.store import credit_grants, credit_history, credit_overview, orgs
from nightmail.store.audit_logs import insert_audit_log
from nightmail.store.credit_grants import NewGrant
from nightmail.store.credit_overview import BatchRow, WalletRow
from nightmail.store.credits import Done
from nightmail.store.database import Connection
from nightmail.store.overview import SCAN
from nightmail.web import money_charts
from nightmail.web.api.credit_fields import YEARS, read_reason, refusal
from nightmail.web.pages import Dashboard, Page, address_of, uuid_of
from nightmail.web.problems import Problem, invalid, not_found

ACTOR = "admin"
ORGS_LISTED = 200
LEDGER_PAGE = 25
NUMBER = re.compile(r"[0-9]{1,18}")
FORM_REFERENCE = re.compile(r"dashboard:[0-9a-f-]{36}")
NOTICES = {
    "granted": "The credits were given: they are a batch of their own below.",
    "repeated": "This form was sent before: nothing was done a second time.",
}


def credit_pages(dashboard: Dashboard) -> list[BaseRoute]:
    """Return the pages below /dashboard/credits."""
    at = dashboard.route
    return [
        at("/credits", show_wallets),
        at("/credits/{account}", show_wallet),
        at("/credits/{account}/grant", grant, method="POST"),
        at("/credits/{account}/batches/{batch}", show_batch),
        at("/credits/{account}/batches/{batch}/clawback", claw_back, method="POST"),
    ]


# ── what is shown ──


async def show_wallets(page: Page) -> Response:
    """GET /dashboard/credits: all orgs' wallets, filtered."""
    org_id = org_filter(page)
    env = one_of(page, "env", ("live", "test"))
    search = page.query("q")
    before = number_of(page, "before")
    wanted = credit_overview.WalletFilter(org_id, env or None, search)
    found = await page.read(lambda conn: credit_overview.list_wallets(conn, wanted, before=before))
    tenants, _ = await page.read(lambda conn: orgs.list_orgs(conn, limit=ORGS_LISTED))
    kept = {"q": search, "org": str(org_id) if org_id else "", "env": env}
    older = address_of("/dashboard/credits", **kept, before=str(found.next_before)) if found.next_before else ""
    return page.show(
        "wallets.html.j2", found=found, older=older, chosen=kept, orgs=tenants, is_first=before is None, scan=SCAN,
        newest=address_of("/dashboard/credits", **kept) if any(kept.values()) else "/dashboard/credits",
    )  # fmt: skip


async def show_wallet(page: Page) -> Response:
    """GET /dashboard/credits/{account}: what it holds, what became of the rest, and every movement."""
    before = number_of(page, "before")
    done = one_of(page, "done", ("clawed_back", *NOTICES))
    taken = number_of(page, "taken")
    values = await page.read(partial(_read_wallet, account_id=_account_of(page), before=before))
    if values is None:
        return page.refuse(404, "There is no wallet with this number.")
    row: WalletRow = values["row"]
    here = f"/dashboard/credits/{row.id}"
    entries = values["entries"]
    return page.show(
        "wallet.html.j2", **values, here=here, is_first=before is None,
        stack=money_charts.draw_batches(values["batches"]),
        plot=money_charts.draw_balance(values["balances"], page.now),
        older=f"{here}?before={entries[-1].seq}" if values["has_more"] else "",
        notice=_notice(done, taken), reference=f"dashboard:{new_id()}", most=MAX_AMOUNT,
        batches_max=credit_overview.MAX_BATCHES, recent=credit_overview.RECENT_ENTRIES,
    )  # fmt: skip


async def _read_wallet(conn: Connection, account_id: int, before: int | None) -> dict[str, Any] | None:
    row = await credit_overview.get_wallet(conn, account_id)
    if row is None:
        return None
    entries, has_more = await credit_history.list_history(conn, row.wallet, limit=LEDGER_PAGE, after=before)
    return {
        "row": row,
        "batches": await credit_overview.list_batches(conn, account_id),
        "balances": await credit_overview.read_balances(conn, account_id, row.entries),
        "entries": entries,
        "has_more": has_more,
        "lines": await credit_overview.list_lines(conn, [entry.transaction_id for entry in entries]),
        "purchases": await credit_overview.list_purchases(conn, account_id),
    }


def _notice(done: str, taken: int | None) -> str:
    if done == "clawed_back":
        return f"{taken or 0:,} credits were taken back. The batch has ended; what was reserved of it keeps its right."
    return NOTICES.get(done, "")


async def show_batch(page: Page) -> Response:
    """GET /dashboard/credits/{account}/batches/{batch}: a batch, and the question whether to take it back."""
    row, batch = await page.read(partial(_read_batch, account_id=_account_of(page), batch_id=_batch_of(page)))
    if row is None or batch is None:
        return page.refuse(404, "There is no such batch in this wallet.")
    return page.show("batch.html.j2", row=row, batch=batch, reference=f"dashboard:{new_id()}")


async def _read_batch(conn: Connection, account_id: int, batch_id: UUID) -> tuple[WalletRow | None, BatchRow | None]:
    row = await credit_overview.get_wallet(conn, account_id)
    return row, await credit_overview.get_batch(conn, account_id, batch_id) if row is not None else None


# ── what is changed ──


async def grant(page: Page) -> Response:
    """POST /dashboard/credits/{account}/grant: give credits as a batch of their own."""
    account_id = _account_of(page)
    form = await page.form()
    reference = _reference_of(form)
    reason = _reason_of(form)
    new = NewGrant(_amount_of(form), reference, expires_at=_end_of(form, page.now), reason=reason)

    async def step(conn: Connection) -> Any:
        async with conn.transaction():
            row = await credit_overview.get_wallet(conn, account_id)
            if row is None:
                return "not_found"
            result = await credit_grants.grant(conn, row.wallet, new)
            if isinstance(result, Done) and not result.is_replay:
                await _note(conn, row, "credits.granted", result, reason)
            return result

    result = await page.read(step)
    if not isinstance(result, Done):
        raise refusal(result, "Wallet")
    return page.go(f"/dashboard/credits/{account_id}?done={'repeated' if result.is_replay else 'granted'}")


async def claw_back(page: Page) -> Response:
    """POST /dashboard/credits/{account}/batches/{batch}/clawback: take back what is left of it."""
    account_id, batch_id = _account_of(page), _batch_of(page)
    form = await page.form()
    reference = _reference_of(form)
    reason = _reason_of(form)
    if form.get("confirm") != "yes":
        raise invalid("Tick the box to say that you mean it: credits that were taken back cannot be restored.")

    async def step(conn: Connection) -> Any:
        async with conn.transaction():
            row = await credit_overview.get_wallet(conn, account_id)
            if row is None:
                return "not_found"
            result = await credit_grants.claw_back(
                conn, row.wallet, reference=reference, batch_id=batch_id, reason=reason
            )
            if isinstance(result, Done) and not result.is_replay:
                await _note(conn, row, "credits.clawed_back", result, reason)
            return result

    result = await page.read(step)
    if not isinstance(result, Done):
        raise refusal(result, "Batch")
    if result.is_replay:
        return page.go(f"/dashboard/credits/{account_id}?done=repeated")
    return page.go(f"/dashboard/credits/{account_id}?done=clawed_back&taken={result.answer['amount']}")


async def _note(conn: Connection, row: WalletRow, action: str, done: Done, reason: str) -> None:
    detail = {
        "user_id": row.user_id,
        "env": row.env,
        "amount": done.answer["amount"],
        "reference_id": done.answer["reference_id"],
        "reason": reason,
    }
    await insert_audit_log(
        conn, actor=ACTOR, action=action, org_id=row.org_id, target=str(done.answer["batch_id"]), detail=detail
    )


# ── what is asked: anything that cannot be meant is refused, as ignoring it would show or change something else ──


def org_filter(page: Page) -> UUID | None:
    """Return the org that the query names, None when it names none. Raises Problem (422)."""
    text = page.query("org")
    found = uuid_of(text)
    if text and found is None:
        raise invalid("The `org` of this address is not an id.")
    return found


def one_of(page: Page, name: str, among: tuple[str, ...]) -> str:
    """Return a word of the query, '' when it is absent. Raises Problem (422)."""
    text = page.query(name)
    if text and text not in among:
        raise invalid(f"The `{name}` of this address can be: {', '.join(among)}.")
    return text


def number_of(page: Page, name: str) -> int | None:
    """Return a number of the query, None when it is absent. Raises Problem (422)."""
    text = page.query(name)
    if text and not NUMBER.fullmatch(text):
        raise invalid(f"The `{name}` of this address must be a number.")
    return int(text) if text else None


def _account_of(page: Page) -> int:
    text = page.request.path_params["account"]
    if not NUMBER.fullmatch(text):
        raise Problem(404, "not_found", "There is no wallet with this number.")
    return int(text)


def _batch_of(page: Page) -> UUID:
    batch_id = uuid_of(page.request.path_params["batch"])
    if batch_id is None:
        raise not_found("Batch")
    return batch_id


def _reference_of(form: dict[str, str]) -> str:
    reference = form.get("reference", "")
    if not FORM_REFERENCE.fullmatch(reference):
        raise invalid("This form is incomplete: go back, load the page again and fill it in there.")
    return reference


def _reason_of(form: dict[str, str]) -> str:
    text = form.get("reason", "")
    if len(text) > 500:
        raise invalid("Invalid `reason` field: at most 500 characters.")
    return read_reason(text) or ""


def _amount_of(form: dict[str, str]) -> int:
    text = form.get("amount", "").strip()
    if not NUMBER.fullmatch(text) or not 1 <= int(text) <= MAX_AMOUNT:
        raise invalid(f"Invalid `amount` field: a whole number from 1 to {MAX_AMOUNT:,}.")
    return int(text)


def _end_of(form: dict[str, str], now: datetime) -> datetime | None:
    """Return midnight UTC, with which the chosen day begins; None when none is chosen."""
    text = form.get("expires", "").strip()
    if not text:
        return None
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise invalid("Invalid `expires` field: a day such as 2030-12-31.") from None
    if day.year not in YEARS:
        raise invalid(f"Invalid `expires` field: must lie between the years {YEARS[0]} and {YEARS[-1]}.")
    ends = datetime.combine(day, time(), UTC)
    if ends <= now:
        raise invalid("Invalid `expires` field: must lie in the future.")
    return ends
