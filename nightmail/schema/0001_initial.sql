-- The first schema: orgs, messages and their queue, usage, idempotency, job runs.
-- Hot tables carry no foreign key to orgs: its check would lock the org's row once per message.
-- Nothing deletes an org, and `nightmail audit` looks for rows without one.

-- The database's clock, shifted by nightmail.clock_offset in tests only. STABLE, so that it bounds index scans.
CREATE FUNCTION nm_now() RETURNS timestamptz
LANGUAGE sql STABLE PARALLEL SAFE
RETURN statement_timestamp()
    + coalesce(nullif(current_setting('nightmail.clock_offset', true), ''), '0')::interval;

-- UUIDv7: PostgreSQL 18 has it, older servers get the same layout from RFC 9562 section 5.7.
DO $do$
BEGIN
    IF to_regprocedure('pg_catalog.uuidv7()') IS NOT NULL THEN
        CREATE FUNCTION nm_uuid7() RETURNS uuid LANGUAGE sql VOLATILE PARALLEL SAFE
        RETURN uuidv7();
    ELSE
        CREATE FUNCTION nm_uuid7() RETURNS uuid LANGUAGE sql VOLATILE PARALLEL SAFE
        RETURN (
            lpad(to_hex((extract(epoch FROM clock_timestamp()) * 1000)::bigint), 12, '0')
            || '7' || substr(replace(gen_random_uuid()::text, '-', ''), 14, 19)
        )::uuid;
    END IF;
END
$do$;

