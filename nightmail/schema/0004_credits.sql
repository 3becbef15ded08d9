-- The credit ledger: accounts, batches, transactions with their entries, reservations, plans and purchases.
--
-- Order of locks, always: purchases → the account's row → its batches. Who holds an account's row is alone with its
-- batches, reservations and sequence. Without that lock the CHECKs and unique indexes below refuse what would be wrong;
-- they are the second line, not the first. It is FOR NO KEY UPDATE: an uncommitted purchase holds the account's key by
-- its foreign key, and two purchases of one user, each waiting for the other's key, would be a deadlock.
--
-- What one account does in one transaction is a function here rather than statements in store/: each statement inside
-- sees what the lock waited for, and the whole costs one round trip (docs/decisions/0020-credit-functions.md).

-- The clock after a wait: nm_now() is the start of the statement, and a batch may have expired while it waited for a lock.
CREATE FUNCTION nm_clock() RETURNS timestamptz
LANGUAGE sql VOLATILE PARALLEL SAFE
RETURN clock_timestamp()
    + coalesce(nullif(current_setting('nightmail.clock_offset', true), ''), '0')::interval;

-- Start of the nth month after the anchor, in UTC; the day is clamped, and never chained: 31 Jan + 2 months = 31 Mar.
CREATE FUNCTION nm_period_start(anchor timestamptz, n integer) RETURNS timestamptz
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN ((anchor AT TIME ZONE 'UTC') + make_interval(months => n)) AT TIME ZONE 'UTC';

-- A wallet: of a user of an org, in one env. `user_id` is the caller's own string.
--   balance    what its batches hold, reserved or not, until their expiry is booked; spendable is less (see credit_batches)
--   seq        number of its newest entry
--   low_below  credits.low is told when a spend takes what is spendable below this
CREATE TABLE credit_accounts (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    org_id uuid NOT NULL REFERENCES orgs (id),
    env text COLLATE "C" NOT NULL CHECK (env IN ('live', 'test')),
    user_id text COLLATE "C" NOT NULL CHECK (length(user_id) BETWEEN 1 AND 200),
    balance bigint NOT NULL DEFAULT 0 CONSTRAINT credit_accounts_balance CHECK (balance >= 0),
    seq bigint NOT NULL DEFAULT 0 CONSTRAINT credit_accounts_seq CHECK (seq >= 0),
    low_below bigint CHECK (low_below > 0),
    created_at timestamptz NOT NULL DEFAULT nm_clock(),
    UNIQUE (org_id, env, user_id)
) WITH (fillfactor = 60, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);

-- Credits that came together and end together. Its id is that of the transaction that granted it.
--   remaining   may be spent or reserved, until expires_at: from then on it is only waiting to be booked as expired
--   reserved    held for a capture, also beyond expires_at
--   consumed    left for anything but expiry
--   is_open     in the indexes: a column of its own, because a spend that leaves something then touches no index (a
--               partial index WHERE remaining > 0 would make every spend write to all of them)
--   rolls_over  the next grant of its purchase may still take from it: it does not expire before that grant
CREATE TABLE credit_batches (
    id uuid PRIMARY KEY,
    account_id bigint NOT NULL,
    granted bigint NOT NULL,
    remaining bigint NOT NULL,
    reserved bigint NOT NULL DEFAULT 0,
    consumed bigint NOT NULL DEFAULT 0,
    expired bigint NOT NULL DEFAULT 0,
    is_open boolean GENERATED ALWAYS AS (remaining > 0) STORED,
    rolls_over boolean NOT NULL DEFAULT false,
    priority smallint NOT NULL DEFAULT 100 CHECK (priority BETWEEN 0 AND 1000),
    source text COLLATE "C" NOT NULL CHECK (source IN ('subscription', 'purchase', 'bonus', 'refund', 'rollover')),
    issued_at timestamptz NOT NULL CHECK (isfinite(issued_at)),
    expires_at timestamptz CHECK (isfinite(expires_at)),
    purchase_id uuid,
    period_start timestamptz,
    CONSTRAINT credit_batches_conserved CHECK (granted = remaining + reserved + consumed + expired),
    CONSTRAINT credit_batches_positive CHECK (
        granted > 0 AND remaining >= 0 AND reserved >= 0 AND consumed >= 0 AND expired >= 0
    )
) WITH (fillfactor = 75, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);
-- The order in which credits are spent.
CREATE INDEX credit_batches_burn ON credit_batches (account_id, priority, expires_at, issued_at, id) WHERE is_open;
-- What has ended, day by day and account by account: what a run books together then lies together, in this table, in
-- credit_accounts and in their indexes. In the order of the moments a million batches took three times as long.
CREATE INDEX credit_batches_expiry ON credit_batches (((expires_at AT TIME ZONE 'UTC')::date), account_id, id)
    WHERE is_open;

