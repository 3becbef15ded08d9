"""Alerts and health-check pings: best effort, in the background, never in the way of a run.

store.alerts decides in one statement what opened and closed; whoever changed it tells people, so each change is told
once. Mail goes straight to the provider, not through the queue, which may be what is failing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Protocol
from urllib.parse import quote
from uuid import UUID

import aiohttp
import structlog
from structlog.typing import FilteringBoundLogger

from nightmail.engine.background import Background
from nightmail.engine.job import JobSpec
from nightmail.engine.schedule import previous_slot
from nightmail.errors import DatabaseAway
from nightmail.ids import new_claim_id, new_id, sha256
from nightmail.log import Redactor, secret_values, short_error
from nightmail.ports import OutgoingEmail, Ports
from nightmail.settings import Settings
from nightmail.store import alerts, queue
from nightmail.store.alerts import Change, Watched
from nightmail.store.database import Connection, Database

OVERDUE_AFTER = timedelta(hours=24)
SLOW_MS = 5000
HTTP_LIMIT_S = 5.0
MAIL_LIMIT_S = 10.0
EVALUATE_LIMIT_S = 10.0
NOBODY = UUID(int=0)


class Ended(Protocol):
    """What the watch needs of a run's outcome."""

    @property
    def job_id(self) -> UUID:
        """The run."""

    @property
    def job(self) -> str:
        """Its job."""

    @property
    def state(self) -> str:
        """How it ended."""


