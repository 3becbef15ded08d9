"""The states of a message, which may follow which, and how long to wait before the next attempt.

    scheduled ──► sending ──► sent ──► failed ──► delivered ──► bounced ──► complained   (any of these may be left out)
        │            ├──► failed                (refused for good, or out of attempts)
        │            ├──► ambiguous ──► scheduled | sent | canceled   (by hand, or sent by a provider's event)
        │            └──► scheduled             (not accepted: tried again later)
        └──► canceled                           (requested, or all recipients suppressed)

What providers report later is a summary over the recipients: each report may only raise the state along SUMMARY, so
that duplicates and any order of reports end in the same state. A report may also come before our own `sent`: it raises
`scheduled` at once, and the record step leaves that alone. `failed` stands below `delivered` because it is about one
call: a mail that arrived after all, by a call whose end we never learned, has arrived.

`sending` is never stored: a message is sending while its queue row holds an intent, so entering and leaving it
costs no write on the wide row (docs/decisions/0002-queue-shape.md).
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Literal, get_args

State = Literal["scheduled", "sending", "sent", "delivered", "bounced", "complained", "canceled", "failed", "ambiguous"]
STATES: tuple[State, ...] = get_args(State)

FOLLOWERS: dict[State, frozenset[State]] = {
    "scheduled": frozenset({"sending", "sent", "canceled", "failed", "delivered", "bounced", "complained"}),
    "sending": frozenset(
        {"scheduled", "sent", "failed", "canceled", "ambiguous", "delivered", "bounced", "complained"}
    ),
    "sent": frozenset({"failed", "delivered", "bounced", "complained"}),
    "delivered": frozenset({"bounced", "complained"}),
    "bounced": frozenset({"complained"}),
    "complained": frozenset(),
    "canceled": frozenset(),
    "failed": frozenset({"delivered", "bounced", "complained"}),
    "ambiguous": frozenset({"scheduled", "sent", "failed", "delivered", "bounced", "complained", "canceled"}),
}

# What providers report, the later of these standing for the whole message: one complaint among 50 deliveries is
# `complained`.
SUMMARY: tuple[State, ...] = ("sent", "failed", "delivered", "bounced", "complained")

MAX_ATTEMPTS = 5
# A row whose calls twice ended with a dead or mute runner may be what kills it: worked alone from then on.
SOLO_AFTER_TAKEOVERS = 2
BACKOFF_S = (30, 120, 600, 1800)  # after attempt 1, 2, 3, 4: 42 minutes in all
THROTTLE_BACKOFF_S = 5.0
MAX_RETRY_AFTER_S = 3600.0


def is_transition(old: State, new: State) -> bool:
    """Return whether a message may go from one state to the other."""
    return new in FOLLOWERS[old]


def summarise(reported: Iterable[State]) -> State | None:
    """Return the state that several reports make together; None when none of them is about the state."""
    return max((state for state in reported if state in SUMMARY), key=SUMMARY.index, default=None)


def predecessors(new: State) -> list[State]:
    """Return the stored states that a message may leave for this one."""
    return [state for state in STATES if state != "sending" and is_transition(state, new)]


def next_backoff_s(attempts: int, *, jitter: random.Random) -> float:
    """Return the wait in seconds after `attempts` (≥ 1) begun calls, with up to 20 % added at random."""
    step = BACKOFF_S[min(attempts, len(BACKOFF_S)) - 1]
    return step * (1 + 0.2 * jitter.random())


def next_throttle_s(retry_after_s: float | None, *, jitter: random.Random) -> float:
    """Return the wait in seconds after a refusal for rate: the provider's wish up to an hour, else about 5 s."""
    wait = THROTTLE_BACKOFF_S if retry_after_s is None else min(max(retry_after_s, 1.0), MAX_RETRY_AFTER_S)
    return wait * (1 + 0.2 * jitter.random())
