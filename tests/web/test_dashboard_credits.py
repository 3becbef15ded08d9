"""The operator's pages about credits and usage: what they show, what their buttons do, what they refuse, their cost."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from html import unescape
from typing import Any
from uuid import uuid4

import psycopg
import pytest
import requests

from nightmail.clock import now
from nightmail.ids import new_id
from nightmail.store import credit_overview, overage_overview, usage_overview
from nightmail.web.dashboard_usage import months_before
from tests.web.serving import ADMIN_TOKEN, Org, Server
from tests.web.test_dashboard import HOSTILE, OURS, dashboard, get, log_in, post, send

WALLETS = "/dashboard/credits"


@pytest.fixture
def site(database_url: str) -> Iterator[Server]:
    """A server with the pages, the operator logged in."""
    with dashboard(database_url) as server:
        assert log_in(server).status_code == 303
        yield server


@pytest.fixture
def org(site: Server) -> Org:
    """A tenant."""
    return site.make_org("Lantern Press")


def give(site: Server, org: Org, amount: int, reference: str, user: str = "ada", **fields: Any) -> str:
    """Give credits through the API and return the batch's id."""
    body = {"amount": amount, "reference_id": reference, **fields}
    answer = site.call("POST", f"/credits/{user}/grant?org={org.id}", ADMIN_TOKEN, body)
    assert answer.ok, answer.text
    return str(answer.json()["batch_id"])


def spend(site: Server, org: Org, amount: int, reference: str, verb: str = "consume", user: str = "ada") -> None:
    """Spend or set aside through the API."""
    body = {"amount": amount, "reference_id": reference}
    answer = site.call("POST", f"/credits/{user}/{verb}", org.live_key, body)
    assert answer.ok, answer.text


def account(site: Server, user: str = "ada") -> str:
    """Return the path of a user's wallet."""
    [(number,)] = site.rows("SELECT id FROM credit_accounts WHERE user_id = %s", user)
    return f"{WALLETS}/{number}"


def words(page: requests.Response) -> str:
    """Return the visible words of a page."""
    assert page.status_code == 200, page.text
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", page.text.partition("<main")[2])))


def read(site: Server, path: str, **query: str) -> str:
    """Return the visible words of the page at this path."""
    return words(get(site, path, params=query))


def use(site: Server, org: Org, period: str, rating: str, used: int, reserved: int = 0, channel: str = "email") -> None:
    """Let units have been used and reserved, spread over two shards of which one has given more back than it took."""
    for shard, sign in ((0, 1), (1, -1)):
        site.rows(
            "INSERT INTO usage_records (org_id, channel, env, period, rating, shard, reserved, used)"
            " VALUES (%s, %s, 'live', %s, %s, %s, %s, %s)",
            org.id, channel, period, rating, shard, reserved + 7 if sign > 0 else -7, used if sign > 0 else 0,
        )  # fmt: skip


def report(site: Server, org: Org, period: str, revision: int, units: int, state: str, **fields: Any) -> str:
    """Write a report of overage down and return its identifier."""
    identifier = fields.pop("identifier", f"nm-{org.id}-{period}-{revision}")
    columns = {
        "org_id": org.id, "channel": "email", "period": period, "revision": revision, "units": units,
        "total": units * revision, "identifier": identifier, "event_name": "emails", "stripe_customer_id": "cus_1",
        "event_at": now(), "state": state, **fields,
    }  # fmt: skip
    names, marks = ", ".join(columns), ", ".join(["%s"] * len(columns))
    site.rows(f"INSERT INTO overage_reports ({names}) VALUES ({marks})", *columns.values())
    return str(identifier)


# ── what they show ──


