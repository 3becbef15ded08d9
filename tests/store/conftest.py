"""The worlds these tests live in."""

from tests.crash.fixtures import provider, provider_session, world

__all__ = ["provider", "provider_session", "world"]