-- What was done, once per (account, kind, reference), with the answer that was given: the same request gets it again.
--   reference    the caller's; NULL for what the jobs do, each once by other means (credit_grants, remaining = 0)
--   fingerprint  of the request: the same reference with another one is refused
--   corrects     the transaction that this one undoes or settles: refund and clawback, capture and release
--   nth          given under the account's lock: the order of what happened to it, also when the clock is set back
CREATE TABLE credit_transactions (
    id uuid PRIMARY KEY,
    account_id bigint NOT NULL,
    kind text COLLATE "C" NOT NULL CHECK (
        kind IN ('grant', 'consume', 'reserve', 'capture', 'release', 'refund', 'clawback', 'expire', 'rollover')
    ),
    reference text COLLATE "C" CHECK (length(reference) BETWEEN 1 AND 256),
    fingerprint bytea,
    amount bigint NOT NULL CHECK (amount >= 0),
    corrects uuid,
    reason text CHECK (length(reason) <= 500),
    answer jsonb,
    nth bigint GENERATED ALWAYS AS IDENTITY,
    created_at timestamptz NOT NULL DEFAULT nm_clock()
) WITH (autovacuum_vacuum_insert_scale_factor = 0.05);
CREATE UNIQUE INDEX credit_transactions_reference ON credit_transactions (account_id, kind, reference)
    WHERE reference IS NOT NULL;
CREATE INDEX credit_transactions_corrects ON credit_transactions (corrects) WHERE corrects IS NOT NULL;

-- Double entry. Those of one transaction are written by one statement and sum to zero.
--   account_id         whose ledger; `account` says which account of it: wallet, system:grant, system:expiry,
--                      service:<name>, payment:<reference>
--   seq, balance_after of wallets only: without holes, and the balance after this entry
CREATE TABLE credit_entries (
    transaction_id uuid NOT NULL,
    line integer NOT NULL CHECK (line > 0),
    account_id bigint NOT NULL,
    account text COLLATE "C" NOT NULL CONSTRAINT credit_entries_account CHECK (
        account IN ('wallet', 'system:grant', 'system:expiry')
        OR starts_with(account, 'service:') AND length(account) > 8
        OR starts_with(account, 'payment:') AND length(account) > 8
    ),
    seq bigint,
    balance_after bigint CONSTRAINT credit_entries_balance CHECK (balance_after >= 0),
    batch_id uuid,
    amount bigint NOT NULL CHECK (amount <> 0),
    PRIMARY KEY (transaction_id, line),
    CHECK (
        CASE account
            WHEN 'wallet' THEN seq IS NOT NULL AND balance_after IS NOT NULL AND batch_id IS NOT NULL
            ELSE seq IS NULL AND balance_after IS NULL AND batch_id IS NULL
        END
    )
) WITH (autovacuum_vacuum_insert_scale_factor = 0.05);
CREATE UNIQUE INDEX credit_entries_wallet ON credit_entries (account_id, seq) WHERE seq IS NOT NULL;

-- What is reserved now, a row per batch it was taken from, deleted when settled.
CREATE TABLE credit_reservations (
    account_id bigint NOT NULL,
    reference text COLLATE "C" NOT NULL,
    line integer NOT NULL CHECK (line > 0),
    transaction_id uuid NOT NULL,
    batch_id uuid NOT NULL,
    amount bigint NOT NULL CHECK (amount > 0),
    service text NOT NULL,
    PRIMARY KEY (account_id, reference, line)
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);

CREATE FUNCTION nm_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only: correct it by a new transaction', TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation';
END $$;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON credit_transactions
    FOR EACH STATEMENT EXECUTE FUNCTION nm_refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON credit_entries
    FOR EACH STATEMENT EXECUTE FUNCTION nm_refuse_change();

CREATE FUNCTION nm_refuse_imbalance() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM written GROUP BY transaction_id HAVING sum(amount) <> 0) THEN
        RAISE EXCEPTION 'the entries of a credit transaction must sum to zero' USING ERRCODE = 'check_violation';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER sum_to_zero AFTER INSERT ON credit_entries
    REFERENCING NEW TABLE AS written FOR EACH STATEMENT EXECUTE FUNCTION nm_refuse_imbalance();

