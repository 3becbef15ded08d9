"""What every answer has, what a defect and a lost database look like, and the documentation."""

from __future__ import annotations

import json
import socket
import uuid
from html.parser import HTMLParser

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from nightmail.errors import DatabaseAway
from nightmail.web.api.table import OPERATIONS
from nightmail.web.openapi import plain_path
from nightmail.web.operation import Operation
from tests.web.examples import BUILT, name_of
from tests.web.serving import ADMIN_TOKEN, Org, Server, serving


def test_every_answer_has_an_id_and_security_headers(server: Server, org: Org) -> None:
    for path in ("/healthz", "/emails", "/nope", "/docs", "/openapi.json", "/domains"):
        answer = server.call("GET", path, org.live_key)
        assert uuid.UUID(answer.headers["x-request-id"]).version == 7
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")


def test_unknown_paths_and_methods_are_json(server: Server, org: Org) -> None:
    for path in ("/nope", "/emails/", "//emails", "/emails/a/b/c/d", "/%00", "/emails%2f", "/.env", "/index.php"):
        answer = server.call("GET", path, org.live_key)
        assert (answer.status_code, answer.headers["content-type"]) == (404, "application/json"), path
        assert answer.json()["name"] == "not_found"
    answer = server.call("PUT", "/emails", org.live_key)
    assert (answer.status_code, answer.json()["name"]) == (405, "method_not_allowed")
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}
    assert server.call("POST", "/healthz").status_code == 405
    assert server.call("POST", "/docs").json()["name"] == "method_not_allowed"
    head = server.call("HEAD", "/healthz")
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("operation", [o for o in OPERATIONS if o.status == 501], ids=name_of)
def test_what_is_not_built_is_501(module_server: Server, operation: Operation) -> None:
    org = module_server.make_org()
    path = plain_path(operation.path).replace("{", "").replace("}", "")
    answer = module_server.call(operation.method, path, org.live_key, {})
    assert (answer.status_code, answer.json()["name"]) == (501, "not_implemented")
    assert module_server.call(operation.method, path).status_code == 401


async def defect(_: Request) -> Response:
    raise RuntimeError("secret-in-a-defect")


async def lost(_: Request) -> Response:
    raise DatabaseAway("secret-host")


async def teapot(_: Request) -> Response:
    return JSONResponse({"short": "stout"}, headers={"cache-control": "max-age=5"})


def test_defects_and_a_lost_database_are_json_without_details(
    database_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    routes = [Route("/x/defect", defect), Route("/x/lost", lost), Route("/x/teapot", teapot)]
    with serving(database_url, extra_routes=routes) as server:
        broken = server.call("GET", "/x/defect", "nm_live_secret-key")
        assert (broken.status_code, broken.json()["name"]) == (500, "internal_server_error")
        away = server.call("GET", "/x/lost")
        assert (away.status_code, away.json()["name"]) == (503, "application_error")
        assert away.headers["retry-after"] == "2"
        for answer in (broken, away):
            assert "secret" not in answer.text
            assert answer.headers["x-request-id"]
        fine = server.call("GET", "/x/teapot")
        assert (fine.json(), fine.headers["cache-control"]) == ({"short": "stout"}, "max-age=5")
    log = capfd.readouterr()
    assert "http.defect" in log.out
    assert "RuntimeError" in log.out
    for secret in ("secret-in-a-defect", "nm_live_secret-key"):
        assert secret not in log.out + log.err


@pytest.fixture
def free_port() -> int:
    """A port where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_without_a_database_everything_says_503_and_health_stays(free_port: int) -> None:
    with serving(f"postgresql://postgres@127.0.0.1:{free_port}/none") as server:
        assert server.call("GET", "/healthz").json() == {"status": "ok"}
        ready = server.call("GET", "/readyz")
        assert ready.status_code == 503
        assert ready.json()["status"] == "unavailable"
        assert "database" in ready.json()["reasons"][0]
        for method, path, key in (
            ("POST", "/emails", "nm_live_" + "A" * 43),
            ("GET", "/orgs", ADMIN_TOKEN),
        ):
            answer = server.call(method, path, key, {})
            assert (answer.status_code, answer.json()["name"]) == (503, "application_error"), answer.text
            assert answer.headers["retry-after"]


def test_the_document_holds_every_operation_once(server: Server) -> None:
    document = server.call("GET", "/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert described == {(o.method, plain_path(o.path)) for o in BUILT}
    assert len(described) == len(BUILT)
    ids = [o["operationId"] for methods in document["paths"].values() for o in methods.values()]
    assert len(set(ids)) == len(ids)
    text = json.dumps(document)
    for name in document["components"]["schemas"]:
        assert f"#/components/schemas/{name}" in text


class Tags(HTMLParser):
    """Collects what a page would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_lists_every_operation_and_loads_nothing_from_elsewhere(server: Server) -> None:
    answer = server.call("GET", "/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    for operation in OPERATIONS:
        assert plain_path(operation.path) in answer.text
    assert "curl -X POST http://localhost:8025/emails" in answer.text
    tags = Tags()
    tags.feed(answer.text)
    assert not [tag for tag, _ in tags.found if tag in ("script", "img", "iframe", "style")]
    assert not [attrs for _, attrs in tags.found if "style" in attrs or any(name.startswith("on") for name in attrs)]
    loaded = [attrs["href"] for tag, attrs in tags.found if tag == "link"]
    assert loaded == ["docs/style.css"]
    assert server.call("GET", "/docs/style.css").headers["content-type"].startswith("text/css")