CREATE TABLE orgs (
    id uuid PRIMARY KEY,
    name text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    plan text NOT NULL DEFAULT 'free' CHECK (plan IN ('free', 'pro')),
    billing text NOT NULL DEFAULT 'quota' CHECK (billing IN ('quota', 'prepaid', 'metered')),
    stripe_customer_id text,
    send_policy text NOT NULL DEFAULT 'at_least_once' CHECK (send_policy IN ('at_least_once', 'at_most_once')),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE api_keys (
    id uuid PRIMARY KEY,
    org_id uuid NOT NULL REFERENCES orgs (id),
    name text NOT NULL DEFAULT '',
    env text NOT NULL CHECK (env IN ('live', 'test')),
    token_sha256 bytea NOT NULL UNIQUE CHECK (length(token_sha256) = 32),
    last_four text NOT NULL,
    permission text NOT NULL DEFAULT 'full_access' CHECK (permission IN ('full_access', 'sending_access')),
    domain_id uuid,
    rate_per_s integer CHECK (rate_per_s > 0),
    cidrs text[] NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz,
    revoked_at timestamptz
);
CREATE INDEX api_keys_org ON api_keys (org_id, id);

-- The record of a message. Written at accept and once more when its fate is known; in between only its queue row
-- changes. No index covers a column that the second write changes, so that write stays heap-only.
CREATE TABLE messages (
    id uuid PRIMARY KEY,
    org_id uuid NOT NULL,
    env text COLLATE "C" NOT NULL CHECK (env IN ('live', 'test')),
    channel text COLLATE "C" NOT NULL CHECK (channel IN ('email', 'sms')),
    state text COLLATE "C" NOT NULL DEFAULT 'scheduled'
        CHECK (state IN ('scheduled', 'sent', 'delivered', 'bounced', 'complained', 'canceled', 'failed', 'ambiguous')),
    reason text,
    sender text NOT NULL,
    subject text,
    addresses text[] NOT NULL CHECK (cardinality(addresses) BETWEEN 1 AND 50),
    units bigint NOT NULL CHECK (units > 0),
    rating text COLLATE "C" NOT NULL DEFAULT 'included' CHECK (rating IN ('included', 'credits', 'metered')),
    period text COLLATE "C" NOT NULL CHECK (period ~ '^\d{4}-(0[1-9]|1[0-2])$'),
    send_policy text CHECK (send_policy IN ('at_least_once', 'at_most_once')),
    scheduled_at timestamptz,
    created_at timestamptz NOT NULL,
    sent_at timestamptz,
    provider_message_id text,
    last_error text
) WITH (fillfactor = 75, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_insert_scale_factor = 0.05,
        autovacuum_analyze_scale_factor = 0.05);
CREATE INDEX messages_list ON messages (org_id, env, channel, id);

-- What only the provider and the detail page read: keeps the rows above narrow.
CREATE TABLE message_bodies (
    message_id uuid PRIMARY KEY,
    to_addresses text[] NOT NULL,
    cc_addresses text[] NOT NULL DEFAULT '{}',
    bcc_addresses text[] NOT NULL DEFAULT '{}',
    reply_to text[] NOT NULL DEFAULT '{}',
    html text,
    text text,
    headers jsonb NOT NULL DEFAULT '[]',
    tags jsonb NOT NULL DEFAULT '[]',
    attachment_count smallint NOT NULL DEFAULT 0
);
CREATE TABLE message_attachments (
    message_id uuid NOT NULL,
    position smallint NOT NULL CHECK (position >= 0),
    filename text NOT NULL,
    content_type text NOT NULL,
    content_id text,
    content bytea NOT NULL,
    PRIMARY KEY (message_id, position)
);

-- One row per unfinished message; deleted in the transaction that finishes it.
--   lane        what is claimed together: live:email, live:sms (a provider each), test (no provider)
--   due_at      when it may be claimed
--   claim_id    who holds it (a row of claims), NULL when free
--   attempts    provider calls begun, counted at the gate
--   takeovers   times a begun call's end was never learned (dead runner, timeout, 5xx)
--   file_bytes  size of its attachments: they are held in memory during the call, so few at once
--   intent_at   a call has begun and its end is not known; NULL otherwise
CREATE TABLE message_queue (
    message_id uuid PRIMARY KEY,
    org_id uuid NOT NULL,
    lane text COLLATE "C" NOT NULL CHECK (lane IN ('live:email', 'live:sms', 'test')),
    due_at timestamptz NOT NULL CHECK (isfinite(due_at)),
    claim_id uuid,
    attempts smallint NOT NULL DEFAULT 0,
    takeovers smallint NOT NULL DEFAULT 0,
    file_bytes integer NOT NULL DEFAULT 0,
    intent_at timestamptz
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0,
        autovacuum_vacuum_insert_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05);
CREATE INDEX message_queue_due ON message_queue (lane, due_at) WHERE claim_id IS NULL;
CREATE INDEX message_queue_due_of_org ON message_queue (lane, org_id, due_at) WHERE claim_id IS NULL;
CREATE INDEX message_queue_claimed ON message_queue (claim_id) WHERE claim_id IS NOT NULL;

-- Hints for fair share: this org may have rows due in this minute. Only fairness rests on them; whatever they miss is
-- still found through message_queue_due.
CREATE TABLE queue_turns (
    lane text COLLATE "C" NOT NULL,
    due_minute timestamptz NOT NULL,
    org_id uuid NOT NULL,
    PRIMARY KEY (lane, due_minute, org_id)
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);

-- A lease: the holder renews this one row, not every row it holds.
CREATE TABLE claims (
    claim_id uuid PRIMARY KEY,
    runner text NOT NULL,
    lease_until timestamptz NOT NULL
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);

-- Facts only, never claim or release.
CREATE TABLE message_events (
    message_id uuid NOT NULL,
    org_id uuid NOT NULL,
    recipient text NOT NULL DEFAULT '',
    kind text COLLATE "C" NOT NULL,
    provider_ref text COLLATE "C" NOT NULL DEFAULT '',
    occurred_at timestamptz NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    written_by xid8 NOT NULL DEFAULT pg_current_xact_id(),
    data jsonb NOT NULL DEFAULT '{}',
    PRIMARY KEY (message_id, recipient, kind, provider_ref)
) WITH (autovacuum_vacuum_insert_scale_factor = 0.05);
CREATE INDEX message_events_recorded ON message_events USING brin (recorded_at);

-- What happened to single recipients of a message; no row means: as the message.
CREATE TABLE recipient_outcomes (
    message_id uuid NOT NULL,
    address text NOT NULL,
    state text COLLATE "C" NOT NULL CHECK (state IN ('suppressed', 'refused', 'delivered', 'bounced', 'complained')),
    detail text,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (message_id, address)
);

CREATE TABLE suppressions (
    id uuid PRIMARY KEY,
    org_id uuid NOT NULL REFERENCES orgs (id),
    env text COLLATE "C" NOT NULL CHECK (env IN ('live', 'test')),
    channel text COLLATE "C" NOT NULL CHECK (channel IN ('email', 'sms')),
    address text NOT NULL,
    origin text NOT NULL CHECK (origin IN ('manual', 'bounce', 'complaint', 'stop', 'unsubscribe')),
    reason text,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (org_id, env, channel, address)
);
CREATE INDEX suppressions_list ON suppressions (org_id, env, channel, id);

-- Reserved at accept, turned into use by the record step, summed over shards on read: one shard alone may be negative.
CREATE TABLE usage_records (
    org_id uuid NOT NULL,
    channel text COLLATE "C" NOT NULL,
    env text COLLATE "C" NOT NULL,
    period text COLLATE "C" NOT NULL,
    rating text COLLATE "C" NOT NULL,
    shard smallint NOT NULL,
    reserved bigint NOT NULL DEFAULT 0,
    used bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (org_id, channel, env, period, rating, shard)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);

CREATE TABLE idempotency_keys (
    org_id uuid NOT NULL,
    env text COLLATE "C" NOT NULL,
    key text COLLATE "C" NOT NULL CHECK (length(key) BETWEEN 1 AND 256),
    request_sha256 bytea NOT NULL,
    status smallint NOT NULL,
    response text NOT NULL,
    created_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (org_id, env, key)
) WITH (autovacuum_vacuum_scale_factor = 0.05);
CREATE INDEX idempotency_keys_expiry ON idempotency_keys (expires_at);

-- Send rate per provider account when there is no Valkey: the generic cell rate algorithm on one row.
CREATE TABLE send_rates (
    account text PRIMARY KEY,
    next_free_at timestamptz NOT NULL
) WITH (fillfactor = 20, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200,
        autovacuum_vacuum_cost_delay = 0);

-- One row per call, whatever came of it. A row still 'running' long after started_at + deadline_s belonged to a process
-- that died; the next tick marks it 'interrupted'.
CREATE TABLE job_runs (
    job_id uuid PRIMARY KEY,
    job text COLLATE "C" NOT NULL,
    slot timestamptz NOT NULL,
    trigger text NOT NULL,
    host text NOT NULL,
    started_at timestamptz NOT NULL,
    deadline_s double precision NOT NULL DEFAULT 25 CHECK (deadline_s > 0),
    finished_at timestamptz,
    state text COLLATE "C" NOT NULL DEFAULT 'running'
        CHECK (state IN ('running', 'succeeded', 'failed', 'deduplicated', 'not_configured', 'interrupted')),
    results jsonb NOT NULL DEFAULT '{}',
    more boolean NOT NULL DEFAULT false,
    duration_ms bigint,
    error text,
    CHECK ((state = 'running') = (finished_at IS NULL))
);
CREATE INDEX job_runs_by_slot ON job_runs (job, slot, started_at);
CREATE INDEX job_runs_by_job ON job_runs (job, started_at);
CREATE INDEX job_runs_started ON job_runs (started_at);
CREATE INDEX job_runs_running ON job_runs (started_at) WHERE state = 'running';

-- Who runs a whole-table job now; no row: nobody. A crashed holder is replaced when its lease is over.
CREATE TABLE job_locks (
    job text COLLATE "C" PRIMARY KEY,
    claim_id uuid NOT NULL,
    job_id uuid NOT NULL,
    lease_until timestamptz NOT NULL
);

-- What has become of a slot, so that it fires once however many tickers watch.
--   running         claimed by a ticker until lease_until
--   succeeded       done; also by a direct call
--   failed          again at retry_at, attempts says how far the backoff has come
--   unfinished      ran well but left work, or was too early: again at retry_at
--   not_configured  left alone until the next slot
CREATE TABLE job_slots (
    job text COLLATE "C" NOT NULL,
    slot timestamptz NOT NULL,
    state text COLLATE "C" NOT NULL
        CHECK (state IN ('running', 'succeeded', 'failed', 'unfinished', 'not_configured')),
    attempts integer NOT NULL DEFAULT 0,
    claim_id uuid,
    lease_until timestamptz,
    retry_at timestamptz,
    PRIMARY KEY (job, slot),
    CHECK ((state = 'running') = (claim_id IS NOT NULL AND lease_until IS NOT NULL)),
    CHECK (state NOT IN ('failed', 'unfinished') OR retry_at IS NOT NULL)
);

-- When each CRON_SECRET was first and last used, by its hash; the secret itself is nowhere.
CREATE TABLE cron_secrets (
    sha256 bytea PRIMARY KEY CHECK (length(sha256) = 32),
    first_seen timestamptz NOT NULL,
    last_used timestamptz NOT NULL
);

CREATE TABLE alerts (
    id uuid PRIMARY KEY,
    preset text COLLATE "C" NOT NULL,
    job text COLLATE "C" NOT NULL DEFAULT '',
    summary text NOT NULL,
    opened_at timestamptz NOT NULL,
    closed_at timestamptz
);
CREATE UNIQUE INDEX alerts_open ON alerts (preset, job) WHERE closed_at IS NULL;

CREATE TABLE audit_logs (
    id uuid PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    actor text NOT NULL,
    action text NOT NULL,
    org_id uuid,
    target text NOT NULL,
    detail jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX audit_logs_at ON audit_logs USING brin (at);
