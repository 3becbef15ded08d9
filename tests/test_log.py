"""No log line can be forged, and none holds a secret."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from nightmail.log import Redactor, configure_logging, escape, secret_values, short_error
from nightmail.settings import load

SECRET = "correct-horse-battery-staple"
SETTINGS = load(
    {
        "nightmail_env": "test",
        "cron_secret": f"{SECRET},another-secret-of-ours",
        "database_url": "postgresql://me:p%40ssword1@host/db",
    }
)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


def lines_of(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines_hold_no_secret_and_no_control_character() -> None:
    stream = io.StringIO()
    configure_logging(SETTINGS, json=True, stream=stream)
    log = structlog.get_logger()
    try:
        raise ValueError(f"{SECRET}\nforged line\x1b[2J\u202e")
    except ValueError:
        log.exception("broke", value={"deep": [f"Bearer {SECRET}", b"nm_live_abcdefgh12345"]}, other="a\r\nb")
    logging.getLogger("uvicorn.error").warning("from the library with %s", SECRET)
    text = stream.getvalue()
    assert SECRET not in text
    assert "abcdefgh12345" not in text
    first, second = lines_of(stream)
    assert first["other"] == "a\\r\\nb"
    assert "\x1b" not in str(first["exception"])
    assert "ValueError: [hidden]\nforged line\\x1b[2J\\u202e" in str(first["exception"])
    assert second["event"] == "from the library with [hidden]"
    assert second["logger"] == "uvicorn.error"


def test_console_lines_are_one_line_each() -> None:
    stream = io.StringIO()
    configure_logging(SETTINGS, json=False, stream=stream)
    structlog.get_logger().info("an\nevent", value="one\ntwo\x07", lone="\ud800")
    assert stream.getvalue().count("\n") == 1
    assert "\x07" not in stream.getvalue()
    assert stream.getvalue().encode()


def test_the_context_of_a_run_is_in_every_line() -> None:
    stream = io.StringIO()
    configure_logging(SETTINGS, stream=stream)
    with structlog.contextvars.bound_contextvars(job_id="abc"):
        structlog.get_logger().info("inside")
        logging.getLogger("psycopg").warning("inside too")
    assert [line["job_id"] for line in lines_of(stream)] == ["abc", "abc"]


def test_secrets_of_settings_and_passwords_in_urls_are_known() -> None:
    values = secret_values(SETTINGS)
    assert {SECRET, "another-secret-of-ours", "p@ssword1", "p%40ssword1"} <= set(values)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:other-password@host/db", "postgresql://me:[hidden]@host/db"),
        ("host=db password='a b' user=me", "host=db password=[hidden] user=me"),
        ("Authorization: Bearer abcdefghij", "Authorization: Bearer [hidden]"),
        ("key nm_test_0123456789 refused", "key nm_test_[hidden] refused"),
        ("nothing to hide at https://host/path", "nothing to hide at https://host/path"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text: str, shown: str) -> None:
    assert Redactor()(text) == shown


def test_errors_are_short() -> None:
    assert short_error(ValueError("x" * 500), Redactor(), limit=10) == "ValueError: xxxxxxxxxx"
    assert short_error(ValueError(), Redactor()) == "ValueError"
    assert escape("a\tb") == "a\\tb"
