"""Fixtures of the HTTP tests: a server on a database of its own, and tenants in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from nightmail.embedded import EmbeddedServers
from tests.conftest import _fresh_database
from tests.web.serving import Org, Server, serving


@pytest.fixture
def server(database_url: str) -> Iterator[Server]:
    """A server without Valkey, whose rate limit is out of the way."""
    with serving(database_url) as running:
        yield running


@pytest.fixture(scope="module")
def module_server(
    embedded_servers: EmbeddedServers,
    maintenance: psycopg.Connection[Any],
    template_database: str,
    worker_id: str,
) -> Iterator[Server]:
    """A server for the tests of one module, each of which makes tenants of its own."""
    for url in _fresh_database(embedded_servers, maintenance, worker_id, template_database):
        with serving(url) as running:
            yield running


@pytest.fixture
def org(server: Server) -> Org:
    """A tenant."""
    return server.make_org()