def test_a_wallet_shows_what_it_holds_and_both_sides_of_every_movement(site: Server, org: Org) -> None:
    soon, later = now() + timedelta(days=3), now() + timedelta(days=300)
    gone = give(site, org, 40, "gone", expires_at=(now() + timedelta(hours=1)).isoformat())
    give(site, org, 60, "gift", expires_at=soon.isoformat(), reason="goodwill for ticket 4711")
    kept = give(site, org, 500, "pack", source="purchase", expires_at=later.isoformat())
    spend(site, org, 110, "render-1")
    spend(site, org, 90, "render-2", "reserve")
    give(site, org, 30, "late", expires_at=(now() + timedelta(hours=1)).isoformat())
    site.rows("UPDATE credit_batches SET expires_at = now() - interval '1 hour' WHERE expires_at < now() + '1 day'")
    page = get(site, account(site))
    text = words(page)
    # 630 granted, 110 spent: 40 + 60 + 10 of the three; 90 reserved of the pack; 30 have ended and are not booked.
    assert "400 can be spent now 90 reserved 520 balance, 30 of it ended" in text
    assert re.search(r"in (299|300) d next expiry, 400 credits", text), text
    assert "purchase: 400 of 500 left, 90 reserved; ends" in text
    assert "bonus: 30 of 30 left; ended" in text
    stack = page.text.partition('class="stack"')[2].partition("</svg>")[0]
    assert re.findall(r'rect class="(ended|[a-z]+(?: waits)?)" x', stack) == ["ended", "purchase", "purchase waits"]
    assert text.count("Claw back …") == 1
    assert f'{account(site)}/batches/{kept}">Claw back' in page.text
    assert f"/batches/{gone}" in page.text, "used up, and of late"
    assert "render-1" in text
    assert "goodwill for ticket 4711" in text
    # The spend took three batches: three movements, each with the same four lines.
    spent = page.text.count("<td><bdi>service:direct</bdi></td>")
    assert spent == 3
    assert re.search(r"wallet: ada this movement −10 …\w{8} service:direct \+110", text), text
    assert re.search(r"grant pack \+500", text), text
    assert "payment:pack −500" in text


def test_a_subscription_shows_its_next_grant_and_why_a_month_waits(site: Server, org: Org) -> None:
    bought = [
        site.call("POST", f"/purchases?org={org.id}", ADMIN_TOKEN, {"user_id": "ada", "plan": plan}).json()["id"]
        for plan in ("monthly", "pack-1000")
    ]
    text = read(site, account(site))
    assert re.search(r"in (27|28|29|30|31) d next grant, 1,000 credits", text), text
    assert re.search(r"1,000 credits for a year paid pack, bought (now|\d+ s ago)", text), text
    assert re.search(r"1,000 credits a month active next 1,000 in \d\d d", text), text
    site.rows("UPDATE purchases SET grant_error = 'the balance does not fit' WHERE id = %s", bought[0])
    site.call("PATCH", f"/purchases/{bought[0]}", ADMIN_TOKEN, {"status": "past_due"})
    text = read(site, account(site))
    assert "past due the next month waits for a payment the balance does not fit" in text
    assert "– no grant ahead" in text
    site.call("PATCH", f"/purchases/{bought[0]}", ADMIN_TOKEN, {"status": "canceled"})
    assert re.search(r"canceled no further months, ends in \d\d d", read(site, account(site)))
    site.rows("UPDATE purchases SET ends_at = now() - interval '1 hour' WHERE id = %s", bought[0])
    assert re.search(r"canceled no further months, ended (60 min|1 h) ago", read(site, account(site)))


