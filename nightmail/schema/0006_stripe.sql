-- Money's way in and out: what Stripe told us, and what we told Stripe.
-- Why it is so: docs/decisions/0023-stripe-in.md, 0024-report-overage.md.

-- Each of Stripe's events once. The row is written in the transaction of what the event caused.
--   outcome   applied, ignored (nothing of ours), stale (an older state than the one we have), failed (see error: the
--             same event posted again, by `Resend` in Stripe, is tried again)
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
CREATE INDEX stripe_events_failed ON stripe_events (received_at) WHERE outcome = 'failed';

-- Which plan a price of Stripe buys; `price` is its id or its lookup key. A lookup key that is a plan's id needs no row.
CREATE TABLE plan_prices (
    price text COLLATE "C" PRIMARY KEY CHECK (length(price) BETWEEN 1 AND 255),
    plan_id text COLLATE "C" NOT NULL REFERENCES plans (id)
);

-- A subscription as the newest event told it. The row is the lock under which its events are applied one by one.
--   changed_at, rank  of that event: what is less is older. NULL: only its checkout session is known
--   state             as rules.stripe_objects reads it; kept also while nobody is known who owns it
--   org_id … org_plan the metadata of its checkout session; those of the subscription itself are in `state`
--   purchase_id       the credits it buys
--   paid_org_id       the org that has the plan paid_plan by it, while it is live
CREATE TABLE stripe_subscriptions (
    id text COLLATE "C" PRIMARY KEY CHECK (length(id) BETWEEN 1 AND 255),
    changed_at timestamptz,
    rank integer NOT NULL DEFAULT 0,
    state jsonb,
    org_id uuid,
    env text COLLATE "C",
    user_id text COLLATE "C",
    plan_id text COLLATE "C",
    org_plan text COLLATE "C",
    purchase_id uuid,
    paid_org_id uuid,
    paid_plan text COLLATE "C"
) WITH (autovacuum_vacuum_scale_factor = 0.05);
-- A subscription that ends takes the org's plan with it; another one that pays for the org gives it its own.
CREATE INDEX stripe_subscriptions_of_org ON stripe_subscriptions (paid_org_id) WHERE paid_org_id IS NOT NULL;

-- What a payment was for, so that its refund finds the credits: a pack, or months of a subscription from `since` until
-- `until`. `id` is that of a payment intent or of an invoice; the former may only know the latter.
CREATE TABLE stripe_payments (
    id text COLLATE "C" PRIMARY KEY CHECK (length(id) BETWEEN 1 AND 255),
    invoice_id text COLLATE "C",
    subscription_id text COLLATE "C",
    purchase_id uuid,
    since timestamptz,
    until timestamptz
) WITH (autovacuum_vacuum_insert_scale_factor = 0.05);

-- How much of a charge was paid back, in all, and for how much of that credits were taken back.
CREATE TABLE stripe_refunds (
    charge_id text COLLATE "C" PRIMARY KEY CHECK (length(charge_id) BETWEEN 1 AND 255),
    payment_id text COLLATE "C" NOT NULL,
    paid bigint NOT NULL CHECK (paid > 0),
    refunded bigint NOT NULL CHECK (refunded BETWEEN 0 AND paid),
    settled bigint NOT NULL DEFAULT 0 CHECK (settled BETWEEN 0 AND refunded)
) WITH (autovacuum_vacuum_insert_scale_factor = 0.05);
CREATE INDEX stripe_refunds_of_payment ON stripe_refunds (payment_id);
-- Those that wait until it is known what their payment was for.
CREATE INDEX stripe_refunds_open ON stripe_refunds (payment_id) WHERE refunded > settled;

