"""The official Resend SDK for Node, unmodified, against a real server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.web.serving import Org, Server

FOLDER = os.environ.get("NODE_RESEND", "")
SCRIPT = Path(__file__).parent / "resend.mjs"


@pytest.mark.skipif(not FOLDER, reason="NODE_RESEND names no folder with `npm install resend@6.38.0`")
@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_node_sdk(server: Server, org: Org) -> None:
    ran = subprocess.run(
        ["node", str(SCRIPT), FOLDER, server.url, org.live_key],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "RESEND_BASE_URL": ""},
    )
    assert ran.returncode == 0, ran.stderr
    steps: dict[str, dict[str, Any]] = {}
    for line in ran.stdout.splitlines():
        if line.startswith('{"step"'):
            step = json.loads(line)
            steps[step["step"]] = step

    def data(step: str) -> Any:
        assert steps[step]["error"] is None, steps[step]
        return steps[step]["data"]

    def error(step: str) -> tuple[int, str]:
        assert steps[step]["data"] is None, steps[step]
        return steps[step]["error"]["statusCode"], steps[step]["error"]["name"]

    sent, later = data("send")["id"], data("send scheduled")["id"]
    found = data("get")
    assert (found["id"], found["to"], found["reply_to"]) == (sent, ["ada@example.org"], ["desk@example.com"])
    assert found["tags"] == [{"name": "category", "value": "night_mail"}]
    stored = server.rows("SELECT filename, content_id, content FROM message_attachments")
    assert [(name, id, bytes(content)) for name, id, content in stored] == [("a.bin", "logo", b"\x00\xff\x01")]
    assert (data("update")["object"], data("update")["id"]) == ("email", later)
    assert data("cancel")["id"] == data("cancel again")["id"] == later
    assert (data("list")["data"][0]["id"], data("list")["has_more"]) == (later, True)
    assert (data("list after")["data"][0]["id"], data("list after")["has_more"]) == (sent, False)
    assert len(data("batch strict")["data"]) == 2
    assert error("batch strict refused") == (422, "validation_error")
    assert len(data("batch permissive")["data"]) == 1
    assert [item["index"] for item in data("batch permissive")["errors"]] == [1]
    assert data("idempotent")["id"] == data("idempotent again")["id"]
    assert (steps["idempotent"]["replayed"], steps["idempotent again"]["replayed"]) == (None, "true")
    assert error("idempotent other") == (409, "invalid_idempotent_request")
    assert error("missing") == (404, "not_found")
    assert error("wrong key") == (403, "invalid_api_key")
    assert data("suppression")["id"] == data("suppress")["id"]
    assert [item["email"] for item in data("suppressions")["data"]] == ["bob@example.org"]
    assert data("lift")["data"][0]["deleted"] is True
    assert data("key")["token"].startswith("nm_live_")
    assert [key["name"] for key in data("keys")["data"]] == ["ci", "first live key"]
    assert data("key gone")["deleted"] is True
    webhook = data("webhook")["id"]
    assert (data("webhook")["object"], data("webhook")["signing_secret"][:6]) == ("webhook", "whsec_")
    found = data("webhook got")
    assert (found["endpoint"], found["events"]) == ("https://hooks.example.com/", ["email.bounced"])
    assert (found["status"], found["signing_secret"]) == ("enabled", data("webhook")["signing_secret"])
    assert data("webhook changed") == {"object": "webhook", "id": webhook}
    assert error("webhook replay refused") == (409, "webhook_disabled")
    assert data("webhook enabled")["id"] == webhook
    listed = data("webhooks")
    assert [(item["id"], item["status"], item["events"]) for item in listed["data"]] == [
        (webhook, "enabled", ["email.sent"])
    ]
    event = data("webhook test")["id"]
    assert [(item["id"], item["type"], item["status"]) for item in data("webhook events")["data"]] == [
        (event, "webhook.test", "pending")
    ]
    found = data("webhook event")
    assert (found["object"], found["id"], found["payload"]["type"]) == ("webhook_event", event, "webhook.test")
    assert (data("webhook attempts")["data"], data("webhook attempts")["has_more"]) == ([], False)
    assert data("webhook replay") == {"object": "webhook_event", "id": event}
    rotated = data("webhook rotated")
    assert (rotated["object"], rotated["id"]) == ("webhook", webhook)
    assert rotated["signing_secret"] not in ("", data("webhook")["signing_secret"])
    assert data("webhook gone") == {"object": "webhook", "id": webhook, "deleted": True}
    assert error("webhook missing") == (404, "not_found")
    assert error("not built") == (501, "not_implemented")
    assert server.rows("SELECT count(*) FROM messages") == [(6,)]
