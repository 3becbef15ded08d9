"""Hostile values in every field of every body: a 4xx with name and message, and nothing written."""

from __future__ import annotations

import json
from typing import Any, get_args, get_origin

import msgspec
import pytest

from nightmail.web.operation import Operation
from nightmail.web.paging import Page
from tests.web.examples import BUILT, WITH_BODY, make_belongings, name_of
from tests.web.serving import ADMIN_TOKEN, Org, Server


@pytest.fixture
def server(module_server: Server) -> Server:
    return module_server


LONG = "x" * 300_000
# Wrong in every field. Raw JSON, as no library writes some of them.
WRONG = {
    "boolean": "true",
    "number": "1.5",
    "negative": "-9223372036854775809",
    "huge number": "1" + "0" * 400,
    "NaN": "NaN",
    "infinity": "1e999",
    "object": '{"$gt": ""}',
    "list of lists": "[[[]]]",
    "list of null": "[null]",
    "NUL": '"a\\u0000b"',
    "surrogate": '"\\ud800"',
    "deep": "[" * 200 + "]" * 200,
}
# Texts that are wrong in every field that is no free text.
WRONG_TEXT = {
    "line end": '"a\\r\\nBcc: x@example.com"',
    "long": json.dumps(LONG),
    "blank": '"   "',
    "control": '"\\u0007\\u001b[2J"',
    "separator": '"\\u2028"',
}
# Free text, where only the size of the body is a limit, or a text of any kind has its use.
FREE = {"html", "text", "body"}
# Where these values are right.
RIGHT = {
    ("filename", "boolean"), ("headers", "object"), ("data", "list of lists"), ("id", "line end"), ("id", "long"),
    ("id", "blank"), ("id", "control"), ("id", "separator"), ("subject", "blank"), ("at_period_end", "boolean"),
    ("expires", "boolean"),
}  # fmt: skip


def fields_of(kind: Any) -> list[str]:
    """Return the names of a struct's fields, those of a batch's item for a batch."""
    if get_origin(kind) is list:
        kind = get_args(kind)[0]
    return [field.encode_name for field in msgspec.structs.fields(kind)]


CASES = [
    pytest.param(operation, name, id=f"{name_of(operation)} {name}")
    for operation in WITH_BODY
    for name in fields_of(operation.body)
]


def body_with(operation: Operation, name: str, raw: str) -> bytes:
    """Return the operation's example with one field set to raw JSON."""
    example = operation.example[0] if isinstance(operation.example, list) else operation.example
    members = {**{k: json.dumps(v) for k, v in example.items() if k != name}, name: raw}
    text = "{" + ",".join(f"{json.dumps(k)}:{v}" for k, v in members.items()) + "}"
    return (f"[{text}]" if isinstance(operation.example, list) else text).encode()


@pytest.mark.parametrize(("operation", "name"), CASES)
def test_hostile_values_are_refused_and_nothing_is_written(
    server: Server, org: Org, operation: Operation, name: str
) -> None:
    path = make_belongings(server, org, org.live_key).path_of(operation)
    key = ADMIN_TOKEN if operation.access == "admin" else org.live_key
    before = server.counts()
    for label, raw in {**WRONG, **({} if name in FREE else WRONG_TEXT)}.items():
        if (name, label) in RIGHT:
            continue
        answer = server.call(operation.method, path, key, data=body_with(operation, name, raw))
        assert 400 <= answer.status_code < 500, (label, answer.status_code, answer.text[:300])
        problem = answer.json()
        assert problem["statusCode"] == answer.status_code
        assert problem["name"]
        assert 0 < len(problem["message"]) <= 500
        assert "Traceback" not in problem["message"]
    assert server.counts() == before


