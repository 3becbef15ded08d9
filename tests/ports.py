"""Ports for tests: what a test does not name is the real adapter, which dials only where it may."""

from __future__ import annotations

from ipaddress import ip_network

from nightmail.engine.send_rate import Unlimited
from nightmail.ports import BillingMeter, EmailSender, Ports, SendRate, SmsSender, SnsHost, WebhookSender
from nightmail.providers.capture import CaptureSender
from nightmail.providers.sns_http import HttpSnsHost
from nightmail.providers.stripe_meter import StripeMeter
from nightmail.providers.webhook_http import HttpWebhookSender

LOOPBACK = (ip_network("127.0.0.0/8"), ip_network("::1/128"))


def make_ports(
    *,
    email: EmailSender | None = None,
    sms: SmsSender | None = None,
    send_rate: SendRate | None = None,
    webhooks: WebhookSender | None = None,
    sns: SnsHost | None = None,
    meter: BillingMeter | None = None,
) -> Ports:
    """Return ports; webhooks may reach loopback and nothing else."""
    return Ports(
        email=email or CaptureSender(),
        sms=sms or CaptureSender(),
        send_rate=send_rate or Unlimited(),
        webhooks=webhooks or HttpWebhookSender(LOOPBACK, allow_http=True),
        sns=sns or HttpSnsHost(),
        meter=meter or StripeMeter(api_key=None),
    )
