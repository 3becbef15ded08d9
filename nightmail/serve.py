"""Serve HTTP: one process, or a parent with several workers on one listening socket.

SIGTERM and SIGINT stop cleanly: no new call is begun, calls in flight end and are recorded, the rest is released.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence

import structlog
import uvicorn
import uvloop

from nightmail.errors import DatabaseAway, NightmailError, SettingsError
from nightmail.main import Servers, build_web, open_application
from nightmail.settings import Settings

# Open connections get this long after SIGTERM; the whole stop stays within 10 s.
GRACEFUL_S = 3
RESTART_AFTER_S = 1.0
READY_LIMIT_S = 30.0
SCHEMA_RETRY_S = 1.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h
BACKLOG = 2048

log = structlog.stdlib.get_logger(__name__)


class _Server(uvicorn.Server):
    """uvicorn without its signal handling: a signal must stop the jobs too, and end in exit code 0."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises SettingsError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise SettingsError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    listener.listen(BACKLOG)
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the http:// address of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    settings: Settings,
    servers: Servers,
    listener: socket.socket,
    *,
    scheduler: bool,
    on_ready: Callable[[], None],
    migrate: Callable[[], object] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT.

    `migrate` is what could not be done yet because PostgreSQL was away: it is tried until it succeeds.
    """
    uvloop.run(serve_async(settings, servers, listener, scheduler=scheduler, on_ready=on_ready, migrate=migrate))


async def serve_async(
    settings: Settings,
    servers: Servers,
    listener: socket.socket,
    *,
    scheduler: bool,
    on_ready: Callable[[], None],
    stop: asyncio.Event | None = None,
    migrate: Callable[[], object] | None = None,
) -> None:
    """Serve until SIGTERM, SIGINT or `stop`."""
    async with open_application(settings, servers) as application:
        config = uvicorn.Config(
            build_web(application, listener.getsockname()[0]),
            loop="none",
            http="httptools",
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=65,
            timeout_graceful_shutdown=GRACEFUL_S,
            h11_max_incomplete_event_size=64 * 1024,
        )
        server = _Server(config, on_ready)

        def end() -> None:
            application.stop()
            server.should_exit = True

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end)
        helpers = [asyncio.create_task(_end_with(stop, end))] if stop is not None else []
        if migrate is not None:
            helpers.append(asyncio.create_task(_migrate_when_back(migrate)))
        if scheduler:
            application.start_scheduler()
        await server.serve(sockets=[listener])
        application.stop()
        for helper in helpers:
            helper.cancel()


async def _migrate_when_back(migrate: Callable[[], object]) -> None:
    """Bring the schema up to date as soon as PostgreSQL can be reached; until then requests get 503."""
    while True:
        try:
            await asyncio.to_thread(migrate)
        except DatabaseAway:
            await asyncio.sleep(SCHEMA_RETRY_S)
        except NightmailError as error:
            log.error("serve.schema_not_migrated", error=str(error))
            return
        else:
            log.info("serve.schema_up_to_date")
            return


def die_with_parent() -> None:
    """Ask the kernel to end this worker when its parent is gone, even by kill -9 (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == 1:
            raise SystemExit(1)


async def _end_with(stop: asyncio.Event, end: Callable[[], None]) -> None:
    await stop.wait()
    end()


def serve_workers(arguments: Sequence[str], listener: socket.socket, workers: int, on_ready: Callable[[], None]) -> int:
    """Run `workers` child processes on the socket, replace those that die, and stop them all on a signal.

    `arguments` is the child's command line; each child says it is ready with one byte on a pipe. Returns 0, or 1 when
    no child became ready in time.
    """
    stopping = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopping
        stopping = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    descriptor = listener.fileno()

    def start_child() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "nightmail", *arguments, "--socket-fd", str(descriptor), "--ready-fd", str(writer)],
            pass_fds=(descriptor, writer),
        )

    children = [start_child() for _ in range(workers)]
    ready, give_up_at = 0, time.monotonic() + READY_LIMIT_S
    while not stopping:
        if ready < workers:
            with contextlib.suppress(BlockingIOError):
                ready += len(os.read(reader, workers))
            if ready >= workers:
                on_ready()
            elif time.monotonic() > give_up_at or any(child.poll() == 2 for child in children):
                break
        for index, child in enumerate(children):
            if child.poll() is not None and not stopping and ready >= workers:
                log.error("serve.worker_died", exit_code=child.returncode)
                time.sleep(RESTART_AFTER_S)
                children[index] = start_child()
        time.sleep(0.05)
    for child in children:
        child.terminate()
    for child in children:
        child.wait()
    return 0 if ready >= workers else 1
