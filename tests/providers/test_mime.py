"""What goes on the wire, read back by the standard library's parser."""

from __future__ import annotations

from datetime import UTC, datetime
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightmail.errors import Permanent
from nightmail.ids import new_id
from nightmail.ports import Attachment
from nightmail.providers.mime import build_mime, parse_mailbox
from tests.providers.conftest import make_email

DATE = datetime(2026, 11, 23, 4, 0, tzinfo=UTC)
ID = new_id()


def build(**fields: Any) -> bytes:
    return build_mime(make_email(message_id=ID, **fields), date=DATE).content


def read(content: bytes) -> EmailMessage:
    return message_from_bytes(content, _class=EmailMessage, policy=policy.default)


def names(content: bytes) -> list[str]:
    """Header names as a reader of lines sees them."""
    head = content.partition(b"\r\n\r\n")[0].decode()
    return [line.partition(":")[0] for line in head.split("\r\n") if not line.startswith((" ", "\t"))]


PLAIN_NAMES = [
    "From", "To", "Subject", "Date", "Message-ID", "X-Nightmail-Message", "MIME-Version", "Content-Type",
]  # fmt: skip

LINE_ENDS = ["\r\n", "\n", "\r", "\x0b", "\x0c", "\x00", "\x1c", "\x85", "\u2028", "\u2029", "\ud800"]


@pytest.mark.parametrize("line_end", LINE_ENDS, ids=ascii)
@pytest.mark.parametrize("place", ["subject", "sender", "to", "cc", "reply_to", "value", "name", "filename", "cid"])
def test_no_place_lets_a_header_in(line_end: str, place: str) -> None:
    evil = f"x{line_end}Bcc: evil@evil.test"
    fields: dict[str, dict[str, Any]] = {
        "subject": {"subject": evil},
        "sender": {"sender": f"{evil} <a@sender.test>"},
        "to": {"to": [f'"{evil}" <a@b.test>']},
        "cc": {"cc": [f"a{line_end}b@b.test"]},
        "reply_to": {"reply_to": [f"a@b.test{line_end}"]},
        "value": {"headers": [("X-Own", evil)]},
        "name": {"headers": [(f"X-Own{line_end}Bcc", "evil@evil.test")]},
        "filename": {"attachments": [Attachment(evil, b"", "text/plain")]},
        "cid": {"attachments": [Attachment("a", b"", "text/plain", content_id=evil)]},
    }
    with pytest.raises(Permanent):
        build(**fields[place])


def test_an_encoded_word_is_shown_as_it_was_given_and_ends_no_line() -> None:
    # CVE-2024-6923: email.policy.SMTP of Python 3.11.7 writes the decoded line break.
    evil = "=?utf-8?q?x=0ABcc:_evil@evil.test?="
    content = build(subject=evil, sender=f'"{evil}" <a@sender.test>', headers=[("X-Own", evil)])
    assert names(content) == [*PLAIN_NAMES[:6], "X-Own", *PLAIN_NAMES[6:]]
    assert b"\nBcc" not in content
    message = read(content)
    assert message["subject"] == evil
    assert message["from"].addresses[0].display_name == evil


@given(st.text(max_size=300))
def test_any_subject_is_refused_or_arrives_as_given(subject: str) -> None:
    try:
        content = build(subject=subject)
    except Permanent:
        return
    assert names(content) == PLAIN_NAMES
    assert max(map(len, content.split(b"\r\n"))) <= 998
    assert read(content)["subject"] == subject.replace("\t", " ").strip(" ")


@given(st.text(max_size=80))
def test_any_display_name_is_refused_or_arrives_as_given(name: str) -> None:
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    try:
        content = build(sender=f'"{quoted}" <a@sender.test>')
    except Permanent:
        return
    (address,) = read(content)["from"].addresses
    assert names(content) == PLAIN_NAMES
    assert address.addr_spec == "a@sender.test"
    # The parser of addresses keeps the white space between encoded words (RFC 2047 6.2 says to drop it): compare
    # without any.
    assert "".join(address.display_name.split()) == "".join(name.split())


@given(st.text(max_size=2000), st.text(max_size=2000))
def test_any_body_is_refused_or_arrives_as_given(text: str, html: str) -> None:
    message = read(build(text=text, html=html))
    plain, rich = message.get_body(("plain",)), message.get_body(("html",))
    assert plain is not None
    assert rich is not None
    assert _lines(plain.get_payload(decode=True)) == _lines(text.encode())
    assert _lines(rich.get_payload(decode=True)) == _lines(html.encode())


