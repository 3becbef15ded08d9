"""For every operation of the table: things that make it answer, made by one tenant."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from nightmail.web.api.table import OPERATIONS
from nightmail.web.operation import Operation
from tests.web.serving import Org, Server

BUILT = [operation for operation in OPERATIONS if operation.status != 501]
WITH_ID = [operation for operation in BUILT if operation.path_kinds and operation.access != "admin"]
WITH_BODY = [operation for operation in BUILT if operation.body is not None]


def name_of(operation: Operation) -> str:
    """Return the operation's name in test ids."""
    return f"{operation.method} {operation.path}"


@dataclass(frozen=True, slots=True)
class Belongings:
    """Ids of what one tenant has, as the paths of the operations want them."""

    email: str
    sms: str
    suppression: str
    api_key: str
    org: str
    webhook: str
    event: str

    def path_of(self, operation: Operation) -> str:
        """Return the operation's path with these ids."""
        noun = operation.path.split("/")[1]
        ids = {
            "emails": self.email,
            "sms": self.sms,
            "suppressions": self.suppression,
            "api-keys": self.api_key,
            "webhooks": self.webhook,
        }
        path = operation.path.replace("{id}", ids.get(noun, self.org)).replace("{attachment_id}", "0")
        path = path.replace("{event_id}", self.event)
        return re.sub(r"\{rest:path\}", "x", path)


def make_belongings(server: Server, org: Org, key: str) -> Belongings:
    """Make one of everything with a key."""
    mail = {
        "from": "a@example.com",
        "to": "b@example.org",
        "subject": "s",
        "text": "t",
        "scheduled_at": "in 1 day",
        "attachments": [{"filename": "a.txt", "content": "YQ=="}],
    }

    def make(path: str, body: dict[str, Any]) -> str:
        answer = server.call("POST", path, key, body)
        assert answer.ok, answer.text
        return str(answer.json()["id"])

    webhook = make("/webhooks", {"endpoint": "https://hooks.example.com/", "events": ["email.bounced"]})
    return Belongings(
        email=make("/emails", mail),
        sms=make("/sms", {"to": "+15005550006", "text": "t", "scheduled_at": "in 1 day"}),
        suppression=make("/suppressions", {"email": f"x{len(key)}@example.org"}),
        api_key=make("/api-keys", {"name": "k"}),
        org=org.id,
        webhook=webhook,
        event=make(f"/webhooks/{webhook}/test", {}),
    )
