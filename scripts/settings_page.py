"""Print docs/settings.md: every setting with type, default and purpose, from nightmail.settings.

`.venv/bin/python scripts/settings_page.py > docs/settings.md`; tests/test_docs.py fails when the file is not that.
"""

from __future__ import annotations

import types
import typing
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from nightmail.settings import Settings

HEAD = """# Settings

<!-- Made by scripts/settings_page.py. Change the script or nightmail/settings.py, not this file. -->

Everything comes from the environment and is read once, at the start. What is wrong stops the process with exit code 2
and the variable's name; values are never printed. An empty variable counts as unset. Where a folder is given with
`--data`, the embedded servers in it are used whatever `DATABASE_URL` says.
"""

GROUPS: dict[str, dict[str, str]] = {
    "Process and database": {
        "nightmail_env": "`production` refuses to start without a strong `CRON_SECRET`; `development` is open on "
        "loopback where a secret is missing; `test` is for tests.",
        "database_url": "PostgreSQL 15 or newer. Unset: the embedded server in `./.nightmail`.",
        "migrate_database_url": "A direct connection for migrations when `DATABASE_URL` goes through a pooler.",
        "valkey_url": "Valkey or Redis for rate limits that several processes share. Nothing depends on it.",
        "db_pool_max": "Connections per process.",
        "db_pooler": "`transaction` behind PgBouncer in transaction mode: nothing prepared, no session state.",
    },
    "Who may call": {
        "cron_secret": "Bearer of `/api/cron/*` and `/api/jobs/*`. Two, separated by a comma, while one is rotated in; "
        "each at least 16 characters: `openssl rand -hex 16`.",
        "cron_allowed_ips": "Addresses or networks that may call job routes, separated by commas. Unset: all.",
        "trusted_proxies": "Networks whose `X-Forwarded-For` is believed.",
        "admin_token": "Bearer of the admin API and login of the dashboard, at least 16 characters. Unset: open on "
        "loopback in development, closed elsewhere.",
        "public_url": "Where others reach this server; https makes the dashboard's cookie `Secure`.",
        "api_rate_per_s": "Requests a second per API key, unless the key says otherwise.",
    },
    "Jobs and sending": {
        "job_deadline_s": "Seconds in which a job call must have answered.",
        "job_deadline_max_s": "The most that `?deadline=` may ask for.",
        "send_lease_s": "Seconds a claim lives without renewal; a dead runner's messages are taken over after it.",
        "provider_timeout_s": "Seconds of one whole provider call; never more than half the lease.",
        "evidence_wait_s": "Seconds to wait for provider events before a call in doubt is decided without them.",
        "send_batch": "Messages claimed at once.",
        "send_concurrency": "Provider calls at once, per process and channel.",
        "send_rate_email_per_s": "Emails a second over all processes. Unset: no limit of ours.",
        "send_rate_sms_per_s": "SMS a second over all processes. Unset: no limit of ours.",
    },
    "Providers": {
        "email_provider": "`capture` keeps mail in the database and shows it at `/dashboard/inbox`.",
        "smtp_url": "For `EMAIL_PROVIDER=smtp`: `smtp://user:password@host:587?starttls=required`, or "
        "`smtps://user:password@host:465`.",
        "ses_configuration_set": "SES configuration set whose events come back to us.",
        "sms_provider": "`aws-sms` is AWS End User Messaging, `sns` is SNS Publish.",
        "sms_sender": "Number, pool or sender id that SMS come from when a message names none.",
        "sms_configuration_set": "End User Messaging configuration set whose events come back to us.",
        "sns_topic_arns": "Topics whose events are believed, separated by commas.",
    },
    "Webhooks": {
        "webhook_allow_cidrs": "Networks that endpoints may be in although they are private: `10.1.0.0/16`, "
        "`127.0.0.0/8` for development.",
        "webhook_timeout_s": "Seconds of one POST, from the look-up of the name to the end of what is read; never more "
        "than half the lease.",
        "webhook_lease_s": "Seconds after which deliveries of a dead runner are due again.",
        "webhook_concurrency": "POSTs at once, per process.",
        "webhook_endpoint_concurrency": "POSTs at once to one endpoint, per process.",
        "sms_keyword_replies": "Answer STOP, START and HELP with an SMS. AWS answers STOP and HELP itself unless the "
        "number has self-managed opt-outs: then turn it off.",
    },
    "Stripe": {
        "stripe_api_key": "Secret or restricted key of the account that bills: see [stripe.md](stripe.md).",
        "stripe_api_base": "Where Stripe is, for tests. Unset: api.stripe.com.",
        "stripe_webhook_secret": "Signing secret of the webhook endpoint at `/inbound/stripe`; several, separated by "
        "commas, for several endpoints or while one is rolled.",
        "stripe_email_overage_meter_event": "Event name of the meter of email overage.",
        "stripe_sms_overage_meter_event": "Event name of the meter of SMS overage.",
        "overage_reporting": "`monthly` reports a month when it is over, `daily` what each day added: see "
        "[stripe.md](stripe.md).",
    },
    "Alerts": {
        "alert_webhook_url": "Gets a JSON POST (Slack understands it) when an alert opens or closes.",
        "alert_email": "Gets a mail when an alert opens or closes, sent directly.",
        "alert_email_from": "Sender of that mail.",
        "healthchecks_ping_url": "Base URL; each job pings `<base>/<job>` at start, success and failure.",
    },
    "Tests only": {
        "nightmail_crash": "`<job>:<point>:<action>[:<nth>]`, action `exit`, `stop` or `raise`, at a named "
        "point. Only with `NIGHTMAIL_ENV=test`.",
    },
}

