"""The provider without outside effect: takes everything, sends nothing, for development and demonstrations."""

from __future__ import annotations

from nightmail.ports import Accepted, OutgoingEmail, OutgoingSms

__all__ = ["CaptureSender"]


class CaptureSender:
    """Accepts every email and SMS as `capture_<message id>`."""

    name = "capture"

    async def send_email(self, email: OutgoingEmail, *, timeout_s: float) -> Accepted:
        """Accept the email; raises nothing."""
        return Accepted(f"capture_{email.message_id}")

    async def send_sms(self, sms: OutgoingSms, *, timeout_s: float) -> Accepted:
        """Accept the SMS; raises nothing."""
        return Accepted(f"capture_{sms.message_id}")

    async def close(self) -> None:
        """Release nothing."""
