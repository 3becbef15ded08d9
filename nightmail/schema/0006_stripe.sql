-- Money's way in and out: what Stripe told us, and what we told Stripe.

-- Each of Stripe's events once. The row is written in the transaction of what the event caused.
--   outcome   applied, ignored (nothing of ours), stale (an older state than the one we have), failed (see error)
CREATE TABLE stripe_events (
    id text COLLATE "C" PRIMARY KEY CHECK (length(id) BETWEEN 1 AND 255),
    type text COLLATE "C" NOT NULL,
    created_at timestamptz NOT NULL,
    outcome text COLLATE "C" NOT NULL CHECK (outcome IN ('applied', 'ignored', 'stale', 'failed')),
    org_id uuid,
    purchase_id uuid,
    error text,
    received_at timestamptz NOT NULL DEFAULT nm_now()
) WITH (autovacuum_vacuum_insert_scale_factor = 0.05);
CREATE INDEX stripe_events_received ON stripe_events (received_at);

-- One meter event each: what became metered since the revision before. Written, and committed, before the call.
--   units        of this revision: > 0, never changed; total is the sum up to it
--   identifier   Stripe takes one once within 24 hours: the same for every repetition of the call
--   event_at     the meter event's timestamp, inside the period
--   state        pending → calling → reported; too_old (Stripe takes no timestamp of over 35 days), failed (refused)
--   first_called_at  when the call began for the first time: after 24 hours Stripe's sum is asked before it is repeated
--   answer       what Stripe said; error why not
CREATE TABLE overage_reports (
    org_id uuid NOT NULL,
    channel text COLLATE "C" NOT NULL CHECK (channel IN ('email', 'sms')),
    period text COLLATE "C" NOT NULL CHECK (period ~ '^\d{4}-(0[1-9]|1[0-2])$'),
    revision integer NOT NULL CHECK (revision > 0),
    units bigint NOT NULL CHECK (units > 0),
    total bigint NOT NULL CHECK (total >= units),
    identifier text COLLATE "C" NOT NULL UNIQUE CHECK (length(identifier) <= 100),
    event_name text NOT NULL,
    stripe_customer_id text NOT NULL,
    event_at timestamptz NOT NULL,
    state text COLLATE "C" NOT NULL DEFAULT 'pending'
        CHECK (state IN ('pending', 'calling', 'reported', 'too_old', 'failed')),
    claim_id uuid,
    attempts integer NOT NULL DEFAULT 0,
    first_called_at timestamptz,
    called_at timestamptz,
    reported_at timestamptz,
    answer jsonb,
    error text,
    created_at timestamptz NOT NULL DEFAULT nm_now(),
    PRIMARY KEY (org_id, channel, period, revision)
);
CREATE INDEX overage_reports_open ON overage_reports (period, org_id) WHERE state IN ('pending', 'calling');
-- The dashboard's list, newest first.
CREATE INDEX overage_reports_listed ON overage_reports (created_at, identifier);
