-- Rating: who pays for a message. Fixed at accept, in this order: included quota → credits → metered
-- (docs/decisions/0022-rating.md). A message that straddles a border is split: `units` are its recipients or segments,
-- `credit_units` and `metered_units` of them are not included.

-- What a month of an org includes, and what a unit beyond costs in credits. Another plan is another row.
CREATE TABLE message_plans (
    id text COLLATE "C" PRIMARY KEY CHECK (id ~ '^[a-z0-9][a-z0-9_.-]{0,63}$'),
    included_emails bigint NOT NULL CHECK (included_emails BETWEEN 0 AND 1000000000000),
    included_sms bigint NOT NULL CHECK (included_sms BETWEEN 0 AND 1000000000000),
    email_credits bigint NOT NULL CHECK (email_credits BETWEEN 1 AND 1000000000),
    sms_credits bigint NOT NULL CHECK (sms_credits BETWEEN 1 AND 1000000000)
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
    ADD COLUMN rerated integer NOT NULL DEFAULT 0,
    ADD CONSTRAINT messages_rated CHECK (
        credit_units >= 0 AND metered_units >= 0 AND credit_units + metered_units <= units AND credits >= credit_units
        AND (credits > 0) = (credit_units > 0) AND (credit_account_id IS NOT NULL) = (credits > 0)
    ) NOT VALID;

-- Included units taken (reserved or used) in a month, live env: the sum of the org's `included` usage_records, wherever
-- the row exists. There is none while much is left (see nm_rate). Then whoever takes included units holds the row: two
-- requests that each counted what is left would both get it, and what is rated as included is never invoiced. Metered orgs
-- without a wallet leave the row alone once it is full.
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

-- A quota row begins as the sum of usage_records, which others change without it. So who makes one locks the org
-- exclusively until its commit, and who changes included units without the row's lock shares that lock: nothing is
-- counted twice or left out between the sum and the row. It comes before every quota row.
CREATE FUNCTION nm_quota_guard(p_org_id uuid) RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN hashtext(p_org_id::text);

-- Make the missing rows of these months (those of one channel, or any).
CREATE FUNCTION nm_quota_open(p_org_id uuid, p_channels text[], p_periods text[]) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM unnest(p_channels, p_periods) AS k (channel, period)
        WHERE NOT EXISTS (
            SELECT FROM usage_quotas AS q WHERE q.org_id = p_org_id AND q.channel = k.channel AND q.period = k.period
        )
    ) THEN
        RETURN;
    END IF;
    PERFORM pg_advisory_xact_lock(1853451636, nm_quota_guard(p_org_id));
    INSERT INTO usage_quotas (org_id, channel, period, taken)
    SELECT DISTINCT p_org_id, k.channel, k.period, coalesce(
        (
            SELECT sum(u.reserved + u.used) FROM usage_records AS u
            WHERE u.org_id = p_org_id AND u.channel = k.channel AND u.env = 'live' AND u.period = k.period
              AND u.rating = 'included'
        ), 0)
    FROM unnest(p_channels, p_periods) AS k (channel, period)
    ORDER BY 2, 3
    ON CONFLICT DO NOTHING;
END $$;

-- Units that are no longer taken (negative), or are taken without asking (the answer to a STOP), where there is a row.
CREATE FUNCTION nm_quota_move(p_org_ids uuid[], p_channels text[], p_periods text[], p_units bigint[]) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    change record;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(1853451636, o.guard)
    FROM (SELECT DISTINCT nm_quota_guard(id) AS guard FROM unnest(p_org_ids) AS o (id) ORDER BY 1) AS o;
    FOR change IN
        SELECT c.org_id, c.channel, c.period, sum(c.units)::bigint AS units
        FROM unnest(p_org_ids, p_channels, p_periods, p_units) AS c (org_id, channel, period, units)
        GROUP BY c.org_id, c.channel, c.period
        ORDER BY c.org_id, c.channel, c.period
    LOOP
        UPDATE usage_quotas AS q SET taken = q.taken + change.units
        WHERE q.org_id = change.org_id AND q.channel = change.channel AND q.period = change.period;
    END LOOP;
END $$;

