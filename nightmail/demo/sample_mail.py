"""What the two sample orgs send. The same random seed every time; no address or number here belongs to anyone."""

from __future__ import annotations

import random
import unicodedata
from datetime import datetime, timedelta
from html import escape
from typing import Any

SHOP, CLINIC = "Alpenglow Outfitters", "Harbour Lane Clinic"
SHOP_SENDER = "Alpenglow Outfitters <orders@alpenglow.example.com>"
CLINIC_SENDER = "Harbour Lane Clinic <desk@harbourlane.example.org>"
LONG_TEXT = (
    "Снегопад на перевале: доставка заказа 20417 переносится на завтра, с 9:00 до 13:00. Ответьте 1, чтобы подтвердить."
)
"""Outside GSM-7 and longer than 70 characters: two segments of at most 67 UCS-2 units each."""

FIRST = (
    "Ada", "Amara", "Anouk", "Benedikt", "Chiara", "Chloé", "Daniel", "Dmitri", "Elif", "Emil", "Farah",
    "Gabriel", "Hana", "Imogen", "Ivo", "Jasper", "João", "Kenji", "Lars", "Leila", "Lucía", "Maja", "Malik",
    "Mateo", "Mirela", "Nadia", "Niamh", "Noor", "Oisín", "Olga", "Pavel", "Priya", "Quentin", "Rosa", "Samira",
    "Søren", "Tadeusz", "Theo", "Uma", "Vera", "Wanjiru", "Xenia", "Yusuf", "Zoë",
)  # fmt: skip
LAST = (
    "Abbott", "Almeida", "Baptiste", "Bergström", "Castellanos", "Dubois", "Eriksen", "Fitzgerald", "Grünwald",
    "Haddad", "Ivanova", "Jansen", "Kowalska", "Laurent", "Moreau", "Nakamura", "Okafor", "Petrov", "Quispe",
    "Rossi", "Silva", "Tanaka", "Ueda", "Varga", "Weiss", "Yilmaz", "Zhang",
)  # fmt: skip
GOODS = (
    "merino base layer", "enamel mug", "avalanche shovel", "down jacket", "trail map 1:25 000", "head torch",
    "rope, 60 m", "wool socks, three pairs", "camping stove", "folding saw", "rucksack, 38 l", "gaiters",
)  # fmt: skip
VISITS = ("check-up", "vaccination", "eye test", "blood test", "physiotherapy", "dental cleaning")
NUMBERS = ("+1202555", "+1415555", "+1312555")

PAGE = """<!doctype html><html><body style="margin:0;background:#f3f4f8;font-family:Georgia,serif;color:#1f2a44">
<table role="presentation" width="100%" cellpadding="0" cellspacing="0"><tr><td align="center" style="padding:28px">
<table role="presentation" width="560" cellpadding="0" cellspacing="0" style="background:#fff;border-radius:10px">
<tr><td style="padding:22px 32px;background:{colour};color:#fff;border-radius:10px 10px 0 0">{sender}</td></tr>
<tr><td style="padding:28px 32px;line-height:1.6;font-size:16px">{body}</td></tr>
<tr><td style="padding:16px 32px 26px;color:#8088a0;font-size:13px">{footer}</td></tr>
</table></td></tr></table></body></html>"""