-- What can be bought, as data.
--   kind             subscription: `credits` for each month, whatever the interval of billing; pack: once
--   interval_months  of billing, which ends a subscription that is canceled at its period's end
--   grace_days       a month's credits end this long after the next month begins; expires false: never
--   lifetime_days    of a pack's credits; NULL: no end
--   rollover_cap     so much of what a month left over moves into the next one
--   trial_credits    granted once when a trial begins; they end with it
--   past_due_days    how long an unpaid subscription is still granted its months; the others wait for the payment
CREATE TABLE plans (
    id text COLLATE "C" PRIMARY KEY CHECK (id ~ '^[a-z0-9][a-z0-9_.-]{0,63}$'),
    name text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    kind text COLLATE "C" NOT NULL CHECK (kind IN ('subscription', 'pack')),
    credits bigint NOT NULL CHECK (credits >= 0),
    interval_months smallint NOT NULL DEFAULT 1 CHECK (interval_months IN (1, 3, 6, 12)),
    priority smallint NOT NULL DEFAULT 100 CHECK (priority BETWEEN 0 AND 1000),
    expires boolean NOT NULL DEFAULT true,
    grace_days smallint NOT NULL DEFAULT 0 CHECK (grace_days BETWEEN 0 AND 366),
    lifetime_days integer CHECK (lifetime_days BETWEEN 1 AND 36600),
    rollover_cap bigint NOT NULL DEFAULT 0 CHECK (rollover_cap >= 0),
    trial_credits bigint NOT NULL DEFAULT 0 CHECK (trial_credits >= 0),
    past_due_days smallint NOT NULL DEFAULT 0 CHECK (past_due_days BETWEEN 0 AND 366),
    CHECK (rollover_cap = 0 OR expires)
);
INSERT INTO plans (id, name, kind, credits, interval_months, priority, grace_days, lifetime_days, rollover_cap,
                   trial_credits, past_due_days)
VALUES ('monthly', '1,000 credits a month', 'subscription', 1000, 1, 100, 0, NULL, 0, 100, 3),
       ('yearly', '1,000 credits a month, billed yearly', 'subscription', 1000, 12, 100, 0, NULL, 1000, 100, 7),
       ('pack-1000', '1,000 credits for a year', 'pack', 1000, 1, 200, 0, 365, 0, 0, 0);

-- A subscription or a pack that somebody bought.
--   quantity       so many times the plan's credits
--   anchor         its months begin at anchor + n months
--   grants_from    months that begin before are not granted (an imported subscription had its credits elsewhere)
--   next_period    n of the next month to grant; next_grant_at is when it begins (NULL for packs)
--   holds_from     months that begin at or after this wait: trial not over, payment due, or canceled
--   billed_from    when the billing interval was last changed, which begins a new one; NULL: it still is the anchor's.
--                  The months of credits stay where they are, so that nobody gets more of them by changing
--   failed_run     the run that could not grant it, with grant_error; the next one tries it last
CREATE TABLE purchases (
    id uuid PRIMARY KEY,
    org_id uuid NOT NULL REFERENCES orgs (id),
    env text COLLATE "C" NOT NULL CHECK (env IN ('live', 'test')),
    account_id bigint NOT NULL REFERENCES credit_accounts (id),
    plan_id text COLLATE "C" NOT NULL REFERENCES plans (id),
    quantity integer NOT NULL DEFAULT 1 CHECK (quantity BETWEEN 1 AND 9999),
    external_ref text COLLATE "C" CHECK (length(external_ref) BETWEEN 1 AND 255),
    status text COLLATE "C" NOT NULL CHECK (status IN ('trialing', 'active', 'past_due', 'canceled', 'paid')),
    anchor timestamptz NOT NULL CHECK (isfinite(anchor)),
    grants_from timestamptz NOT NULL CHECK (isfinite(grants_from)),
    next_period integer NOT NULL DEFAULT 0 CHECK (next_period >= 0),
    next_grant_at timestamptz,
    holds_from timestamptz,
    past_due_at timestamptz,
    ends_at timestamptz,
    billed_from timestamptz CHECK (isfinite(billed_from)),
    failed_run uuid,
    grant_error text,
    created_at timestamptz NOT NULL DEFAULT nm_clock(),
    CHECK (next_grant_at = nm_period_start(anchor, next_period)),
    CHECK (status <> 'past_due' OR past_due_at IS NOT NULL),
    CHECK (status <> 'canceled' OR ends_at IS NOT NULL)
) WITH (fillfactor = 75, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);
-- Day by day and account by account, as credit_batches_expiry.
CREATE INDEX purchases_due ON purchases (((next_grant_at AT TIME ZONE 'UTC')::date), account_id, id)
    WHERE next_grant_at IS NOT NULL AND (holds_from IS NULL OR next_grant_at < holds_from);
CREATE UNIQUE INDEX purchases_external ON purchases (org_id, env, external_ref) WHERE external_ref IS NOT NULL;
CREATE INDEX purchases_of_account ON purchases (account_id);

-- One grant per purchase and month; its batch has the transaction's id. An upgrade within the month raises `amount`.
CREATE TABLE credit_grants (
    purchase_id uuid NOT NULL,
    period_start timestamptz NOT NULL,
    transaction_id uuid NOT NULL,
    amount bigint NOT NULL CHECK (amount > 0),
    PRIMARY KEY (purchase_id, period_start)
) WITH (autovacuum_vacuum_insert_scale_factor = 0.05);

