"""Webhooks: bodies, signatures, and the run that delivers what is due."""