class SampleMail:
    """Makes bodies of API requests, one person after the other."""

    def __init__(self, seed: int = 2026) -> None:
        self._random = random.Random(seed)
        self._number = 20_000

    def order(self) -> dict[str, Any]:
        """Return an order confirmation."""
        name, address = self._person()
        self._number += self._random.randint(1, 9)
        goods = self._random.sample(GOODS, self._random.randint(1, 3))
        prices = [self._random.randint(9, 240) for _ in goods]
        rows = "".join(f"<li>{escape(g)}: {p}.00 €</li>" for g, p in zip(goods, prices, strict=True))
        return {
            "from": SHOP_SENDER,
            "to": [f"{name} <{address}>"],
            "subject": f"Order {self._number} is confirmed",
            "html": _shop_page(
                f"<p>Dear {escape(name)},</p><p>thank you. We are packing:</p><ul>{rows}</ul>"
                f"<p><b>Total {sum(prices)}.00 €</b></p>"
            ),
            "text": f"Dear {name}, thank you. We are packing {', '.join(goods)}. Total {sum(prices)}.00 EUR.",
            "tags": [{"name": "kind", "value": "order"}],
        }

    def shipping(self, at: datetime) -> dict[str, Any]:
        """Return a shipping notice for a later time."""
        name, address = self._person()
        self._number += 1
        text = f"Dear {name}, order {self._number} leaves our store with the night train and is with you tomorrow."
        return {
            "from": SHOP_SENDER,
            "to": address,
            "subject": f"Order {self._number} is on its way",
            "html": _shop_page(f"<p>{escape(text)}</p>"),
            "text": text,
            "scheduled_at": at.isoformat(),
            "tags": [{"name": "kind", "value": "shipping"}],
        }

    def newsletter(self) -> dict[str, Any]:
        """Return one copy of a newsletter."""
        name, address = self._person()
        return {
            "from": SHOP_SENDER,
            "to": address,
            "subject": "First snow: what to pack, and what to leave at home",
            "html": _shop_page(
                f"<p>Dear {escape(name)},</p><p>the passes are white since Tuesday. Three things we would not go "
                "without: a spare layer, a head torch, and somebody who knows when you are due back.</p>"
            ),
            "text": f"Dear {name}, the passes are white since Tuesday. Pack a spare layer and a head torch.",
            "headers": {"List-Id": "winter.alpenglow.example.com"},
        }

    def appointment(self, at: datetime | None) -> dict[str, Any]:
        """Return an appointment reminder, for now or for a later time."""
        name, address = self._person()
        visit = self._random.choice(VISITS)
        day = datetime(2026, 12, 1) + timedelta(days=self._random.randint(0, 27), hours=self._random.randint(8, 17))  # noqa: DTZ001 - a text
        text = f"Dear {name}, we expect you for your {visit} on {day:%A, %d %B at %H:%M}."
        later = {"scheduled_at": at.isoformat()} if at is not None else {}
        return {
            "from": CLINIC_SENDER,
            "to": f"{name} <{address}>",
            "subject": f"Your {visit} on {day:%d %B}",
            "html": _clinic_page(f"<p>{escape(text)}</p><p>If this does not suit you, reply to this mail.</p>"),
            "text": text,
            "tags": [{"name": "kind", "value": "appointment"}],
            **later,
        }

    def sms(self, at: datetime | None = None) -> dict[str, Any]:
        """Return a delivery SMS, for now or for a later time."""
        self._number += 1
        later = {"scheduled_at": at.isoformat()} if at is not None else {}
        hour = self._random.randint(9, 16)
        return {
            "to": self.number(),
            "text": f"Alpenglow: order {self._number} arrives today between {hour}:00 and {hour + 2}:00.",
            **later,
        }

    def letter(self, to: str | list[str], subject: str, text: str, **fields: Any) -> dict[str, Any]:
        """Return a mail of the clinic to somebody in particular."""
        html = _clinic_page(f"<p>{escape(text)}</p>")
        return {"from": CLINIC_SENDER, "to": to, "subject": subject, "html": html, "text": text, **fields}

    def number(self) -> str:
        """Return a phone number from the range kept for fiction."""
        return f"{self._random.choice(NUMBERS)}01{self._random.randint(0, 99):02d}"

    def _person(self) -> tuple[str, str]:
        first, last = self._random.choice(FIRST), self._random.choice(LAST)
        plain = unicodedata.normalize("NFKD", f"{first}.{last}".lower()).encode("ascii", "ignore").decode()
        domain = self._random.choice(("example.com", "example.net"))
        return f"{first} {last}", f"{plain}.{self._random.randint(1, 9999)}@{domain}"


def _shop_page(body: str) -> str:
    return PAGE.format(sender=SHOP, colour="#23395d", body=body, footer="Alpenglow Outfitters, 1 Pass Road, Andermatt")


def _clinic_page(body: str) -> str:
    return PAGE.format(sender=CLINIC, colour="#2c6e63", body=body, footer="Harbour Lane Clinic, 7 Harbour Lane, Cork")
