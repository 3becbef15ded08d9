-- Rating: who pays for a message. Fixed at accept, in this order: included quota → credits → metered
-- (docs/decisions/0022-rating.md). A message that straddles a border is split: `units` are its recipients or segments,
-- `credit_units` and `metered_units` of them are not included.

-- What a month of an org includes, and what a unit beyond costs in credits. Another plan is another row.
CREATE TABLE message_plans (
    id text COLLATE "C" PRIMARY KEY CHECK (id ~ '^[a-z0-9][a-z0-9_.-]{0,63}$'),
    included_emails bigint NOT NULL CHECK (included_emails >= 0),
    included_sms bigint NOT NULL CHECK (included_sms >= 0),
    email_credits bigint NOT NULL CHECK (email_credits > 0),
    sms_credits bigint NOT NULL CHECK (sms_credits > 0)
);
INSERT INTO message_plans (id, included_emails, included_sms, email_credits, sms_credits)
VALUES ('free', 3000, 100, 1, 10),
       ('pro', 10000, 1000, 1, 10);

-- Whose credits pay for the org's live messages: the wallet of this user of the org.
ALTER TABLE orgs ADD COLUMN billing_user text NOT NULL DEFAULT 'billing' CHECK (length(billing_user) BETWEEN 1 AND 200);
-- squawk-ignore ban-drop-constraint
ALTER TABLE orgs DROP CONSTRAINT orgs_plan_check;
-- The list became a table; NOT VALID checks what is written from now on, and nothing before could be wrong.
ALTER TABLE orgs ADD CONSTRAINT orgs_plan_known FOREIGN KEY (plan) REFERENCES message_plans (id) NOT VALID;

-- The rest of a message's rating. `rating` is the dearest kind among its units.
--   credits            reserved for credit_units: a multiple of them
--   credit_account_id  the wallet, so that the record step finds the reservation
--   rerated            times a reschedule rated it anew: a reference stands for one reservation
ALTER TABLE messages
    ADD COLUMN credit_units bigint NOT NULL DEFAULT 0,
    ADD COLUMN metered_units bigint NOT NULL DEFAULT 0,
    ADD COLUMN credits bigint NOT NULL DEFAULT 0,
    ADD COLUMN credit_account_id bigint,
    ADD COLUMN rerated smallint NOT NULL DEFAULT 0,
    ADD CONSTRAINT messages_rated CHECK (
        credit_units >= 0 AND metered_units >= 0 AND credit_units + metered_units <= units AND credits >= credit_units
        AND (credits > 0) = (credit_units > 0) AND (credit_account_id IS NOT NULL) = (credits > 0)
    ) NOT VALID;

-- Included units taken (reserved or used) in a month, live env. One row is enough where the limit is exact, and it must
-- be one: orgs that are refused or pay credits beyond the quota. Metered orgs without a wallet have none: their invoice
-- is max(0, used - quota) however their messages were rated, so they need no lock (docs/decisions/0022-rating.md).
CREATE TABLE usage_quotas (
    org_id uuid NOT NULL,
    channel text COLLATE "C" NOT NULL CHECK (channel IN ('email', 'sms')),
    period text COLLATE "C" NOT NULL CHECK (period ~ '^\d{4}-(0[1-9]|1[0-2])$'),
    taken bigint NOT NULL CHECK (taken >= 0),
    PRIMARY KEY (org_id, channel, period)
) WITH (fillfactor = 60, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);

-- usage.threshold was told: once per org, channel, month and percentage of the quota.
CREATE TABLE usage_notices (
    org_id uuid NOT NULL,
    channel text COLLATE "C" NOT NULL,
    period text COLLATE "C" NOT NULL,
    percent smallint NOT NULL,
    told_at timestamptz NOT NULL DEFAULT nm_now(),
    PRIMARY KEY (org_id, channel, period, percent)
);
