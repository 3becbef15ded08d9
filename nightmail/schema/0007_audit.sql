-- The audit's memory: whose turn it is, how far it has come, what it found. The invariants are in store/audit/.

-- The hourly pass is one process's turn at a time, whoever ticks. A pass that did not come to its end goes on where its
-- marks stand; `next_at` moves when it has.
--   claim_id, lease_until   who is at it; a holder that died is replaced when its lease is over
--   finished_at, checked    of the last pass that came to its end
CREATE TABLE audit_turn (
    is_only boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    next_at timestamptz NOT NULL,
    claim_id uuid,
    lease_until timestamptz,
    finished_at timestamptz,
    checked bigint NOT NULL DEFAULT 0 CHECK (checked >= 0),
    CHECK ((claim_id IS NULL) = (lease_until IS NULL))
) WITH (fillfactor = 20);
INSERT INTO audit_turn (next_at) VALUES ('1970-01-01T00:00:00Z');

-- What was written before `audited_to`, by the server's own clock, has been looked at. No row: nothing has.
CREATE TABLE audit_marks (
    scope text COLLATE "C" PRIMARY KEY,
    audited_to timestamptz NOT NULL CHECK (isfinite(audited_to))
) WITH (fillfactor = 50);

-- What is not as it must be. `key` is what to look at again to see whether it still is: an account, a message, a moment.
CREATE TABLE audit_findings (
    invariant text COLLATE "C" NOT NULL,
    offender text COLLATE "C" NOT NULL,
    key text COLLATE "C" NOT NULL,
    first_seen timestamptz NOT NULL,
    last_seen timestamptz NOT NULL,
    cleared_at timestamptz,
    PRIMARY KEY (invariant, offender)
) WITH (fillfactor = 75);
CREATE INDEX audit_findings_open ON audit_findings (invariant, offender) WHERE cleared_at IS NULL;

-- The least UUIDv7 of a moment: what was written from then on, found through a primary key.
CREATE FUNCTION nm_uuid_at(moment timestamptz) RETURNS uuid
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN (
    lpad(to_hex(greatest(floor(extract(epoch FROM moment) * 1000), 0)::bigint), 12, '0') || '70008000000000000000'
)::uuid;