class Alerts:
    """Tells people when a preset begins to fire and when it ends; pings a health-check service about each run."""

    def __init__(
        self,
        jobs: Sequence[JobSpec],
        database: Database,
        ports: Ports,
        settings: Settings,
    ) -> None:
        self._jobs = jobs
        self._database = database
        self._ports = ports
        self._settings = settings
        self._background = Background()
        self._redact = Redactor(secret_values(settings))
        self._log: FilteringBoundLogger = structlog.get_logger()
        self._secrets = [sha256(secret.get_secret_value()) for secret in settings.cron_secret]
        self._session: aiohttp.ClientSession | None = None
        self._starts: dict[UUID, asyncio.Task[None]] = {}
        self._is_evaluating = False
        self._is_asked_again = False

    # ── runs ──

    def run_started(self, job: str, job_id: UUID) -> None:
        """Ping that a run began."""
        if self._settings.healthchecks_ping_url:
            self._starts[job_id] = self._background.start(self._ping(job, job_id, "/start"))

    def run_ended(self, outcome: Ended) -> None:
        """Ping how a run ended, and look at the presets."""
        started = self._starts.pop(outcome.job_id, None)
        if self._settings.healthchecks_ping_url and outcome.state in ("succeeded", "failed", "away"):
            suffix = "" if outcome.state == "succeeded" else "/fail"
            self._background.start(self._ping(outcome.job, outcome.job_id, suffix, after=started))
        self.evaluate_soon()

    def evaluate_soon(self) -> None:
        """Look at the presets once more; calls during a look make one further look."""
        self._is_asked_again = True
        if not self._is_evaluating:
            self._is_evaluating = True
            self._background.start(self._evaluate())

    async def close(self, seconds: float = 2.0) -> None:
        """Let notices under way leave, at most `seconds`, and close connections."""
        await self._background.drain(seconds)
        if self._session is not None:
            await self._session.close()

    # ── presets ──

    async def _evaluate(self) -> None:
        try:
            while self._is_asked_again:
                self._is_asked_again = False
                changes = await self._background.within(EVALUATE_LIMIT_S, self._database.run(self._changes))
                for change in changes:
                    self._background.start(self._tell(change))
        except (DatabaseAway, TimeoutError) as error:
            self._log.warning("alerts.not_evaluated", error=short_error(error, self._redact))
        except Exception as error:
            self._log.error("alerts.broke", exc_info=error)
        finally:
            self._is_evaluating = False

    async def _changes(self, conn: Connection) -> list[Change]:
        watched = self._watched(await queue.read_clock(conn))
        return await alerts.evaluate(conn, watched, secrets=self._secrets)

    def _watched(self, at: datetime) -> list[Watched]:
        """Return what the presets need to know of each job at this time."""
        return [
            Watched(
                job=spec.name,
                overdue_slot=previous_slot(spec.schedule, at - OVERDUE_AFTER) if self._is_ready(spec) else None,
                slow_ms=SLOW_MS if spec.holds == "table" else None,
                total_key=spec.keys[0] if "failed" in spec.keys else None,
            )
            for spec in self._jobs
        ]

    def _is_ready(self, spec: JobSpec) -> bool:
        return spec.run is not None and not spec.missing(self._settings)

    # ── channels ──

    async def _tell(self, change: Change) -> None:
        """Tell all channels; each fails alone."""
        level = self._log.error if change.change == "opened" else self._log.info
        level(
            f"alert.{change.change}",
            preset=change.preset,
            job=change.job,
            summary=change.summary,
            alert_id=str(change.alert_id),
        )
        await asyncio.gather(self._post(change), self._mail(change))

    async def _post(self, change: Change) -> None:
        """Post to the webhook: Slack and its kin read `text`, others the fields."""
        if self._settings.alert_webhook_url is None:
            return
        body = {
            "text": _for_slack(headline(change)),
            "type": f"alert.{change.change}",
            "alert": {
                "id": str(change.alert_id),
                "preset": change.preset,
                "job": change.job or None,
                "summary": change.summary,
                "openedAt": change.opened_at.isoformat(),
            },
        }
        try:
            url = self._settings.alert_webhook_url.get_secret_value()
            async with self._http().post(url, json=body, allow_redirects=False) as reply:
                if reply.status >= 300:
                    self._log.warning("alert.webhook_refused", status=reply.status)
        except Exception as error:  # best effort, whatever a stranger's server does
            self._log.warning("alert.webhook_failed", error=type(error).__name__)

    async def _mail(self, change: Change) -> None:
        if self._settings.alert_email is None:
            return
        email = OutgoingEmail(
            message_id=new_id(),
            org_id=NOBODY,
            claim_id=new_claim_id(),
            sender=self._settings.alert_email_from or self._settings.alert_email,
            to=[self._settings.alert_email],
            cc=[],
            bcc=[],
            reply_to=[],
            subject=headline(change)[:200],
            html=None,
            text=f"{change.summary}\n\nPreset: {change.preset}\nOpened: {change.opened_at:%Y-%m-%d %H:%M:%S} UTC\n",
        )
        try:
            await self._background.within(
                MAIL_LIMIT_S, partial(self._ports.email.send_email, email, timeout_s=MAIL_LIMIT_S)()
            )
        except Exception as error:  # best effort: the provider may be what is failing
            self._log.warning("alert.mail_failed", error=short_error(error, self._redact))

    async def _ping(self, job: str, job_id: UUID, suffix: str, *, after: asyncio.Task[None] | None = None) -> None:
        """Ping `<base>/<job><suffix>?rid=<job id>`, after the run's first ping has been answered."""
        if after is not None:
            await asyncio.wait({after})
        url = f"{self._settings.healthchecks_ping_url}/{quote(job)}{suffix}"
        try:
            async with self._http().get(url, params={"rid": str(job_id)}, allow_redirects=False) as reply:
                if reply.status >= 300:
                    self._log.warning("ping.refused", job=job, status=reply.status)
        except Exception as error:  # best effort, whatever a stranger's server does
            self._log.warning("ping.failed", job=job, error=type(error).__name__)

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=HTTP_LIMIT_S))
        return self._session


def headline(change: Change) -> str:
    """Return one line for people."""
    return f"[Nightmail] {'ALERT' if change.change == 'opened' else 'resolved'}: {change.summary}"


def _for_slack(text: str) -> str:
    # Slack reads <!channel> and <url|text> as commands; these three are the ones it wants escaped.
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
