"""What the fake provider does to a request, and how it decides.

The first that applies: a name in a recipient, a rule of the script, the seeded random programme, `ok`.

    email recipient   SMS recipient    SES / SMS / SNS answer                       SMTP answer                taken
    ----------------  ---------------  -------------------------------------------  -------------------------  -----
    ok@               +1555nnn9000     200                                          250                        yes
    throttle@         +1555nnn9001     429 or 400, rate exceeded                    454 at RCPT, rate          no
    quota@            +1555nnn9002     daily quota / monthly spend limit            454 at RCPT, daily quota   no
    paused@           +1555nnn9003     account paused or disabled                   530 at RCPT                no
    credentials@      +1555nnn9004     403, unknown key                             535 at RCPT                no
    reject@           +1555nnn9005     400, message rejected / opted out            550 at RCPT                no
    denied@           +1555nnn9006     403, access denied                           554 at RCPT                no
    tempfail@         +1555nnn9007     503                                          451 at RCPT                no
    fail5xx@          +1555nnn9008     500                                          451 after DATA             no
    fail5xx-after-accept@       ...09  500                                          drop after DATA            yes
    hang@             +1555nnn9010     never                                        never, after DATA          no
    hang-after-accept@          ...11  never                                        never, after DATA          yes
    reset-before@     +1555nnn9012     TCP reset after the request was read         TCP reset at RCPT          no
    reset-after@      +1555nnn9013     TCP reset                                    TCP reset after DATA       yes
    garbage@          +1555nnn9014     200 with HTML                                a line without a code      yes
    empty@            +1555nnn9015     200 without MessageId                        drop after DATA            yes
    slow@             +1555nnn9016     200 after `slow_ms`                          250 after `slow_ms`        yes
    drip@             +1555nnn9017     200, one byte per `drip_ms`                  250, a byte per `drip_ms`  yes

`taken` is what the log says: "accepted" is written before the answer, whatever becomes of the answer.
`throttle-once@`, `reset-after-3x@` do it the first 1 or 3 times for that recipient and are `ok` afterwards;
for numbers 91NN instead of 90NN means once. A `+tag` behind the name keeps recipients apart:
`slow-once+42@x.test`.

A script is JSON, all fields optional:

    {"seed": 7, "rates": {"throttle": 0.01, "reset-after": 0.005}, "latency_ms": 20, "jitter_ms": 10,
     "slow_ms": 1500, "drip_ms": 100, "hang_s": 60,
     "rules": [{"match": "*@down.test", "behaviour": "fail5xx", "times": 3}]}

The random draw depends on seed, our message id and how often that message was seen, so a run repeats whatever
the order of requests.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from enum import StrEnum
from fnmatch import fnmatchcase

import msgspec

__all__ = ["ACCEPTING", "Behaviour", "Chooser", "Rule", "Script"]


class Behaviour(StrEnum):
    """What happens to a request; the order gives the numbers of the SMS recipients."""

    OK = "ok"
    THROTTLE = "throttle"
    QUOTA = "quota"
    PAUSED = "paused"
    CREDENTIALS = "credentials"
    REJECT = "reject"
    DENIED = "denied"
    TEMPFAIL = "tempfail"
    FAIL5XX = "fail5xx"
    FAIL5XX_AFTER_ACCEPT = "fail5xx-after-accept"
    HANG = "hang"
    HANG_AFTER_ACCEPT = "hang-after-accept"
    RESET_BEFORE = "reset-before"
    RESET_AFTER = "reset-after"
    GARBAGE = "garbage"
    EMPTY = "empty"
    SLOW = "slow"
    DRIP = "drip"


ACCEPTING = frozenset(
    {
        Behaviour.OK, Behaviour.FAIL5XX_AFTER_ACCEPT, Behaviour.HANG_AFTER_ACCEPT, Behaviour.RESET_AFTER,
        Behaviour.GARBAGE, Behaviour.EMPTY, Behaviour.SLOW, Behaviour.DRIP,
    }
)  # fmt: skip
"""Behaviours under which the message is taken and logged."""

_NUMBERED = tuple(Behaviour)
_NAMES = "|".join(sorted((re.escape(name) for name in Behaviour), key=len, reverse=True))
_LOCAL_PART = re.compile(rf"({_NAMES})(?:-(once|[0-9]{{1,6}}x))?(?:\+[^@]*)?@")
_NUMBER = re.compile(r"\+1555[0-9]{3}9([01])([0-9]{2})")


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Recipients that match the shell pattern are treated so, the first `times` times (None: always)."""

    match: str
    behaviour: Behaviour
    times: int | None = None


class Script(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The programme of the fake provider."""

    seed: int = 0
    rates: dict[Behaviour, float] = {}
    rules: list[Rule] = []
    latency_ms: float = 0.0
    jitter_ms: float = 0.0
    slow_ms: float = 1500.0
    drip_ms: float = 100.0
    hang_s: float = 60.0


class Chooser:
    """Applies a script and counts for "the first n times"."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self._times: dict[tuple[str, str], int] = {}
        self._seen: dict[str, int] = {}
        self._rates = tuple(script.rates.items())

    def choose(self, recipients: Sequence[str], message_id: str) -> Behaviour:
        """Return what to do with a request to `recipients`."""
        for recipient in recipients:
            named = self.named(recipient)
            if named is not None:
                return named
        return self.drawn(message_id)

    def named(self, recipient: str) -> Behaviour | None:
        """Return the behaviour a recipient's name or a rule asks for and count it; None when neither does."""
        found = _LOCAL_PART.match(recipient)
        if found:
            return self._counted(("name", recipient), Behaviour(found[1]), _times(found[2]))
        found = _NUMBER.fullmatch(recipient)
        if found and int(found[2]) < len(_NUMBERED):
            return self._counted(("name", recipient), _NUMBERED[int(found[2])], 1 if found[1] == "1" else None)
        for rule in self.script.rules:
            if fnmatchcase(recipient, rule.match):
                return self._counted(("rule", rule.match), rule.behaviour, rule.times)
        return None

    def drawn(self, message_id: str) -> Behaviour:
        """Return what the random programme has for this message, this time."""
        if not self._rates:
            return Behaviour.OK
        times = self._seen[message_id] = self._seen.get(message_id, 0) + 1
        draw = random.Random(f"{self.script.seed}:{message_id}:{times}").random()
        for behaviour, rate in self._rates:
            draw -= rate
            if draw < 0:
                return behaviour
        return Behaviour.OK

    def _counted(self, key: tuple[str, str], behaviour: Behaviour, times: int | None) -> Behaviour:
        if times is None:
            return behaviour
        done = self._times[key] = self._times.get(key, 0) + 1
        return behaviour if done <= times else Behaviour.OK


def _times(text: str | None) -> int | None:
    if text is None:
        return None
    return 1 if text == "once" else int(text[:-1])