def test_wallets_are_found_by_org_env_and_user(site: Server, org: Org) -> None:
    other = site.make_org("Other")
    give(site, org, 5, "a", user="ada")
    give(site, org, 5, "b", user="Adam.Smith")
    give(site, other, 5, "c", user="ada")
    site.call("POST", f"/credits/bob/grant?org={org.id}&env=test", ADMIN_TOKEN, {"amount": 5, "reference_id": "d"})
    ids = {
        (owner, user): number
        for number, owner, user in site.rows("SELECT id, org_id::text, user_id FROM credit_accounts")
    }

    def found(**query: str) -> list[int]:
        return [int(n) for n in re.findall(rf'"{WALLETS}/(\d+)"', get(site, WALLETS, params=query).text)]

    everyone = sorted(ids.values(), reverse=True)
    assert found() == everyone
    assert found(q="ADA") == [n for n in everyone if n != ids[org.id, "bob"]]
    assert found(env="test") == [ids[org.id, "bob"]]
    assert found(org=org.id) == [ids[org.id, "Adam.Smith"], ids[org.id, "ada"], ids[org.id, "bob"]]
    assert found(org=org.id, q="ada") == [ids[org.id, "ada"], ids[org.id, "Adam.Smith"]], "the exact one first"
    assert found(org=org.id, q="ada", env="test") == []
    assert found(q="%") == []
    assert "No wallet matches" in read(site, WALLETS, q="nobody")


def test_pages_of_wallets_and_movements_leave_nothing_out(
    site: Server, org: Org, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credit_overview, "PAGE", 10)
    site.rows(
        "INSERT INTO credit_accounts (org_id, env, user_id) SELECT %s, 'live', 'u' || n FROM generate_series(1, 34) n",
        org.id,
    )
    give(site, org, 100, "g")
    for number in range(30):
        spend(site, org, 1, f"s{number}")

    def walk(path: str, pattern: str) -> list[str]:
        seen: list[str] = []
        while path:
            text = get(site, path).text
            seen += re.findall(pattern, text)
            older = re.search(r'href="([^"]+before=[^"]+)"', text)
            path = unescape(older[1]) if older else ""
        return seen

    ids = [str(n) for (n,) in site.rows("SELECT id FROM credit_accounts ORDER BY id DESC")]
    assert walk(WALLETS, rf'"{WALLETS}/(\d+)"') == ids
    by_user = [str(n) for (n,) in site.rows("SELECT id FROM credit_accounts ORDER BY user_id")]
    assert walk(f"{WALLETS}?org={org.id}", rf'"{WALLETS}/(\d+)"') == by_user
    assert walk(account(site), r'<summary class="row"><span class="num soft">(\d+)<') == [
        str(n) for n in range(31, 0, -1)
    ]
    monkeypatch.setattr(credit_overview, "SCAN", 5)
    assert "Look further" in get(site, f"{WALLETS}?q=u2").text
    assert walk(f"{WALLETS}?q=u2", rf'"{WALLETS}/(\d+)"') == [
        str(n) for (n,) in site.rows("SELECT id FROM credit_accounts WHERE user_id LIKE 'u2%%' ORDER BY id DESC")
    ]


def test_a_month_is_shown_by_who_paid_against_the_quota(site: Server) -> None:
    org = site.make_org("Metered", plan="pro", billing="metered", stripe_customer_id="cus_9")
    this, [*_, before_last, last] = f"{now():%Y-%m}", months_before(now(), 3)
    use(site, org, this, "included", 4_000, reserved=500)
    use(site, org, last, "included", 10_000)
    use(site, org, last, "credits", 300)
    use(site, org, last, "metered", 1_700)
    use(site, org, this, "metered", 60, channel="sms")
    use(site, org, this, "included", 1_000, channel="sms")
    report(site, org, last, 1, 1_200, "reported")
    site.rows(
        "INSERT INTO usage_notices (org_id, channel, period, percent) VALUES (%s, 'sms', %s, 80), (%s, 'sms', %s, 100)",
        org.id, this, org.id, this,
    )  # fmt: skip
    give(site, org, 250, "g", user="billing")
    text = read(site, f"/dashboard/usage/{org.id}")
    assert "pro : 10,000 emails and 1,000 SMS segments a month" in text
    assert "cus_9" in text
    assert "billing 250 credits can be spent" in text
    assert "4,500 of 10,000 included this month" in text
    assert "1,060 of 1,000 included this month" in text
    assert "106 % · the org was told at 80 %, 100 %" in text
    assert f"{last} 10,000 300 1,700 – 12,000 1,200" in text
    assert f"{this} 4,000 – – 500 4,500 –" in text
    assert f"{last}: 1,700 metered, used" in text
    assert f"{before_last} – – – – 0 –" in text
    listed = get(site, "/dashboard/usage", params={"q": "meter"})
    assert "4,500 / 10,000" in words(listed)
    assert 'class="fill over"' in listed.text
    assert "No org matches" in read(site, "/dashboard/usage", q="meter", billing="quota")
    assert get(site, "/dashboard/usage", params={"q": org.id}).headers["location"] == f"/dashboard/usage/{org.id}"