-- One meter event each: what became metered since the revision before. Written, and committed, before the call.
--   units        of this revision: > 0, never changed; total is the sum up to it of those that were not refused
--   identifier   Stripe takes one once within 24 hours: the same for every repetition of the call
--   event_at     the meter event's timestamp, inside the period
--   state        pending → calling → reported; too_old (Stripe takes no timestamp of over 35 days), failed (refused:
--                its units are in the next revision)
--   claim_id     of the run that calls now; NULL in `calling` means that the call's end is in doubt
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
CREATE INDEX overage_reports_open ON overage_reports (stripe_customer_id, event_name, period, created_at)
    WHERE state IN ('pending', 'calling');
-- The dashboard's list, newest first.
CREATE INDEX overage_reports_listed ON overage_reports (created_at, identifier);
CREATE INDEX overage_reports_bad ON overage_reports (created_at) WHERE state IN ('too_old', 'failed');

-- Overage that nobody can be billed for: the org has no Stripe customer. The row goes when there is one, or nothing due.
CREATE TABLE overage_skips (
    org_id uuid NOT NULL,
    channel text COLLATE "C" NOT NULL CHECK (channel IN ('email', 'sms')),
    period text COLLATE "C" NOT NULL CHECK (period ~ '^\d{4}-(0[1-9]|1[0-2])$'),
    units bigint NOT NULL CHECK (units > 0),
    noted_at timestamptz NOT NULL DEFAULT nm_now(),
    PRIMARY KEY (org_id, channel, period)
);

-- The report looks for metered usage of all months; most orgs have none.
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX usage_records_metered ON usage_records (period, org_id, channel)
    WHERE env = 'live' AND rating = 'metered';

-- The plan an org had until then: a month that is over is reported by the plan it ended with, so that nobody gets out of
-- an overage by a larger plan on the first of the next month.
CREATE TABLE org_plan_changes (
    org_id uuid NOT NULL,
    changed_at timestamptz NOT NULL DEFAULT nm_now(),
    plan text COLLATE "C" NOT NULL,
    PRIMARY KEY (org_id, changed_at)
);

-- What months owe that was not told: those that are over, with p_with_open also the one that runs. Metered units of a month
-- are what is over the quota of the plan at the month's end, at most what was rated as metered; the included part is
-- looked up for metered months only. Refused revisions count as not told. The event of a closed month lies in its last second, of an open one at this
-- moment.
CREATE FUNCTION nm_overage_owed(p_with_open boolean) RETURNS TABLE (
    org_id uuid, channel text, period text, stripe_customer_id text, units bigint, total bigint, revision integer,
    event_at timestamptz
)
LANGUAGE sql STABLE
BEGIN ATOMIC
    WITH metered AS MATERIALIZED (
        SELECT org_id, channel, period, sum(used)::bigint AS used
        FROM usage_records
        WHERE env = 'live'
          AND rating = 'metered'
          AND (period < to_char(nm_now() AT TIME ZONE 'UTC', 'YYYY-MM')
               OR (p_with_open AND period = to_char(nm_now() AT TIME ZONE 'UTC', 'YYYY-MM')))
        GROUP BY org_id, channel, period
        HAVING sum(used) > 0
    ), month AS MATERIALIZED (
        SELECT m.*, o.stripe_customer_id, told.units AS told, coalesce(told.revision, 0) AS revision,
               least(m.used, m.used + coalesce(included.used, 0)
                     - CASE m.channel WHEN 'email' THEN p.included_emails ELSE p.included_sms END) AS units,
               (m.period || '-01')::timestamp AT TIME ZONE 'UTC' AS begins_at,
               ((m.period || '-01')::timestamp + interval '1 month') AT TIME ZONE 'UTC' AS ends_at
        FROM metered AS m
        JOIN orgs AS o ON o.id = m.org_id
        JOIN message_plans AS p ON p.id = coalesce(
            (
                SELECT c.plan
                FROM org_plan_changes AS c
                WHERE c.org_id = m.org_id
                  AND c.changed_at >= ((m.period || '-01')::timestamp + interval '1 month') AT TIME ZONE 'UTC'
                ORDER BY c.changed_at
                LIMIT 1
            ), o.plan)
        CROSS JOIN LATERAL (
            SELECT sum(u.used)::bigint AS used
            FROM usage_records AS u
            WHERE u.org_id = m.org_id AND u.channel = m.channel AND u.env = 'live' AND u.period = m.period
              AND u.rating = 'included'
        ) AS included
        CROSS JOIN LATERAL (
            SELECT coalesce(sum(r.units) FILTER (WHERE r.state <> 'failed'), 0)::bigint AS units,
                   max(r.revision) AS revision
            FROM overage_reports AS r
            WHERE r.org_id = m.org_id AND r.channel = m.channel AND r.period = m.period
        ) AS told
    )
    SELECT m.org_id, m.channel, m.period, m.stripe_customer_id, m.units - m.told, m.units, m.revision + 1,
           greatest(m.begins_at, least(date_trunc('second', nm_now()), m.ends_at - interval '1 second'))
    FROM month AS m
    WHERE m.units > m.told;