-- What a service costs, by org and env: POST /credits/{user}/consume {"service": …}.
CREATE TABLE credit_prices (
    org_id uuid NOT NULL REFERENCES orgs (id),
    env text COLLATE "C" NOT NULL CHECK (env IN ('live', 'test')),
    service text COLLATE "C" NOT NULL CHECK (service ~ '^[a-z0-9][a-z0-9_.-]{0,63}$'),
    credits bigint NOT NULL CHECK (credits > 0),
    PRIMARY KEY (org_id, env, service)
);

-- What each new user of an org is given, once: POST /credits/{user}. The operator sets it, as it makes credits.
CREATE TABLE credit_bonuses (
    org_id uuid NOT NULL REFERENCES orgs (id),
    env text COLLATE "C" NOT NULL CHECK (env IN ('live', 'test')),
    credits bigint NOT NULL CHECK (credits > 0),
    lifetime_days integer CHECK (lifetime_days BETWEEN 1 AND 36600),
    PRIMARY KEY (org_id, env)
);

-- Spend (p_kind consume) or set aside (reserve) an amount: earliest by priority, then expiry, then issue.
--   outcome     done, replayed (answer: as then), other_body, insufficient (answer: what was missing), crosses_low
--   crosses_low nothing was done because credits.low must be told in the same transaction: call again in one, with
--               p_may_cross. `low_below` is then the threshold, otherwise NULL.
CREATE FUNCTION nm_credit_spend(
    p_kind text, p_org_id uuid, p_env text, p_user_id text, p_reference text, p_fingerprint bytea, p_amount bigint,
    p_service text, p_may_cross boolean,
    OUT outcome text, OUT answer jsonb, OUT low_below bigint
) LANGUAGE plpgsql AS $$
DECLARE
    held credit_accounts;
    past record;
    batch record;
    batches uuid[] := '{}';
    takes bigint[] := '{}';
    balances bigint[] := '{}';
    parts jsonb := '[]';
    missing bigint := p_amount;
    spendable bigint := 0;
    now_at timestamptz;
    new_id uuid;
BEGIN
    SELECT * INTO held FROM credit_accounts AS a
    WHERE a.org_id = p_org_id AND a.env = p_env AND a.user_id = p_user_id
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        outcome := 'insufficient';
        answer := jsonb_build_object('required', p_amount, 'available', 0, 'missing', p_amount);
        RETURN;
    END IF;
    -- One reference means one spend, whether at once or by reservation: a refund can then name it without a kind.
    SELECT t.kind, t.fingerprint, t.answer INTO past FROM credit_transactions AS t
    WHERE t.account_id = held.id AND t.kind IN ('consume', 'reserve') AND t.reference = p_reference;
    IF FOUND THEN
        IF past.kind = p_kind AND past.fingerprint = p_fingerprint THEN
            outcome := 'replayed';
            answer := past.answer;
        ELSE
            outcome := 'other_body';
        END IF;
        RETURN;
    END IF;
    now_at := nm_clock();
    FOR batch IN
        SELECT b.id, b.remaining FROM credit_batches AS b
        WHERE b.account_id = held.id AND b.is_open AND (b.expires_at IS NULL OR b.expires_at > now_at)
        ORDER BY b.priority, b.expires_at, b.issued_at, b.id
    LOOP
        IF missing > 0 THEN
            batches := batches || batch.id;
            takes := takes || least(batch.remaining, missing);
            missing := missing - least(batch.remaining, missing);
            balances := balances || held.balance - p_amount + missing;
            parts := parts || jsonb_build_object('id', batch.id, 'amount', takes[cardinality(takes)]);
        END IF;
        spendable := spendable + batch.remaining;
    END LOOP;
    IF missing > 0 THEN
        outcome := 'insufficient';
        answer := jsonb_build_object('required', p_amount, 'available', spendable, 'missing', missing);
        RETURN;
    END IF;
    IF spendable >= held.low_below AND spendable - p_amount < held.low_below THEN
        low_below := held.low_below;
        IF NOT p_may_cross THEN
            outcome := 'crosses_low';
            RETURN;
        END IF;
    END IF;
    new_id := nm_uuid7();
    outcome := 'done';
    answer := jsonb_build_object(
        'reference_id', p_reference, 'amount', p_amount, 'service', p_service, 'balance', spendable - p_amount,
        'batches', parts
    );
    INSERT INTO credit_transactions (id, account_id, kind, reference, fingerprint, amount, answer, created_at)
    VALUES (new_id, held.id, p_kind, p_reference, p_fingerprint, p_amount, answer, now_at);
    -- Row by row: nearly always it is one, and a join with unnest is planned for ten.
    FOR nth IN 1 .. cardinality(takes) LOOP
        UPDATE credit_batches AS b
        SET remaining = b.remaining - takes[nth],
            reserved = b.reserved + CASE p_kind WHEN 'reserve' THEN takes[nth] ELSE 0 END,
            consumed = b.consumed + CASE p_kind WHEN 'reserve' THEN 0 ELSE takes[nth] END
        WHERE b.id = batches[nth];
    END LOOP;
    IF p_kind = 'reserve' THEN
        INSERT INTO credit_reservations (account_id, reference, line, transaction_id, batch_id, amount, service)
        SELECT held.id, p_reference, l.nth, new_id, l.batch_id, l.take, p_service
        FROM unnest(batches, takes) WITH ORDINALITY AS l (batch_id, take, nth);
        RETURN;
    END IF;
    INSERT INTO credit_entries (transaction_id, line, account_id, account, seq, balance_after, batch_id, amount)
    SELECT new_id, l.nth, held.id, 'wallet', held.seq + l.nth, l.balance, l.batch_id, -l.take
    FROM unnest(batches, takes, balances) WITH ORDINALITY AS l (batch_id, take, balance, nth)
    UNION ALL
    SELECT new_id, cardinality(takes) + 1, held.id, 'service:' || p_service, NULL, NULL, NULL, p_amount;
    UPDATE credit_accounts AS a
    SET balance = a.balance - p_amount, seq = a.seq + cardinality(takes)
    WHERE a.id = held.id;