def test_overage_shows_reports_their_answers_and_months_still_open(site: Server) -> None:
    org = site.make_org("Busy", plan="pro", billing="metered", stripe_customer_id="cus_1")
    quiet = site.make_org("Quiet", plan="pro", billing="metered", stripe_customer_id="cus_2")
    free = site.make_org("Nobody", plan="pro", billing="metered")
    first, last = months_before(now(), 2)
    for tenant in (org, free):
        use(site, tenant, last, "metered", 10_900)
    use(site, org, first, "metered", 11_000)
    use(site, quiet, last, "included", 9_000)
    report(site, org, first, 1, 1_000, "reported", answer=json.dumps({"identifier": "mev_77"}), attempts=1)
    report(site, org, last, 1, 500, "reported")
    pending = report(site, org, last, 2, 300, "failed", error="No such customer: 'cus_1'", attempts=4)
    text = read(site, "/dashboard/overage")
    assert f"{last} Busy email 900 500 0 0 400" in text, text
    assert "Quiet" not in text
    assert f"{last} Nobody no customer cannot be billed: set its stripe_customer_id email 900 0 0 0 900" in text
    assert "1,500 reported 2 reports" in text
    assert "No such customer: 'cus_1'" in text
    assert "mev_77" in text
    assert pending in read(site, "/dashboard/overage", state="failed")
    assert "Months to be reported" not in read(site, "/dashboard/overage", state="failed")
    assert "mev_77" not in read(site, "/dashboard/overage", period=last)
    assert "No report matches" in read(site, "/dashboard/overage", org=quiet.id)
    report(site, org, last, 3, 200, "calling")
    report(site, org, last, 4, 50, "too_old")
    # A quota that is counted exactly has the truth in its ratings: here everything was metered.
    site.rows("INSERT INTO usage_quotas VALUES (%s, 'email', %s, 10000)", org.id, last)
    assert f"{last} Busy email 10,900 500 200 50 10,150" in read(site, "/dashboard/overage")


def test_stripes_events_are_listed_with_what_came_of_them(site: Server, org: Org) -> None:
    give(site, org, 1, "g")
    bought = site.call("POST", f"/purchases?org={org.id}", ADMIN_TOKEN, {"user_id": "ada", "plan": "monthly"}).json()
    site.rows(
        "INSERT INTO stripe_events (id, type, created_at, outcome, org_id, purchase_id, error, received_at)"
        " SELECT 'evt_' || n, 'invoice.paid', now(), CASE n WHEN 3 THEN 'failed' ELSE 'applied' END, %s, %s,"
        " CASE n WHEN 3 THEN 'no plan for price_x' END, now() + n * interval '1 ms' FROM generate_series(1, 60) AS n",
        org.id, bought["id"],
    )  # fmt: skip
    page = get(site, "/dashboard/overage/events")
    older = re.search(r'href="([^"]+before=[^"]+)"', page.text)
    assert older is not None
    seen = re.findall(r"<bdi>(evt_\d+)", page.text + get(site, unescape(older[1])).text)
    assert seen == [f"evt_{n}" for n in range(60, 0, -1)]
    assert f'href="{account(site)}"' in page.text
    failed = read(site, "/dashboard/overage/events", outcome="failed")
    assert "failed invoice.paid evt_3 wallet → no plan for price_x Lantern Press" in failed
    assert "evt_4" not in failed
    assert "evt_60" in read(site, "/dashboard/overage")


