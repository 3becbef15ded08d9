-- Facts become deliveries: endpoints, deliveries, attempts.

-- The nth id of a set: `base` (a UUIDv7 as text) with its last 16 bits replaced. A UUIDv7 costs 3 to 5 us, for its 62
-- random bits; a set needs them once. Two sets with the same base would differ in 46 random bits and the microsecond.
CREATE FUNCTION nm_nth_id(base text, n bigint) RETURNS uuid
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN (left(base, 32) || lpad(to_hex(n), 4, '0'))::uuid;

-- Where an org wants to be told. `types` are the names it asked for, in its dialect; `topics` what they stand for.
--   schedule          default, legacy, or the waits after each attempt, e.g. '5s 5m 1h'
--   next_seq          the number the next stamped delivery gets
--   failures          attempts that failed in a row; first_failing_at is when the first of them did
--   blocked_until     nothing is posted before: the endpoint asked for it, or failed too often
CREATE TABLE webhook_endpoints (
    id uuid PRIMARY KEY,
    org_id uuid NOT NULL REFERENCES orgs (id),
    env text COLLATE "C" NOT NULL CHECK (env IN ('live', 'test')),
    url text NOT NULL CHECK (length(url) BETWEEN 1 AND 2048),
    description text NOT NULL DEFAULT '' CHECK (length(description) <= 500),
    dialect text COLLATE "C" NOT NULL CHECK (dialect IN ('nightmail', 'resend')),
    types text[] NOT NULL CHECK (cardinality(types) BETWEEN 1 AND 100),
    topics text[] NOT NULL,
    status text COLLATE "C" NOT NULL DEFAULT 'enabled' CHECK (status IN ('enabled', 'paused', 'disabled')),
    disabled_reason text,
    secret text NOT NULL,
    previous_secret text,
    previous_until timestamptz,
    schedule text NOT NULL DEFAULT 'default',
    next_seq bigint NOT NULL DEFAULT 1 CHECK (next_seq > 0),
    failures integer NOT NULL DEFAULT 0 CHECK (failures >= 0),
    first_failing_at timestamptz,
    blocked_until timestamptz,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CHECK ((previous_secret IS NULL) = (previous_until IS NULL)),
    CHECK (status <> 'disabled' OR disabled_reason IS NOT NULL)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX webhook_endpoints_of_org ON webhook_endpoints (org_id, env, id);

-- An event for one endpoint, inserted in the transaction of the fact. No foreign keys: the insert is on the hot path.
--   event_id     the webhook-id of every attempt; the same for all endpoints
--   topic        what happened, e.g. email.sent, domain.verified; its name in the body depends on the dialect
--   data         what only this event knows; of a message the rest is read when the body is made
--   seq, body    NULL until first claimed or pulled ("stamped"), under the endpoint's lock
--   due_at       when it may be claimed; of a claimed one the end of its lease
--   attempts     attempts that ended and were counted, since the last replay
--   takeovers    times a claim of it ran out, since the last replay: its runner died, perhaps of it
CREATE TABLE webhook_deliveries (
    endpoint_id uuid NOT NULL,
    event_id uuid NOT NULL,
    org_id uuid NOT NULL,
    topic text COLLATE "C" NOT NULL,
    message_id uuid,
    recipient text NOT NULL DEFAULT '',
    data jsonb NOT NULL DEFAULT '{}',
    occurred_at timestamptz NOT NULL,
    seq bigint,
    body text,
    state text COLLATE "C" NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'delivered', 'failed')),
    reason text,
    due_at timestamptz NOT NULL,
    claim_id uuid,
    attempts smallint NOT NULL DEFAULT 0,
    takeovers smallint NOT NULL DEFAULT 0,
    finished_at timestamptz,
    PRIMARY KEY (endpoint_id, event_id),
    CHECK (claim_id IS NULL OR (state = 'pending' AND seq IS NOT NULL)),
    CHECK ((state = 'pending') = (finished_at IS NULL))
) WITH (fillfactor = 75, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0,
        autovacuum_vacuum_insert_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05);
-- A fresh row is in the first of these only: the insert pays for two indexes. One due_at for "due again" and "lease ran
-- out", hence one index for both.
CREATE INDEX webhook_deliveries_fresh ON webhook_deliveries (endpoint_id, due_at)
    WHERE seq IS NULL AND state = 'pending';
CREATE INDEX webhook_deliveries_due ON webhook_deliveries (endpoint_id, due_at)
    WHERE seq IS NOT NULL AND state = 'pending';
CREATE UNIQUE INDEX webhook_deliveries_seq ON webhook_deliveries (endpoint_id, seq)
    WHERE seq IS NOT NULL;

-- The endpoints that have something pending, found by jumping from one to the next through the index: what waits behind
-- an endpoint costs nothing, an endpoint with nothing pending neither.
CREATE VIEW webhook_endpoints_with_fresh AS
WITH RECURSIVE found (endpoint_id) AS (
    (
        SELECT d.endpoint_id
        FROM webhook_deliveries AS d
        WHERE d.seq IS NULL AND d.state = 'pending'
        ORDER BY d.endpoint_id
        LIMIT 1
    )
    UNION ALL
    SELECT further.endpoint_id
    FROM found AS f
    CROSS JOIN LATERAL (
        SELECT d.endpoint_id
        FROM webhook_deliveries AS d
        WHERE d.seq IS NULL AND d.state = 'pending' AND d.endpoint_id > f.endpoint_id
        ORDER BY d.endpoint_id
        LIMIT 1
    ) AS further
)
SELECT endpoint_id FROM found;

-- The same for deliveries that are to be repeated, or are held, with the first moment at which one may be claimed.
CREATE VIEW webhook_endpoints_with_due AS
WITH RECURSIVE found (endpoint_id, due_at) AS (
    (
        SELECT d.endpoint_id, d.due_at
        FROM webhook_deliveries AS d
        WHERE d.seq IS NOT NULL AND d.state = 'pending'
        ORDER BY d.endpoint_id, d.due_at
        LIMIT 1
    )
    UNION ALL
    SELECT further.endpoint_id, further.due_at
    FROM found AS f
    CROSS JOIN LATERAL (
        SELECT d.endpoint_id, d.due_at
        FROM webhook_deliveries AS d
        WHERE d.seq IS NOT NULL AND d.state = 'pending' AND d.endpoint_id > f.endpoint_id
        ORDER BY d.endpoint_id, d.due_at
        LIMIT 1
    ) AS further
)
SELECT endpoint_id, due_at FROM found;

-- One row per POST, whatever came of it.
CREATE TABLE webhook_attempts (
    endpoint_id uuid NOT NULL,
    event_id uuid NOT NULL,
    id uuid NOT NULL DEFAULT nm_uuid7(),
    sent_at timestamptz NOT NULL,
    duration_ms integer NOT NULL CHECK (duration_ms >= 0),
    http_status smallint,
    error text,
    response text,
    PRIMARY KEY (endpoint_id, event_id, id)
) WITH (autovacuum_vacuum_insert_scale_factor = 0.05);
CREATE INDEX webhook_attempts_sent ON webhook_attempts USING brin (sent_at);
