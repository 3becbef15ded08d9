"""The adapter to Stripe's meters, with the real SDK: what each answer means, and that the key stays where it is."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import requests

from nightmail.errors import InDoubt, NotConfigured, Permanent, ProviderError, Retryable, Throttled
from nightmail.fakes.script import Behaviour, Rule, Script
from nightmail.fakes.stripe_api import FakeStripe
from nightmail.ports import MeterEvent
from nightmail.providers.stripe_meter import StripeMeter
from tests.stripe.billing import EMAIL

pytestmark = pytest.mark.anyio

KEY = "sk_test_this_must_not_be_seen"


@pytest.fixture
async def meter(stripe_api: FakeStripe) -> AsyncIterator[StripeMeter]:
    made = StripeMeter(api_key=KEY, api_base=stripe_api.url, timeout_s=5)
    yield made
    await made.close()


def usage(**fields: Any) -> MeterEvent:
    event = MeterEvent(EMAIL, "one", "cus_1", 5, datetime.now(UTC) - timedelta(minutes=5))
    return replace(event, **fields)


@pytest.mark.parametrize(
    ("behaviour", "outcome", "code"),
    [
        ("throttle", Throttled, "throttled"),
        ("credentials", Throttled, "channel_stopped"),
        ("denied", Throttled, "channel_stopped"),
        ("reject", Permanent, "http_400"),
        ("tempfail", InDoubt, "http_503"),
        ("fail5xx-after-accept", InDoubt, "http_500"),
        ("reset-before", InDoubt, "connection_lost"),
        ("garbage", InDoubt, "http_200"),
        ("hang", InDoubt, "call_timeout"),
    ],
)
async def test_each_answer_has_its_class_and_none_shows_the_key(
    stripe_api: FakeStripe, meter: StripeMeter, behaviour: str, outcome: type[ProviderError], code: str
) -> None:
    stripe_api.script = Script(rules=[Rule(match="*", behaviour=Behaviour(behaviour))], hang_s=1)
    with pytest.raises(ProviderError) as caught:
        await meter.report(usage(), timeout_s=0.3 if behaviour == "hang" else 5)
    assert (type(caught.value), caught.value.code) == (outcome, code)
    assert KEY not in f"{caught.value!r} {caught.value.detail}"


async def test_nothing_listens_and_no_key(meter: StripeMeter) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    nowhere = StripeMeter(api_key=KEY, api_base=f"http://127.0.0.1:{port}")
    with pytest.raises(Retryable, match="connect_failed"):
        await nowhere.report(usage(), timeout_s=5)
    await nowhere.close()
    with pytest.raises(NotConfigured) as caught:
        await StripeMeter(api_key=None).report(usage(), timeout_s=5)
    assert caught.value.missing == ["STRIPE_API_KEY"]


async def test_an_identifier_counts_once_in_24_hours(stripe_api: FakeStripe, meter: StripeMeter) -> None:
    assert await meter.report(usage(), timeout_s=5) == "accepted"
    for has_code in (True, False):
        stripe_api.has_duplicate_code = has_code
        assert await meter.report(usage(value=7), timeout_s=5) == "duplicate"
    stripe_api.offset = timedelta(hours=24, minutes=1)
    assert await meter.report(usage(value=7), timeout_s=5) == "accepted"
    start = (datetime.now(UTC) - timedelta(hours=1)).replace(second=0, microsecond=0)
    asked: dict[str, Any] = {
        "event_name": EMAIL,
        "stripe_customer_id": "cus_1",
        "start": start,
        "end": start + timedelta(hours=2),
    }
    assert await meter.sum_of(**asked, timeout_s=5) == 12
    headers = {"Authorization": f"Bearer {KEY}"}
    undo = {"event_name": EMAIL, "type": "cancel", "cancel[identifier]": "one"}
    path = "/v1/billing/meter_event_adjustments"
    assert requests.post(stripe_api.url + path, data=undo, headers=headers, timeout=5).ok
    assert await meter.sum_of(**asked, timeout_s=5) == 5, "only what came within 24 hours can be canceled"
    with pytest.raises(Permanent, match="no active meter"):
        await meter.sum_of(**{**asked, "event_name": "other"}, timeout_s=5)


@pytest.mark.parametrize(
    "fields",
    [
        {"event_name": "unknown"},
        {"identifier": "x" * 101},
        {"stripe_customer_id": ""},
        {"ago": timedelta(days=35, minutes=1)},
        {"ago": -timedelta(minutes=6)},
    ],
)
async def test_what_stripe_would_refuse_is_refused(
    stripe_api: FakeStripe, meter: StripeMeter, fields: dict[str, Any]
) -> None:
    if "ago" in fields:  # reckoned when the test runs: the list was made when it was collected
        fields = {"at": datetime.now(UTC) - fields["ago"]}
    with pytest.raises(Permanent):
        await meter.report(usage(**fields), timeout_s=5)
    assert stripe_api.events == []
