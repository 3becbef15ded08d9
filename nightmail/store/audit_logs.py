"""audit_logs: who changed what through the API or the command line."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

from psycopg.types.json import Jsonb

from nightmail.ids import new_id
from nightmail.store.database import Connection

INSERT = """
INSERT INTO audit_logs (id, actor, action, org_id, target, detail)
VALUES (%(id)s, %(actor)s, %(action)s, %(org_id)s, %(target)s, %(detail)s)
"""


async def insert_audit_log(
    conn: Connection,
    *,
    actor: str,
    action: str,
    org_id: UUID | None,
    target: str,
    detail: Mapping[str, object] | None = None,
) -> None:
    """Write down a change, in the transaction that makes it; `actor` is `admin`, `cli` or `key:<id>`."""
    await conn.execute(
        INSERT,
        {
            "id": new_id(),
            "actor": actor,
            "action": action,
            "org_id": org_id,
            "target": target,
            "detail": Jsonb(dict(detail or {})),
        },
    )
