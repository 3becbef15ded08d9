"""A fake Stripe with both meters."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nightmail.fakes.stripe_api import FakeStripe
from tests.stripe.billing import EMAIL, SMS


@pytest.fixture
def stripe_api() -> Iterator[FakeStripe]:
    with FakeStripe() as fake:
        fake.make_meter(EMAIL)
        fake.make_meter(SMS)
        yield fake
