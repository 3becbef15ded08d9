"""What a body may be: strict JSON of a bounded size, whatever its headers claim."""

from __future__ import annotations

import base64
import http.client
import json
import socket
from typing import Any

import pytest

from nightmail.web.bodies import MAX_DEPTH, BodyBudget, read_json
from nightmail.web.problems import Problem
from tests.web.serving import Org, Server

MAIL = {"from": "a@example.com", "to": "b@example.org", "subject": "s", "text": "t"}


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b'{"a":1,}', 400),
        (b"\xef\xbb\xbf{}", 400),
        (b'{"a":"\xff"}', 400),
        (b'{"a":"\xed\xa0\x80"}', 400),
        (b'{"a":NaN}', 400),
        (b'{"a":Infinity}', 400),
        (b'{"a":-Infinity}', 400),
        (b'{"a":1,"a":1}', 400),
        (b'{"b":{"a":1,"\\u0061":1}}', 400),
        (b'{"a":"\x00"}', 400),
        (b'{"a":"line\nend"}', 400),
        (b"{'a':1}", 400),
        (b"{} {}", 400),
        (b"\x00", 400),
        (b'{"a":' + b"9" * 5000 + b"}", 400),
        (b'{"a":1e999}', 422),
        (b'{"a":-1e999}', 422),
        (b'{"a":"\\u0000"}', 422),
        (b'{"\\u0000":1}', 422),
        (b'{"a":"\\ud800"}', 422),
        (b'{"a":["x","\\uDFFF"]}', 422),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), 422),
        (b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1), 422),
        (b"[" * 100_000 + b"]" * 100_000, 422),
        (b"[1,[" * 40 + b"]]" * 40, 422),
        (b"[1, " + b"[" * MAX_DEPTH + b'"\\u0000"' + b"]" * MAX_DEPTH + b"]", 422),
    ],
)
def test_json_that_is_refused(raw: bytes, status: int) -> None:
    with pytest.raises(Problem) as refused:
        read_json(raw)
    assert refused.value.status == status


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b'{"a":"\\ud83d\\ude00 \xf0\x9f\x98\x80"}', {"a": "😀 😀"}),
        (b'{"a":"\\\\u0000"}', {"a": "\\u0000"}),
        (b" [1, -0.5, 1e3, null, true]\n", [1, -0.5, 1000.0, None, True]),
        (b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH)),
        (b'"' + b"{" * 500 + b'"', "{" * 500),
    ],
)
def test_json_that_is_understood(raw: bytes, value: Any) -> None:
    assert read_json(raw) == value


def test_the_budget_is_given_back() -> None:
    budget = BodyBudget(100)
    budget.take(100)
    with pytest.raises(Problem) as refused:
        budget.take(1)
    assert refused.value.status == 503
    budget.give_back(100)
    budget.take(100)


def post(server: Server, path: str, key: str, body: Any, **headers: str) -> tuple[int, Any]:
    """Post a body as it is; an iterator is sent in chunks without a length."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    try:
        connection.request(
            "POST",
            path,
            body,
            {"Authorization": f"Bearer {key}", **headers},
            encode_chunked=not isinstance(body, bytes),
        )
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_bodies_over_one_mebibyte_are_refused(server: Server, org: Org) -> None:
    padding = b'{"email":"a@example.org"' + b" " * (1_048_576 - 25) + b"}"
    assert len(padding) == 1_048_576
    assert post(server, "/suppressions", org.live_key, padding)[0] == 201
    bodies: list[Any] = [padding + b" ", iter([padding, b" "]), iter([b" " * 4096] * 400)]
    body: Any
    for body in bodies:
        headers = {} if isinstance(body, bytes) else {"Transfer-Encoding": "chunked"}
        status, answer = post(server, "/suppressions", org.live_key, body, **headers)
        assert (status, answer["name"]) == (413, "payload_too_large")
    assert server.rows("SELECT count(*) FROM suppressions") == [(1,)]


def test_emails_may_be_larger_up_to_sixty_megabytes(server: Server, org: Org) -> None:
    def mail(size: int) -> bytes:
        content = base64.b64encode(b"\0" * size).decode()
        return json.dumps({**MAIL, "attachments": [{"filename": "a", "content": content}]}).encode()

    assert post(server, "/emails", org.live_key, mail(2_000_000))[0] == 200
    assert server.rows("SELECT length(content) FROM message_attachments") == [(2_000_000,)]
    status, answer = post(server, "/emails", org.live_key, mail(40_000_001))
    assert (status, answer["name"]) == (413, "payload_too_large")
    status, answer = post(server, "/emails", org.live_key, mail(46_000_000))
    assert (status, answer["name"]) == (413, "payload_too_large")
    half = json.loads(mail(20_000_001))
    status, answer = post(server, "/emails/batch", org.live_key, json.dumps([half, half]).encode())
    assert (status, answer["name"]) == (413, "payload_too_large")
    assert server.rows("SELECT count(*) FROM messages") == [(1,)]
    assert server.app.state.api.budget._held == 0


def test_a_length_that_is_too_large_is_refused_without_reading(server: Server, org: Org) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as raw:
        raw.sendall(
            f"POST /emails HTTP/1.1\r\nHost: x\r\nContent-Length: 60000001\r\n"
            f"Authorization: Bearer {org.live_key}\r\n\r\n".encode()
        )
        assert raw.recv(65536).startswith(b"HTTP/1.1 413")


def test_the_bodies_that_the_python_sdk_sends_with_get_are_ignored(server: Server, org: Org) -> None:
    bodies: list[Any] = [{}, {"x": 1}, []]
    for body in bodies:
        assert server.call("GET", "/emails", org.live_key, body).ok