TAIL = """
The AWS providers also read the AWS SDK's own variables: `AWS_REGION`, `AWS_PROFILE`, `AWS_ACCESS_KEY_ID`,
`AWS_ENDPOINT_URL` and the others.
"""


def page() -> str:
    """Return the page. Raises LookupError when settings and descriptions disagree."""
    fields = Settings.model_fields
    described = [name for group in GROUPS.values() for name in group]
    if different := set(fields) ^ set(described):
        raise LookupError(f"in Settings or in GROUPS only: {', '.join(sorted(different))}")
    lines = [HEAD]
    for title, group in GROUPS.items():
        lines += [f"## {title}", "", "| variable | value | default | what for |", "| --- | --- | --- | --- |"]
        for name, text in group.items():
            field = fields[name]
            lines.append(f"| `{name.upper()}` | {kind(field)} | {default(field)} | {text} |")
        lines.append("")
    return "\n".join(lines) + TAIL


def kind(field: FieldInfo) -> str:
    """Return what values the setting takes, with its bounds."""
    text = kind_of(field.annotation)
    bounds = {type(item).__name__: item for item in field.metadata}
    low = next((f"≥ {item.ge:g}" for n, item in bounds.items() if n == "Ge"), "") or next(
        (f"> {item.gt:g}" for n, item in bounds.items() if n == "Gt"), ""
    )
    high = next((f"≤ {item.le:g}" for n, item in bounds.items() if n == "Le"), "")
    return ", ".join(part for part in (text, low, high) if part)


def kind_of(annotation: Any) -> str:
    """Return the words for a type."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return kind_of(next(a for a in get_args(annotation) if a is not type(None)))
    if origin is Literal:
        return " · ".join(f"`{value}`" for value in get_args(annotation))
    if origin is tuple:
        return "list"
    if origin is typing.Annotated:
        return kind_of(get_args(annotation)[0])
    words = {bool: "`true` or `false`", int: "whole number", float: "number", SecretStr: "secret", str: "text"}
    return words[annotation]


def default(field: FieldInfo) -> str:
    """Return the default, `–` for unset."""
    value = str(field.default).lower() if isinstance(field.default, bool) else field.default
    return "–" if value in (None, (), PydanticUndefined) else f"`{value}`"


if __name__ == "__main__":
    print(page(), end="")
