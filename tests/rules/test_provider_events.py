"""What SES and End User Messaging report becomes our events."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import permutations
from typing import Any
from uuid import UUID

import pytest

from nightmail.ids import new_id
from nightmail.rules import messages
from nightmail.rules.provider_events import BadEvent, ProviderEvent, match_recipient, read_ses_event
from nightmail.rules.sms_events import SMS_KINDS, read_sms_event
from tests import provider_reports as said

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
ID = new_id()
A, B = "a@recipient.test", "b@recipient.test"


def events(payload: dict[str, Any]) -> list[ProviderEvent]:
    return list(read_ses_event(payload, told_at=NOW).events)


@pytest.mark.parametrize(
    ("payload", "kind", "suppresses"),
    [
        (said.ses("Send", ID, {}), "accepted", None),
        (said.delivery(ID, A), "delivered", None),
        (said.bounce(ID, A), "bounced", "bounce"),
        (
            said.bounce(ID, A, kind="Permanent", subtype="OnAccountSuppressionList", action="failed"),
            "bounced",
            "bounce",
        ),
        (said.bounce(ID, A, kind="Transient", action="failed", status="4.4.7"), "bounced", None),
        (said.bounce(ID, A, kind="Transient", subtype="MailboxFull", note=1), "bounced", None),
        (said.bounce(ID, A, kind="Transient", subtype="General", note=1), "delayed", None),
        (said.bounce(ID, A, kind="Transient", action="delayed", status="4.4.7"), "delayed", None),
        (said.bounce(ID, A, kind="Undetermined", subtype="Undetermined", note=1), "delayed", None),
        (said.bounce(ID, A, kind="Undetermined", subtype="Undetermined", status="5.0.0"), "bounced", None),
        (said.complaint(ID, A), "complained", "complaint"),
        (said.opened(ID), "opened", None),
        (said.clicked(ID), "clicked", None),
        (said.delay(ID, A), "delayed", None),
        (said.ses("Reject", ID, {"reason": "Bad content"}), "failed", None),
        (said.ses("Rendering Failure", ID, {"errorMessage": "no such field", "templateName": "t"}), "failed", None),
    ],
)
def test_each_kind_of_ses_event(payload: dict[str, Any], kind: str, suppresses: str | None) -> None:
    report = read_ses_event(payload, told_at=NOW)
    assert (report.message_id, report.provider_message_id) == (ID, said.SES_ID)
    (event,) = report.events
    assert (event.kind, event.suppresses) == (kind, suppresses)
    assert event.provider_ref
    # Feedback of an identity calls the same thing otherwise.
    payload = {**payload, "notificationType": payload["eventType"]}
    del payload["eventType"]
    assert events(payload) == [event]


def test_the_words_of_the_events() -> None:
    (bounced,) = events(said.bounce(ID, A))
    assert bounced.data == {
        "bounce": {
            "type": "Permanent",
            "subtype": "General",
            "message": "Permanent/General: smtp; 550 5.1.1 user unknown",
            "diagnostic_code": "smtp; 550 5.1.1 user unknown",
        }
    }
    assert (bounced.recipient, bounced.occurred_at) == (A, datetime(2026, 11, 23, 9, 0, 3, tzinfo=UTC))
    (click,) = events(said.clicked(ID))
    assert click.data["click"] == {
        "link": "https://example.com/",
        "ip_address": "192.0.2.1",
        "timestamp": "2026-11-23T09:00:06.000Z",
        "user_agent": "Mail/1",
    }
    assert events(said.complaint(ID, A))[0].data == {"complaint": {"type": "abuse"}}
    assert events(said.ses("Reject", ID, {"reason": "Bad content"}))[0].data == {
        "reason": "refused by SES: Bad content"
    }


def test_a_report_may_name_several_recipients_and_not_spam_is_no_complaint() -> None:
    assert [event.recipient for event in events(said.bounce(ID, A, B))] == [A, B]
    assert [event.recipient for event in events(said.delivery(ID, A, B))] == [A, B]
    assert events(said.complaint(ID, A, kind="not-spam")) == []
    assert events(said.ses("Subscription", ID, {"source": "UnsubscribeHeader"})) == []


def test_opens_and_clicks_are_as_many_as_there_were() -> None:
    first, again, second = events(said.opened(ID, 5)), events(said.opened(ID, 5)), events(said.opened(ID, 6))
    assert first == again
    assert first[0].provider_ref != second[0].provider_ref
    one, other = events(said.clicked(ID, "https://a.test/")), events(said.clicked(ID, "https://b.test/"))
    assert one[0].provider_ref != other[0].provider_ref


@pytest.mark.parametrize(
    ("mail", "found"),
    [
        ({"tags": {"nightmail_message": [str(ID)]}}, ID),
        ({"tags": {"nightmail_message": ["nonsense", str(ID)]}}, ID),
        ({"tags": {}, "headers": [{"name": "X-NIGHTMAIL-Message", "value": f" {ID} "}]}, ID),
        ({"tags": None, "headers": [{"name": "X-Nightmail-Message", "value": str(ID)}]}, ID),
        ({"tags": {"other": [str(ID)]}, "headers": [{"name": "X-Other", "value": str(ID)}]}, None),
        ({"tags": {"nightmail_message": ["{" + str(ID) + "}"]}}, None),
        ({"tags": {"nightmail_message": []}}, None),
    ],
)
def test_whose_message_it_is(mail: dict[str, Any], found: UUID | None) -> None:
    assert read_ses_event(said.ses("Send", None, {}, **mail), told_at=NOW).message_id == found


@pytest.mark.parametrize(
    "payload",
    [
        None,
        [],
        "Send",
        {},
        {"eventType": "Send"},
        {"eventType": 1, "mail": {"messageId": "x"}},
        {"eventType": "Send", "mail": {"messageId": 7}},
        {"eventType": "Send", "mail": {"messageId": "x", "tags": {"nightmail_message": "id"}}},
        {"eventType": "Bounce", "mail": {"messageId": "x"}},
        {"eventType": "Bounce", "mail": {"messageId": "x"}, "bounce": {"bounceType": "Permanent"}},
        {"eventType": "Delivery", "mail": {"messageId": "x"}, "delivery": {"recipients": [1]}},
        {"mail": {"messageId": "x"}},
    ],
)
def test_what_cannot_be_read_is_refused(payload: Any) -> None:
    with pytest.raises(BadEvent):
        read_ses_event(payload, told_at=NOW)


@pytest.mark.parametrize(
    "text", [None, "", "soon", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2026-11-23T09:00:00"]
)
def test_an_unreadable_time_loses_no_event(text: str | None) -> None:
    (event,) = events(said.ses("Open", ID, {"timestamp": text}))
    assert event.occurred_at == NOW


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("SENT", "accepted"),
        ("PENDING", "accepted"),
        ("QUEUED", "accepted"),
        ("SUCCESSFUL", "delivered"),
        ("DELIVERED", "delivered"),
        *((status, "bounced") for status, kind in SMS_KINDS.items() if kind == "bounced"),
        ("UNKNOWN", "delayed"),
    ],
)
def test_each_kind_of_sms_event(status: str, kind: str) -> None:
    report = read_sms_event(said.text_event(status, ID), told_at=NOW)
    (event,) = report.events
    assert (report.message_id, report.channel, event.kind, event.recipient) == (ID, "sms", kind, "+15005550006")
    assert event.data["status"] == status
    assert event.suppresses is None


def test_delivered_to_the_carrier_and_to_the_phone_are_one_event() -> None:
    (carrier,) = read_sms_event(said.text_event("SUCCESSFUL", ID), told_at=NOW).events
    (phone,) = read_sms_event(said.text_event("DELIVERED", ID), told_at=NOW).events
    assert carrier.provider_ref == phone.provider_ref
    assert len(SMS_KINDS) == 15


@pytest.mark.parametrize("stamp", [None, -1, 10**30, 0])
def test_sms_times_out_of_range_lose_no_event(stamp: int | None) -> None:
    (event,) = read_sms_event(said.text_event("SENT", ID, eventTimestamp=stamp), told_at=NOW).events
    assert event.occurred_at in (NOW, datetime(1970, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize("fields", [{"eventType": 1}, {"context": []}, {"messageId": None}, {"eventTimestamp": "1"}])
def test_sms_events_of_other_types_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(BadEvent):
        read_sms_event(said.text_event("SENT", ID, **fields), told_at=NOW)


def test_other_channels_of_the_service_are_not_ours() -> None:
    assert not read_sms_event(said.text_event("SENT", ID, eventType="MEDIA_DELIVERED"), told_at=NOW).events


@pytest.mark.parametrize(
    ("reported", "found"),
    [
        (A, A),
        ("A@Recipient.TEST", A),
        ("Ada <a@recipient.test>", A),
        ("<a@recipient.test>", A),
        ("forwarded@elsewhere.test", None),
        ("", None),
    ],
)
def test_recipients_are_matched_however_they_are_written(reported: str, found: str | None) -> None:
    assert match_recipient(reported, [A, B]) == found
    assert match_recipient(reported, [A]) == A


def test_any_order_of_reports_sums_up_to_the_same_state() -> None:
    """Each report raises the state or leaves it: the table of followers agrees with the rank."""
    for reported in permutations(messages.SUMMARY[1:]):
        for start in ("scheduled", "sent", "ambiguous"):
            state: messages.State = start
            for new in reported:
                state = new if state in messages.predecessors(new) else state
            assert state == "complained" == messages.summarise(reported)
    assert messages.summarise(["delivered", "failed"]) == "delivered"
    assert messages.summarise([]) is None
    assert "canceled" not in messages.predecessors("delivered")
