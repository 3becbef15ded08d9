"""The story: a client of the public API sends what two orgs would, then looks whether everything came to its end.

It knows Nightmail by its URL, its keys and what the mail catcher took; nothing of its inside.
"""

from __future__ import annotations

import asyncio
import base64
import re
import statistics
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp

from nightmail.clock import monotonic, now
from nightmail.demo.credits import PRESS, Credits
from nightmail.demo.sample_mail import CLINIC, LONG_TEXT, SHOP, SampleMail
from nightmail.demo.screen import Expectation, Screen
from nightmail.demo.webhooks import FLAKY, FLAKY_SCRIPT, OURS, RESENDS, Webhooks
from nightmail.errors import NightmailError
from nightmail.fakes.smtp_catcher import CaughtEmail, SmtpCatcher
from nightmail.fakes.webhook_receiver import Receiver
from nightmail.ids import new_id
from nightmail.jobs.table import JOBS

ORDERS, NEWSLETTERS, SHIPPINGS, APPOINTMENTS, SMS_NOW, SMS_LATER, TEST_ENV = 120, 100, 40, 60, 30, 10, 30
# Facts that somebody listens for: what is scheduled is told twice, SMS of the clinic and its cancellation to nobody.
TOLD = ORDERS + NEWSLETTERS + 2 * (SHIPPINGS + APPOINTMENTS + SMS_LATER) + SMS_NOW + TEST_ENV + 10
# Requests under way at once.
CONCURRENCY = 8
# Scheduled messages are spread over this, after a moment in which they are accepted.
FIRST_LATER_S, LAST_LATER_S = 3.0, 7.0
# Everything must have come to its end within this after the last due time.
SETTLE_S = 30.0
DRAW_EVERY_S = 0.25
# Reading every message's state costs the server more than drawing: seldom enough not to slow what is watched.
LOOK_EVERY_S = 1.0
PAGES_MAX = 40
TRIES = 5
FINAL = frozenset({"sent", "delivered", "failed", "canceled", "suppressed", "bounced", "complained"})

SUPPRESSED = "left.for.good@example.com"
REFUSED = "bounce-no-such-mailbox@example.com"
SUBJECT = "Übermorgen früh: Ihr Termin, 診察のご予約 🩺"
CALENDAR = b"BEGIN:VCALENDAR\r\nVERSION:2.0\r\nPRODID:-//Harbour Lane Clinic//EN\r\nEND:VCALENDAR\r\n"


class StoryError(NightmailError):
    """The demonstration cannot go on: an answer that it cannot do without did not come."""


class ServerGone(StoryError):
    """The server does not answer at all: perhaps it was asked to stop."""


@dataclass(frozen=True, slots=True)
class Keys:
    """An org of the demonstration and its two API keys."""

    org_id: str
    name: str
    live: str
    test: str


@dataclass(slots=True)
class Ids:
    """The messages of this run by what must become of them."""

    mail: list[str] = field(default_factory=list)
    sms: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    later: list[str] = field(default_factory=list)
    suppressed: str = ""
    canceled: str = ""
    failed: str = ""
    three: str = ""
    attached: str = ""
    unicode: str = ""
    replayed: str = ""
    moved: str = ""
    long_sms: str = ""

    @property
    def live_email(self) -> set[str]:
        """Return every live email accepted so far, whatever becomes of it."""
        return {*self.mail, self.suppressed, self.canceled, self.failed} - {""}

    @property
    def total(self) -> int:
        """Return how many messages were accepted."""
        return len(self.live_email) + len(self.sms) + len(self.test)


@dataclass(slots=True)
class Seen:
    """What the API says of this run's messages: the last event by id, and items of SMS by id."""

    last_event: dict[str, str] = field(default_factory=dict)
    sms: dict[str, dict[str, Any]] = field(default_factory=dict)