def test_a_message_says_how_it_was_paid(site: Server, org: Org) -> None:
    give(site, org, 100, "g", user="billing")
    [(number,)] = site.rows("SELECT id FROM credit_accounts")
    mail = send(site, org, to=["a@example.com", "b@example.com", "c@example.com"], scheduled_at="in 1 hour")
    path = f"/dashboard/messages/{mail}"
    assert "included 3 included; reserved until it is sent." in read(site, path)
    site.rows(
        "UPDATE messages SET rating = 'metered', credit_units = 1, metered_units = 1, credits = 10,"
        " credit_account_id = %s, state = 'sent', sent_at = now() WHERE id = %s",
        number, mail,
    )  # fmt: skip
    site.rows("DELETE FROM message_queue")
    page = get(site, path)
    assert "metered 1 included, 1 by 10 credits, 1 metered; settled when it was sent. Wallet of billing →" in words(
        page
    )
    assert f'href="{WALLETS}/{number}"' in page.text
    site.rows("UPDATE messages SET state = 'canceled'")
    assert "1 metered; given back, as nothing was sent." in read(site, path)


# ── what stays hidden, and what is refused ──


def test_nothing_from_outside_acts_in_these_pages(site: Server, org: Org) -> None:
    batch = give(site, org, 10, "g", reason="x")
    spend(site, org, 3, "s")
    site.call("POST", f"/purchases?org={org.id}", ADMIN_TOKEN, {"user_id": "ada", "plan": "monthly"})
    here = account(site)
    site.rows("ALTER TABLE credit_transactions DISABLE TRIGGER append_only")
    site.rows("ALTER TABLE credit_entries DISABLE TRIGGER append_only")
    site.rows("UPDATE credit_transactions SET reference = id::text || %s, reason = %s", HOSTILE, HOSTILE)
    site.rows("UPDATE credit_entries SET account = 'service:' || %s WHERE account <> 'wallet'", HOSTILE)
    site.rows("UPDATE credit_accounts SET user_id = %s", HOSTILE)
    site.rows("UPDATE purchases SET external_ref = %s, grant_error = %s", HOSTILE, HOSTILE)
    site.rows("UPDATE plans SET name = %s", HOSTILE)
    site.rows("UPDATE orgs SET name = %s, billing_user = %s, stripe_customer_id = %s", HOSTILE, HOSTILE, HOSTILE)
    report(site, org, "2026-01", 1, 5, "failed", identifier=HOSTILE, error=HOSTILE, stripe_customer_id=HOSTILE,
           event_name=HOSTILE)  # fmt: skip
    report(site, org, "2026-02", 1, 5, "reported", answer=json.dumps({HOSTILE: HOSTILE}))
    site.rows(
        "INSERT INTO stripe_events (id, type, created_at, outcome, org_id, error)"
        " VALUES (%s, %s, now(), 'failed', %s, %s)",
        HOSTILE, HOSTILE, org.id, HOSTILE,
    )  # fmt: skip
    paths = (WALLETS, f"{WALLETS}?q=script", here, f"{here}/batches/{batch}", "/dashboard/usage",
             f"/dashboard/usage/{org.id}", "/dashboard/overage", "/dashboard/overage/events")  # fmt: skip
    for path in paths:
        page = get(site, path)
        assert page.status_code == 200, path
        assert "{{7*7}}" in page.text, path
        assert re.search(r"<script(?! src=\"/dashboard/static/live\.js\")", page.text) is None, path
        assert "<img src=x" not in page.text, path
        assert re.search(r"<[^>]+\s(style|on\w+)=", page.text.replace("onerror=alert(2)", "")) is None, path
        assert re.search(r"(src|href)=\"(?!/(dashboard|docs))", page.text) is None, path


