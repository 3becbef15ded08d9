"""The fake provider itself: its log is the ground truth, so it has to be true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nightmail.errors import ProviderError
from nightmail.fakes import script
from nightmail.fakes.script import Behaviour, Chooser, Rule, Script
from nightmail.ids import new_id
from nightmail.providers.ses import SesSender
from tests.providers.conftest import REGION, make_email, start_fake_provider

pytestmark = pytest.mark.anyio


async def test_the_log_survives_a_restart_and_counts_doubles(tmp_path: Path) -> None:
    email = make_email()
    for _ in range(2):
        fake = start_fake_provider(tmp_path)
        sender = SesSender(region=REGION, endpoint_url=fake.http_url)
        await sender.send_email(email, timeout_s=5)
        await sender.close()
        summary = fake.get("/_log/summary")
        counts = fake.get("/_log/counts?at_least=2")
        assert fake.stop() == 0
    assert summary == {"requests": 1, "total": 2, "distinct": 1, "doubles": 1, "without_id": 0}
    assert counts == {str(email.message_id): 2}
    lines = [json.loads(line) for line in (tmp_path / "taken.jsonl").read_text().splitlines()]
    assert lines[0].keys() == {
        "at", "channel", "service", "message_id", "provider_message_id", "recipients", "subject",
    }  # fmt: skip
    assert len({line["provider_message_id"] for line in lines}) == 2


async def test_a_seeded_programme_repeats_and_the_log_agrees_with_the_attempts(tmp_path: Path) -> None:
    emails = [make_email() for _ in range(40)]
    rates = {"throttle": 0.2, "reset-after": 0.2, "fail5xx": 0.1}
    results = []
    for run in range(2):
        folder = tmp_path / str(run)
        folder.mkdir()
        fake = start_fake_provider(folder, "--script", json.dumps({"seed": 7, "rates": rates}))
        sender = SesSender(region=REGION, endpoint_url=fake.http_url)
        outcomes = []
        for email in emails if run else reversed(emails):
            try:
                await sender.send_email(email, timeout_s=5)
                outcomes.append((email.message_id, "accepted"))
            except ProviderError as exc:
                outcomes.append((email.message_id, exc.code))
        await sender.close()
        results.append(dict(outcomes))
        attempts = [json.loads(line) for line in fake.attempts_log.read_text().splitlines()]
        assert len(attempts) == 40
        assert fake.get("/_log/summary")["total"] == sum(line["accepted"] for line in attempts)
        fake.stop()
    assert results[0] == results[1]
    assert len(set(results[0].values())) == 4


def test_the_random_programme_keeps_its_rates() -> None:
    chooser = Chooser(Script(seed=3, rates={Behaviour.THROTTLE: 0.25}))
    drawn = [chooser.drawn(str(new_id())) for _ in range(2000)]
    assert 400 < drawn.count(Behaviour.THROTTLE) < 600


@pytest.mark.parametrize(
    ("recipient", "behaviour"),
    [
        ("throttle@x.test", Behaviour.THROTTLE),
        ("fail5xx-after-accept+1@x.test", Behaviour.FAIL5XX_AFTER_ACCEPT),
        ("throttled@x.test", Behaviour.OK),
        ("slow-lane@x.test", Behaviour.OK),
        ("+15551239001", Behaviour.THROTTLE),
        ("+15551239017", Behaviour.DRIP),
        ("+15551239099", Behaviour.OK),
        ("+4915551239001", Behaviour.OK),
        ("who@down.test", Behaviour.FAIL5XX),
    ],
)
def test_recipients_choose_their_behaviour(recipient: str, behaviour: Behaviour) -> None:
    chooser = Chooser(Script(rules=[Rule(match="*@down.test", behaviour=Behaviour.FAIL5XX)]))
    assert chooser.choose([recipient], "") is behaviour


def test_the_first_n_times_are_counted_per_recipient() -> None:
    chooser = Chooser(Script())
    assert [chooser.choose(["hang-2x+a@x.test"], "") for _ in range(3)] == ["hang", "hang", "ok"]
    assert [chooser.choose(["hang-once+b@x.test"], "") for _ in range(2)] == ["hang", "ok"]
    assert [chooser.choose(["+15551239105"], "") for _ in range(2)] == ["reject", "ok"]


def test_the_table_in_the_documentation_is_complete() -> None:
    assert script.__doc__ is not None
    assert all(f"    {behaviour}@" in script.__doc__ for behaviour in Behaviour)
