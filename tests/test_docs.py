"""What the documents promise: commands exist, links lead somewhere, examples run, generated pages are fresh."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import resend
from botocore import xform_name
from botocore.model import StringShape
from botocore.validate import ParamValidator

from nightmail.cli import app
from nightmail.jobs.table import JOBS
from nightmail.rules.sms_events import PREFIX, SMS_KINDS
from nightmail.rules.sms_keywords import KEYWORDS
from nightmail.settings import Settings
from nightmail.web.api.table import OPERATIONS
from nightmail.webhooks.signature import signature_headers
from tests.web.serving import serving

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
TEXTS = {name: (ROOT / name).read_text() for name in PAGES}
README = TEXTS["README.md"]
WEBHOOKS = (ROOT / "docs" / "webhooks.md").read_text()
INBOUND = (ROOT / "docs" / "inbound.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name, text in TEXTS.items():
        named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE))
        assert named <= targets, name


def test_every_command_that_is_named_exists() -> None:
    commands = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    for name, text in TEXTS.items():
        named = set(re.findall(r"(?:\.venv/bin/|`)nightmail ([a-z]+)", text))
        assert named <= commands, name
    assert {"serve", "demo", "jobs", "org", "doctor", "audit"} <= commands


def test_every_local_link_and_image_leads_somewhere() -> None:
    for name, text in TEXTS.items():
        links = re.findall(r"\]\(([^)#][^)]*)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
        for link in links:
            assert link.startswith("https://") or (ROOT / link).exists(), f"{name}: {link}"
        for anchor in re.findall(r"\]\(#([^)]+)\)", text):
            headings = {h.lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
            assert anchor in headings, f"{name}: #{anchor}"


def test_pictures_are_small_enough_to_be_in_a_repository() -> None:
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.stat().st_size < 300_000, picture.name


def test_the_readme_is_honest_about_what_is_not_built() -> None:
    section = README.partition("## What is not built yet")[2].partition("\n## ")[0]
    unbuilt = {spec.name for spec in JOBS if spec.run is None}
    assert set(re.findall(r"`([a-z-]+)`", section)) & {spec.name for spec in JOBS} == unbuilt
    words = "no one two three four five six seven eight nine ten eleven twelve thirteen"
    numbers = dict(enumerate(words.split()))
    built = len(JOBS) - len(unbuilt)
    assert f"{numbers[built]} of the thirteen jobs are there, {numbers[len(unbuilt)]} are not" in README
    assert f"These {numbers[len(unbuilt)]} jobs" in section


def test_every_setting_that_is_named_exists() -> None:
    names = {name.upper() for name in Settings.model_fields}
    rows = re.findall(r"^\| ((?:`[A-Z_=a-z]+`(?:, )?)+) \|", README, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([A-Z_]+)", row)}
    assert named
    assert named <= names


def test_the_settings_page_is_what_the_settings_say() -> None:
    made = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "settings_page.py")], capture_output=True, text=True, check=True
    )
    hint = "run: .venv/bin/python scripts/settings_page.py > docs/settings.md"
    assert made.stdout == (ROOT / "docs" / "settings.md").read_text(), hint


def test_the_examples_of_the_readme_send_mail(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (curl,) = (block for block in blocks(README, "sh") if block.startswith("curl "))
    arguments = shlex.split(curl)
    body: dict[str, Any] = json.loads(arguments[arguments.index("-d") + 1])
    (script,) = blocks(README, "python")
    for variable in [name for name in os.environ if name.startswith("RESEND_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setattr(resend, "api_key", None)
    monkeypatch.setattr(resend, "api_url", resend.api_url)
    with serving(database_url) as server:
        org = server.make_org()
        monkeypatch.setenv("NIGHTMAIL_KEY", org.live_key)
        answer = server.call("POST", arguments[1].removeprefix("http://127.0.0.1:8025"), org.live_key, body)
        assert answer.status_code == 200, answer.text
        exec(script.replace("http://127.0.0.1:8025", server.url), {})
        assert server.rows("SELECT count(*) FROM messages") == [(2,)]


def test_the_tables_of_the_webhooks_page_are_what_the_rules_say() -> None:
    made = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "webhooks_page.py")], capture_output=True, text=True, check=True
    )
    assert made.stdout == WEBHOOKS, "docs/webhooks.md is not what scripts/webhooks_page.py makes of it"


def test_the_webhooks_page_names_settings_and_operations_that_exist() -> None:
    names = {name.upper() for name in Settings.model_fields}
    named = set(re.findall(r"`([A-Z]+_[A-Z_]+)`", WEBHOOKS)) - {"NIGHTMAIL_KEY"}
    assert named <= names
    assert {name for name in names if name.startswith("WEBHOOK_")} <= named
    operations = {(operation.method, operation.path) for operation in OPERATIONS if operation.status != 501}
    calls = {
        (method, path.partition("?")[0])
        for method, path in re.findall(r"`(GET|POST|PATCH|DELETE)\s(/[^\s`]+)`", WEBHOOKS)
    }
    assert len(calls) >= 7
    assert calls <= operations
    for link in re.findall(r"\]\(([^)#]+)\)", WEBHOOKS):
        assert link.startswith("https://") or (ROOT / "docs" / link).exists(), link


def test_the_inbound_page_names_settings_events_and_pages_that_exist() -> None:
    names = {name.upper() for name in Settings.model_fields}
    commands = "".join(blocks(INBOUND, "sh"))
    prose = INBOUND.replace(commands, "")
    named = set(re.findall(r"`([A-Z]+_[A-Z_]+)[`=]", prose)) | set(re.findall(r"^([A-Z_]+)=", commands, re.MULTILINE))
    events = {name for name in named if name.startswith("TEXT_")} - {"TEXT_ALL"}
    assert events == {f"{PREFIX}{status}" for status in SMS_KINDS}
    assert named - events - {"TEXT_ALL"} <= names
    assert {"SNS_TOPIC_ARNS", "EVIDENCE_WAIT_S", "SES_CONFIGURATION_SET", "SMS_CONFIGURATION_SET"} <= named
    words = {word.replace(" ", "").lower() for word in re.findall(r"`([A-Z ]+)`", INBOUND)}
    assert set(KEYWORDS) <= words
    for link in re.findall(r"\]\(([^)#]+)\)", INBOUND):
        assert link.startswith("https://") or (ROOT / "docs" / link).exists(), link


def test_the_commands_of_the_inbound_page_are_ones_that_aws_knows() -> None:
    session = botocore.session.get_session()
    commands = [
        shlex.split(command.replace("\\\n", " "))
        for block in blocks(INBOUND, "sh")
        for command in re.findall(r"^aws .*?(?=^aws |\Z)", block, re.MULTILINE | re.DOTALL)
    ]
    assert len(commands) >= 10
    reported: set[str] = set()
    for _, service, operation, *arguments in commands:
        model = session.get_service_model(service)
        by_name = {xform_name(name, "-"): model.operation_model(name) for name in model.operation_names}
        shape = by_name[operation].input_shape
        assert shape is not None
        given: dict[str, Any] = {}
        while arguments:
            option = arguments.pop(0).removeprefix("--").replace("notification-endpoint", "endpoint")
            name = next(name for name in shape.members if xform_name(name, "-") == option)
            match shape.members[name].type_name:
                case "boolean":
                    given[name] = True
                case "structure" | "map":
                    given[name] = json.loads(arguments.pop(0))
                case "list":
                    given[name] = [arguments.pop(0)]
                case _:
                    given[name] = arguments.pop(0)
        errors = ParamValidator().validate(given, shape)
        assert not errors.has_errors(), (operation, errors.generate_report())
        chosen = {
            *given.get("MatchingEventTypes", ()),
            *given.get("EventDestination", {}).get("MatchingEventTypes", ()),
        }
        if chosen:
            known = model.shape_for("EventType")
            assert isinstance(known, StringShape)
            assert chosen <= set(known.enum)
        reported |= chosen
        for policy in (given.get("AttributeValue"), given.get("Attributes", {}).get("DeliveryPolicy")):
            assert policy is None or json.loads(policy)
    assert {"SEND", "BOUNCE", "COMPLAINT", "TEXT_ALL"} <= reported


def test_the_email_of_the_inbound_page_carries_the_unsubscribe_link(database_url: str) -> None:
    (email,) = blocks(INBOUND, "json")
    with serving(database_url, public_url="https://nightmail.example.com") as server:
        org = server.make_org()
        answer = server.call("POST", "/emails", org.live_key, json.loads(email))
        assert answer.status_code == 200, answer.text
        assert "https://nightmail.example.com/unsubscribe/" in str(server.rows("SELECT headers FROM message_bodies"))


def test_the_examples_of_the_webhooks_page_subscribe_and_verify(
    database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (curl,) = (block for block in blocks(WEBHOOKS, "sh") if block.startswith("curl "))
    arguments = shlex.split(curl)
    with serving(database_url) as server:
        org = server.make_org()
        path = arguments[1].removeprefix("http://127.0.0.1:8025")
        made = server.call("POST", path, org.live_key, json.loads(arguments[arguments.index("-d") + 1]))
        assert made.status_code == 201, made.text
        webhook = made.json()
        event = server.call("POST", f"/webhooks/{webhook['id']}/test", org.live_key).json()["id"]
        sent = server.call("GET", f"/webhooks/{webhook['id']}/events/{event}", org.live_key).json()
    body = json.dumps(sent["payload"]).encode()
    headers = signature_headers([webhook["signing_secret"]], webhook_id=event, timestamp=int(time.time()), body=body)
    (script,) = blocks(WEBHOOKS, "python")
    monkeypatch.setenv("WEBHOOK_SECRET", webhook["signing_secret"])
    example: dict[str, Any] = {}
    exec(script, example)
    assert [example["receive"](body, headers) for _ in range(2)] == [204, 204]
    assert example["receive"](body + b" ", headers) == 400
    assert example["receive"](body, {}) == 400
    assert capsys.readouterr().out.count("webhook.test") == 1