def test_without_a_session_every_page_leads_to_the_login(site: Server, org: Org) -> None:
    batch = give(site, org, 10, "g")
    here = account(site)
    paths = (WALLETS, here, f"{here}/batches/{batch}", "/dashboard/usage", f"/dashboard/usage/{org.id}",
             "/dashboard/overage", "/dashboard/overage/events")  # fmt: skip
    site.session.cookies.clear()
    for path in paths:
        answer = get(site, path)
        assert (answer.status_code, answer.text) == (303, ""), path
        assert answer.headers["location"].startswith("/dashboard/login?next=%2Fdashboard"), path


def test_unknown_ids_are_not_found_and_what_cannot_be_meant_is_refused(site: Server, org: Org) -> None:
    batch = give(site, org, 10, "g")
    give(site, org, 10, "g", user="bob")
    here, bobs = account(site), account(site, "bob")
    for path in (f"{WALLETS}/0", f"{WALLETS}/none", f"{WALLETS}/-1", f"{WALLETS}/%00", f"{WALLETS}/²",
                 f"{WALLETS}/{'9' * 18}", f"{WALLETS}/{'9' * 40}", f"{here}/batches/none", f"{here}/batches/{uuid4()}",
                 f"{bobs}/batches/{batch}", "/dashboard/usage/none", f"/dashboard/usage/{uuid4()}"):  # fmt: skip
        assert get(site, path).status_code == 404, path
    refused = {
        WALLETS: ("org=x", "env=prod", "before=x", "before=-1", "before=%C2%B2", "before=" + "9" * 30, "org=%27--"),
        here: ("before=x", "before=1;2", "done=<b>", "taken=-1", "taken=1e9"),
        "/dashboard/usage": ("billing=gratis", "before=x", "before=%27"),
        "/dashboard/overage": ("org=1", "state=lost", "period=2026-13", "period=2026", "period=%F0%9F%92%A5"),
        "/dashboard/overage/events": ("outcome=x",),
    }
    for path, queries in refused.items():
        for query in queries:
            assert get(site, f"{path}?{query}").status_code == 422, (path, query)
        for query in ("q=%00", "q=%FF%FE", "q=%27%22%3B--", "q=" + "%25" * 300, "before=", "org=", "x=y"):
            assert get(site, f"{path}?{query}").status_code == 200, (path, query)
    for query in ("before=nothing", "before=%27", "before=%F0%9F%92%A5", "before=" + "x" * 2000):
        assert get(site, f"/dashboard/overage?{query}").status_code == 200, query
        assert get(site, f"/dashboard/overage/events?{query}").status_code == 200, query


# ── what their buttons do ──


def form(page: requests.Response, action: str) -> dict[str, str]:
    """Return the hidden fields of the form that a page sends to this address."""
    found = re.search(rf'action="{re.escape(action)}">(.*?)</form>', page.text, re.DOTALL)
    assert found is not None, page.text
    return dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', found[1]))


def test_giving_credits_is_a_batch_an_entry_and_an_audit_log_once(site: Server, org: Org) -> None:
    give(site, org, 10, "g")
    here = account(site)
    filled = form(get(site, here), f"{here}/grant") | {"amount": "70", "reason": "goodwill", "expires": "2150-01-31"}
    landed = post(site, f"{here}/grant", headers=OURS, data=filled).headers["location"]
    assert "The credits were given" in read(site, landed)
    again = post(site, f"{here}/grant", headers=OURS, data=filled).headers["location"]
    assert "nothing was done a second time" in read(site, again)
    batches = "SELECT granted, source, expires_at FROM credit_batches WHERE granted = 70"
    assert site.rows(batches) == [(70, "bonus", datetime(2150, 1, 31, tzinfo=UTC))]
    assert site.rows("SELECT balance FROM credit_accounts") == [(80,)]
    log = "SELECT actor, org_id::text, detail FROM audit_logs WHERE action = 'credits.granted'"
    [(actor, owner, detail)] = site.rows(log)
    assert (actor, owner, detail["amount"], detail["reason"]) == ("admin", org.id, 70, "goodwill")
    other = post(site, f"{here}/grant", headers=OURS, data=filled | {"amount": "71"})
    assert other.status_code == 409
    right = filled | {"reference": f"dashboard:{new_id()}"}
    for field, value in (("amount", "0"), ("amount", "-5"), ("amount", "1e3"), ("amount", "²"), ("amount", ""),
                         ("amount", "1" * 40), ("reason", ""), ("reason", "\x00"), ("reason", "x" * 501),
                         ("expires", "2020-01-01"), ("expires", "soon"), ("expires", "9999-12-31"),
                         ("reference", "g"), ("reference", "")):  # fmt: skip
        assert post(site, f"{here}/grant", headers=OURS, data=right | {field: value}).status_code == 422, (field, value)
    assert post(site, f"{WALLETS}/999/grant", headers=OURS, data=right).status_code == 404
    assert site.rows("SELECT balance FROM credit_accounts") == [(80,)]
    assert len(site.rows(log)) == 1


