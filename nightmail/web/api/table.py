"""Every operation of the API, in the order of the documentation; the one list that routes and OpenAPI are made from."""

from __future__ import annotations

from nightmail.web.api import (
    api_keys,
    credit_accounts,
    credit_grants,
    credit_prices,
    credits,
    emails,
    explain,
    health,
    not_built,
    orgs,
    purchases,
    runs,
    sms,
    stripe,
    suppressions,
    usage,
    webhook_events,
    webhooks,
)
from nightmail.web.operation import Operation

OPERATIONS: tuple[Operation, ...] = (
    *emails.OPERATIONS,
    *sms.OPERATIONS,
    *suppressions.OPERATIONS,
    *webhooks.OPERATIONS,
    *webhook_events.OPERATIONS,
    *api_keys.OPERATIONS,
    *usage.OPERATIONS,
    *credit_accounts.OPERATIONS,
    *credits.OPERATIONS,
    *credit_grants.OPERATIONS,
    *credit_prices.OPERATIONS,
    *purchases.OPERATIONS,
    *explain.OPERATIONS,
    *stripe.OPERATIONS,
    *orgs.OPERATIONS,
    *runs.OPERATIONS,
    *health.OPERATIONS,
    *not_built.OPERATIONS,
)
