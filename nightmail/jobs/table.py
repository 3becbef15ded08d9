"""The thirteen jobs, in the order of the README: one row each, and the only list of them."""

from __future__ import annotations

from dataclasses import replace

from nightmail.engine.job import JobSpec
from nightmail.jobs import (
    cleanup_idempotency,
    credits_expire,
    credits_grant,
    report_overage,
    retry_webhooks,
    send_scheduled,
)
from nightmail.settings import Settings

JOBS: tuple[JobSpec, ...] = (
    JobSpec(
        name="send-scheduled",
        path="/api/cron/send-scheduled",
        schedule="* * * * *",
        title="Send Scheduled Job",
        starting="sending of due messages",
        keys=send_scheduled.KEYS,
        holds="rows",
        least_s=send_scheduled.LEAST_S,
        run=send_scheduled.run,
    ),
    JobSpec(
        name="retry-webhooks",
        path="/api/cron/retry-webhooks",
        schedule="*/5 * * * *",
        title="Retry Webhooks Job",
        starting="webhook retries",
        keys=retry_webhooks.KEYS,
        holds="rows",
        least_s=retry_webhooks.LEAST_RUN_S,
        run=retry_webhooks.run,
    ),
    JobSpec(
        name="probe-health",
        path="/api/cron/probe-health",
        schedule="*/5 * * * *",
        title="Probe Health Job",
        starting="health probes",
        keys=("probed", "up", "degraded", "down"),
        holds="rows",
    ),
    JobSpec(
        name="domain-verify-poll",
        path="/api/cron/domain-verify-poll",
        schedule="*/5 * * * *",
        title="Domain Verify Poll Job",
        starting="domain verification poll",
        keys=("polled", "verified", "failed", "pending", "drifted"),
        holds="rows",
    ),
    JobSpec(
        name="sms-verify-poll",
        path="/api/cron/sms-verify-poll",
        schedule="*/5 * * * *",
        title="SMS Verify Poll Job",
        starting="SMS registration poll",
        keys=("polled", "changed", "action_required", "pending"),
        holds="rows",
    ),
    JobSpec(
        name="reconcile-registrations",
        path="/api/cron/reconcile-registrations",
        schedule="*/15 * * * *",
        title="Reconcile Registrations Job",
        starting="registration reconciliation",
        keys=("claimed", "advanced", "completed", "waiting", "failed", "timed_out"),
        holds="rows",
    ),
    JobSpec(
        name="run-exports",
        path="/api/cron/run-exports",
        schedule="*/10 * * * *",
        title="Run Exports Job",
        starting="exports",
        keys=("claimed", "completed", "failed", "rows", "bytes"),
        holds="rows",
    ),
    JobSpec(
        name="rollup-stats",
        path="/api/cron/rollup-stats",
        schedule="0 2 * * *",
        title="Rollup Stats Job",
        starting="daily roll-up",
        keys=("events", "days", "rows"),
        holds="table",
    ),
    JobSpec(
        name="cleanup-idempotency",
        path="/api/cron/cleanup-idempotency",
        schedule="0 3 * * *",
        title="Cleanup Idempotency Job",
        starting="idempotency key cleanup",
        keys=cleanup_idempotency.KEYS,
        holds="table",
        destroys=True,
        run=cleanup_idempotency.run,
    ),
    JobSpec(
        name="retention",
        path="/api/cron/retention",
        schedule="0 4 * * *",
        title="Retention Job",
        starting="nightly prune",
        keys=("health_probes", "audit_logs", "daily_stats", "webhook_deliveries", "job_runs"),
        holds="table",
        destroys=True,
        after=("rollup-stats",),
    ),
    JobSpec(
        name="report-overage",
        path="/api/cron/report-overage",
        schedule="0 6 1 * *",
        title="Report Overage Job",
        starting="overage report",
        keys=report_overage.KEYS,
        holds="table",
        least_s=report_overage.LEAST_RUN_S,
        run=report_overage.run,
        missing=lambda settings: settings.missing_for_overage,
    ),
    JobSpec(
        name="credits-grant",
        path="/api/jobs/credits/grant",
        schedule="0 0 * * *",
        title="Credits Grant Job",
        starting="daily grant process",
        keys=credits_grant.KEYS,
        holds="table",
        run=credits_grant.run,
    ),
    JobSpec(
        name="credits-expire",
        path="/api/jobs/credits/expire",
        schedule="0 1 * * *",
        title="Credits Expire Job",
        starting="daily expiry process",
        keys=credits_expire.KEYS,
        holds="table",
        destroys=True,
        run=credits_expire.run,
        after=("credits-grant",),
    ),
)

# OVERAGE_REPORTING=daily: soon after midnight, because an invoice is a draft for one hour after its month.
DAILY_OVERAGE = "15 0 * * *"


def jobs_for(settings: Settings) -> tuple[JobSpec, ...]:
    """Return the jobs with the schedules that the settings ask for."""
    if settings.overage_reporting == "monthly":
        return JOBS
    return tuple(replace(spec, schedule=DAILY_OVERAGE) if spec.name == "report-overage" else spec for spec in JOBS)