def test_clawing_back_takes_what_is_left_once_it_is_confirmed(site: Server, org: Org) -> None:
    batch = give(site, org, 100, "mistake")
    give(site, org, 10, "right", user="bob")
    spend(site, org, 30, "s")
    spend(site, org, 20, "r", "reserve")
    here, page = account(site), f"{account(site)}/batches/{batch}"
    question = get(site, page)
    assert "Takes back the 50 credits that are left" in words(question)
    assert "What is reserved (20) keeps its right" in words(question)
    filled = form(question, f"{page}/clawback") | {"reason": "given twice"}
    assert post(site, f"{page}/clawback", headers=OURS, data=filled).status_code == 422
    foreign = f"{account(site, 'bob')}/batches/{batch}/clawback"
    assert post(site, foreign, headers=OURS, data=filled | {"confirm": "yes"}).status_code == 404
    assert site.rows("SELECT remaining FROM credit_batches WHERE id = %s", batch) == [(50,)]
    filled["confirm"] = "yes"
    landed = post(site, f"{page}/clawback", headers=OURS, data=filled).headers["location"]
    assert "50 credits were taken back." in read(site, landed)
    assert post(site, f"{page}/clawback", headers=OURS, data=filled).headers["location"] == f"{here}?done=repeated"
    amounts = "SELECT remaining, reserved, consumed, expires_at <= now() FROM credit_batches WHERE id = %s"
    assert site.rows(amounts, batch) == [(0, 20, 80, True)]
    log = "SELECT target, detail FROM audit_logs WHERE action = 'credits.clawed_back'"
    [(target, detail)] = site.rows(log)
    assert (target, detail["amount"], detail["reason"]) == (batch, 50, "given twice")
    assert "Nothing is left of it." in read(site, page)
    assert "clawback" in read(site, here)


