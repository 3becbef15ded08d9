"""The stories: a message from accept to invoice line, a wallet replayed, an org's months; and who may read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from nightmail.ids import new_id
from nightmail.rules.explain import tell_message, tell_org, tell_wallet
from nightmail.store.credits import Wallet
from nightmail.store.database import Connection
from nightmail.store.explain_message import explain_message
from nightmail.store.explain_org import explain_org, explain_wallet
from tests.audit.books import Books, make_books
from tests.test_cli import in_process
from tests.web.serving import ADMIN_TOKEN, Server, serving

pytestmark = pytest.mark.anyio


async def test_a_message_paid_with_credits_is_told_from_accept_to_its_entries(books: Books, conn: Connection) -> None:
    story = await explain_message(conn, books.ids["paid"])
    assert story is not None
    (reservation,) = story.reservations
    # What a refund gave back is as early in the order as what it was taken from.
    (back,) = books.ask("SELECT id FROM credit_transactions WHERE kind = 'refund' AND reference = 'back'")
    assert (story.units, story.included_units, story.credit_units, story.credits) == (3, 0, 3, 6)
    assert [(part.batch_id, part.amount, part.source) for part in reservation.batches] == [(back[0], 6, "refund")]
    assert (reservation.settled, reservation.captured, reservation.released) == ("capture", 6, 0)
    (entry,) = reservation.entries
    assert books.ask("SELECT amount, balance_after FROM credit_entries WHERE account_id = %s AND seq = %s",
                     books.account_id, entry.seq) == [(-6, entry.balance_after)]  # fmt: skip
    said = "\n".join(tell_message(story))
    for part in (
        "This email of org",
        "It counts as 3 recipients",
        "3 paid with 6 credits",
        f"6 from batch {back[0]} (refund, priority 10, ends ",
        "6 spent",
        f"balance after it {entry.balance_after:,}",
        f"The provider calls it ses-{story.id}",
        "3 recipients of it are counted",
    ):
        assert part in said, (part, said)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("waiting", ["All of it fitted into the included quota", "It is scheduled: its units are reserved, not used."]),
        ("waiting_paid", ["4 credits of billing were reserved", "They are still reserved."]),
        ("refused", ["(release): 6 given back", "It was not sent, it is failed (MessageRejected)"]),
        ("test_sent", ["Test messages are always included", "3 recipients of it are counted"]),
        (
            "metered",
            [
                "10,000 included in the quota, 2,000 metered for the invoice",
                "revision 1: 1,500 units, 1,500 in all, reported",
                "revision 2: 500 units, 2,000 in all, reported",
                "with the identifier overage-2",
            ],
        ),
    ],
)
async def test_every_fate_has_its_story(books: Books, conn: Connection, name: str, parts: list[str]) -> None:
    story = await explain_message(conn, books.ids[name])
    assert story is not None
    said = "\n".join(tell_message(story))
    for part in parts:
        assert part in said, (part, said)


async def test_a_message_is_told_to_its_own_org_and_env(books: Books, conn: Connection) -> None:
    sent = books.ids["sent"]
    assert await explain_message(conn, sent, org_id=books.org_id, env="live") is not None
    assert await explain_message(conn, sent, org_id=books.org_id, env="test") is None
    assert await explain_message(conn, sent, org_id=books.metered_id) is None
    assert await explain_message(conn, new_id()) is None


async def test_a_wallet_is_replayed_entry_by_entry(books: Books, conn: Connection) -> None:
    story = await explain_wallet(conn, books.wallet)
    assert story is not None
    assert [line.replayed for line in story.entries] == [line.balance_after for line in story.entries]
    assert story.entries_in_all == len(story.entries) == story.entries[0].seq
    assert story.balance == story.spendable + story.reserved
    said = "\n".join(tell_wallet(story))
    assert "every balance adds up" in said
    assert "capture (captured), -6" in said
    ada = await explain_wallet(conn, Wallet(books.org_id, "live", "ada"))
    assert ada is not None
    assert ada.next_grant is not None
    assert ada.next_grant.at > datetime.now(UTC)
    assert "The plan yearly gives 1,000 credits at" in "\n".join(tell_wallet(ada))
    async with conn.transaction(force_rollback=True):
        await conn.execute("SET LOCAL session_replication_role = replica")
        await conn.execute("UPDATE credit_entries SET amount = amount + 1 WHERE seq = 3 AND amount < 0")
        spoilt = await explain_wallet(conn, books.wallet)
    assert spoilt is not None
    assert "entry 3 is the first shown that does not add up" in "\n".join(tell_wallet(spoilt))
    assert await explain_wallet(conn, Wallet(books.org_id, "test", "billing")) is None


async def test_an_org_is_told_its_months_its_overage_and_its_wallet(books: Books, conn: Connection) -> None:
    org, metered = await explain_org(conn, books.org_id), await explain_org(conn, books.metered_id)
    assert org is not None
    assert metered is not None
    assert org.wallet is not None
    assert [(line.revision, line.units, line.state) for line in metered.overage] == [
        (1, 1500, "reported"), (2, 500, "reported"),
    ]  # fmt: skip
    said = "\n".join(tell_org(metered))
    assert "Stripe customer: cus_1." in said
    assert "email, live, metered: 2,000 used, 0 reserved." in said
    assert "10,000 included in the plan, 10,000 taken now" in said
    assert "has no wallet" in said
    assert "billing of org" in "\n".join(tell_org(org))


@pytest.fixture
def server(database_url: str) -> Iterator[Server]:
    with serving(database_url) as running:
        yield running


def test_the_api_explains_to_the_owner_and_to_the_operator(server: Server) -> None:
    org = server.make_org()
    mail = {"from": "a@example.com", "to": "b@example.org", "subject": "s", "text": "t"}
    made = server.call("POST", "/emails", org.live_key, mail).json()["id"]
    for key in (org.live_key, ADMIN_TOKEN):
        answer = server.call("GET", f"/explain/{made}", key)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert (body["object"], body["id"], body["message"]["units"]) == ("explanation", made, 1)
        assert body["message"]["accepted_at"].endswith("Z")
        assert any("accepted" in sentence for sentence in body["sentences"])
    other = server.make_org("Other")
    assert server.call("GET", f"/explain/{made}", org.test_key).status_code == 404
    assert server.call("GET", f"/explain/{made}", other.live_key).status_code == 404
    assert server.call("GET", f"/explain/{new_id()}", ADMIN_TOKEN).status_code == 404
    assert server.call("GET", "/explain/x", org.live_key).status_code == 422
    assert server.call("GET", f"/explain/{made}").status_code == 401
    limited = server.call("POST", "/api-keys", org.live_key, {"name": "k", "permission": "sending_access"}).json()
    assert server.call("GET", f"/explain/{made}", limited["token"]).status_code == 401


# ── the command ──


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str, *arguments: str
) -> tuple[int | str | None, str]:
    code = in_process(monkeypatch, "audit", *arguments, database_url=url)
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, said.out + said.err


def test_the_command_tells_counts_and_offenders_by_its_exit_code_and_in_json(
    database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    books: Books = _made(database_url)
    code, said = run(monkeypatch, capsys, database_url, "--json")
    body: dict[str, Any] = json.loads(said)
    assert (code, body["clean"]) == (0, True)
    assert all(finding["checked"] >= 0 and finding["first"] == [] for finding in body["invariants"])
    assert run(monkeypatch, capsys, database_url)[0] == 0
    assert run(monkeypatch, capsys, database_url, "--incremental", "--json")[0] == 0
    before = books.ask("SELECT count(*) FROM audit_findings")
    books.tell("SET session_replication_role = replica; UPDATE credit_accounts SET balance = balance + 1")
    code, said = run(monkeypatch, capsys, database_url, "--json")
    body = json.loads(said)
    assert (code, body["clean"]) == (1, False)
    (broken,) = (finding for finding in body["invariants"] if finding["violations"])
    assert (broken["name"], broken["scope"]) == ("credit_balance", "accounts")
    assert (broken["checked"], broken["violations"], len(broken["first"])) == (2, 2, 2)
    assert books.ask("SELECT count(*) FROM audit_findings") == before
    code, said = run(monkeypatch, capsys, database_url)
    assert code == 1
    assert "credit_balance: 2 violations, the first:" in said
    books.tell("UPDATE audit_turn SET claim_id = gen_random_uuid(), lease_until = now() + interval '1 minute'")
    assert run(monkeypatch, capsys, database_url, "--incremental")[0] == 3


def _made(url: str) -> Books:
    import uvloop

    return uvloop.run(make_books(url))


def test_the_command_explains_and_refuses_what_it_does_not_know(
    books: Books, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    explained = {
        str(books.ids["sent"]): "This email of org",
        str(books.org_id): "Acme is on the plan free, billed by quota",
        f"{books.org_id}/ada": "The plan yearly gives",
    }
    for what, part in explained.items():
        code, said = run(monkeypatch, capsys, books.url, "--explain", what)
        assert code is None or code == 0
        assert part in said
        _, said = run(monkeypatch, capsys, books.url, "--explain", what, "--json")
        assert set(json.loads(said)) == {"sentences", "story"}
    for arguments, part in {
        ("--explain", "x"): "takes the id of a message or of an org, or ORG/USER",
        ("--explain", str(new_id())): "no message or org is",
        ("--explain", f"{books.org_id}/nobody"): "has no wallet in live",
        ("--explain", f"{books.org_id}/ada", "--env", "test"): "has no wallet in test",
        ("--explain", f"{books.org_id}/"): "USER must have 1 to 200 printable characters",
        ("--explain", f"{books.org_id}/a\nb"): "USER must have 1 to 200 printable characters",
        ("--env", "prod"): "--env must be live or test",
    }.items():
        code, said = run(monkeypatch, capsys, books.url, *arguments)
        assert (code, part in said) == (2, True), said