def _lines(content: object) -> list[bytes]:
    assert isinstance(content, bytes)
    return content.replace(b"\r\n", b"\n").replace(b"\r", b"\n").rstrip(b"\n").split(b"\n")


def test_long_lines_and_dots_and_our_own_boundary_survive() -> None:
    text = f".\n..\n--=_alternative_{ID.hex}--\n" + "x" * 5000
    content = build(text=text)
    assert max(map(len, content.split(b"\r\n"))) <= 998
    body = read(content).get_body(("plain",))
    assert body is not None
    assert _lines(body.get_payload(decode=True)) == _lines(text.encode())


def test_attachments_and_inline_images_parse_back() -> None:
    pdf = Attachment('räksmörgås "1".pdf', bytes(range(256)) * 20, "application/pdf")
    image = Attachment("logo.png", b"\x89PNG", "image/png", content_id="logo@sender.test")
    odd = Attachment("x" * 200 + ".bin", b"", "no type")
    message = read(build(html='<img src="cid:logo@sender.test">', attachments=[pdf, image, odd]))
    parts = {part.get_filename(): part for part in message.walk() if part.get_filename()}
    assert message.get_content_type() == "multipart/mixed"
    assert parts[pdf.filename].get_payload(decode=True) == pdf.content
    assert parts[pdf.filename].get_content_disposition() == "attachment"
    assert parts["logo.png"]["content-id"] == "<logo@sender.test>"
    assert parts["logo.png"].get_content_disposition() == "inline"
    assert parts[odd.filename].get_content_type() == "application/octet-stream"
    related = next(part for part in message.walk() if part.get_content_type() == "multipart/related")
    assert [part.get_content_type() for part in related.iter_parts()] == [
        "multipart/alternative",
        "image/png",
    ]
    assert all(not part.defects for part in message.walk())


def test_bcc_is_in_the_envelope_and_nowhere_in_the_bytes() -> None:
    message = build_mime(make_email(bcc=["Hidden <hidden@secret.test>"]), date=DATE)
    assert message.recipients == ["someone@recipient.test", "hidden@secret.test"]
    assert b"hidden" not in message.content.lower()
    assert b"bcc" not in message.content.lower()
    assert read(build(to=[], bcc=["hidden@secret.test"]))["to"].addresses == ()


def test_a_domain_is_written_as_a_labels_and_a_local_part_needs_smtputf8() -> None:
    message = build_mime(make_email(sender="a@bücher.test", to=["b@日本語.test"]), date=DATE)
    assert message.content.isascii()
    assert not message.smtputf8
    assert message.recipients == ["b@xn--wgv71a119e.test"]
    assert message.message_id.endswith("@xn--bcher-kva.test>")
    message = build_mime(make_email(to=["jürgen@bücher.test"]), date=DATE)
    assert message.smtputf8
    assert "To: jürgen@xn--bcher-kva.test".encode() in message.content


@pytest.mark.parametrize(
    "text",
    ["", "nobody", "@x.test", "a@", "a b@x.test", "a@b@x.test", '"q"@x.test', "a@x..test", "a@[127.0.0.1]",
     "<a@x.test", "a@x.test>b", "a@x.test,b@x.test", "x" * 65 + "@x.test", "a@" + "x" * 64 + ".test"],
)  # fmt: skip
def test_what_is_no_address_is_permanent(text: str) -> None:
    with pytest.raises(Permanent) as raised:
        parse_mailbox(text)
    assert raised.value.code == "invalid_address"


@pytest.mark.parametrize(
    "name",
    ["Bcc", "from", "MESSAGE-ID", "Content-Type", "X-SES-CONFIGURATION-SET", "X-Nightmail-Message", "Date"],
)
def test_our_headers_and_the_providers_commands_are_not_the_senders(name: str) -> None:
    with pytest.raises(Permanent) as raised:
        build(headers=[(name, "x")])
    assert raised.value.code == "reserved_header"


def test_the_same_message_has_the_same_bytes() -> None:
    attachment = Attachment("a.txt", b"a", "text/plain")
    assert build(attachments=[attachment]) == build(attachments=[attachment])
    assert f"Message-ID: <{ID}@sender.test>".encode() in build()


def test_a_structured_header_is_folded_not_encoded() -> None:
    value = "<https://x.test/" + "u" * 200 + ">, <mailto:u@x.test>"
    assert read(build(headers=[("List-Unsubscribe", value)]))["list-unsubscribe"] == value


def test_no_recipient_at_all_is_permanent() -> None:
    with pytest.raises(Permanent):
        build(to=[])