-- Take what a move from month to month will need, in the order of locks: giving back comes before rating there.
CREATE FUNCTION nm_quota_lock(p_org_id uuid, p_channel text, p_periods text[], p_account_id bigint) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    wallet bigint;
BEGIN
    SELECT a.id INTO wallet
    FROM orgs AS o
    JOIN credit_accounts AS a ON a.org_id = o.id AND a.env = 'live' AND a.user_id = o.billing_user
    WHERE o.id = p_org_id;
    PERFORM nm_quota_open(p_org_id, array_fill(p_channel, ARRAY[cardinality(p_periods)]), p_periods);
    PERFORM pg_advisory_xact_lock_shared(1853451636, nm_quota_guard(p_org_id));
    PERFORM FROM usage_quotas AS q
    WHERE q.org_id = p_org_id AND q.channel = p_channel AND q.period = ANY (p_periods)
    ORDER BY q.period
    FOR UPDATE;
    PERFORM FROM credit_accounts AS a WHERE a.id IN (wallet, p_account_id) ORDER BY a.id FOR UPDATE;
END $$;

-- Rate live messages of an org, all or none: take their included units, reserve their credits, and say how each is
-- split. The arrays have one element per message; `references` are those of its reservation.
--   outcome   rated: done; facts: what to tell in this transaction, [{topic, data}]
--             quota_exceeded, insufficient: refused, see answer; nothing was changed
--             crosses: nothing was done, because there is something to tell, or the month needs its row: call again in a
--             transaction, with p_may_tell
-- Locks: quota rows by channel and period → the wallet → its batches. Usage_records are the caller's, afterwards.
CREATE FUNCTION nm_rate(
    p_org_id uuid, p_references text[], p_channels text[], p_periods text[], p_units bigint[], p_may_tell boolean,
    OUT outcome text, OUT answer jsonb, OUT credit_units bigint[], OUT metered_units bigint[], OUT credits bigint[],
    OUT account_id bigint, OUT facts jsonb
) LANGUAGE plpgsql AS $$
DECLARE
    org record;
    month record;
    held credit_accounts;
    spent record;
    messages integer := cardinality(p_units);
    zeros bigint[] := array_fill(0::bigint, ARRAY[cardinality(p_units)]);
    rests bigint[] := zeros;  -- units that are not included
    rest bigint := 0;
    channels text[] := '{}';
    periods text[] := '{}';
    included bigint[] := '{}';
    notices jsonb := '[]';
    now_taken bigint;
    free bigint;
    part bigint;
    price bigint;
    spendable bigint := 0;
    total bigint := 0;
    is_low boolean := false;
    wallet bigint;
    standing record;
    is_far boolean;
