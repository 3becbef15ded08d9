"""Print docs/webhooks.md with its tables made anew: event types and schedules, from nightmail.rules.webhooks.

`.venv/bin/python scripts/webhooks_page.py > /tmp/page && mv /tmp/page docs/webhooks.md`; tests/test_docs.py fails when
the file is not that.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from nightmail.rules.webhooks import (
    DEFAULT_WAITS_S,
    JITTER,
    LEGACY_ATTEMPTS,
    NIGHTMAIL_TYPES,
    RESEND_TYPES,
    TEST_TOPIC,
)

PAGE = Path(__file__).parent.parent / "docs" / "webhooks.md"

WHEN = {
    "message.scheduled": "It was accepted for a later time.",
    "message.sent": "The provider took it; in the test env: it would have been handed over.",
    "message.delivered": "The recipient's server, or the carrier, took it.",
    "message.delayed": "It is not there yet, as far as anybody knows: SES goes on trying, an automatic answer came, "
    "or the carrier of an SMS said nothing for 72 hours.",
    "message.bounced": "It cannot be delivered; `bounce` says why. A permanent one suppresses the address.",
    "message.complained": "The recipient called it spam; the address is suppressed.",
    "message.failed": "It was not sent; `reason` says why.",
    "message.canceled": "It was canceled before it left.",
    "message.suppressed": "Every recipient was on the suppression list: it was not sent.",
    "message.opened": "The recipient's program loaded the tracking picture (the provider must be told to add one).",
    "message.clicked": "The recipient followed a link; `click.link` is which.",
    "message.unsubscribed": "The recipient unsubscribed with one click, or answered STOP; the address is suppressed.",
    "message.ambiguous": "Nobody can know whether the provider took it; it waits for your decision.",
    "inbound.sms": "Somebody sent an SMS to a number you send from.",
    "credits.granted": "A user was given credits: a month of a subscription, a purchase, a bonus, a refund.",
    "credits.expired": "Credits of a user ended unspent; `amount` is how many were booked.",
    "credits.low": "A spend took what a user can spend below the `low_below` of the wallet.",
    "usage.threshold": "80 or 100 percent of what the plan includes in a month are used or scheduled; each told once.",
    "webhook.disabled": "Another webhook of yours was disabled; `reason` says why.",
}
# Names that can be subscribed to, of jobs that are not built.
COMING = {
    "domain": "sending domains",
    "brand": "SMS brands",
    "campaign": "SMS campaigns",
    "phone_number": "phone numbers",
    "export": "exports",
}


def page(text: str) -> str:
    """Return the text with what stands between its markers made anew. Raises LookupError."""
    for name, made in (("types", types()), ("schedules", schedules())):
        head, tail = re.search(rf"<!-- {name}: .*? -->\n", text), re.search(rf"<!-- end of {name} -->", text)
        if head is None or tail is None:
            raise LookupError(f"docs/webhooks.md has no part named {name}")
        text = f"{text[: head.end()]}\n{made}\n\n{text[tail.start() :]}"
    return text


def types() -> str:
    """Return the table of event types. Raises LookupError when one is not described."""
    described = {*WHEN, *(name for name in NIGHTMAIL_TYPES if name.partition(".")[0] in COMING)}
    if different := described ^ set(NIGHTMAIL_TYPES):
        raise LookupError(f"in rules.webhooks or described here only: {', '.join(sorted(different))}")
    lines = ["| Nightmail's name | Resend's name | when |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {_resend(name)} | {text} |" for name, text in WHEN.items()]
    lines.append(f"| `{TEST_TOPIC}` | `{TEST_TOPIC}` | You asked for a test; it comes unsubscribed. |")
    coming = [name for name in NIGHTMAIL_TYPES if name not in WHEN]
    text = (
        f"To come, with the jobs that make them ({', '.join(COMING.values())}); they may be subscribed to already: "
        + ", ".join(f"`{name}`" for name in coming)
        + ". Resend's `domain.updated` stands for "
        + ", ".join(f"`{topic}`" for topic in RESEND_TYPES["domain.updated"])
        + "."
    )
    return "\n".join([*lines, "", *textwrap.wrap(text, 120, break_on_hyphens=False)])


def schedules() -> str:
    """Return the table of schedules."""
    waits = " ".join(_span(wait) for wait in DEFAULT_WAITS_S)
    jitter = f"each up to {JITTER:.0%} longer, by chance"
    hours = sum(DEFAULT_WAITS_S) // 3600
    legacy = ", ".join(f"{2**n}" for n in range(1, LEGACY_ATTEMPTS))
    return "\n".join(
        [
            "| `schedule` | attempts | waits between them |",
            "| --- | --- | --- |",
            f"| `default` | {1 + len(DEFAULT_WAITS_S)} in {hours:.0f} hours | {waits}; {jitter} |",
            f"| `legacy` | {LEGACY_ATTEMPTS} in half a minute | {legacy} s, each up to 1 s longer |",
            f"| `5s 5m 2h` | one more than waits | what it says; {jitter} |",
        ]
    )


def _resend(name: str) -> str:
    """Return Resend's name for what one of ours stands for; `–` when it has none."""
    topics = set(NIGHTMAIL_TYPES[name])
    return next((f"`{theirs}`" for theirs, stands_for in RESEND_TYPES.items() if topics & set(stands_for)), "–")


def _span(seconds: float) -> str:
    for unit, size in (("h", 3600), ("m", 60)):
        if seconds % size == 0:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"


if __name__ == "__main__":
    print(page(PAGE.read_text()), end="")
