"""One frozen Settings, read from the environment once.

Values are validated together; what is wrong stops the start with the variable's name and a hint, never its value.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import psycopg
from psycopg.conninfo import conninfo_to_dict
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from nightmail.errors import SettingsError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})
MIN_SECRET_LENGTH = 16
# Values printed in tutorials (the first two in the document Nightmail started from): public, hence no secrets.
SAMPLE_SECRETS = frozenset({"your-cron-secret-here", "a1b2c3d4e5f6g7h8i9j0k1l2m3n4o5p6", "changemechangeme"})
MIN_SECRET_BITS = 48.0


class Settings(BaseSettings):
    """Everything the environment decides; see docs/settings.md for one line on each."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True, hide_input_in_errors=True)

    nightmail_env: Literal["development", "test", "production"] = "development"
    database_url: SecretStr | None = None
    migrate_database_url: SecretStr | None = None
    valkey_url: SecretStr | None = None
    db_pool_max: int = Field(20, ge=2, le=20)
    db_pooler: Literal["none", "transaction"] = "none"

    cron_secret: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    cron_allowed_ips: Annotated[tuple[Network, ...], NoDecode] = ()
    trusted_proxies: Annotated[tuple[Network, ...], NoDecode] = ()
    admin_token: SecretStr | None = None
    public_url: str | None = None
    api_rate_per_s: int = Field(50, ge=1, le=100_000)

    job_deadline_s: float = Field(25, ge=1, le=3600)
    job_deadline_max_s: float = Field(300, ge=1, le=3600)
    send_lease_s: float = Field(60, ge=1, le=3600)
    provider_timeout_s: float = Field(10, gt=0, le=300)
    evidence_wait_s: float = Field(120, ge=0, le=86_400)
    send_batch: int = Field(500, ge=1, le=500)
    send_concurrency: int = Field(32, ge=1, le=512)
    send_rate_email_per_s: float | None = Field(None, gt=0)
    send_rate_sms_per_s: float | None = Field(None, gt=0)

    email_provider: Literal["ses", "smtp", "capture"] = "capture"
    sms_provider: Literal["aws-sms", "sns", "capture"] = "capture"
    smtp_url: SecretStr | None = None
    sms_sender: str | None = None
    ses_configuration_set: str | None = None
    sms_configuration_set: str | None = None
    sns_topic_arns: Annotated[tuple[str, ...], NoDecode] = ()

    webhook_allow_cidrs: Annotated[tuple[Network, ...], NoDecode] = ()
    webhook_timeout_s: float = Field(15, gt=0, le=60)
    webhook_lease_s: float = Field(60, ge=1, le=3600)
    webhook_concurrency: int = Field(100, ge=1, le=1000)
    webhook_endpoint_concurrency: int = Field(25, ge=1, le=1000)
    sms_keyword_replies: bool = True

    stripe_api_key: SecretStr | None = None
    stripe_api_base: str | None = None
    stripe_webhook_secret: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    stripe_email_overage_meter_event: str | None = Field(None, max_length=100)
    stripe_sms_overage_meter_event: str | None = Field(None, max_length=100)
    overage_reporting: Literal["monthly", "daily"] = "monthly"

    alert_webhook_url: SecretStr | None = None
    alert_email: str | None = None
    alert_email_from: str | None = None
    healthchecks_ping_url: str | None = None

    nightmail_crash: str | None = None

    @field_validator("cron_secret", mode="before")
    @classmethod
    def _split_secrets(cls, value: Any) -> Any:
        return tuple(SecretStr(part) for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("cron_secret")
    @classmethod
    def _check_secrets(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if len(value) > 2:
            raise ValueError("at most two secrets, separated by one comma, so that one can be rotated in")
        for secret in (part.get_secret_value() for part in value):
            if len(secret) < MIN_SECRET_LENGTH:
                raise ValueError(f"each secret needs at least {MIN_SECRET_LENGTH} characters: openssl rand -hex 16")
            if not re.fullmatch(r"[\x21-\x7e]+", secret):
                raise ValueError("a secret may hold visible ASCII only: no space, line end, control or accented letter")
        return value

    @field_validator("cron_allowed_ips", "trusted_proxies", "webhook_allow_cidrs", mode="before")
    @classmethod
    def _split_networks(cls, value: Any) -> Any:
        return _networks(value) if isinstance(value, str) else value

    @field_validator("sns_topic_arns", mode="before")
    @classmethod
    def _split_arns(cls, value: Any) -> Any:
        return tuple(p.strip() for p in value.split(",") if p.strip()) if isinstance(value, str) else value

    @field_validator("stripe_webhook_secret", mode="before")
    @classmethod
    def _split_signing_secrets(cls, value: Any) -> Any:
        parts = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else None
        return value if parts is None else tuple(SecretStr(part) for part in parts)

    @field_validator("stripe_api_key")
    @classmethod
    def _check_api_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not re.fullmatch(r"[\x21-\x7e]+", value.get_secret_value()):
            raise ValueError("may hold visible ASCII only: a secret or restricted key, such as rk_live_…")
        return value

    @field_validator("admin_token")
    @classmethod
    def _check_admin_token(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value()) < MIN_SECRET_LENGTH:
            raise ValueError(f"needs at least {MIN_SECRET_LENGTH} characters: openssl rand -hex 16")
        return value

    @field_validator("database_url", "migrate_database_url")
    @classmethod
    def _check_conninfo(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            try:
                conninfo_to_dict(value.get_secret_value())
            except psycopg.Error:
                # Without the driver's words: they repeat the value, password included.
                raise ValueError("must be a PostgreSQL URL such as postgresql://user:password@host/name") from None
        return value

    @field_validator("public_url", "healthchecks_ping_url", "stripe_api_base")
    @classmethod
    def _check_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an http(s) URL such as https://mail.example.com")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _check_together(self) -> Settings:
        if self.nightmail_env == "production":
            if not self.cron_secret:
                raise ValueError("CRON_SECRET: production does not start without it: openssl rand -hex 16")
            for secret in (part.get_secret_value() for part in self.cron_secret):
                if secret in SAMPLE_SECRETS or entropy_bits(secret) < MIN_SECRET_BITS:
                    raise ValueError("CRON_SECRET: a sample or guessable value; make one with: openssl rand -hex 16")
        if self.email_provider == "smtp" and self.smtp_url is None:
            raise ValueError("SMTP_URL: EMAIL_PROVIDER=smtp needs it, e.g. smtp://user:password@host:587?starttls=1")
        if self.nightmail_crash and self.nightmail_env != "test":
            raise ValueError("NIGHTMAIL_CRASH: crash points are honoured only when NIGHTMAIL_ENV=test")
        if self.job_deadline_s > self.job_deadline_max_s:
            raise ValueError("JOB_DEADLINE_S: must not be above JOB_DEADLINE_MAX_S")
        return self

    @property
    def provider_call_s(self) -> float:
        """Return the bound of one whole provider call in seconds: never over half the lease."""
        return min(self.provider_timeout_s, self.send_lease_s / 2)

    @property
    def missing_for_overage(self) -> list[str]:
        """Return the variables without which overage cannot be reported."""
        needed = ("stripe_api_key", "stripe_email_overage_meter_event", "stripe_sms_overage_meter_event")
        return [name.upper() for name in needed if getattr(self, name) is None]

    @property
    def evidence_configured(self) -> bool:
        """Return whether provider events that carry our message id reach us."""
        return bool(self.sns_topic_arns and (self.ses_configuration_set or self.sms_configuration_set))


def entropy_bits(text: str) -> float:
    """Return Shannon's estimate of the text's information, in bits (length times entropy per character)."""
    counts = Counter(text)
    return -sum(n * math.log2(n / len(text)) for n in counts.values())


def _networks(text: str) -> tuple[Network, ...]:
    try:
        return tuple(ipaddress.ip_network(part.strip(), strict=False) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError("a comma-separated list of addresses or CIDR networks, e.g. 10.0.0.0/8,::1") from error


def load(overrides: Mapping[str, Any] | None = None) -> Settings:
    """Read the environment; `overrides` (field name → value) win over it.

    Raises SettingsError with one line per unusable variable.
    """
    try:
        return Settings(**(overrides or {}))
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False, include_input=False, include_context=False):
            name = ".".join(str(part) for part in problem["loc"]).upper()
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{name}: {message}" if name else message)
        raise SettingsError("\n".join(lines)) from None
