"""Email addresses and phone numbers: checked at the door, normalised before they are compared.

Domains are lower-cased and in their ASCII (IDNA) form; the local part keeps its case, as RFC 5321 section 2.4 asks.
Numbers are E.164.
"""

from __future__ import annotations

from email.utils import formataddr
from functools import lru_cache

import phonenumbers
from email_validator import EmailNotValidError, validate_email

MAX_ENTRY_LENGTH = 1000


class BadAddress(ValueError):
    """The text is not an address we can send to; the message says why, for the caller."""


def parse_mailbox(entry: str) -> tuple[str, str]:
    """Split `Name <local@domain>` or `local@domain` into (display name, normalised address).

    Raises BadAddress.
    """
    text = entry.strip()
    if not text or len(text) > MAX_ENTRY_LENGTH:
        raise BadAddress("must be `name@example.com` or `Name <name@example.com>`")
    if any(ord(char) < 32 or ord(char) == 127 or char in "\u2028\u2029\x85" for char in text):
        raise BadAddress("must not contain line ends or control characters")
    name, address = "", text
    if text.endswith(">"):
        name, opened, rest = text[:-1].rpartition("<")
        if not opened:
            raise BadAddress("has `>` without `<`")
        name, address = name.strip(), rest.strip()
        if len(name) >= 2 and name[0] == name[-1] == '"':
            name = name[1:-1].replace('\\"', '"').replace("\\\\", "\\")
    return name, normalise_address(address)


@lru_cache(maxsize=16_384)
def normalise_address(address: str) -> str:
    """Return the address with its domain in lower-case ASCII. Raises BadAddress."""
    try:
        valid = validate_email(
            address, check_deliverability=False, allow_smtputf8=True, test_environment=True, allow_domain_literal=False
        )
    except EmailNotValidError as error:
        raise BadAddress(str(error)) from None
    return f"{valid.local_part}@{valid.ascii_domain}"


def format_mailbox(name: str, address: str) -> str:
    """Return the canonical text of a mailbox; the inverse of `parse_mailbox`."""
    if not name:
        return address
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    return formataddr((name, address)) if name.isascii() and quoted == name else f'"{quoted}" <{address}>'


def bare_address(entry: str) -> str:
    """Return the address of a canonical mailbox text."""
    return entry[entry.rindex("<") + 1 : -1] if entry.endswith(">") else entry


@lru_cache(maxsize=16_384)
def normalise_number(number: str) -> str:
    """Return the number in E.164 (`+` and up to 15 digits). Raises BadAddress."""
    if not number.startswith("+") or len(number) > 32:
        raise BadAddress("must be in E.164 form: + and country code, such as +15005550006")
    try:
        parsed = phonenumbers.parse(number, None)
    except phonenumbers.NumberParseException:
        raise BadAddress("must be in E.164 form: + and country code, such as +15005550006") from None
    if parsed.extension or not phonenumbers.is_possible_number(parsed):
        raise BadAddress("is not a possible phone number of its country")
    return phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.E164)
