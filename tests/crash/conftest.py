"""The worlds these tests live in, and runner processes."""

from tests.crash.fixtures import nurse, provider, provider_session, world

__all__ = ["nurse", "provider", "provider_session", "world"]
