"""SMS that people send: who wrote what to which number, and what STOP, START and HELP are.

Source: AWS End User Messaging user guide, "Two-way SMS"; the keywords are those of the CTIA messaging principles, and
`revoke` and `opt out` the FCC's of 2025 (47 CFR 64.1200(a)(10)). Only a text that is the keyword and nothing else
counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

import msgspec

from nightmail.rules.addresses import BadAddress, normalise_number
from nightmail.rules.provider_events import BadEvent

Action = Literal["stop", "start", "help"]

KEYWORDS: dict[str, Action] = {
    **dict.fromkeys(("stop", "stopall", "unsubscribe", "cancel", "end", "quit", "revoke", "optout"), "stop"),
    **dict.fromkeys(("start", "unstop", "yes"), "start"),
    **dict.fromkeys(("help", "info"), "help"),
}
# Each fits into one GSM-7 segment.
REPLIES: dict[Action, str] = {
    "stop": "You are unsubscribed and will get no more messages from this number. Reply START to subscribe again.",
    "start": "You are subscribed again. Reply HELP for help or STOP to unsubscribe.",
    "help": "Reply STOP to unsubscribe or START to subscribe again. Message and data rates may apply.",
}
MAX_BODY = 4000

_ID = re.compile(r"[!-~]{1,200}")
_SHORT_NUMBER = re.compile(r"[0-9A-Za-z]{2,20}")
_BETWEEN = re.compile(r"[\W_]+")


@dataclass(frozen=True, slots=True)
class InboundSms:
    """An SMS to a number of ours; numbers are normalised, or a short code as it stands. `keyword` is the provider's."""

    inbound_id: str
    sender: str
    recipient: str
    body: str
    keyword: str
    action: Action | None

    @property
    def is_yes(self) -> bool:
        """Return whether it merely says yes, which is an answer to many a question."""
        return _bare(self.body) == "yes"


class _Payload(msgspec.Struct, rename="camel"):
    origination_number: str
    destination_number: str
    inbound_message_id: str
    message_body: str | None = None
    message_keyword: str | None = None


def read_inbound_sms(payload: Any) -> InboundSms:
    """Return the SMS of a two-way notification. Raises BadEvent."""
    try:
        said = msgspec.convert(payload, _Payload, strict=True)
    except msgspec.ValidationError as error:
        raise BadEvent(str(error)) from None
    if _ID.fullmatch(said.inbound_message_id) is None:
        raise BadEvent("inboundMessageId is not an id")
    body = (said.message_body or "")[:MAX_BODY]
    return InboundSms(
        inbound_id=said.inbound_message_id,
        sender=_number(said.origination_number, "originationNumber"),
        recipient=_number(said.destination_number, "destinationNumber"),
        body=body,
        keyword=(said.message_keyword or "")[:200],
        action=read_action(body),
    )


def read_action(text: str) -> Action | None:
    """Return what the text means as a keyword; case, spaces and punctuation do not matter."""
    return KEYWORDS.get(_bare(text)) if len(text) <= 40 else None


def choose_orgs(
    senders: Sequence[tuple[UUID, str]], number: str, default_sender: str | None
) -> tuple[UUID | None, frozenset[UUID]]:
    """Return (whom to tell, whose messages a keyword is about) of the orgs that wrote to the person.

    `senders` are (org, origination identity of a message of it), newest first; '' was the default, None lets the
    provider choose. Who wrote last from this very number is told, and nobody else: what a person writes is not for
    others. A pool or the provider's choice may have been this number or not; such an org is told when nobody wrote from
    the number itself. A STOP counts for all of them: sending on after a STOP is worse than stopping too much.
    """
    exact, possible = [], []
    for org_id, sender in senders:
        identity = sender or default_sender
        if identity == number:
            exact.append(org_id)
        elif identity is None or identity.startswith(("arn:", "pool-", "phone-")):
            possible.append(org_id)
    return next(iter(exact + possible), None), frozenset(exact + possible)


def _bare(text: str) -> str:
    return _BETWEEN.sub("", text).casefold()


def _number(text: str, name: str) -> str:
    if _SHORT_NUMBER.fullmatch(text):
        return text
    try:
        return normalise_number(text)
    except BadAddress as error:
        raise BadEvent(f"{name} {error}") from None
