"""The mail that says an endpoint was disabled: best effort, straight to the provider, as alerts are."""

from __future__ import annotations

import asyncio
from uuid import UUID

from nightmail.engine.job import JobContext
from nightmail.ids import new_claim_id, new_id
from nightmail.ports import OutgoingEmail
from nightmail.rules.webhook_urls import mask_url
from nightmail.store.webhook_attempts import Disabled

MAIL_LIMIT_S = 5.0
NOBODY = UUID(int=0)


async def tell_disabled(ctx: JobContext, endpoint: Disabled) -> None:
    """Mail the operator (ALERT_EMAIL); the org itself is told by the event `webhook.disabled`."""
    settings = ctx.settings
    if settings.alert_email is None:
        return
    email = OutgoingEmail(
        message_id=new_id(),
        org_id=NOBODY,
        claim_id=new_claim_id(),
        sender=settings.alert_email_from or settings.alert_email,
        to=[settings.alert_email],
        cc=[],
        bcc=[],
        reply_to=[],
        subject="[Nightmail] a webhook endpoint was disabled",
        html=None,
        text=(
            f"Endpoint {mask_url(endpoint.url)}\n"
            f"Id       {endpoint.id}\n"
            f"Org      {endpoint.org_id} ({endpoint.env})\n"
            f"Reason   {endpoint.reason}\n\n"
            "Nothing is posted to it any more. Once it works, enable it (PATCH /webhooks/{id}, status `enabled`)\n"
            "and replay what failed (POST /webhooks/{id}/replay).\n"
        ),
    )
    try:
        async with asyncio.timeout(MAIL_LIMIT_S):
            await ctx.ports.email.send_email(email, timeout_s=MAIL_LIMIT_S)
    except Exception as error:  # best effort: the provider may be what is failing
        ctx.log.warning("webhook.notice_failed", error=type(error).__name__)