END $$;

-- Settle open reservations, any number of any accounts: `takes` of each is captured, the rest goes back to its batch,
-- or straight to expiry where the batch is past its end. References that are not open are left out of the result, also
-- when somebody else has just settled them: the lines come from the DELETE itself.
CREATE FUNCTION nm_credit_settle(p_account_ids bigint[], p_references text[], p_takes bigint[], p_fingerprint bytea)
RETURNS TABLE (account_id bigint, reference text, captured bigint, released bigint, expired bigint)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    now_at timestamptz;
    base text := nm_uuid7();
BEGIN
    PERFORM FROM credit_accounts AS a WHERE a.id = ANY (p_account_ids) ORDER BY a.id FOR NO KEY UPDATE;
    now_at := nm_clock();
    RETURN QUERY
    WITH wanted AS MATERIALIZED (
        SELECT * FROM unnest(p_account_ids, p_references, p_takes) AS w (account_id, reference, take)
    ), settled AS (
        DELETE FROM credit_reservations AS r
        USING wanted AS w
        WHERE r.account_id = w.account_id AND r.reference = w.reference
        RETURNING r.*, w.take
    ), split AS MATERIALIZED (
        SELECT s.*, b.expires_at <= now_at IS TRUE AS is_late,
               least(s.amount, greatest(s.take - (sum(s.amount) OVER earlier - s.amount), 0))::bigint AS captured
        FROM settled AS s
        JOIN credit_batches AS b ON b.id = s.batch_id
        WINDOW earlier AS (PARTITION BY s.account_id, s.reference ORDER BY s.line)
    ), batch AS (
        UPDATE credit_batches AS b
        SET reserved = b.reserved - t.amount,
            consumed = b.consumed + t.captured,
            remaining = b.remaining + t.back,
            expired = b.expired + t.late
        FROM (
            SELECT batch_id, sum(amount)::bigint AS amount, sum(captured)::bigint AS captured,
                   coalesce(sum(amount - captured) FILTER (WHERE NOT is_late), 0)::bigint AS back,
                   coalesce(sum(amount - captured) FILTER (WHERE is_late), 0)::bigint AS late
            FROM split
            GROUP BY batch_id
        ) AS t
        WHERE b.id = t.batch_id
    ), total AS MATERIALIZED (
        SELECT account_id, reference, min(service) AS service, min(transaction_id::text)::uuid AS reserve_id,
               nm_nth_id(base, row_number() OVER (ORDER BY account_id, reference)) AS id,
               sum(captured)::bigint AS captured,
               coalesce(sum(amount - captured) FILTER (WHERE NOT is_late), 0)::bigint AS released,
               coalesce(sum(amount - captured) FILTER (WHERE is_late), 0)::bigint AS expired
        FROM split
        GROUP BY account_id, reference
    ), header AS (
        INSERT INTO credit_transactions (
            id, account_id, kind, reference, fingerprint, amount, corrects, answer, created_at
        )
        SELECT id, account_id, CASE WHEN captured > 0 THEN 'capture' ELSE 'release' END, reference, p_fingerprint,
               CASE WHEN captured > 0 THEN captured ELSE released + expired END, reserve_id,
               jsonb_build_object(
                   'reference_id', reference, 'captured', captured, 'released', released, 'expired', expired
               ),
               now_at
        FROM total
    ), movement AS (
        SELECT s.account_id, t.id, 2 * s.line + m.half AS line, s.batch_id, m.amount
        FROM split AS s
        JOIN total AS t ON t.account_id = s.account_id AND t.reference = s.reference
        CROSS JOIN LATERAL (
            VALUES (1, s.captured), (2, CASE WHEN s.is_late THEN s.amount - s.captured ELSE 0 END)
        ) AS m (half, amount)
        WHERE m.amount > 0
    ), numbered AS MATERIALIZED (
        SELECT m.*, row_number() OVER earlier AS nth, (sum(m.amount) OVER earlier)::bigint AS so_far
        FROM movement AS m
        WINDOW earlier AS (PARTITION BY m.account_id ORDER BY m.id, m.line ROWS UNBOUNDED PRECEDING)
    ), entry AS (
        INSERT INTO credit_entries (transaction_id, line, account_id, account, seq, balance_after, batch_id, amount)
        SELECT t.id, 1, t.account_id, 'service:' || t.service, NULL::bigint, NULL::bigint, NULL::uuid, t.captured
        FROM total AS t
        WHERE t.captured > 0
        UNION ALL
        SELECT t.id, 2, t.account_id, 'system:expiry', NULL, NULL, NULL, t.expired
        FROM total AS t
        WHERE t.expired > 0
        UNION ALL
        SELECT n.id, n.line, n.account_id, 'wallet', a.seq + n.nth, a.balance - n.so_far, n.batch_id, -n.amount
        FROM numbered AS n
        JOIN credit_accounts AS a ON a.id = n.account_id
    ), account AS (
        UPDATE credit_accounts AS a
        SET balance = a.balance - n.amount, seq = a.seq + n.entries
        FROM (
            SELECT account_id, sum(amount)::bigint AS amount, count(*) AS entries
            FROM numbered
            GROUP BY account_id
        ) AS n
        WHERE a.id = n.account_id
    )
    SELECT t.account_id, t.reference, t.captured, t.released, t.expired FROM total AS t;
