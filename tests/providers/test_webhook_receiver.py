"""The webhook receiver itself: its log is the ground truth, so it has to be true."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import urllib.request
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from nightmail.fakes.webhook_receiver import Receiver
from nightmail.providers.webhook_http import HttpWebhookSender

pytestmark = pytest.mark.anyio


def ask(url: str, data: Any = None) -> Any:
    """Ask one of the control paths."""
    with urllib.request.urlopen(url, data=None if data is None else json.dumps(data).encode(), timeout=5) as answer:
        return json.load(answer)


async def test_behaviours_follow_one_another_and_requests_are_kept() -> None:
    sender = HttpWebhookSender([ip_network("127.0.0.0/8")], allow_http=True)
    async with Receiver() as receiver:
        receiver.behave("/hook", "fail 2 503 retry_after=9", "gone", "ok")
        replies = [
            await sender.post(receiver.url(path), body=b'{"n":%d}' % n, headers={"webhook-id": "a"}, timeout_s=5)
            for n, path in enumerate(["/hook"] * 6 + ["/fail/1/status/x"] * 2)
        ]
    await sender.close()
    assert [reply.status for reply in replies] == [503, 503, 200, 410, 200, 200, 500, 200]
    assert replies[0].retry_after_s == 9
    assert [request.json()["n"] for request in receiver.received("/hook")] == [0, 1, 2, 3, 4, 5]
    summary = {"total": 8, "distinct": 1, "doubles": 7, "connections": 1}
    assert receiver.summary() == {**summary, "most_open": {"/hook": 1, "/fail/1/status/x": 1}}


async def test_requests_open_at_once_are_counted_by_event_and_path() -> None:
    sender = HttpWebhookSender([ip_network("127.0.0.0/8")], allow_http=True)
    async with Receiver() as receiver:
        posts = [
            asyncio.create_task(
                sender.post(receiver.url("/hang"), body=b"", headers={"webhook-id": webhook_id}, timeout_s=5)
            )
            for webhook_id in ("a", "b", "a")
        ]
        await receiver.wait_for(3)
        receiver.release()
        await asyncio.gather(*posts)
        await sender.post(receiver.url("/ok"), body=b"", headers={"webhook-id": "a"}, timeout_s=5)
    await sender.close()
    assert sorted((r.webhook_id, r.open_at_once) for r in receiver.requests) == [("a", 1), ("a", 1), ("a", 2), ("b", 1)]
    assert receiver.most_open == {"/hang": 3, "/ok": 1}


async def test_as_a_process_with_a_log_and_controls(tmp_path: Path) -> None:
    log = tmp_path / "webhooks.jsonl"
    command = [sys.executable, "-m", "nightmail.fakes.webhook_receiver", "--log", str(log), "--exit-with-parent"]
    command += ["--behave", "/hook", "status 500"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    sender = HttpWebhookSender([ip_network("127.0.0.0/8")], allow_http=True)
    try:
        ready, url = process.stdout.readline().split()
        assert ready == "ready"

        async def post() -> int:
            reply = await sender.post(f"{url}/hook", body=b'{"a":1}', headers={"webhook-id": "one"}, timeout_s=5)
            return reply.status

        assert await post() == 500
        ask(f"{url}/_behave", {"path": "/hook", "behaviours": ["ok"]})
        assert await post() == 200
        assert ask(f"{url}/_summary")["doubles"] == 1
        assert [request["body"] for request in ask(f"{url}/_requests")] == ['{"a":1}'] * 2
        hanging = asyncio.create_task(sender.post(f"{url}/hang", body=b"", headers={}, timeout_s=5))
        while ask(f"{url}/_summary")["total"] < 3:
            await asyncio.sleep(0)
        process.kill()
        process.wait(timeout=5)
        with pytest.raises(Exception, match="reset"):
            await hanging
    finally:
        await sender.close()
        process.kill()
        process.wait(timeout=5)
        process.stdout.close()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["path"], line["webhook_id"], line["open_at_once"]) for line in lines] == [
        ("/hook", "one", 1),
        ("/hook", "one", 1),
        ("/hang", "", 1),
    ]
    assert lines[0]["headers"]["user-agent"] == "Nightmail-Webhooks/1"
