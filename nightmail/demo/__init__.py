"""The demonstration: a few hundred messages through the public API on one machine, and every outcome checked."""

from __future__ import annotations

from nightmail.demo.run import run_demo

__all__ = ["run_demo"]