END $$;

-- Capture (p_amount of it, NULL: all) or release one reservation.
--   outcome  done, replayed, other_body, not_found, too_much (answer: what is reserved), settled (answer: how it was)
CREATE FUNCTION nm_credit_close(
    p_kind text, p_org_id uuid, p_env text, p_user_id text, p_reference text, p_fingerprint bytea, p_amount bigint,
    OUT outcome text, OUT answer jsonb
) LANGUAGE plpgsql AS $$
DECLARE
    held bigint;
    past record;
    open_amount bigint;
BEGIN
    outcome := 'not_found';
    SELECT a.id INTO held FROM credit_accounts AS a
    WHERE a.org_id = p_org_id AND a.env = p_env AND a.user_id = p_user_id
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    SELECT t.kind, t.fingerprint, t.answer INTO past FROM credit_transactions AS t
    WHERE t.account_id = held AND t.kind IN ('capture', 'release') AND t.reference = p_reference;
    IF FOUND THEN
        answer := past.answer;
        outcome := CASE
            WHEN past.fingerprint = p_fingerprint THEN 'replayed'
            WHEN past.kind = p_kind AND past.fingerprint IS NOT NULL THEN 'other_body'
            ELSE 'settled'
        END;
        RETURN;
    END IF;
    SELECT sum(r.amount) INTO open_amount FROM credit_reservations AS r
    WHERE r.account_id = held AND r.reference = p_reference;
    IF open_amount IS NULL THEN
        RETURN;
    END IF;
    IF p_amount > open_amount THEN
        outcome := 'too_much';
        answer := jsonb_build_object('reserved', open_amount);
        RETURN;
    END IF;
    SELECT 'done', jsonb_build_object(
        'reference_id', s.reference, 'captured', s.captured, 'released', s.released, 'expired', s.expired
    )
    INTO outcome, answer
    FROM nm_credit_settle(
        ARRAY[held], ARRAY[p_reference],
        ARRAY[CASE p_kind WHEN 'capture' THEN coalesce(p_amount, open_amount) ELSE 0 END], p_fingerprint
    ) AS s;
    outcome := coalesce(outcome, 'not_found');
END $$;

-- Give credits as a new batch; makes the account when there is none.
--   p_counter  where they come from: system:grant, payment:<reference>, or service:<name> for a refund
--   p_answered what the answer says it gives, where it is a part of that
--   outcome    done, replayed, other_body, too_much (the balance would not fit)
CREATE FUNCTION nm_credit_grant(
    p_kind text, p_org_id uuid, p_env text, p_user_id text, p_reference text, p_fingerprint bytea, p_amount bigint,
    p_source text, p_priority smallint, p_issued_at timestamptz, p_expires_at timestamptz, p_counter text, p_reason text,
    p_corrects uuid, p_purchase_id uuid, p_period_start timestamptz, p_answered bigint DEFAULT NULL,
    OUT outcome text, OUT answer jsonb, OUT transaction_id uuid
) LANGUAGE plpgsql AS $$
DECLARE
    held credit_accounts;
    past record;
    now_at timestamptz;