END;

-- What somebody should look at, as presets of the alerts (store.alerts): open while it is so, and at most this long.
CREATE FUNCTION nm_stripe_alerts() RETURNS TABLE (preset text, job text, summary text)
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT 'overage_not_configured', 'report-overage',
           format('report-overage lacks settings, and there are metered orgs: %s', r.error)
    FROM (
        SELECT state, error FROM job_runs
        WHERE job_runs.job BETWEEN 'report-overage' AND 'report-overage'
        ORDER BY job_runs.job DESC, started_at DESC
        LIMIT 1
    ) AS r
    WHERE r.state = 'not_configured'
      AND EXISTS (SELECT FROM orgs WHERE billing = 'metered')
    UNION ALL
    SELECT 'overage_too_old', 'report-overage',
           format('%s units of overage are too old for Stripe (35 days), the first of org %s in %s: invoice them by hand',
                  sum(units), (array_agg(org_id ORDER BY created_at))[1], (array_agg(period ORDER BY created_at))[1])
    FROM overage_reports
    WHERE state = 'too_old'
      AND created_at > nm_now() - interval '168 hours'
    HAVING count(*) > 0
    UNION ALL
    SELECT 'overage_refused', 'report-overage',
           format('Stripe refused %s overage reports, the last of org %s: %s', count(*),
                  (array_agg(f.org_id ORDER BY f.created_at DESC))[1], (array_agg(f.error ORDER BY f.created_at DESC))[1])
    FROM overage_reports AS f
    WHERE f.state = 'failed'
      AND f.created_at > nm_now() - interval '840 hours'
      AND NOT EXISTS (
          SELECT FROM overage_reports AS later
          WHERE later.org_id = f.org_id AND later.channel = f.channel AND later.period = f.period
            AND later.revision > f.revision AND later.state <> 'failed'
      )
    HAVING count(*) > 0
    UNION ALL
    SELECT 'overage_waiting', 'report-overage',
           format('%s overage reports have waited for Stripe since %s: %s', count(*),
                  to_char(min(created_at) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI "UTC"'),
                  coalesce(min(error), 'not called'))
    FROM overage_reports
    WHERE state IN ('pending', 'calling')
      AND created_at < nm_now() - interval '1 hour'
    HAVING count(*) > 0
    UNION ALL
    SELECT 'overage_without_customer', 'report-overage',
           format('%s orgs have overage and no Stripe customer, one is %s: set stripe_customer_id',
                  count(DISTINCT org_id), min(org_id::text))
    FROM overage_skips
    HAVING count(*) > 0
    UNION ALL
    SELECT 'stripe_event_failed', '',
           format('%s of Stripe''s events could not be applied, the last, %s: %s', count(*),
                  (array_agg(id ORDER BY received_at DESC))[1], (array_agg(error ORDER BY received_at DESC))[1])
    FROM stripe_events
    WHERE outcome = 'failed'
      AND received_at > nm_now() - interval '168 hours'
    HAVING count(*) > 0;
END;
