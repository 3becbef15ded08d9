"""GET /runs and /runs/{jobId}: the operator's look at what the jobs did."""

from __future__ import annotations

from typing import Any

from nightmail.ids import new_id
from tests.web.serving import ADMIN_TOKEN, Org, Server, make_run


def ids_of(server: Server, **query: Any) -> tuple[list[str], bool]:
    answer = server.call("GET", "/runs", ADMIN_TOKEN, params=query)
    assert answer.status_code == 200, answer.text
    assert answer.json()["object"] == "list"
    return [run["id"] for run in answer.json()["data"]], answer.json()["has_more"]


def test_runs_are_paged_in_both_directions(server: Server) -> None:
    runs = [make_run(server, "a" if i % 2 else "b") for i in range(7)][::-1]
    assert ids_of(server) == (runs, False)
    assert ids_of(server, limit=3) == (runs[:3], True)
    assert ids_of(server, limit=3, after=runs[2]) == (runs[3:6], True)
    assert ids_of(server, limit=3, after=runs[5]) == (runs[6:], False)
    assert ids_of(server, limit=3, before=runs[5]) == (runs[2:5], True)
    assert ids_of(server, limit=3, before=runs[2]) == (runs[:2], False)
    of_a = runs[1::2]
    assert ids_of(server, job="a") == (of_a, False)
    assert ids_of(server, job="a", limit=1, after=of_a[0]) == (of_a[1:2], True)
    assert ids_of(server, job="a", limit=1, before=of_a[2]) == (of_a[1:2], True)
    assert ids_of(server, job="none") == ([], False)


def test_runs_are_found_by_state(server: Server) -> None:
    make_run(server)
    failed = make_run(server, state="failed")
    make_run(server, "other")
    assert ids_of(server, state="failed") == ([failed], False)
    assert ids_of(server, state="failed", job="other") == ([], False)


def test_a_run_is_shown_and_what_does_not_exist_is_refused(server: Server, org: Org) -> None:
    run_id = make_run(server, state="failed")
    run = server.call("GET", f"/runs/{run_id}", ADMIN_TOKEN).json()
    assert (run["object"], run["id"], run["job"], run["state"]) == ("run", run_id, "send-scheduled", "failed")
    assert (run["duration_ms"], run["deadline_s"], run["trigger"], run["more"]) == (5, 25, "http", False)
    assert server.call("GET", f"/runs/{new_id()}", ADMIN_TOKEN).status_code == 404
    assert server.call("GET", "/runs/x", ADMIN_TOKEN).status_code == 422
    for query in ("state=x", "limit=0", "job=%00", f"after={new_id()}", f"after={run_id}&before={run_id}"):
        assert server.call("GET", f"/runs?{query}", ADMIN_TOKEN).status_code == 422, query
    assert server.call("GET", "/runs", org.live_key).status_code == 403
