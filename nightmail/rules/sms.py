"""How many segments an SMS takes: what the operator bills and usage counts.

Source: 3GPP TS 23.038 section 6.2.1 (GSM 7-bit default alphabet and its extension table), TS 23.040 section 9.2.3.24
(the concatenation header takes 6 octets of 140 from every part).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

GSM7_BASIC = frozenset(
    "@£$¥èéùìòÇ\nØø\rÅåΔ_ΦΓΛΩΠΨΣΘΞÆæßÉ !\"#¤%&'()*+,-./0123456789:;<=>?"
    "¡ABCDEFGHIJKLMNOPQRSTUVWXYZÄÖÑÜ§¿abcdefghijklmnopqrstuvwxyzäöñüà"
)
GSM7_EXTENSION = frozenset("\f^{}\\[~]|€")
GSM7_SINGLE, GSM7_PART = 160, 153
UCS2_SINGLE, UCS2_PART = 70, 67


@dataclass(frozen=True, slots=True)
class SmsSize:
    """What a text takes: `units` are septets (gsm7, an extension character is two) or UTF-16 code units (ucs2)."""

    encoding: Literal["gsm7", "ucs2"]
    units: int
    segments: int


def measure_sms(text: str) -> SmsSize:
    """Return encoding and segments of a text; no character is cut in two by the end of a part."""
    if all(char in GSM7_BASIC or char in GSM7_EXTENSION for char in text):
        costs = [1 if char in GSM7_BASIC else 2 for char in text]
        return SmsSize("gsm7", sum(costs), _count_parts(costs, GSM7_SINGLE, GSM7_PART))
    costs = [1 if char <= "\uffff" else 2 for char in text]
    return SmsSize("ucs2", sum(costs), _count_parts(costs, UCS2_SINGLE, UCS2_PART))


def _count_parts(costs: Iterable[int], single: int, part: int) -> int:
    """Fill parts one after the other; a two-unit character that does not fit begins the next part."""
    costs = list(costs)
    if sum(costs) <= single:
        return 1
    parts, used = 1, 0
    for cost in costs:
        if used + cost > part:
            parts, used = parts + 1, 0
        used += cost
    return parts
