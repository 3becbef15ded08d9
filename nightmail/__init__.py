"""Nightmail: a self-hosted back end for email and SMS with prepaid credits and metered overage."""

__version__ = "0.1.0"