BEGIN
    LOOP
        SELECT * INTO held FROM credit_accounts AS a
        WHERE a.org_id = p_org_id AND a.env = p_env AND a.user_id = p_user_id
        FOR NO KEY UPDATE;
        EXIT WHEN FOUND;
        INSERT INTO credit_accounts (org_id, env, user_id) VALUES (p_org_id, p_env, p_user_id) ON CONFLICT DO NOTHING;
    END LOOP;
    SELECT t.id, t.fingerprint, t.answer INTO past FROM credit_transactions AS t
    WHERE t.account_id = held.id AND t.kind = p_kind AND t.reference = p_reference;
    IF FOUND THEN
        outcome := CASE WHEN past.fingerprint = p_fingerprint THEN 'replayed' ELSE 'other_body' END;
        answer := past.answer;
        transaction_id := past.id;
        RETURN;
    END IF;
    IF held.balance > 9223372036854775807 - p_amount THEN
        outcome := 'too_much';
        RETURN;
    END IF;
    now_at := nm_clock();
    transaction_id := nm_uuid7();
    outcome := 'done';
    answer := jsonb_build_object(
        'reference_id', p_reference, 'batch_id', transaction_id, 'amount', coalesce(p_answered, p_amount),
        'source', p_source, 'priority', p_priority, 'expires_at',
        to_char(p_expires_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
    );
    INSERT INTO credit_batches (
        id, account_id, granted, remaining, priority, source, issued_at, expires_at, purchase_id, period_start
    )
    VALUES (
        transaction_id, held.id, p_amount, p_amount, p_priority, p_source, coalesce(p_issued_at, now_at), p_expires_at,
        p_purchase_id, p_period_start
    );
    INSERT INTO credit_transactions (
        id, account_id, kind, reference, fingerprint, amount, corrects, reason, answer, created_at
    )
    VALUES (
        transaction_id, held.id, p_kind, p_reference, p_fingerprint, p_amount, p_corrects, p_reason, answer, now_at
    );
    INSERT INTO credit_entries (transaction_id, line, account_id, account, seq, balance_after, batch_id, amount)
    VALUES (transaction_id, 1, held.id, 'wallet', held.seq + 1, held.balance + p_amount, transaction_id, p_amount),
           (transaction_id, 2, held.id, p_counter, NULL, NULL, NULL, -p_amount);
    UPDATE credit_accounts AS a SET balance = a.balance + p_amount, seq = a.seq + 1 WHERE a.id = held.id;
END $$;

-- Give back (p_amount of it, NULL: what is left) what a consume or a capture took, last batch first: a batch for each that
-- it was taken from, which is spent as early and ends when that one does, because credits must not live longer for having
-- been spent together with others. A batch that is about to end, or has, is made up for by p_least_days, once: not when it
-- was given by a refund itself, nor when it was taken back. The first transaction has the reference and the whole answer.
-- They stay credits of their purchase, so that they can be taken back with it when its payment is undone.
--   outcome  done, replayed, other_body, not_found, too_much (answer: what may be refunded)
CREATE FUNCTION nm_credit_refund(
    p_org_id uuid, p_env text, p_user_id text, p_reference text, p_fingerprint bytea, p_of text, p_amount bigint,
    p_reason text, p_least_days integer,
    OUT outcome text, OUT answer jsonb
) LANGUAGE plpgsql AS $$
DECLARE
    held credit_accounts;
    past record;
    spent credit_transactions;
    part record;
    given record;
    left_over bigint;
    wanted bigint;
    least_end timestamptz;
BEGIN
    outcome := 'not_found';
    SELECT * INTO held FROM credit_accounts AS a
    WHERE a.org_id = p_org_id AND a.env = p_env AND a.user_id = p_user_id
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    SELECT t.fingerprint, t.answer INTO past FROM credit_transactions AS t
    WHERE t.account_id = held.id AND t.kind = 'refund' AND t.reference = p_reference;
    IF FOUND THEN
        outcome := CASE WHEN past.fingerprint = p_fingerprint THEN 'replayed' ELSE 'other_body' END;
        answer := past.answer;
        RETURN;
    END IF;
    SELECT * INTO spent FROM credit_transactions AS t
    WHERE t.account_id = held.id AND t.kind IN ('consume', 'capture') AND t.reference = p_of;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    SELECT spent.amount - coalesce(sum(t.amount), 0) INTO left_over FROM credit_transactions AS t
    WHERE t.corrects = spent.id AND t.kind = 'refund';
    wanted := coalesce(p_amount, left_over);
    IF left_over = 0 OR wanted > left_over THEN
        outcome := 'too_much';
        answer := jsonb_build_object('refundable', left_over);
        RETURN;
    END IF;
    IF held.balance > 9223372036854775807 - wanted THEN
        outcome := 'too_much';
        RETURN;
    END IF;
    least_end := nm_clock() + make_interval(hours => 24 * p_least_days);
    FOR part IN
        SELECT taken.*
        FROM (
            SELECT b.priority, b.purchase_id, b.period_start, l.line,
                   CASE WHEN b.source = 'refund' OR EXISTS (
                            SELECT FROM credit_transactions AS t WHERE t.corrects = b.id AND t.kind = 'clawback'
                        ) THEN b.expires_at
                        WHEN b.expires_at IS NOT NULL THEN greatest(b.expires_at, least_end) END AS expires_at,
                   -- What of this line lies between what was refunded before and what will have been now.
                   least(l.so_far, spent.amount - left_over + wanted)
                       - greatest(l.so_far - l.amount, spent.amount - left_over) AS amount
            FROM (
                SELECT e.batch_id, e.line, -e.amount AS amount,
                       (-sum(e.amount) OVER (ORDER BY e.line DESC))::bigint AS so_far
                FROM credit_entries AS e
                WHERE e.transaction_id = spent.id
                  AND e.account = 'wallet'
                  AND (spent.kind = 'consume' OR e.line % 2 = 1)  -- the even lines of a capture are what expired
            ) AS l
            JOIN credit_batches AS b ON b.id = l.batch_id
        ) AS taken
        WHERE taken.amount > 0
        ORDER BY taken.line DESC
    LOOP
        SELECT g.outcome, g.answer INTO given
        FROM nm_credit_grant(
            'refund', p_org_id, p_env, p_user_id, CASE WHEN answer IS NULL THEN p_reference END, p_fingerprint,
            part.amount, 'refund', part.priority, NULL, part.expires_at,
            (SELECT e.account FROM credit_entries AS e WHERE e.transaction_id = spent.id AND e.account LIKE 'service:%'),
            p_reason, spent.id, part.purchase_id, part.period_start, wanted
        ) AS g;
        outcome := given.outcome;
        answer := coalesce(answer, given.answer);
    END LOOP;
END $$;

-- Take back what is left (at most p_amount) of a batch: a grant made by mistake, a payment that was refunded. What is
-- reserved keeps its right; what is released of it later goes to expiry, because the batch ends now. The answer keeps the
-- end it had, by which it was spent until then.
--   outcome  done, replayed, other_body, not_found
CREATE FUNCTION nm_credit_claw_back(
    p_org_id uuid, p_env text, p_user_id text, p_reference text, p_fingerprint bytea, p_batch_id uuid, p_amount bigint,
    p_reason text,
    OUT outcome text, OUT answer jsonb
) LANGUAGE plpgsql AS $$
DECLARE
    held credit_accounts;
    past record;
    batch credit_batches;
    taken bigint;
    now_at timestamptz;
    new_id uuid;
BEGIN
    outcome := 'not_found';
    SELECT * INTO held FROM credit_accounts AS a
    WHERE a.org_id = p_org_id AND a.env = p_env AND a.user_id = p_user_id
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    SELECT t.fingerprint, t.answer INTO past FROM credit_transactions AS t
    WHERE t.account_id = held.id AND t.kind = 'clawback' AND t.reference = p_reference;
    IF FOUND THEN
        outcome := CASE WHEN past.fingerprint = p_fingerprint THEN 'replayed' ELSE 'other_body' END;
        answer := past.answer;
        RETURN;
    END IF;
    SELECT * INTO batch FROM credit_batches AS b WHERE b.id = p_batch_id AND b.account_id = held.id;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    taken := least(batch.remaining, coalesce(p_amount, batch.remaining));
    now_at := nm_clock();
    new_id := nm_uuid7();
    outcome := 'done';
    answer := jsonb_build_object(
        'reference_id', p_reference, 'batch_id', p_batch_id, 'amount', taken, 'reserved', batch.reserved,
        'gone', batch.consumed + batch.expired, 'former_end',
        to_char(batch.expires_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
    );
    INSERT INTO credit_transactions (
        id, account_id, kind, reference, fingerprint, amount, corrects, reason, answer, created_at
    )
    VALUES (new_id, held.id, 'clawback', p_reference, p_fingerprint, taken, p_batch_id, p_reason, answer, now_at);
    UPDATE credit_batches AS b
    SET remaining = b.remaining - taken,
        consumed = b.consumed + taken,
        rolls_over = b.rolls_over AND p_amount IS NOT NULL,
        expires_at = CASE WHEN p_amount IS NULL THEN least(b.expires_at, now_at) ELSE b.expires_at END
    WHERE b.id = p_batch_id;
    IF taken = 0 THEN
        RETURN;
    END IF;
    INSERT INTO credit_entries (transaction_id, line, account_id, account, seq, balance_after, batch_id, amount)
    SELECT new_id, 1, held.id, 'wallet', held.seq + 1, held.balance - taken, p_batch_id, -taken
    UNION ALL
    SELECT new_id, 2, held.id, coalesce(
        (SELECT e.account FROM credit_entries AS e WHERE e.transaction_id = p_batch_id AND e.account <> 'wallet'),
        'system:grant'
    ), NULL, NULL, NULL, taken;
    UPDATE credit_accounts AS a SET balance = a.balance - taken, seq = a.seq + 1 WHERE a.id = held.id;
END $$;
