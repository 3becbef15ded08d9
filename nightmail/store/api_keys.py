"""api_keys: only the SHA-256 and the last four characters of a token are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from nightmail.ids import new_api_key, new_id, sha256
from nightmail.store.audit_logs import insert_audit_log
from nightmail.store.database import Connection


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key that may be used now; `expires_in_s` None means that it does not expire."""

    id: UUID
    org_id: UUID
    env: str
    permission: str
    domain_id: UUID | None
    rate_per_s: int | None
    cidrs: list[str]
    expires_in_s: float | None


FIND = """
SELECT id, org_id, env, permission, domain_id, rate_per_s, cidrs,
       extract(epoch FROM expires_at - nm_now())::double precision
FROM api_keys
WHERE token_sha256 = %(token_sha256)s
  AND revoked_at IS NULL
  AND (expires_at IS NULL OR expires_at > nm_now())
"""


async def find_api_key(conn: Connection, token_sha256: bytes) -> ApiKey | None:
    """Return the key with this digest, None when it is unknown, revoked or expired."""
    cursor = await conn.execute(FIND, {"token_sha256": token_sha256})
    row = await cursor.fetchone()
    return ApiKey(*row) if row else None


@dataclass(frozen=True, slots=True)
class ApiKeyView:
    """A key as its org sees it: never the token."""

    id: UUID
    org_id: UUID
    name: str
    env: str
    last_four: str
    permission: str
    rate_per_s: int | None
    cidrs: list[str]
    created_at: datetime
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class NewApiKey:
    """What a new key may do; `rate_per_s` None means the process's default, no CIDRs means from anywhere."""

    name: str
    env: str
    permission: str = "full_access"
    domain_id: UUID | None = None
    rate_per_s: int | None = None
    cidrs: Sequence[str] = ()
    expires_at: datetime | None = None


INSERT = """
INSERT INTO api_keys (
    id, org_id, name, env, token_sha256, last_four, permission, domain_id, rate_per_s, cidrs, expires_at
)
VALUES (
    %(id)s, %(org_id)s, %(name)s, %(env)s, %(token_sha256)s, %(last_four)s, %(permission)s, %(domain_id)s,
    %(rate_per_s)s, %(cidrs)s, %(expires_at)s
)
RETURNING id, org_id, name, env, last_four, permission, rate_per_s, cidrs, created_at, expires_at
"""


async def insert_api_key(conn: Connection, *, org_id: UUID, key: NewApiKey, actor: str) -> tuple[ApiKeyView, str]:
    """Make a key; the token, returned beside it, is not kept anywhere."""
    token = new_api_key(key.env)
    async with conn.transaction():
        cursor = await conn.execute(
            INSERT,
            {
                "id": new_id(),
                "org_id": org_id,
                "name": key.name,
                "env": key.env,
                "token_sha256": sha256(token),
                "last_four": token[-4:],
                "permission": key.permission,
                "domain_id": key.domain_id,
                "rate_per_s": key.rate_per_s,
                "cidrs": list(key.cidrs),
                "expires_at": key.expires_at,
            },
        )
        row = await cursor.fetchone()
        assert row is not None, "INSERT ... RETURNING has one row"
        view = ApiKeyView(*row)
        await insert_audit_log(
            conn,
            actor=actor,
            action="api_key.created",
            org_id=org_id,
            target=str(view.id),
            detail={"env": key.env, "permission": key.permission},
        )
    return view, token


LIST = """
SELECT id, org_id, name, env, last_four, permission, rate_per_s, cidrs, created_at, expires_at
FROM api_keys
WHERE org_id = %(org_id)s
  AND env = %(env)s
  AND revoked_at IS NULL
  AND (%(after)s::uuid IS NULL OR id < %(after)s)
ORDER BY id DESC
LIMIT %(limit)s + 1
"""

LIST_BEFORE = """
SELECT id, org_id, name, env, last_four, permission, rate_per_s, cidrs, created_at, expires_at
FROM api_keys
WHERE org_id = %(org_id)s
  AND env = %(env)s
  AND revoked_at IS NULL
  AND id > %(before)s
ORDER BY id
LIMIT %(limit)s + 1
"""


async def list_api_keys(
    conn: Connection, *, org_id: UUID, env: str, limit: int, after: UUID | None, before: UUID | None
) -> tuple[list[ApiKeyView], bool]:
    """Return up to `limit` keys that are not revoked, newest first, and whether there are more in the direction."""
    arguments: dict[str, Any] = {"org_id": org_id, "env": env, "limit": limit, "after": after, "before": before}
    cursor = await conn.execute(LIST if before is None else LIST_BEFORE, arguments)
    views = [ApiKeyView(*row) for row in await cursor.fetchall()]
    page = views[:limit]
    return (page if before is None else page[::-1]), len(views) > limit


RENAME = """
UPDATE api_keys
SET name = %(name)s
WHERE id = %(id)s
  AND org_id = %(org_id)s
  AND env = %(env)s
  AND revoked_at IS NULL
"""


async def rename_api_key(conn: Connection, *, org_id: UUID, env: str, key_id: UUID, name: str, actor: str) -> bool:
    """Rename a key; return whether the org has it."""
    async with conn.transaction():
        cursor = await conn.execute(RENAME, {"id": key_id, "org_id": org_id, "env": env, "name": name})
        if cursor.rowcount == 0:
            return False
        await insert_audit_log(conn, actor=actor, action="api_key.renamed", org_id=org_id, target=str(key_id))
    return True


REVOKE = """
UPDATE api_keys
SET revoked_at = nm_now()
WHERE id = %(id)s
  AND org_id = %(org_id)s
  AND env = %(env)s
  AND revoked_at IS NULL
"""


async def revoke_api_key(conn: Connection, *, org_id: UUID, env: str, key_id: UUID, actor: str) -> bool:
    """Revoke a key for good; return whether the org had it. The row stays, for the audit log."""
    async with conn.transaction():
        cursor = await conn.execute(REVOKE, {"id": key_id, "org_id": org_id, "env": env})
        if cursor.rowcount == 0:
            return False
        await insert_audit_log(conn, actor=actor, action="api_key.revoked", org_id=org_id, target=str(key_id))
    return True
