"""No operation reaches what another org has, nor what the other env of the same org has."""

from __future__ import annotations

import pytest

from nightmail.web.operation import Operation
from tests.web.examples import WITH_ID, make_belongings, name_of
from tests.web.serving import Org, Server


@pytest.fixture
def server(module_server: Server) -> Server:
    return module_server


@pytest.mark.parametrize("operation", WITH_ID, ids=name_of)
def test_ids_of_another_org_are_not_found(server: Server, org: Org, operation: Operation) -> None:
    other = server.make_org("Other")
    theirs = make_belongings(server, other, other.live_key)
    before = server.counts()
    answer = server.call(operation.method, theirs.path_of(operation), org.live_key, operation.example)
    assert (answer.status_code, answer.json()["name"]) == (404, "not_found")
    assert server.counts() == before
    # the same request of its owner is no 404: what was refused does exist (release refuses what is not ambiguous)
    owners = server.call(operation.method, theirs.path_of(operation), other.live_key, operation.example)
    assert owners.ok or owners.json()["name"] == "not_ambiguous", owners.text


@pytest.mark.parametrize("operation", WITH_ID, ids=name_of)
@pytest.mark.parametrize("owner", ["live", "test"])
def test_ids_of_the_other_env_are_not_found(server: Server, org: Org, operation: Operation, owner: str) -> None:
    keys = {"live": org.live_key, "test": org.test_key}
    theirs = make_belongings(server, org, keys[owner])
    before = server.counts()
    stranger = keys["test" if owner == "live" else "live"]
    answer = server.call(operation.method, theirs.path_of(operation), stranger, operation.example)
    assert (answer.status_code, answer.json()["name"]) == (404, "not_found")
    assert server.counts() == before


def test_lists_hold_only_what_the_key_may_see(server: Server, org: Org) -> None:
    other = server.make_org("Other")
    make_belongings(server, other, other.live_key)
    mine = make_belongings(server, org, org.test_key)
    for path, id in (
        ("/emails", mine.email),
        ("/sms", mine.sms),
        ("/suppressions", mine.suppression),
        ("/webhooks", mine.webhook),
        (f"/webhooks/{mine.webhook}/events", mine.event),
    ):
        assert [item["id"] for item in server.call("GET", path, org.test_key).json()["data"]] == [id]
    for path in ("/emails", "/sms", "/webhooks"):
        assert server.call("GET", path, org.live_key).json()["data"] == []
    keys = server.call("GET", "/api-keys", org.test_key).json()["data"]
    assert {key["env"] for key in keys} == {"test"}
    assert len(keys) == 2


def test_an_email_is_not_an_sms(server: Server, org: Org) -> None:
    mine = make_belongings(server, org, org.live_key)
    assert server.call("GET", f"/sms/{mine.email}", org.live_key).status_code == 404
    assert server.call("GET", f"/emails/{mine.sms}", org.live_key).status_code == 404
    assert server.call("POST", f"/sms/{mine.email}/cancel", org.live_key).status_code == 404


def test_a_test_key_makes_test_keys_only(server: Server, org: Org) -> None:
    made = server.call("POST", "/api-keys", org.test_key, {"name": "k"}).json()
    assert made["token"].startswith("nm_test_")
    assert server.call("POST", "/api-keys", org.test_key, {"name": "k", "env": "live"}).status_code == 422


def test_idempotency_keys_of_other_orgs_and_envs_do_not_meet(server: Server, org: Org) -> None:
    other = server.make_org("Other")
    mail = {"from": "a@example.com", "to": "b@example.org", "subject": "s", "text": "t"}
    ids = {
        server.call("POST", "/emails", key, mail, headers={"Idempotency-Key": "one"}).json()["id"]
        for key in (org.live_key, org.test_key, other.live_key)
    }
    assert len(ids) == 3
