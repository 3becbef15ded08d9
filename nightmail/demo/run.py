"""Starts everything in this process, plays the story against it, and serves on until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import secrets
import socket
from pathlib import Path
from typing import Any

import uvloop
from pydantic import SecretStr

from nightmail.clock import monotonic
from nightmail.demo.screen import Expectation, Screen
from nightmail.demo.story import ServerGone, Story, StoryError
from nightmail.errors import SettingsError
from nightmail.fakes.smtp_catcher import SmtpCatcher
from nightmail.fakes.webhook_receiver import Receiver
from nightmail.log import configure_logging
from nightmail.main import Servers, open_servers
from nightmail.serve import listen, serve_async, url_of
from nightmail.settings import Settings, load

HOST = "127.0.0.1"
PORTS_TRIED = 50
# Mails the catcher keeps whole for the checks: more than the story sends.
KEEP = 2000
# A server that was asked to stop has ended within this.
STOP_S = 10.0


def run_demo(*, data: Path, port: int, once: bool) -> int:
    """Show Nightmail at work; return the exit code: 0, or 1 when something expected did not happen (with `once`).

    Without `once` it serves until Ctrl-C or SIGTERM and returns 0. Raises EmbeddedError, MigrationError, SettingsError.
    """
    screen = Screen()
    began = monotonic()
    data.mkdir(parents=True, exist_ok=True)
    secret = secrets.token_urlsafe(24)
    settings = demo_settings(cron_secret=(SecretStr(secret),))
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((data / "demo.log").open("a", encoding="utf-8"))
        configure_logging(settings, json=False, stream=log)
        logging.getLogger("mail.log").setLevel(logging.WARNING)  # the catcher's dialogues, line by line
        listener = stack.enter_context(listen_near(port))
        screen.title("Nightmail", "messages and money, on schedule")
        screen.say("Starting PostgreSQL and Valkey …")
        try:
            servers = stack.enter_context(open_servers(settings, data))
            return uvloop.run(_demonstrate(servers, listener, secret, screen, began, data, once=once))
        except KeyboardInterrupt:
            return 0


def demo_settings(**overrides: Any) -> Settings:
    """Return settings that hang on nothing in the environment: development, open to this machine only."""
    return load(
        {
            "nightmail_env": "development",
            "database_url": None,
            "migrate_database_url": None,
            "valkey_url": None,
            "admin_token": None,
            "cron_allowed_ips": (),
            "trusted_proxies": (),
            "public_url": None,
            "api_rate_per_s": 1000,
            "email_provider": "capture",
            "sms_provider": "capture",
            "smtp_url": None,
            # The receiver of webhooks is on this machine, where none is posted to otherwise.
            "webhook_allow_cidrs": (ipaddress.ip_network(f"{HOST}/32"),),
            "alert_webhook_url": None,
            "alert_email": None,
            "healthchecks_ping_url": None,
            "stripe_api_key": None,
            "stripe_webhook_secret": (),
            "stripe_email_overage_meter_event": None,
            "stripe_sms_overage_meter_event": None,
            "nightmail_crash": None,
            **overrides,
        }
    )


def listen_near(port: int) -> socket.socket:
    """Return a listening socket on the port or the next free one. Raises SettingsError."""
    for candidate in range(port, min(port + PORTS_TRIED, 65_536)) if port else (0,):
        with contextlib.suppress(SettingsError):
            return listen(HOST, candidate)
    raise SettingsError(f"no free port between {port} and {port + PORTS_TRIED}: choose another one with --port")


async def _demonstrate(
    servers: Servers,
    listener: socket.socket,
    secret: str,
    screen: Screen,
    began: float,
    data: Path,
    *,
    once: bool,
) -> int:
    catcher = SmtpCatcher(keep=KEEP)
    smtp_url = SecretStr(await catcher.start())
    settings = demo_settings(cron_secret=(SecretStr(secret),), email_provider="smtp", smtp_url=smtp_url)
    try:
        async with Receiver() as receiver:
            story = Story(url_of(listener), secret, catcher, receiver, servers.database_url, screen)
            return await _serve_and_play(settings, servers, listener, story, screen, began, data, once=once)
    finally:
        await catcher.stop()


async def _serve_and_play(
    settings: Settings,
    servers: Servers,
    listener: socket.socket,
    story: Story,
    screen: Screen,
    began: float,
    data: Path,
    *,
    once: bool,
) -> int:
    ready, stop = asyncio.Event(), asyncio.Event()
    server = asyncio.create_task(
        serve_async(settings, servers, listener, scheduler=True, on_ready=ready.set, stop=stop)
    )
    url = url_of(listener)
    play = asyncio.create_task(_play(story, screen, ready, began, url))
    await asyncio.wait({server, play}, return_when=asyncio.FIRST_COMPLETED)
    if server.done() or await _is_ending(server, play):
        play.cancel()
        await asyncio.wait({play})
        await server
        screen.say("Stopped.")
        return 1 if once else 0
    is_met = _report(play, story, screen, url, data, once=once)
    if once:
        stop.set()
        await server
        return 0 if is_met else 1
    story.end()
    screen.console.print("\n  Running with the scheduler until Ctrl-C.")
    await server
    screen.say("Stopped.")
    return 0


async def _is_ending(server: asyncio.Task[None], play: asyncio.Task[list[Expectation]]) -> bool:
    """Return whether the story broke off because somebody stopped the server under it."""
    if isinstance(play.exception(), ServerGone):
        await asyncio.wait({server}, timeout=STOP_S)
    return server.done()


async def _play(story: Story, screen: Screen, ready: asyncio.Event, began: float, url: str) -> list[Expectation]:
    """Play the story once the server is ready. Raises StoryError."""
    await ready.wait()
    screen.say(f"Nightmail is ready at {url} after {monotonic() - began:.1f} s. Open {url}/dashboard and watch.")
    screen.console.print()
    screen.title(
        "Two sample orgs send and listen, a third sells credits",
        "email by real SMTP to a catcher in this process, SMS to the capture provider, webhooks to a receiver here",
    )
    return await story.play()


def _report(
    play: asyncio.Task[list[Expectation]], story: Story, screen: Screen, url: str, data: Path, *, once: bool
) -> bool:
    """Print what came of the story; return whether everything expected did."""
    is_met = False
    try:
        expectations = play.result()
    except StoryError as error:
        screen.say(f"✗ {error}")
    else:
        screen.console.print()
        screen.title("What was expected, and what was seen")
        is_met = screen.verdict(expectations)
        if not once:
            _print_addresses(story, screen, url)
    if not is_met:
        screen.say(f"The log is {data / 'demo.log'}.")
    return is_met


def _print_addresses(story: Story, screen: Screen, url: str) -> None:
    shop = story.orgs[0]
    screen.console.print()
    screen.title("Look around")
    screen.pair("dashboard", f"{url}/dashboard")
    screen.pair("webhooks", f"{url}/dashboard/webhooks")
    screen.pair("credits", f"{url}{story.wallet or '/dashboard/credits'}")
    screen.pair("usage", f"{url}/dashboard/usage")
    screen.pair("inbox", f"{url}/dashboard/inbox")
    screen.pair("API docs", f"{url}/docs")
    screen.console.print()
    screen.title("Send one yourself", f"as {shop.name}, with its test key; the live key delivers to the inbox")
    screen.pair("live key", shop.live)
    screen.pair("test key", shop.test)
    screen.console.print()
    screen.console.print(
        f"""curl {url}/emails \\
  -H 'Authorization: Bearer {shop.test}' -H 'Content-Type: application/json' \\
  -d '{{"from": "hello@example.com", "to": "you@example.com", "subject": "Hello", "text": "By night mail."}}'""",
        markup=False,
    )
