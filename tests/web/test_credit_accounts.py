"""/credits: listing wallets, registering users, and the bonus that each of them is given once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.web.serving import ADMIN_TOKEN, Org, Server


@pytest.fixture
def server(module_server: Server) -> Server:
    return module_server


def set_bonus(server: Server, org: Org, **body: int) -> None:
    assert server.call("PUT", f"/registration-bonus?org={org.id}", ADMIN_TOKEN, body).ok


def test_a_registered_user_is_given_the_bonus_once_whatever_it_is_later(server: Server, org: Org) -> None:
    assert server.call("POST", "/credits/early", org.live_key).json()["balance"] == 0
    set_bonus(server, org, credits=50, lifetime_days=30)
    with ThreadPoolExecutor(8) as callers:
        answers = list(callers.map(lambda _: server.call("POST", "/credits/ada", org.live_key), range(8)))
    assert [answer.json()["balance"] for answer in answers] == [50] * 8
    assert answers[0].json()["next_expiry"]["amount"] == 50
    set_bonus(server, org, credits=70)
    assert server.call("POST", "/credits/ada", org.live_key).json()["balance"] == 50
    late = server.call("POST", "/credits/early", org.live_key).json()
    assert (late["balance"], late["next_expiry"]) == (70, None)
    assert server.call("POST", "/credits/ada", org.test_key).json()["balance"] == 0, "the live env's alone"
    [entry] = server.call("GET", "/credits/ada/history", org.live_key).json()["data"]
    assert (entry["reference_id"], entry["kind"], entry["reason"]) == ("registration", "grant", "registration bonus")
    set_bonus(server, org, credits=0)
    assert server.call("GET", "/registration-bonus", org.live_key).json()["credits"] == 0
    assert server.call("POST", "/credits/bob", org.live_key).json()["balance"] == 0


def test_an_org_cannot_set_its_own_bonus(server: Server, org: Org) -> None:
    refused = server.call("PUT", "/registration-bonus", org.live_key, {"credits": 5})
    assert refused.status_code in (401, 403)
    assert server.call("GET", "/registration-bonus", org.live_key).json()["credits"] == 0


def test_wallets_are_listed_page_by_page_and_only_the_own(server: Server, org: Org) -> None:
    other = server.make_org("Other")
    for key, users in ((org.live_key, "edcba"), (org.test_key, "x"), (other.live_key, "yz")):
        for user in users:
            assert server.call("POST", f"/credits/{user}", key).ok
    given = {"amount": 7, "reference_id": "g"}
    assert server.call("POST", f"/credits/c/grant?org={org.id}", ADMIN_TOKEN, given).ok
    seen, path = [], "/credits?limit=2"
    while True:
        answer = server.call("GET", path, org.live_key)
        assert answer.ok, answer.text
        page = answer.json()
        seen += [(item["user_id"], item["balance"]) for item in page["data"]]
        if not page["has_more"]:
            break
        path = f"/credits?limit=2&after={seen[-1][0]}"
    assert seen == [("a", 0), ("b", 0), ("c", 7), ("d", 0), ("e", 0)]
    back = server.call("GET", "/credits?limit=2&before=d", org.live_key).json()
    assert ([item["user_id"] for item in back["data"]], back["has_more"]) == (["b", "c"], True)
    assert len(server.call("GET", f"/credits?org={other.id}", ADMIN_TOKEN).json()["data"]) == 2
    assert server.call("GET", "/credits?after=a&before=b", org.live_key).status_code == 422
