"""STOP, START, HELP, and whom an SMS concerns."""

from __future__ import annotations

from typing import Any

import pytest

from nightmail.ids import new_id
from nightmail.rules.provider_events import BadEvent
from nightmail.rules.sms import measure_sms
from nightmail.rules.sms_keywords import REPLIES, choose_orgs, read_action, read_inbound_sms
from tests.provider_reports import inbound

ONE, TWO = new_id(), new_id()
NUMBER, OTHER = "+15005550001", "+15005550002"


@pytest.mark.parametrize(
    ("text", "action"),
    [
        *(
            (word, "stop")
            for word in ("STOP", "stop", " Stop. ", "“STOP!”", "stop\n", "StopAll", "stop all", "Opt-out")
        ),
        *((word, "stop") for word in ("UNSUBSCRIBE", "cancel", "END", "quit", "revoke")),
        *((word, "start") for word in ("START", "Unstop", "yes", "YES!")),
        *((word, "help") for word in ("HELP", "info?")),
        *((word, None) for word in ("", "stop it", "please stop", "STOP2", "yes please", "stopp", "2", "s" * 99)),
    ],
)
def test_keywords(text: str, action: str | None) -> None:
    assert read_action(text) == action


def test_each_reply_is_one_segment() -> None:
    assert {measure_sms(text).segments for text in REPLIES.values()} == {1}
    assert all(read_action(text) is None for text in REPLIES.values())


def test_an_inbound_sms_is_read() -> None:
    sms = read_inbound_sms(inbound("Stop", inbound_id="i-1", sender="+1 500 555 0006", to="24273"))
    assert (sms.sender, sms.recipient, sms.body, sms.action) == ("+15005550006", "24273", "Stop", "stop")
    assert not sms.is_yes
    assert read_inbound_sms(inbound("Yes.", inbound_id="i-1")).is_yes
    assert len(read_inbound_sms(inbound("x" * 9000, inbound_id="i-1")).body) == 4000


@pytest.mark.parametrize(
    "fields",
    [
        {"originationNumber": "nobody at all"},
        {"originationNumber": None},
        {"originationNumber": "+1"},
        {"destinationNumber": ""},
        {"inboundMessageId": ""},
        {"inboundMessageId": "a b"},
        {"inboundMessageId": "x" * 201},
        {"messageBody": 5},
    ],
)
def test_unusable_sms_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(BadEvent):
        read_inbound_sms({**inbound("hi", inbound_id="i"), **fields})


@pytest.mark.parametrize(
    ("senders", "default", "told", "meant"),
    [
        ([(TWO, OTHER), (ONE, NUMBER)], None, ONE, {ONE}),
        ([(TWO, OTHER), (ONE, "")], NUMBER, ONE, {ONE}),
        ([(ONE, "")], OTHER, None, set()),
        ([(ONE, "")], None, ONE, {ONE}),
        ([(ONE, "pool-0123")], None, ONE, {ONE}),
        ([(ONE, "")], "arn:aws:sms-voice:eu-west-1:1:phone-number/p", ONE, {ONE}),
        ([(TWO, ""), (ONE, NUMBER)], None, ONE, {ONE, TWO}),
        ([(TWO, NUMBER), (ONE, NUMBER)], None, TWO, {ONE, TWO}),
        ([(ONE, "pool-0123"), (TWO, "")], None, ONE, {ONE, TWO}),
        ([(ONE, "NIGHTMAIL")], None, None, set()),
        ([], None, None, set()),
    ],
)
def test_whom_an_sms_concerns(senders: Any, default: str | None, told: Any, meant: Any) -> None:
    assert choose_orgs(senders, NUMBER, default) == (told, meant)
