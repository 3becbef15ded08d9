"""docs/stripe.md and the doctor: events, settings and operations are those that exist, and its example works."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import requests

from nightmail.cli import stripe_checks
from nightmail.jobs.table import DAILY_OVERAGE, JOBS
from nightmail.settings import Settings
from nightmail.store.stripe_events import METER_TYPES, SNAPSHOT_TYPES
from nightmail.web.api.table import OPERATIONS
from tests.engine.place import settings_of
from tests.stripe.billing import SETTINGS
from tests.web.serving import serving

PAGE = (Path(__file__).parents[2] / "docs" / "stripe.md").read_text()


def test_the_page_names_what_exists() -> None:
    listed = set(
        re.findall(r"^((?:checkout|customer|invoice|invoice_payment|charge|v1)\.[a-z_.]+)$", PAGE, re.MULTILINE)
    )
    assert listed == SNAPSHOT_TYPES | METER_TYPES
    names = set(re.findall(r"\b(?:STRIPE|OVERAGE)_[A-Z_]+\b", PAGE))
    assert {name for name in names if not name.endswith("_")} <= {name.upper() for name in Settings.model_fields}
    operations = {(operation.method, operation.path) for operation in OPERATIONS}
    calls = {(m, p) for m, p in re.findall(r"`(GET|PUT) (/[^\s`?]+)", PAGE)}
    assert len(calls) >= 4
    assert calls <= operations
    [monthly] = [spec.schedule for spec in JOBS if spec.name == "report-overage"]
    assert f"`{monthly}`" in PAGE
    assert PAGE.count(f"`{DAILY_OVERAGE}`") == 2
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (Path(__file__).parents[2] / "docs" / link).exists(), link


def test_the_example_of_the_page_buys_a_pack(database_url: str) -> None:
    [text] = re.findall(r"<<'JSON'\n(.*?)JSON\n", PAGE, re.DOTALL)
    with serving(database_url, stripe_webhook_secret="whsec_try_it_out") as server:
        body = json.dumps(json.loads(text.replace("ORG", server.make_org().id))).encode()
        made = subprocess.run(
            [sys.executable, "-m", "nightmail.fakes.stripe_webhooks", "whsec_try_it_out"], input=body, check=True,
            capture_output=True,
        )  # fmt: skip
        name, _, value = made.stdout.decode().strip().partition(": ")
        answer = requests.post(f"{server.url}/inbound/stripe", data=body, headers={name: value}, timeout=30)
        assert answer.json() == {"outcome": "applied"}
        assert server.rows("SELECT balance FROM credit_accounts") == [(1000,)]


def test_the_doctor_says_what_is_missing_and_which_setting_fits() -> None:
    def overage(**settings: object) -> tuple[str, str]:
        check = stripe_checks(settings_of(**settings))[0]
        return check["state"], check["detail"]

    assert overage()[0] == "ok"
    assert overage(stripe_api_key="sk_test_x1") == (
        "bad",
        "report-overage answers 501, and months stay open: set "
        "STRIPE_EMAIL_OVERAGE_METER_EVENT, STRIPE_SMS_OVERAGE_METER_EVENT",
    )
    assert overage(**SETTINGS)[1].startswith("monthly: ")
    assert overage(**SETTINGS, overage_reporting="daily")[1].startswith("daily: ")