BEGIN
    -- Nearly all are rated here. Far from the border nobody need wait for another: while a month has no row and a fifth of
    -- its quota is left, whoever wants few units shares the org's lock. As there are no more transactions than connections,
    -- what is under way at once and not seen in the sum fits into that fifth. Nearer, the way below opens the row, in another
    -- transaction, because a shared lock must not grow into an exclusive one. And beyond a full row nobody of a metered org
    -- without a wallet need wait either.
    IF p_channels[1] = ALL (p_channels) AND p_periods[1] = ALL (p_periods) THEN
        SELECT q.taken, CASE p_channels[1] WHEN 'email' THEN p.included_emails ELSE p.included_sms END AS quota,
               o.billing = 'metered' AND NOT EXISTS (
                   SELECT FROM credit_accounts AS a
                   WHERE a.org_id = o.id AND a.env = 'live' AND a.user_id = o.billing_user
               ) AS is_open_ended,
               (SELECT sum(u.units) FROM unnest(p_units) AS u (units))::bigint AS wanted
        INTO STRICT standing
        FROM orgs AS o
        JOIN message_plans AS p ON p.id = o.plan
        LEFT JOIN usage_quotas AS q ON q.org_id = o.id AND q.channel = p_channels[1] AND q.period = p_periods[1]
        WHERE o.id = p_org_id;
        IF standing.taken >= standing.quota AND standing.is_open_ended THEN
            outcome := 'rated';
            facts := '[]';
            credit_units := zeros;
            metered_units := p_units;
            credits := zeros;
            RETURN;
        END IF;
        IF standing.taken IS NULL AND p_may_tell THEN
            SELECT coalesce(sum(u.reserved + u.used), 0) < standing.quota / 5 * 3 INTO is_far
            FROM usage_records AS u
            WHERE u.org_id = p_org_id AND u.channel = p_channels[1] AND u.env = 'live' AND u.period = p_periods[1]
              AND u.rating = 'included';
        END IF;
        IF standing.taken IS NULL AND (is_far OR NOT p_may_tell)
            AND standing.wanted <= standing.quota / 5 / current_setting('max_connections')::bigint
        THEN
            PERFORM pg_advisory_xact_lock_shared(1853451636, nm_quota_guard(p_org_id));
            SELECT coalesce(sum(u.reserved + u.used), 0) + standing.wanted < standing.quota / 5 * 4
                   AND NOT EXISTS (
                       SELECT FROM usage_quotas AS q
                       WHERE q.org_id = p_org_id AND q.channel = p_channels[1] AND q.period = p_periods[1]
                   )
            INTO is_far
            FROM usage_records AS u
            WHERE u.org_id = p_org_id AND u.channel = p_channels[1] AND u.env = 'live' AND u.period = p_periods[1]
              AND u.rating = 'included';
            IF NOT is_far AND p_may_tell THEN
                RAISE EXCEPTION 'the quota of % came near while messages were rated', p_org_id
                    USING ERRCODE = 'serialization_failure';
            END IF;
            outcome := CASE WHEN is_far THEN 'rated' ELSE 'crosses' END;
            facts := '[]';
            credit_units := zeros;
            metered_units := zeros;
            credits := zeros;
            RETURN;
        END IF;
    END IF;

    SELECT o.billing, o.billing_user, p.* INTO STRICT org
    FROM orgs AS o
    JOIN message_plans AS p ON p.id = o.plan
    WHERE o.id = p_org_id;
    IF org.billing <> 'quota' THEN
        SELECT a.id INTO wallet FROM credit_accounts AS a
        WHERE a.org_id = p_org_id AND a.env = 'live' AND a.user_id = org.billing_user;
    END IF;
    PERFORM nm_quota_open(p_org_id, p_channels, p_periods);

    FOR month IN
        SELECT k.channel, k.period, sum(k.units)::bigint AS wanted,
               CASE k.channel WHEN 'email' THEN org.included_emails ELSE org.included_sms END AS quota
        FROM unnest(p_channels, p_periods, p_units) AS k (channel, period, units)
        GROUP BY k.channel, k.period
        ORDER BY k.channel, k.period
    LOOP
        -- A full row is left alone where everybody may go on beyond it and no wallet makes them take turns anyway.
        SELECT q.taken INTO STRICT now_taken FROM usage_quotas AS q
        WHERE q.org_id = p_org_id AND q.channel = month.channel AND q.period = month.period;
        IF now_taken < month.quota OR org.billing <> 'metered' OR wallet IS NOT NULL THEN
            SELECT q.taken INTO STRICT now_taken FROM usage_quotas AS q
            WHERE q.org_id = p_org_id AND q.channel = month.channel AND q.period = month.period
            FOR UPDATE;
        END IF;
        free := greatest(month.quota - now_taken, 0);
        IF month.wanted > free THEN
            IF org.billing = 'quota' THEN
                outcome := 'quota_exceeded';
                answer := jsonb_build_object(
                    'channel', month.channel, 'period', month.period, 'limit', month.quota, 'used', now_taken,
                    'required', month.wanted
                );
                RETURN;
            END IF;
            rest := rest + month.wanted - free;
            FOR nth IN 1 .. messages LOOP
                CONTINUE WHEN p_channels[nth] <> month.channel OR p_periods[nth] <> month.period;
                part := least(p_units[nth], free);
                free := free - part;
                rests[nth] := p_units[nth] - part;
            END LOOP;
        END IF;
        channels := channels || month.channel;
        periods := periods || month.period;
        part := least(month.wanted, greatest(month.quota - now_taken, 0));
        included := included || part;
        IF part > 0 AND (now_taken + part) * 100 >= month.quota * 80 THEN
            SELECT notices || coalesce(
                jsonb_agg(
                    jsonb_build_object(
                        'channel', month.channel, 'period', month.period, 'percent', p.percent, 'limit', month.quota,
                        'used', now_taken + part
                    )
                    ORDER BY p.percent
                ), '[]')
            INTO notices
            FROM unnest('{80,100}'::smallint[]) AS p (percent)
            WHERE (now_taken + part) * 100 >= month.quota * p.percent
              AND NOT EXISTS (
                  SELECT FROM usage_notices AS n
                  WHERE n.org_id = p_org_id AND n.channel = month.channel AND n.period = month.period
                    AND n.percent = p.percent
              );
        END IF;
    END LOOP;

    credit_units := zeros;
    metered_units := zeros;
    credits := zeros;
    IF rest > 0 AND wallet IS NULL AND org.billing = 'metered' THEN
        metered_units := rests;
    ELSIF rest > 0 THEN
        SELECT * INTO held FROM credit_accounts AS a WHERE a.id = wallet FOR UPDATE;
        SELECT coalesce(sum(b.remaining), 0) INTO spendable FROM credit_batches AS b
        WHERE b.account_id = wallet AND b.is_open AND (b.expires_at IS NULL OR b.expires_at > nm_clock());
        FOR nth IN 1 .. messages LOOP
            CONTINUE WHEN rests[nth] = 0;
            price := CASE p_channels[nth] WHEN 'email' THEN org.email_credits ELSE org.sms_credits END;
            -- Metered orgs pay what the wallet still holds, in whole units; prepaid ones pay all or are refused.
            part := CASE org.billing WHEN 'metered' THEN least(rests[nth], (spendable - total) / price) ELSE rests[nth] END;
            credit_units[nth] := part;
            metered_units[nth] := rests[nth] - part;
            credits[nth] := part * price;
            total := total + part * price;
        END LOOP;
        IF total > spendable THEN
            outcome := 'insufficient';
            answer := jsonb_build_object('required', total, 'available', spendable, 'missing', total - spendable);
            RETURN;
        END IF;
        is_low := coalesce(total > 0 AND spendable >= held.low_below AND spendable - total < held.low_below, false);
    END IF;

    IF (is_low OR notices <> '[]') AND NOT p_may_tell THEN
        outcome := 'crosses';
        RETURN;
    END IF;
    outcome := 'rated';
    facts := '[]';
    FOR nth IN 1 .. cardinality(channels) LOOP
        CONTINUE WHEN included[nth] = 0;
        UPDATE usage_quotas AS q SET taken = q.taken + included[nth]
        WHERE q.org_id = p_org_id AND q.channel = channels[nth] AND q.period = periods[nth];
    END LOOP;
    IF total > 0 THEN
        account_id := wallet;
        FOR nth IN 1 .. messages LOOP
            CONTINUE WHEN credits[nth] = 0;
            SELECT s.outcome, s.answer, s.low_below INTO spent
            FROM nm_credit_spend(
                'reserve', p_org_id, 'live', org.billing_user, p_references[nth], '', credits[nth], p_channels[nth], true
            ) AS s;
            -- A batch has ended since the sum above: all of it again.
            IF spent.outcome <> 'done' THEN
                RAISE EXCEPTION 'the wallet of % changed while messages were rated: %', p_org_id, spent.outcome
                    USING ERRCODE = 'serialization_failure';
            END IF;
            IF spent.low_below IS NOT NULL THEN
                facts := facts || jsonb_build_object('topic', 'credits.low', 'data', jsonb_build_object(
                    'user_id', org.billing_user, 'balance', spent.answer -> 'balance', 'low_below', spent.low_below
                ));
            END IF;
        END LOOP;
    END IF;
    IF notices <> '[]' THEN
        WITH told AS (
            INSERT INTO usage_notices (org_id, channel, period, percent)
            SELECT p_org_id, n.channel, n.period, n.percent
            FROM jsonb_to_recordset(notices) AS n (channel text, period text, percent smallint)
            ORDER BY n.channel, n.period, n.percent
            ON CONFLICT DO NOTHING
            RETURNING channel, period, percent
        )
        SELECT facts || coalesce(
            jsonb_agg(jsonb_build_object('topic', 'usage.threshold', 'data', n.value) ORDER BY n.ordinality), '[]')
        INTO facts
        FROM jsonb_array_elements(notices) WITH ORDINALITY AS n
        JOIN told AS t ON t.channel = n.value ->> 'channel' AND t.period = n.value ->> 'period'
                      AND t.percent = (n.value ->> 'percent')::smallint;
    END IF;
END $$;
