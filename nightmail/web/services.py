"""What the HTTP layer is given by the composition root."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from valkey.asyncio import Valkey

from nightmail.settings import LOOPBACK_HOSTS, Settings
from nightmail.store.database import Database

TEMPLATES = Path(__file__).parent / "templates"


def template_environment() -> jinja2.Environment:
    """Return the templates of nightmail/web/templates, every value escaped, every missing one an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )


@dataclass(frozen=True, slots=True)
class Services:
    """Made once by the composition root, shared by all routes, never changed.

    `bound_host` is the address the server listens on. `valkey` None means rate limits per process.
    `engine` and `ports` are for the cron and dashboard routes.
    """

    settings: Settings
    database: Database
    bound_host: str
    templates: jinja2.Environment
    valkey: Valkey | None = None
    engine: Any = None
    ports: Any = None

    @property
    def is_open_to_loopback(self) -> bool:
        """Return whether a missing ADMIN_TOKEN may mean open: development, and nobody but this machine can call."""
        return self.settings.nightmail_env == "development" and self.bound_host in LOOPBACK_HOSTS