class Story:
    """One run of the demonstration against a server that answers at `url`."""

    def __init__(
        self,
        url: str,
        cron_secret: str,
        catcher: SmtpCatcher,
        receiver: Receiver,
        database_url: str,
        screen: Screen,
    ) -> None:
        self._url = url
        self._secret = cron_secret
        self._catcher = catcher
        self._screen = screen
        self._webhooks = Webhooks(receiver, database_url, self._call)
        self._mail = SampleMail()
        self._ids = Ids()
        self._seen = Seen()
        self._free = asyncio.Semaphore(CONCURRENCY)
        self._expectations: list[Expectation] = []
        self._session: aiohttp.ClientSession
        self._watcher: asyncio.Task[None]
        self.orgs: list[Keys] = []
        self.wallet = ""

    async def play(self) -> list[Expectation]:
        """Do everything and return what was expected and seen. Raises StoryError."""
        timeout = aiohttp.ClientTimeout(total=30)
        async with aiohttp.ClientSession(self._url, timeout=timeout) as self._session:
            self.orgs = [await self._org(SHOP, "pro", "metered"), await self._org(CLINIC, "free", "quota")]
            shop, clinic = self.orgs
            press = await self._org(PRESS, "free", "prepaid")
            credits = Credits(press.org_id, press.live, self._secret, self._call, self._try)
            await self._subscribe(shop, clinic)
            self._expectations += await credits.begin()
            with self._screen:
                async with self._watching():
                    await self._send_special(clinic)
                    await self._send_ordinary(shop, clinic)
                    await self._settle()
                    await self._webhooks.settle(self._everything())
            await self._check_messages(shop, clinic)
            self._expectations += await self._webhooks.check(self._everything())
            self._expectations += await credits.check()
            await self._check_jobs()
            await self._check_page()
            await self._check_credits_page(press, credits)
        return self._expectations

    def end(self) -> None:
        """Let the receiver only count from now on: nobody looks at what it is told any more."""
        self._webhooks.receiver.keeps = False

    # ── sending ──

    async def _org(self, name: str, plan: str, billing: str) -> Keys:
        """Return the org of this name with fresh keys; an earlier run's org is used again."""
        for org in (await self._call("GET", "/orgs?limit=100"))["data"]:
            if org["name"] == name:
                path = f"/orgs/{org['id']}/api-keys"
                live = await self._call("POST", path, None, {"name": "demo", "env": "live"})
                test = await self._call("POST", path, None, {"name": "demo", "env": "test"})
                return Keys(org["id"], name, live["token"], test["token"])
        made = await self._call("POST", "/orgs", None, {"name": name, "plan": plan, "billing": billing})
        return Keys(made["id"], name, made["live_key"], made["test_key"])

    async def _subscribe(self, shop: Keys, clinic: Keys) -> None:
        """Let both orgs listen: one in our dialect, one in Resend's, one for the test env, one that fails at first."""
        self._webhooks.receiver.behave(FLAKY, FLAKY_SCRIPT)
        subscribe = self._webhooks.subscribe
        await subscribe(shop.org_id, shop.live, "live", "/shop/messages", OURS, "nightmail")
        await subscribe(clinic.org_id, clinic.live, "live", "/clinic/resend", RESENDS, "resend")
        await subscribe(clinic.org_id, clinic.test, "test", "/clinic/test", ["message.sent"], "nightmail")
        await subscribe(clinic.org_id, clinic.live, "live", FLAKY, ["message.failed"], "nightmail", schedule="1s 1s 1s")

    async def _send_special(self, clinic: Keys) -> None:
        """Send one message for each thing that may happen to one."""
        mail, ids, key = self._mail, self._ids, clinic.live
        await self._call("POST", "/suppressions", key, {"email": SUPPRESSED})
        soon = now() + timedelta(seconds=LAST_LATER_S)

        ids.suppressed = await self._send(key, mail.letter(SUPPRESSED, "We miss you", "It has been a while."))
        ids.failed = await self._send(key, mail.letter(REFUSED, "Your results", "Your results are ready."))
        ids.canceled = await self._send(
            key, mail.letter("too.early@example.com", "Draft", "Not for sending.", scheduled_at=soon.isoformat())
        )
        await self._call("POST", f"/emails/{ids.canceled}/cancel", key)
        three = ["nurse@example.com", SUPPRESSED, "doctor@example.com"]
        ids.three = await self._send(key, mail.letter(three, "Rota for December", "The rota is out."))
        content = base64.b64encode(CALENDAR).decode()
        file = {"filename": "visit.ics", "content": content, "content_type": "text/calendar"}
        ids.attached = await self._send(
            key, mail.letter("ada@example.com", "Your visit, for your calendar", "See attachment.", attachments=[file])
        )
        ids.unicode = await self._send(key, mail.letter("jörg@example.com", SUBJECT, "Grüß Gott! Bis übermorgen. 🩺"))
        await self._send_twice(key)
        in_an_hour = (now() + timedelta(hours=1)).isoformat()
        ids.moved = await self._send(
            key, mail.letter("vera@example.com", "Earlier than planned", "A place is free.", scheduled_at=in_an_hour)
        )
        await self._call("PATCH", f"/emails/{ids.moved}", key, {"scheduled_at": soon.isoformat()})
        ids.mail += [ids.three, ids.attached, ids.unicode, ids.replayed, ids.moved]
        ids.later.append(ids.moved)
        ids.long_sms = await self._send(key, {"to": mail.number(), "text": LONG_TEXT}, "/sms")
        ids.sms.append(ids.long_sms)

    async def _send_twice(self, key: str) -> None:
        """Send the same request with the same key twice, and another body with that key."""
        name = f"demo-{new_id()}"
        headers = {"Idempotency-Key": name}
        body = self._mail.letter("leila@example.com", "Your invoice", "Thank you for your visit.")
        first = await self._call("POST", "/emails", key, body, headers)
        second = await self._call("POST", "/emails", key, body, headers)
        other = {**body, "subject": "Another invoice"}
        status, refusal = await self._try("POST", "/emails", key, other, headers)
        self._ids.replayed = first["id"]
        self._expect(
            "The same request with the same Idempotency-Key is one message",
            first == second and status == 409,
            f"same id twice; another body: {status} {refusal.get('name')}",
        )

    async def _send_ordinary(self, shop: Keys, clinic: Keys) -> None:
        """Send what two busy orgs send: at once, for later, in batches, by SMS, and in the test env."""
        mail, ids = self._mail, self._ids

        async def one(key: str, body: dict[str, Any], path: str, into: list[str]) -> None:
            message_id = await self._send(key, body, path)
            into.append(message_id)
            if "scheduled_at" in body:
                ids.later.append(message_id)

        async def many(key: str, bodies: Sequence[dict[str, Any]], into: list[str]) -> None:
            async with self._free:
                answer = await self._call("POST", "/emails/batch", key, list(bodies))
            made = [item["id"] for item in answer["data"]]
            into += made
            ids.later += [m for m, body in zip(made, bodies, strict=True) if "scheduled_at" in body]

        at_once: list[Awaitable[None]] = [
            many(shop.live, [mail.newsletter() for _ in range(NEWSLETTERS)], ids.mail),
            many(clinic.test, [mail.appointment(None) for _ in range(TEST_ENV)], ids.test),
        ]
        at_once += [one(shop.live, mail.order(), "/emails", ids.mail) for _ in range(ORDERS)]
        at_once += [one(shop.live, mail.sms(), "/sms", ids.sms) for _ in range(SMS_NOW)]
        await asyncio.gather(*at_once)
        later: list[Awaitable[None]] = [
            many(clinic.live, [mail.appointment(at) for at in _spread(APPOINTMENTS)], ids.mail)
        ]
        later += [one(shop.live, mail.shipping(at), "/emails", ids.mail) for at in _spread(SHIPPINGS)]
        later += [one(shop.live, mail.sms(at), "/sms", ids.sms) for at in _spread(SMS_LATER)]
        await asyncio.gather(*later)

    async def _send(self, key: str, body: dict[str, Any], path: str = "/emails") -> str:
        async with self._free:
            return str((await self._call("POST", path, key, body))["id"])

    # ── watching ──

    @asynccontextmanager
    async def _watching(self) -> AsyncIterator[None]:
        """Look and keep the bars up to date meanwhile."""
        self._watcher = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            self._watcher.cancel()
            await asyncio.wait({self._watcher})
        if not self._watcher.cancelled() and (error := self._watcher.exception()) is not None:
            raise error
        self._draw()

    async def _watch(self) -> None:
        next_look = monotonic() + LOOK_EVERY_S
        while True:
            self._draw()
            await asyncio.sleep(DRAW_EVERY_S)
            if monotonic() >= next_look:
                await self._look()
                next_look = monotonic() + LOOK_EVERY_S

    def _draw(self) -> None:
        ids, events = self._ids, Counter(self._seen.last_event.values())
        planned = ORDERS + NEWSLETTERS + SHIPPINGS + APPOINTMENTS + SMS_NOW + SMS_LATER + TEST_ENV + 9
        ends = [f"{events[name]} {name}" for name in ("suppressed", "canceled", "failed") if events[name]]
        self._screen.count("accepted by the API", min(ids.total, planned), planned)
        self._screen.count("sent", events["sent"], planned - 3, ", ".join(ends))
        self._screen.count("arrived by SMTP", len(self._caught()), planned - 3 - SMS_NOW - SMS_LATER - 1 - TEST_ENV)
        self._screen.count("told to webhooks", self._webhooks.arrived, TOLD)

    async def _settle(self) -> None:
        """Wait until every message has come to its end, or time is up."""
        give_up_at = monotonic() + LAST_LATER_S + SETTLE_S
        while monotonic() < give_up_at and not self._watcher.done():
            if all(self._seen.last_event.get(i) in FINAL for i in self._everything()):
                return
            await asyncio.sleep(DRAW_EVERY_S)

    def _everything(self) -> set[str]:
        return {*self._ids.live_email, *self._ids.sms, *self._ids.test}

    async def _look(self) -> None:
        """Read the newest messages of both orgs, page by page, down to the oldest that has not come to its end."""
        reads = [(org.live, "/emails", self._ids.live_email) for org in self.orgs]
        reads += [(org.live, "/sms", set(self._ids.sms)) for org in self.orgs]
        reads += [(org.test, "/emails", set(self._ids.test)) for org in self.orgs]
        for key, path, wanted in reads:
            if wanted and any(self._seen.last_event.get(i) not in FINAL for i in wanted):
                await self._read_list(key, path, wanted)

    async def _read_list(self, key: str, path: str, wanted: set[str]) -> None:
        after = ""
        oldest = min(i for i in wanted if self._seen.last_event.get(i) not in FINAL)
        for _ in range(PAGES_MAX):
            page = await self._call("GET", f"{path}?limit=100{after}", key)
            for item in page["data"]:
                if item["id"] in wanted:
                    self._seen.last_event[item["id"]] = item["last_event"]
                    if path == "/sms":
                        self._seen.sms[item["id"]] = item
            if not page["has_more"] or page["data"][-1]["id"] < oldest:
                return
            after = f"&after={page['data'][-1]['id']}"

    def _caught(self) -> dict[str, list[CaughtEmail]]:
        """Return what the catcher took of this run, by our id."""
        found: dict[str, list[CaughtEmail]] = {}
        everything = self._everything()
        for mail in self._catcher.messages:
            if mail.nightmail_message in everything:
                found.setdefault(mail.nightmail_message, []).append(mail)
        return found

    # ── checking ──

    def _expect(self, text: str, is_met: bool, seen: str) -> None:
        self._expectations.append(Expectation(text, is_met, seen))

    async def _check_messages(self, shop: Keys, clinic: Keys) -> None:
        """Compare what the API says with what the catcher has."""
        ids, caught, events = self._ids, self._caught(), self._seen.last_event
        sent = [i for i in ids.mail if events.get(i) == "sent"]
        self._expect(
            "Every live email was sent and arrived by SMTP, exactly once",
            len(sent) == len(ids.mail) and {*caught} == {*ids.mail} and all(len(c) == 1 for c in caught.values()),
            f"{len(ids.mail)} accepted, {len(sent)} sent, {sum(map(len, caught.values()))} arrived",
        )
        sms_sent = sum(events.get(i) == "sent" for i in ids.sms)
        self._expect("Every SMS was sent", sms_sent == len(ids.sms), f"{sms_sent} of {len(ids.sms)} captured")
        segments = self._seen.sms.get(ids.long_sms, {}).get("segments")
        self._expect("A long SMS outside GSM-7 counts as two segments", segments == 2, f"{segments} segments")
        test_sent = sum(events.get(i) == "sent" for i in ids.test)
        self._expect(
            "Test env: recorded as sent, never handed to SMTP",
            test_sent == len(ids.test) and not {*ids.test} & {*caught},
            f"{test_sent} of {len(ids.test)} sent, {len({*ids.test} & {*caught})} arrived",
        )
        for text, message_id, end in (
            ("A suppressed recipient gets nothing", ids.suppressed, "suppressed"),
            ("A canceled email never leaves", ids.canceled, "canceled"),
        ):
            self._expect(
                text,
                events.get(message_id) == end and message_id not in caught,
                f"{events.get(message_id)}, {len(caught.get(message_id, ()))} arrived",
            )
        failed = await self._call("GET", f"/emails/{ids.failed}", clinic.live)
        self._expect(
            "A refused address fails with the server's own words",
            failed["state"] == "failed" and "550" in (failed["last_error"] or "") and ids.failed not in caught,
            str(failed["last_error"] or failed["state"]),
        )
        self._check_caught(caught)
        await self._check_times(shop, clinic)

    def _check_caught(self, caught: Mapping[str, Sequence[CaughtEmail]]) -> None:
        """Look inside the mails that have something special."""
        ids = self._ids
        got = sorted(r for mail in caught.get(ids.three, ()) for r in mail.recipients)
        self._expect(
            "Of three recipients, one suppressed, two get it",
            got == ["doctor@example.com", "nurse@example.com"],
            ", ".join(got) or "none",
        )
        files = [
            (part.get_filename(), part.get_content())
            for mail in caught.get(ids.attached, ())
            for part in mail.message.iter_attachments()
        ]
        content = files[0][1] if files else b""
        content = content.encode() if isinstance(content, str) else content
        is_whole = len(files) == 1 and files[0][0] == "visit.ics" and content.split() == CALENDAR.split()
        seen = f"{files[0][0]}, {len(content)} bytes" if files else "none"
        self._expect("An attachment arrives whole", is_whole, seen)
        subjects = [str(mail.message["Subject"]) for mail in caught.get(ids.unicode, ())]
        self._expect("A subject in three scripts arrives as written", subjects == [SUBJECT], "".join(subjects))
        self._expect(
            "A rescheduled email leaves at its new time",
            self._seen.last_event.get(ids.moved) == "sent",
            f"{self._seen.last_event.get(ids.moved)}, moved from an hour ahead",
        )

    async def _check_times(self, shop: Keys, clinic: Keys) -> None:
        """Ask for each scheduled email when it was sent, and compare with its time."""

        async def lateness(message_id: str) -> float | None:
            for key in (shop.live, clinic.live):
                async with self._free:
                    status, mail = await self._try("GET", f"/emails/{message_id}", key)
                if status == 200 and mail["sent_at"]:
                    return _seconds(mail["sent_at"]) - _seconds(mail["scheduled_at"])
            return None

        emails = [i for i in self._ids.later if i not in self._ids.sms]
        found = await asyncio.gather(*(lateness(i) for i in emails))
        late = [value for value in found if value is not None]
        typical = statistics.median(late) * 1000 if late else 0
        self._expect(
            "Scheduled email leaves at its time, never before",
            len(late) == len(emails) and min(late, default=0) >= 0,
            f"recorded {typical:.0f} ms after it (median of {len(late)}), {max(late, default=0) * 1000:.0f} ms at most",
        )

    async def _check_jobs(self) -> None:
        """Call every job once, as a cron platform would."""
        secret = {"Authorization": f"Bearer {self._secret}"}
        done = Counter[str]()
        surprises = []
        for spec in JOBS:
            status, body = await self._try("GET", spec.path, None, None, secret)
            # The demo has no Stripe account: report-overage says which settings it lacks.
            needs_stripe = all(name.startswith("STRIPE_") for name in body.get("missing", ["something else"]))
            wanted = 200 if spec.run is not None and not needs_stripe else 501
            done["succeeded" if status == 200 else f"{status}"] += 1
            if status != wanted or (status == 200 and body.get("success") is not True):
                surprises.append(f"{spec.name}: {status}")
        built = sum(spec.run is not None for spec in JOBS)
        self._expect(
            f"All {len(JOBS)} jobs answer their cron call",
            not surprises,
            ", ".join(surprises) or f"{done['succeeded']} of {built} built: 200; not built yet, or without Stripe: 501",
        )
        status, body = await self._try("GET", JOBS[0].path, None, None, {"Authorization": "Bearer not-the-secret"})
        self._expect("A wrong secret is refused", status == 401, f"{status} {body}")

    async def _check_page(self) -> None:
        """Read the dashboard as a browser would."""
        async with self._session.get("/dashboard") as answer:
            text = await answer.text()
        named = sum(spec.name in text for spec in JOBS)
        unbuilt = sum(spec.run is None for spec in JOBS)
        self._expect(
            "The dashboard shows all jobs and says which are not built",
            answer.status == 200 and named == len(JOBS) and text.count("not built yet") == unbuilt,
            f"{answer.status}, {named} jobs, {text.count('not built yet')} not built yet",
        )
        async with self._session.get("/dashboard/webhooks") as answer:
            text = await answer.text()
        hooks = self._webhooks.hooks
        named = sum(f"/dashboard/webhooks/{hook.id}" in text for hook in hooks)
        self._expect(
            "Its page of webhooks shows how each of them fares",
            answer.status == 200 and named == len(hooks) and "1 of 3 attempts" in text,
            f"{answer.status}, {named} webhooks",
        )

    async def _check_credits_page(self, press: Keys, credits: Credits) -> None:
        """Read the list of wallets, and open one of them."""
        async with self._session.get("/dashboard/credits", params={"org": press.org_id, "q": credits.ada}) as answer:
            found = re.search(r"/dashboard/credits/(\d+)", await answer.text())
        self.wallet = f"/dashboard/credits/{found[1]}" if found else ""
        if found:
            async with self._session.get(self.wallet) as answer:
                text = await answer.text()
        is_shown = bool(found) and answer.status == 200 and credits.ada in text and "system:expiry" in text
        self._expect(
            "Its page of a wallet shows batches and both sides of each movement",
            is_shown,
            f"{answer.status}, {self.wallet or 'no wallet'}",
        )

    # ── HTTP ──

    async def _call(
        self, method: str, path: str, key: str | None = None, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Any:
        """Return the JSON of a success. Raises StoryError."""
        status, answer = await self._try(method, path, key, body, headers)
        if status >= 400:
            raise StoryError(f"{method} {path.partition('?')[0]} answered {status}: {answer}")
        return answer

    async def _try(
        self, method: str, path: str, key: str | None = None, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """Return status and JSON of whatever the answer is; 429 is asked again when it says. Raises ServerGone."""
        sent = {**({"Authorization": f"Bearer {key}"} if key else {}), **(headers or {})}
        try:
            for _ in range(TRIES):
                async with self._session.request(method, path, json=body, headers=sent) as answer:
                    content = await answer.json(content_type=None)
                if answer.status != 429:
                    break
                await asyncio.sleep(float(answer.headers.get("Retry-After", "1")))
            return answer.status, content
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ServerGone(f"{method} {path.partition('?')[0]}: {type(error).__name__} {error}") from error


def _spread(count: int) -> list[datetime]:
    """Return times a few seconds ahead, evenly apart."""
    step_s = (LAST_LATER_S - FIRST_LATER_S) / count
    return [now() + timedelta(seconds=FIRST_LATER_S + index * step_s) for index in range(count)]


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).astimezone(UTC).timestamp()
