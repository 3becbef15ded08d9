"""Adapters of the ports in `nightmail.ports`: one file per provider, one attempt per call, our error classes only."""
