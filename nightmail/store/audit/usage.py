"""Usage against messages, org by org: counted by a second way, from the messages and their sent events.

A message's units are split: `credit_units` and `metered_units` of them, the rest is included; what was used fills them
in this order. The sums of an org need all its messages, so they are not part of the hourly pass.
"""

from __future__ import annotations

from typing import LiteralString

from nightmail.store.audit.invariant import Invariant

SPLIT: LiteralString = """
WITH counted AS MATERIALIZED (
    SELECT org_id, channel, env, period, rating, sum(reserved) AS reserved, sum(used) AS used
    FROM usage_records
    WHERE org_id = ANY (%(keys)s::uuid[])
    GROUP BY org_id, channel, env, period, rating
), message AS MATERIALIZED (
    SELECT m.id, m.org_id, m.channel, m.env, m.period, m.units, m.credit_units, m.metered_units,
           m.units - m.credit_units - m.metered_units AS included_units, m.state
    FROM messages AS m
    WHERE m.org_id = ANY (%(keys)s::uuid[])
)
"""

RESERVED: LiteralString = """
, expected AS (
    SELECT m.org_id, m.channel, m.env, m.period, part.rating, sum(part.units) AS reserved
    FROM message AS m
    CROSS JOIN LATERAL (
        VALUES ('included', m.included_units), ('credits', m.credit_units), ('metered', m.metered_units)
    ) AS part (rating, units)
    WHERE m.state = 'ambiguous'
       OR EXISTS (SELECT FROM message_queue AS q WHERE q.message_id = m.id)
    GROUP BY m.org_id, m.channel, m.env, m.period, part.rating
)
SELECT org_id AS key,
       concat_ws(' ', org_id, channel, env, period, rating) AS id, 1 AS things,
       coalesce(c.reserved, 0) <> coalesce(x.reserved, 0) AS is_wrong
FROM counted AS c
FULL JOIN expected AS x USING (org_id, channel, env, period, rating)
"""

USED: LiteralString = """
, sent AS (
    SELECT m.*, coalesce((e.data ->> 'units')::bigint, m.units) AS used
    FROM message AS m
    JOIN message_events AS e ON e.message_id = m.id AND e.recipient = '' AND e.kind = 'sent' AND e.provider_ref = ''
), expected AS (
    SELECT m.org_id, m.channel, m.env, m.period, part.rating, sum(part.units) AS used
    FROM sent AS m
    CROSS JOIN LATERAL (
        VALUES ('included', least(m.used, m.included_units)),
               ('credits', least(greatest(m.used - m.included_units, 0), m.credit_units)),
               ('metered', greatest(m.used - m.included_units - m.credit_units, 0))
    ) AS part (rating, units)
    GROUP BY m.org_id, m.channel, m.env, m.period, part.rating
)
SELECT org_id AS key,
       concat_ws(' ', org_id, channel, env, period, rating) AS id, 1 AS things,
       coalesce(c.used, 0) <> coalesce(x.used, 0) AS is_wrong
FROM counted AS c
FULL JOIN expected AS x USING (org_id, channel, env, period, rating)
"""

TAKEN: LiteralString = """
SELECT q.org_id AS key, concat_ws(' ', q.org_id, q.channel, q.period) AS id, 1 AS things,
       q.taken <> (
           SELECT coalesce(sum(u.reserved + u.used), 0)
           FROM usage_records AS u
           WHERE u.org_id = q.org_id
             AND u.channel = q.channel
             AND u.env = 'live'
             AND u.period = q.period
             AND u.rating = 'included'
       ) AS is_wrong
FROM usage_quotas AS q
WHERE q.org_id = ANY (%(keys)s::uuid[])
"""

USAGE: tuple[Invariant, ...] = (
    Invariant(
        "reserved", "reserved units are those of messages that wait in the queue or are ambiguous", "orgs",
        SPLIT + RESERVED,
    ),
    Invariant(
        "used", "used units are those of the sent events: the message's own, or what the event says when fewer", "orgs",
        SPLIT + USED,
    ),
    Invariant(
        "taken", "what is taken of a month's quota is what is reserved and used of it", "orgs", TAKEN
    ),
)  # fmt: skip