@pytest.mark.parametrize("operation", WITH_BODY, ids=name_of)
@pytest.mark.parametrize("raw", [b"null", b"1", b'""', b"[]", b"[1]", b"{}", b"[{}]", b"[[]]", b"[null]", b"<xml/>"])
def test_bodies_of_the_wrong_kind_are_refused(server: Server, org: Org, operation: Operation, raw: bytes) -> None:
    path = make_belongings(server, org, org.live_key).path_of(operation)
    key = ADMIN_TOKEN if operation.access == "admin" else org.live_key
    before = server.counts()
    answer = server.call(operation.method, path, key, data=raw)
    assert answer.status_code in (400, 422), answer.text
    assert server.counts() == before


@pytest.mark.parametrize("operation", WITH_BODY, ids=name_of)
def test_the_example_itself_is_accepted(server: Server, org: Org, operation: Operation) -> None:
    """Without this the tests above would pass on an operation that refuses everything."""
    path = make_belongings(server, org, org.live_key).path_of(operation)
    key = ADMIN_TOKEN if operation.access == "admin" else org.live_key
    answer = server.call(operation.method, path, key, operation.example)
    assert answer.ok or answer.json()["name"] == "not_ambiguous", answer.text


HOSTILE_PATHS = [
    "%00", "%ed%a0%80", "%ff", "..%2f..%2fetc", "1;DROP", "%27", "x" * 5000, "%0d%0aSet-Cookie:x", "null", "-1", "*",
    "%F0%9F%98%80", "a@b", "%2B1", "@", "+", "%40%00", "01a206aa-e4a1-734f-a2d1-eda46887c7d", "{id}",
]  # fmt: skip


@pytest.mark.parametrize("operation", [o for o in BUILT if {"id", "jobId"} & set(o.path_kinds)], ids=name_of)
def test_hostile_paths_are_refused(server: Server, org: Org, operation: Operation) -> None:
    key = ADMIN_TOKEN if operation.access == "admin" else org.live_key
    before = server.counts()
    for hostile in HOSTILE_PATHS:
        path = operation.path.replace("{id}", hostile).replace("{attachment_id}", "0").replace("{event_id}", hostile)
        answer = server.call(operation.method, path, key, operation.example)
        assert answer.status_code in (400, 404, 405, 422), (hostile, answer.status_code, answer.text)
        if answer.status_code != 400:
            assert answer.json()["name"]
        else:
            assert answer.headers["content-type"].startswith(("application/json", "text/plain"))
    assert server.counts() == before


HOSTILE_QUERIES = [
    "limit=0", "limit=-1", "limit=101", "limit=1e3", "limit=9999999999999999999999", "limit=", "limit=NaN", "limit=a",
    "limit=1&limit=2", "limit=%00", "after=x", "after=%00", "before=null", "limit[]=1&limit=x", "limit=%ff",
    "after=01a206aa-e4a1-734f-a2d1-eda46887c7d0&before=01a206aa-e4a1-734f-a2d1-eda46887c7d0",
    "&".join(f"a{n}=1" for n in range(1000)), "unknown=1", "=", "Limit=1",
]  # fmt: skip


@pytest.mark.parametrize("operation", [o for o in BUILT if o.query and issubclass(o.query, Page)], ids=name_of)
def test_hostile_queries_are_refused(server: Server, org: Org, operation: Operation) -> None:
    path = make_belongings(server, org, org.live_key).path_of(operation)
    key = ADMIN_TOKEN if operation.access == "admin" else org.live_key
    for query in HOSTILE_QUERIES:
        answer = server.call("GET", f"{path}?{query}", key)
        assert answer.status_code == 422, (query, answer.status_code, answer.text)
    assert server.call("GET", f"{path}?limit=1", key).ok


def test_hostile_batch_modes_are_refused(server: Server, org: Org) -> None:
    for mode in ("", "STRICT", "both", "\xff"):
        answer = server.call(
            "POST",
            "/sms/batch",
            org.live_key,
            [{"to": "+15005550006", "text": "x"}],
            headers={"x-batch-validation": mode.encode("latin-1")},
        )
        assert answer.status_code == 422
