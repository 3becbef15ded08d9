"""The company's books, made once for all tests of a module that take back what they do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import psycopg
import pytest
import uvloop

from nightmail.embedded import EmbeddedServers
from nightmail.store.database import Connection
from tests.audit.books import Books, make_books
from tests.conftest import _fresh_database


@pytest.fixture(scope="module")
def books(
    embedded_servers: EmbeddedServers, maintenance: psycopg.Connection[Any], template_database: str, worker_id: str
) -> Iterator[Books]:
    """The books of a database of this module alone."""
    for url in _fresh_database(embedded_servers, maintenance, worker_id, template_database):
        yield uvloop.run(make_books(url))


@pytest.fixture
async def conn(books: Books) -> AsyncIterator[Connection]:
    """A connection to the books."""
    async with await psycopg.AsyncConnection[Any].connect(books.url, autocommit=True) as conn:
        yield conn
