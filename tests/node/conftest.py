"""The server of the HTTP tests."""

from __future__ import annotations

from tests.web.conftest import org, server

__all__ = ["org", "server"]
