"""Every error Nightmail raises on purpose.

NightmailError
├── SettingsError            a setting is missing or unusable; the process must not start (exit code 2)
├── EmbeddedError            the embedded PostgreSQL or Valkey could not be started
├── MigrationError           the schema in the database and the files of this version disagree
├── NotConfigured            a job or provider lacks a setting it needs (HTTP 501, names in `missing`)
├── DatabaseAway             PostgreSQL cannot be reached or cannot take writes now (HTTP 503)
├── UnknownPlan              no message plan has this name (HTTP 422, exit code 2)
└── ProviderError            one call to an outside service did not end in acceptance
    ├── Throttled            refused for rate; not accepted; burns no attempt
    ├── Retryable            not accepted, for a reason that may pass
    ├── Permanent            not accepted, and never will be
    └── InDoubt              accepted or not: cannot be told (timeout or reset after the request was written, 5xx)
"""

from __future__ import annotations


class NightmailError(Exception):
    """Something Nightmail knows about went wrong."""


class SettingsError(NightmailError):
    """A setting is missing or unusable."""


class EmbeddedError(NightmailError):
    """The embedded server could not be started."""


class MigrationError(NightmailError):
    """The schema in the database and the files of this version disagree."""


class NotConfigured(NightmailError):
    """A needed setting is absent; `missing` names the environment variables."""

    def __init__(self, missing: list[str]) -> None:
        super().__init__("set " + ", ".join(missing))
        self.missing = missing


class DatabaseAway(NightmailError):
    """PostgreSQL cannot be reached or cannot take writes now."""


class UnknownPlan(NightmailError):
    """No message plan has this name; `known` are those there are."""

    def __init__(self, plan: str, known: list[str]) -> None:
        super().__init__(f"no plan is called {plan!r}; there are {', '.join(known)}")
        self.known = known


class ProviderError(NightmailError):
    """One call to an outside service did not end in acceptance; `code` is short and stable, for people and filters."""

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(f"{code}: {detail}" if detail else code)
        self.code = code
        self.detail = detail


class Throttled(ProviderError):
    """Refused for rate, or for the account as a whole: no fault of the message.

    `retry_after_s` is the provider's own wish, None when it gave none. With the codes `channel_stopped` and
    `daily_quota` it is long: the channel should be parked, not slowed down.
    """

    def __init__(self, code: str, detail: str = "", *, retry_after_s: float | None = None) -> None:
        super().__init__(code, detail)
        self.retry_after_s = retry_after_s


class Retryable(ProviderError):
    """Not accepted, for a reason that may pass: DNS, connection refused, TLS, a temporary refusal.

    The codes in UNSENT_CODES mean that the adapter itself had no room: nothing was written, no attempt is burnt.
    """


UNSENT_CODES = frozenset({"threads_busy", "no_free_slot", "call_timeout"})


class Permanent(ProviderError):
    """Not accepted, and never will be: a refused address, an invalid message, no permission."""


class InDoubt(ProviderError):
    """Accepted or not: timeout or reset after the request was written, 5xx, an unreadable 2xx."""
