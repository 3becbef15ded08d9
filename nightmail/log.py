"""Logs: one line per event, JSON or for a terminal, without control characters and without secrets.

Everything passes here, the standard library's loggers (uvicorn, psycopg, aiohttp) too. Lines go to standard error,
because commands print their answers to standard output.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable
from typing import Any, TextIO
from urllib.parse import unquote, urlsplit

import structlog
from pydantic import BaseModel, SecretStr
from structlog.typing import EventDict, Processor, WrappedLogger

# C0 and C1 controls, line and paragraph separators, bidirectional overrides, lone surrogates: whatever could forge a
# line, move the cursor of who reads it, or fail to be written.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Tokens that are secret wherever they come from.
TOKENS = re.compile(r"(?i)\b(nm_live_|nm_test_|whsec_|sk_live_|sk_test_|rk_live_|bearer\s+)[^\s\"',;]{6,}")
URL_PASSWORD = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://[^\s/@:]*:)[^\s/@]+@")
CONNINFO_PASSWORD = re.compile(r"(?i)\b(password\s*=\s*)('[^']*'|\S+)")
HIDDEN = "[hidden]"
# A shorter value would also match innocent text.
MIN_HIDDEN = 6


def secret_values(settings: BaseModel) -> tuple[str, ...]:
    """Return the values that must never be printed: each secret setting and the password inside each such URL."""
    values: set[str] = set()
    for _, value in settings:
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, SecretStr):
                text = part.get_secret_value()
                values.add(text)
                values.update(_passwords(text))
    return tuple(sorted((v for v in values if len(v) >= MIN_HIDDEN), key=len, reverse=True))


def _passwords(text: str) -> set[str]:
    try:
        password = urlsplit(text).password
    except ValueError:
        return set()
    return {password, unquote(password)} if password else set()


class Redactor:
    """Hides known secrets, and what looks like one, in any text."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        known = [re.escape(secret) for secret in secrets]
        self._known = re.compile("|".join(known)) if known else None

    def __call__(self, text: str) -> str:
        """Return the text without secrets."""
        if self._known is not None:
            text = self._known.sub(HIDDEN, text)
        text = URL_PASSWORD.sub(rf"\1{HIDDEN}@", text)
        text = CONNINFO_PASSWORD.sub(rf"\1{HIDDEN}", text)
        return TOKENS.sub(rf"\1{HIDDEN}", text)


def escape(text: str, *, keep: str = "") -> str:
    """Return the text with unsafe characters as escapes such as `\\x1b`, those in `keep` left alone."""
    return UNSAFE.sub(lambda m: m[0] if m[0] in keep else m[0].encode("unicode_escape").decode(), text)


def short_error(error: BaseException, redact: Redactor, *, limit: int = 200) -> str:
    """Return `<Class>: <short>`: the first line of the message, without secrets, controls or stack."""
    lines = str(error).strip().splitlines()
    text = escape(redact(lines[0])).strip() if lines else ""
    return f"{type(error).__name__}: {text[:limit]}" if text else type(error).__name__


class Cleaner:
    """The last processor before the renderer: no secret and no unsafe character in any string of the event."""

    def __init__(self, redact: Redactor) -> None:
        self._redact = redact

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        """Clean keys and values, nested ones too; a stack keeps its line ends."""
        return {
            escape(str(key)): self._clean(value, keep="\n" if key in ("exception", "stack") else "")
            for key, value in event.items()
        }

    def _clean(self, value: Any, keep: str = "") -> Any:
        if isinstance(value, str):
            return escape(self._redact(value), keep=keep)
        if isinstance(value, bytes):
            return self._clean(value.decode("utf-8", "backslashreplace"))
        if isinstance(value, dict):
            return {escape(str(k)): self._clean(v) for k, v in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self._clean(v) for v in value]
        if value is None or isinstance(value, (bool, int, float)):
            return value
        return self._clean(str(value))


def configure_logging(settings: BaseModel, *, json: bool | None = None, stream: TextIO | None = None) -> None:
    """Send all logs of this process to `stream` (standard error), once, at the start.

    `json` chooses one JSON object per line, else lines for people; None means JSON unless `stream` is a terminal.
    The secret values among the settings are hidden wherever they appear.
    """
    out = stream or sys.stderr
    as_json = json if json is not None else not out.isatty()
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    ending: list[Processor] = [
        structlog.processors.format_exc_info,
        Cleaner(Redactor(secret_values(settings))),
        _renderer(as_json, out),
    ]
    structlog.configure(
        processors=[*shared, *ending],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=out),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *ending],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    logging.captureWarnings(True)


def _renderer(json: bool, out: TextIO) -> Processor:
    if json:
        return structlog.processors.JSONRenderer()
    return structlog.dev.ConsoleRenderer(colors=out.isatty(), exception_formatter=structlog.dev.plain_traceback)
