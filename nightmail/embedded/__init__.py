"""PostgreSQL and Valkey that come with Nightmail: one pair per data folder, shared by all its users."""

from nightmail.embedded.servers import EmbeddedServers, start

__all__ = ["EmbeddedServers", "start"]
