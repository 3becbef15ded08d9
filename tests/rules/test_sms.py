"""Segments of SMS, at the edges of 3GPP TS 23.038 and 23.040."""

from __future__ import annotations

import pytest

from nightmail.rules.sms import GSM7_BASIC, GSM7_EXTENSION, measure_sms


@pytest.mark.parametrize(
    ("text", "encoding", "units", "segments"),
    [
        ("", "gsm7", 0, 1),
        ("a" * 160, "gsm7", 160, 1),
        ("a" * 161, "gsm7", 161, 2),
        ("a" * 306, "gsm7", 306, 2),
        ("a" * 307, "gsm7", 307, 3),
        ("€" * 80, "gsm7", 160, 1),
        ("€" * 81, "gsm7", 162, 2),
        # 153 is odd: the 77th euro does not fit behind 76 others, so 152 euros fill two parts and 153 need three
        ("€" * 152, "gsm7", 304, 2),
        ("€" * 153, "gsm7", 306, 3),
        ("a" * 152 + "€" + "a" * 152, "gsm7", 306, 3),
        ("я" * 70, "ucs2", 70, 1),
        ("я" * 71, "ucs2", 71, 2),
        ("я" * 134, "ucs2", 134, 2),
        ("я" * 135, "ucs2", 135, 3),
        ("😀" * 35, "ucs2", 70, 1),
        ("😀" * 36, "ucs2", 72, 2),
        # 67 is odd: 33 emoji a part, never half of one
        ("😀" * 66, "ucs2", 132, 2),
        ("😀" * 67, "ucs2", 134, 3),
        ("я" * 66 + "😀" + "я" * 66, "ucs2", 134, 3),
        ("a" * 159 + "ç", "ucs2", 160, 3),
        ("a" * 159 + "Ç", "gsm7", 160, 1),
        ("`", "ucs2", 1, 1),
    ],
)
def test_units_and_segments(text: str, encoding: str, units: int, segments: int) -> None:
    size = measure_sms(text)
    assert (size.encoding, size.units, size.segments) == (encoding, units, segments)


def test_the_alphabet_has_its_128_positions() -> None:
    # 128 less the escape to the extension table
    assert len(GSM7_BASIC) == 127
    assert len(GSM7_EXTENSION) == 10
    assert not GSM7_BASIC & GSM7_EXTENSION
