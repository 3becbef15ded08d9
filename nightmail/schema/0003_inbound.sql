-- What comes in: notifications of Amazon SNS, SMS from people, and clicks on unsubscribe links.

-- Notifications whose effects are committed, each in the transaction of its effects: the same one again does nothing.
-- Kept for two days, twice as long as a notification may be old (rules.sns).
CREATE TABLE sns_notifications (
    message_id text COLLATE "C" PRIMARY KEY CHECK (length(message_id) BETWEEN 1 AND 200),
    topic_arn text NOT NULL,
    received_at timestamptz NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0.05);
CREATE INDEX sns_notifications_received ON sns_notifications (received_at);

-- SMS that people sent to a number of ours.
--   action            what its text means as a keyword, NULL for anything else
--   org_ids           the orgs it was told to
--   reply_message_id  the message that answers it, NULL when none does
CREATE TABLE inbound_sms (
    id text COLLATE "C" PRIMARY KEY CHECK (length(id) BETWEEN 1 AND 200),
    from_number text NOT NULL,
    to_number text NOT NULL,
    body text NOT NULL,
    keyword text NOT NULL DEFAULT '',
    action text COLLATE "C" CHECK (action IN ('stop', 'start', 'help')),
    org_ids uuid[] NOT NULL DEFAULT '{}',
    reply_message_id uuid,
    received_at timestamptz NOT NULL
) WITH (autovacuum_vacuum_insert_scale_factor = 0.05);
-- Was this person's keyword answered within the hour?
CREATE INDEX inbound_sms_answered ON inbound_sms (from_number, to_number, action, received_at)
    WHERE reply_message_id IS NOT NULL;

-- Whose person is this? No column of it is ever updated, so the second write of a message stays heap-only. Before the
-- ALTER below, which shuts out readers too until the end: a migration is one transaction. Who has millions of SMS builds
-- it CONCURRENTLY before migrating, and then nothing waits here.
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX IF NOT EXISTS messages_sms_recipient ON messages ((addresses[1]), org_id, id)
    WHERE channel = 'sms' AND env = 'live';

-- An answer to STOP must pass the gate although the number is suppressed by that very STOP. NOT VALID saves reading the
-- old rows, all of which have the default.
ALTER TABLE messages ADD COLUMN purpose text COLLATE "C" NOT NULL DEFAULT 'message';
ALTER TABLE messages ADD CONSTRAINT messages_purpose CHECK (purpose IN ('message', 'keyword_reply')) NOT VALID;

-- The secret of unsubscribe links, one per installation. Links in old mail must work for years: it is never rotated.
CREATE TABLE unsubscribe_secret (
    is_only boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    secret bytea NOT NULL CHECK (length(secret) = 32)
);
INSERT INTO unsubscribe_secret (secret)
VALUES (sha256(convert_to(gen_random_uuid()::text || gen_random_uuid()::text, 'UTF8')));
