"""For every operation of the table: things that make it answer, made by one tenant."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from nightmail.web.api.credit_fields import Owner
from nightmail.web.api.table import OPERATIONS
from nightmail.web.operation import Operation
from tests.web.serving import ADMIN_TOKEN, Org, Server

# Whose credits the examples of the credit operations are about.
USER = "ada"

BUILT = [operation for operation in OPERATIONS if operation.status != 501]
# Those of other orgs must not be found. A user, a service and a plan are names, not ids: anybody may have the same.
WITH_ID = [
    operation
    for operation in BUILT
    if operation.path_kinds and operation.access != "admin" and not {"user", "service"} & set(operation.path_kinds)
]
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
    purchase: str

    def path_of(self, operation: Operation) -> str:
        """Return the operation's path with these ids."""
        noun = operation.path.split("/")[1]
        ids = {
            "emails": self.email,
            "sms": self.sms,
            "suppressions": self.suppression,
            "api-keys": self.api_key,
            "webhooks": self.webhook,
            "purchases": self.purchase,
            "explain": self.email,
        }
        path = operation.path.replace("{id}", ids.get(noun, self.org)).replace("{attachment_id}", "0")
        path = path.replace("{user}", USER).replace("{service}", "render").replace("{plan}", "large")
        path = path.replace("{price}", "price_1")
        path = path.replace("{entry}", "1").replace("{event_id}", self.event)
        needs_org = operation.access == "admin" and operation.query is not None and operation.query is Owner
        return re.sub(r"\{rest:path\}", "x", path) + (f"?org={self.org}" if needs_org else "")


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
        purchase=make_credits(server, org, key),
        email=make("/emails", mail),
        sms=make("/sms", {"to": "+15005550006", "text": "t", "scheduled_at": "in 1 day"}),
        suppression=make("/suppressions", {"email": f"x{len(key)}@example.org"}),
        api_key=make("/api-keys", {"name": "k"}),
        org=org.id,
        webhook=webhook,
        event=make(f"/webhooks/{webhook}/test", {}),
    )


def make_credits(server: Server, org: Org, key: str) -> str:
    """Give the user credits, spent and set aside as the examples want it; return the id of a subscription."""
    env = key.split("_")[1]
    owner = f"org={org.id}&env={env}"

    def make(path: str, token: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = server.call("POST", path, token, body)
        assert answer.ok, answer.text
        return dict(answer.json())

    make(f"/credits/{USER}/grant?{owner}", ADMIN_TOKEN, {"amount": 500, "reference_id": "welcome"})
    for number in (1, 2):
        make(f"/credits/{USER}/reserve", key, {"amount": 5, "reference_id": f"render-{number}"})
    make(f"/credits/{USER}/consume", key, {"amount": 5, "reference_id": "render-3"})
    assert server.call("PUT", "/credit-prices/render", key, {"credits": 3}).ok
    assert server.call("PUT", "/stripe/prices/price_1", ADMIN_TOKEN, {"plan": "monthly"}).ok
    bought = make(f"/purchases?{owner}", ADMIN_TOKEN, {"user_id": USER, "plan": "monthly", "external_ref": "sub_1"})
    return str(bought["id"])
