"""`nightmail credits` and `nightmail purchase`: what scripts rely on, in one process."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest

from tests.credits.seeds import seed_org
from tests.test_cli import in_process


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], database_url: str) -> Any:
    """Return a function that runs a command for an org; it returns the exit code, the JSON, and what was said."""
    with psycopg.connect(database_url, autocommit=True) as conn:
        org = str(seed_org(conn))

    def call(*arguments: str, as_json: bool = True, org: str = org) -> tuple[Any, Any, str]:
        code = in_process(
            monkeypatch, *arguments, "--org", org, *(["--json"] if as_json else []), database_url=database_url
        )
        printed = capsys.readouterr()
        found = json.loads(printed.out.splitlines()[-1]) if as_json and printed.out else printed.out
        return code or 0, found, printed.err

    return call


def test_credits_are_given_spent_given_back_and_explained(run: Any) -> None:
    code, given, _ = run("credits", "grant", "ada", "100", "--reference", "g", "--days", "5", "--reason", "welcome")
    assert (code, given["amount"], given["replayed"]) == (0, 100, False)
    code, spent, _ = run("credits", "consume", "ada", "30", "--reference", "r", "--service", "render")
    assert (code, spent["balance"]) == (0, 70)
    assert run("credits", "consume", "ada", "30", "--reference", "r", "--service", "render")[1]["replayed"] is True
    code, _, said = run("credits", "consume", "ada", "71")
    assert (code, said) == (1, "nightmail: 71 credits are needed and 70 can be spent: 1 missing\n")
    assert run("credits", "refund", "ada", "--of", "r", "--amount", "10", "--reference", "f")[1]["amount"] == 10
    code, _, said = run("credits", "refund", "ada", "--of", "r", "--amount", "21", "--reference", "f2")
    assert (code, said) == (1, "nightmail: Only 20 credits are left for this.\n")
    assert run("credits", "balance", "ada")[1]["balance"] == 80
    assert [entry["amount"] for entry in run("credits", "history", "ada")[1]["data"]] == [10, -30, 100]
    explained = run("credits", "explain", "ada", "2")[1]
    assert explained["explanation"] == "ada spent 30 credits of this batch on service:render."
    assert sum(line["amount"] for line in explained["lines"]) == 0
    assert run("credits", "list")[1]["data"][0]["balance"] == 80
    for shown in ("balance", "history"):
        code, text, _ = run("credits", shown, "ada", as_json=False)
        assert code == 0
        assert "80" in text


def test_purchases_are_made_once_and_listed(run: Any) -> None:
    first = run("purchase", "create", "ada", "pack-1000", "--external-ref", "cs_1")[1]
    assert run("purchase", "create", "ada", "pack-1000", "--external-ref", "cs_1")[1]["id"] == first["id"]
    assert run("credits", "balance", "ada")[1]["balance"] == 1000
    assert [item["id"] for item in run("purchase", "list")[1]["data"]] == [first["id"]]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("credits", "grant", "a/b", "5"), "Invalid `user` field"),
        (("credits", "grant", "ada", "0"), "greater than or equal to 1"),
        (("credits", "grant", "ada", "5", "--env", "prod"), "--env must be live or test"),
        (("credits", "grant", "ada", "5", "--ends", "2001-01-01"), "--ends must lie in the future"),
        (("credits", "consume", "ada", "5", "--service", "a b"), "--service must have"),
        (("credits", "grant", "ada", "5", "--ends", "9999-12-31"), "between the years 2000 and 2199"),
        (("credits", "grant", "ada", "5", "--reference", "upgrade:x"), "Nightmail's own"),
        (("credits", "consume", "ada", "5", "--reference", "message:x"), "Nightmail's own"),
        (("credits", "refund", "ada", "--of", "\udcff"), "Invalid `of` field"),
        (("credits", "list", "--after", "\udcff"), "Invalid `after` field"),
        (("purchase", "create", "ada", "gold"), "there is no plan 'gold'"),
        (("purchase", "create", "ada", "\udcff"), "there is no plan"),
        (("purchase", "create", "ada", "pack-1000", "--external-ref", "x" * 256), "at most 255 characters"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_one_line(run: Any, arguments: tuple[str, ...], reason: str) -> None:
    code, _, said = run(*arguments)
    assert code == 2
    assert reason in said
    assert "Traceback" not in said


def test_an_unknown_org_and_an_unknown_user_are_told_apart(run: Any) -> None:
    assert run("credits", "balance", "ada", org="00000000-0000-7000-8000-000000000009")[0] == 2
    assert run("credits", "balance", "ada", org="acme")[0] == 2
    assert run("credits", "balance", "ada")[0] == 1
