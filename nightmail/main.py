"""The composition root: settings → servers → pools → providers → engine → ASGI app.

The only place that names them all.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from starlette.applications import Starlette
from valkey.asyncio import Valkey

from nightmail.clock import monotonic
from nightmail.embedded import start
from nightmail.engine.alerts import Alerts
from nightmail.engine.crash import CrashPoints
from nightmail.engine.heap import settle_heap
from nightmail.engine.runner import Engine
from nightmail.engine.scheduler import Dispatcher, Scheduler
from nightmail.engine.send_rate import build_send_rate, connect_valkey
from nightmail.engine.tick import Ticker
from nightmail.jobs.send_scheduled import work_lanes
from nightmail.jobs.table import jobs_for
from nightmail.ports import EmailSender, Ports, SmsSender
from nightmail.providers.aws_sms import AwsSmsSender
from nightmail.providers.capture import CaptureSender
from nightmail.providers.ses import SesSender
from nightmail.providers.smtp import SmtpSender
from nightmail.providers.sns import SnsSender
from nightmail.providers.sns_http import HttpSnsHost
from nightmail.providers.stripe_meter import StripeMeter
from nightmail.providers.webhook_http import HttpWebhookSender
from nightmail.schema.migrate import migrate
from nightmail.settings import Settings
from nightmail.store.database import Database
from nightmail.web.app import create_app
from nightmail.web.cron import cron_routes
from nightmail.web.dashboard import dashboard_routes
from nightmail.web.services import Services, template_environment
from nightmail.webhooks import deliver

DEFAULT_DATA = Path(".nightmail")
# From the signal to the last statement; with what closing takes, the whole stop stays within 10 s.
STOP_S = 7.5


@dataclass(frozen=True, slots=True)
class Servers:
    """Where PostgreSQL and Valkey are; `valkey_url` None means there is none and nothing depends on it."""

    database_url: str
    valkey_url: str | None


@contextmanager
def open_servers(settings: Settings, data: Path | None) -> Iterator[Servers]:
    """Yield the configured servers, or the embedded ones in `data` for as long as the context lasts, migrated.

    Raises EmbeddedError, MigrationError or DatabaseAway.
    """
    valkey_url = settings.valkey_url.get_secret_value() if settings.valkey_url else None
    if settings.database_url is not None and data is None:
        url = settings.database_url.get_secret_value()
        yield Servers(url, valkey_url)
        return
    with start(data or DEFAULT_DATA, valkey=valkey_url is None) as embedded:
        migrate(embedded.database_url)
        yield Servers(embedded.database_url, valkey_url or embedded.valkey_url)


@dataclass(slots=True)
class Application:
    """A process's open connections and the engine over them."""

    settings: Settings
    database: Database
    valkey: Valkey | None
    ports: Ports
    engine: Engine
    ticker: Ticker
    alerts: Alerts
    stopping: asyncio.Event
    background: list[asyncio.Task[None]] = field(default_factory=list)
    stop_by: float | None = None

    def stop(self) -> None:
        """Begin nothing more; what has begun gets until STOP_S from the first call of this."""
        self.stopping.set()
        self.stop_by = self.stop_by or monotonic() + STOP_S

    @property
    def stop_left_s(self) -> float:
        """Return the seconds that what has begun may still take; at least a fifth."""
        return max((self.stop_by or monotonic() + STOP_S) - monotonic(), 0.2)

    def start_scheduler(self) -> None:
        """Fire slots and work due messages in this process until `stopping` is set."""
        scheduler = Scheduler(self.engine, self.stopping)
        sending = Dispatcher(self.engine, "send-scheduled", work_lanes, self.stopping)
        # No platform limits a run here: a long one has fewer ends, at which slow posts would be broken off.
        delivering = Dispatcher(
            self.engine,
            "retry-webhooks",
            deliver.work,
            self.stopping,
            probe=deliver.Probe(),
            deadline_s=self.settings.job_deadline_max_s,
        )
        self.engine.after_run = None  # the dispatcher is faster
        self.background += [asyncio.create_task(one.run()) for one in (scheduler, sending, delivering)]


