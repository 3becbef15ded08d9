"""The ground truth: one line per message the fake provider took, appended before it answers.

    {"at": 1795.., "channel": "email", "service": "ses", "message_id": "<ours>", "provider_message_id": "...",
     "recipients": [...], "subject": "..."}

O_APPEND and one write per line: a killed reader, database or provider never tears it. A log that exists is
read at the start, so the counts are those of the file. Memory grows by about 200 bytes per distinct message.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from secrets import token_hex

import msgspec

__all__ = ["MessageLog", "Submission", "Summary"]


class Submission(msgspec.Struct, frozen=True):
    """A request to send, as understood; `message_id` is ours, '' when the request carries none."""

    channel: str
    service: str
    message_id: str
    recipients: Sequence[str]
    subject: str
    content: bytes = b""
    tags: dict[str, str] = {}


class Summary(msgspec.Struct, frozen=True):
    """Messages taken; `doubles` = total - distinct, over the messages that carried our id."""

    requests: int
    total: int
    distinct: int
    doubles: int
    without_id: int


class _Taken(msgspec.Struct, frozen=True):
    at: float
    channel: str
    service: str
    message_id: str
    provider_message_id: str
    recipients: Sequence[str]
    subject: str


class _Attempt(msgspec.Struct, frozen=True):
    at: float
    service: str
    message_id: str
    recipients: Sequence[str]
    behaviour: str
    accepted: bool


class _Kept(msgspec.Struct, frozen=True):
    service: str
    message_id: str
    provider_message_id: str
    recipients: Sequence[str]
    content: bytes
    tags: dict[str, str]


class MessageLog:
    """Appends, counts, and keeps the last `keep` messages whole for tests that look inside."""

    def __init__(self, path: Path, *, attempts_path: Path | None = None, keep: int = 0) -> None:
        self._requests = 0
        self._without_id = 0
        self._counts: dict[str, int] = {}
        self._kept: deque[_Kept] = deque(maxlen=keep)
        self._encoder = msgspec.json.Encoder()
        self._id_prefix, self._id_number = f"0100{token_hex(6)}", 0
        self._read(path)
        self._file = _append_to(path)
        self._attempts_file = None if attempts_path is None else _append_to(attempts_path)

    def take(self, submission: Submission) -> str:
        """Write the message down and return the provider's id for it."""
        self._id_number += 1
        provider_message_id = f"{self._id_prefix}-{self._id_number:08x}"
        taken = _Taken(
            at=time.time(),
            channel=submission.channel,
            service=submission.service,
            message_id=submission.message_id,
            provider_message_id=provider_message_id,
            recipients=submission.recipients,
            subject=submission.subject,
        )
        os.write(self._file, self._encoder.encode(taken) + b"\n")
        self._count(submission.message_id)
        if self._kept.maxlen:
            self._kept.append(
                _Kept(
                    service=submission.service,
                    message_id=submission.message_id,
                    provider_message_id=provider_message_id,
                    recipients=submission.recipients,
                    content=submission.content,
                    tags=submission.tags,
                )
            )
        return provider_message_id

    def attempt(
        self, *, service: str, message_id: str, recipients: Sequence[str], behaviour: str, accepted: bool
    ) -> None:
        """Count a request, and write it down where an attempts log was asked for."""
        self._requests += 1
        if self._attempts_file is not None:
            line = _Attempt(
                at=time.time(),
                service=service,
                message_id=message_id,
                recipients=recipients,
                behaviour=behaviour,
                accepted=accepted,
            )
            os.write(self._attempts_file, self._encoder.encode(line) + b"\n")

    def summary(self) -> Summary:
        """Return the counts."""
        total = sum(self._counts.values())
        return Summary(
            requests=self._requests,
            total=total + self._without_id,
            distinct=len(self._counts),
            doubles=total - len(self._counts),
            without_id=self._without_id,
        )

    def counts(self, *, at_least: int = 1) -> dict[str, int]:
        """Return how often each of our message ids was taken."""
        return {message_id: count for message_id, count in self._counts.items() if count >= at_least}

    def kept(self, message_id: str) -> list[_Kept]:
        """Return the kept messages with this id, oldest first."""
        return [kept for kept in self._kept if kept.message_id == message_id]

    def close(self) -> None:
        """Close the files."""
        os.close(self._file)
        if self._attempts_file is not None:
            os.close(self._attempts_file)

    def _count(self, message_id: str) -> None:
        if message_id:
            self._counts[message_id] = self._counts.get(message_id, 0) + 1
        else:
            self._without_id += 1

    def _read(self, path: Path) -> None:
        if path.is_file():
            decoder = msgspec.json.Decoder(_Taken)
            with path.open("rb") as lines:
                for line in lines:
                    self._count(decoder.decode(line).message_id)


def _append_to(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