def test_the_buttons_work_only_from_a_page_of_ours_with_a_session(site: Server, org: Org) -> None:
    batch = give(site, org, 100, "g")
    here = account(site)
    data = {"reference": f"dashboard:{new_id()}", "amount": "5", "reason": "r", "confirm": "yes"}
    paths = (f"{here}/grant", f"{here}/batches/{batch}/clawback")
    foreign: tuple[dict[str, str], ...] = ({}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.test"})
    for path in paths:
        for headers in foreign:
            assert post(site, path, headers=headers, data=data).status_code == 403, path
    site.session.cookies.clear()
    for path in paths:
        assert post(site, path, headers=OURS, data=data).headers["location"] == "/dashboard/login", path
    assert site.rows("SELECT balance, seq FROM credit_accounts") == [(100, 1)]


# ── what they cost ──


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", ()):
        yield from _nodes(inner)


def test_no_page_reads_a_whole_table(database_url: str) -> None:
    tenant = new_id()
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("INSERT INTO orgs (id, name, billing, plan) VALUES (%s, 'x', 'metered', 'pro')", [tenant])
        conn.execute(
            "INSERT INTO credit_accounts (org_id, env, user_id, balance, seq)"
            " SELECT %s, 'live', 'u' || n, 3, 4 FROM generate_series(1, 5000) AS n",
            [tenant],
        )
        conn.execute(
            "INSERT INTO credit_batches (id, account_id, granted, remaining, consumed, source, issued_at)"
            " SELECT nm_uuid7(), a.id, 4, mod(n, 2) * 3, 4 - mod(n, 2) * 3, 'bonus', now()"
            " FROM credit_accounts AS a CROSS JOIN generate_series(1, 4) AS n"
        )
        conn.execute(
            "INSERT INTO credit_transactions (id, account_id, kind, amount)"
            " SELECT id, account_id, 'grant', 4 FROM credit_batches"
        )
        conn.execute(
            "INSERT INTO credit_entries"
            " (transaction_id, line, account_id, account, seq, balance_after, batch_id, amount)"
            " SELECT b.id, l.n, b.account_id, CASE l.n WHEN 1 THEN 'wallet' ELSE 'system:grant' END,"
            " CASE l.n WHEN 1 THEN row_number() OVER (PARTITION BY b.account_id, l.n ORDER BY b.id) END,"
            " CASE l.n WHEN 1 THEN 3 END, CASE l.n WHEN 1 THEN b.id END, CASE l.n WHEN 1 THEN 4 ELSE -4 END"
            " FROM credit_batches AS b CROSS JOIN generate_series(1, 2) AS l (n)"
        )
        conn.execute(
            "INSERT INTO usage_records (org_id, channel, env, period, rating, shard, used)"
            " SELECT nm_uuid7(), 'email', 'live', '2026-01', 'metered', 0, 1 FROM generate_series(1, 5000)"
        )
        conn.execute(
            "INSERT INTO overage_reports (org_id, channel, period, revision, units, total, identifier, event_name,"
            " stripe_customer_id, event_at) SELECT nm_uuid7(), 'email', '2026-01', 1, 1, 1, 'i' || n, 'e', 'c', now()"
            " FROM generate_series(1, 5000) AS n"
        )
        conn.execute(
            "INSERT INTO stripe_events (id, type, created_at, outcome, received_at)"
            " SELECT 'evt' || n, 't', now(), 'applied', now() - n * interval '1 s' FROM generate_series(1, 5000) AS n"
        )
        conn.execute("VACUUM ANALYZE")
        row = conn.execute("SELECT max(account_id), (array_agg(id))[1] FROM credit_batches").fetchone()
    assert row is not None
    arguments = {
        "org_id": tenant, "env": None, "user": "u", "before": 4000, "is_first": False, "scan": 200, "limit": 50,
        "account_id": row[0], "batch_id": row[1], "recent": 200, "newest": 4, "points": 4, "org_ids": [tenant],
        "transaction_ids": [row[1]], "channels": ["email"], "periods": ["2026-01"], "period": None, "state": None,
        "outcome": None,
    }  # fmt: skip
    queries = {
        credit_overview.LIST_WALLETS: {}, credit_overview.LIST_WALLETS_OF_ORG: {}, credit_overview.GET_WALLET: {},
        credit_overview.BATCHES: {}, credit_overview.BALANCES: {}, credit_overview.LINES: {},
        usage_overview.MONTHS_OF_ORGS: {}, overage_overview.LIST_REPORTS: {"before": "i400"},
        overage_overview.LIST_REPORTS_OF_ORG: {"before": "i400"}, overage_overview.STRIPE_EVENTS: {"before": "evt400"},
        overage_overview.REPORT_TOTALS: {},
    }  # fmt: skip
    for query, more in queries.items():
        with psycopg.connect(database_url, autocommit=True) as conn:
            plan = conn.execute(f"EXPLAIN (FORMAT JSON, ANALYZE) {query}", {**arguments, **more}).fetchone()
        assert plan is not None
        scans = [node for node in _nodes(plan[0][0]["Plan"]) if "Relation Name" in node]
        read_rows = sum(
            (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"] for node in scans
        )
        assert read_rows <= 1000, (query, [(n["Relation Name"], n["Node Type"], n["Actual Rows"]) for n in scans])