@asynccontextmanager
async def open_application(settings: Settings, servers: Servers) -> AsyncIterator[Application]:
    """Open pools and providers, and close them in the reverse order. Raises NotConfigured."""
    stopping = asyncio.Event()
    database = Database(servers.database_url, pool_max=settings.db_pool_max, pooler=settings.db_pooler)
    valkey = connect_valkey(servers.valkey_url) if servers.valkey_url else None
    ports = Ports(
        email=build_email_sender(settings),
        sms=build_sms_sender(settings),
        send_rate=build_send_rate(settings, database, valkey),
        webhooks=HttpWebhookSender(
            settings.webhook_allow_cidrs,
            allow_http=settings.nightmail_env != "production",
        ),
        sns=HttpSnsHost(),
        meter=build_meter(settings),
    )
    jobs = jobs_for(settings)
    alerts = Alerts(jobs, database, ports, settings)
    crash = CrashPoints.parse(settings.nightmail_crash)
    engine = Engine(jobs, database, ports, settings, socket.gethostname(), stopping, crash, alerts)
    engine.after_run = deliver.deliver_after
    await database.open()
    settle_heap()
    application = Application(settings, database, valkey, ports, engine, Ticker(engine), alerts, stopping)
    try:
        yield application
    finally:
        application.stop()
        if application.background:
            await asyncio.wait(application.background, timeout=application.stop_left_s)
        await engine.close(application.stop_left_s)
        await alerts.close(min(application.stop_left_s, 1.0))
        await ports.email.close()
        await ports.sms.close()
        await ports.webhooks.close()
        await ports.sns.close()
        await ports.meter.close()
        if valkey is not None:
            await valkey.aclose()
        await database.close()


def build_email_sender(settings: Settings) -> EmailSender:
    """Return the configured email provider. Raises NotConfigured."""
    if settings.email_provider == "ses":
        return SesSender(
            region=None,
            configuration_set=settings.ses_configuration_set,
            concurrency=settings.send_concurrency,
            timeout_s=settings.provider_call_s,
        )
    if settings.email_provider == "smtp" and settings.smtp_url is not None:
        return SmtpSender(url=settings.smtp_url.get_secret_value(), concurrency=settings.send_concurrency)
    return CaptureSender()


def build_sms_sender(settings: Settings) -> SmsSender:
    """Return the configured SMS provider. Raises NotConfigured."""
    if settings.sms_provider == "aws-sms":
        return AwsSmsSender(
            region=None,
            origination_identity=settings.sms_sender,
            configuration_set=settings.sms_configuration_set,
            concurrency=settings.send_concurrency,
            timeout_s=settings.provider_call_s,
        )
    if settings.sms_provider == "sns":
        return SnsSender(
            region=None,
            sender=settings.sms_sender,
            concurrency=settings.send_concurrency,
            timeout_s=settings.provider_call_s,
        )
    return CaptureSender()


def build_meter(settings: Settings) -> StripeMeter:
    """Return Stripe's meters; without a key they say so when they are called."""
    key = settings.stripe_api_key.get_secret_value() if settings.stripe_api_key else None
    return StripeMeter(api_key=key, api_base=settings.stripe_api_base, timeout_s=settings.provider_call_s)


def build_web(application: Application, bound_host: str) -> Starlette:
    """Return the ASGI app: API, job routes and pages over one application."""
    services = Services(
        settings=application.settings,
        database=application.database,
        valkey=application.valkey,
        bound_host=bound_host,
        templates=template_environment(),
        engine=application.engine,
        ports=application.ports,
    )
    return create_app(
        services,
        extra_routes=[
            *cron_routes(application.engine, application.ticker, application.settings, bound_host),
            *dashboard_routes(services, application.engine),
        ],
    )
