"""/openapi.json and /docs, made from the list of operations and the types of their bodies and replies."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from nightmail import __version__
from nightmail.web.auth import Access
from nightmail.web.operation import Operation
from nightmail.web.problems import ProblemBody
from nightmail.web.services import TEMPLATES, Services

REASONS: Mapping[int, str] = {
    400: "The body is not JSON, or the Idempotency-Key is not usable.",
    401: "No key, or one that may only send.",
    402: "There are not enough credits: the answer says how many are required, available and missing.",
    403: "The key is unknown, revoked, expired or used from elsewhere.",
    404: "Not found, or not visible to this key.",
    405: "The path does not have this method.",
    408: "The body did not arrive in time.",
    409: "The request conflicts with the state of what it names, or with another one of the same Idempotency-Key.",
    413: "The body is too large.",
    422: "A value is refused; the message names the field.",
    429: "Too many requests, and `retry-after` says when to come back; or `monthly_quota_exceeded`.",
    500: "A defect of Nightmail.",
    503: "The database is away and the outcome unknown. Try again with the same Idempotency-Key.",
}
HEADERS: Mapping[str, dict[str, Any]] = {
    "Idempotency-Key": {
        "description": "The same request again within 24 hours gets the same answer.",
        "schema": {"type": "string", "minLength": 1, "maxLength": 256, "pattern": "^[!-~]+$"},
    },
    "x-batch-validation": {
        "description": "`strict` (default): all or none. `permissive`: refused messages are listed in `errors`.",
        "schema": {"type": "string", "enum": ["strict", "permissive"]},
    },
}
SECURITY: Mapping[Access, list[dict[str, list[str]]]] = {
    "open": [],
    "sending": [{"apiKey": []}],
    "full": [{"apiKey": []}],
    "full_or_admin": [{"apiKey": []}, {"adminToken": []}],
    "admin": [{"adminToken": []}],
}
NOT_BUILT = 501
REF = "#/components/schemas/{name}"
CSP = "default-src 'none'; style-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


def statuses(operation: Operation) -> list[int]:
    """Return the statuses an operation may answer with besides its own."""
    found = {405, 500, *operation.errors}
    if operation.access != "open":
        found |= {401, 403, 429, 503}
    if operation.body is not None:
        found |= {400, 408, 413, 422}
    if operation.headers:
        found.add(400)
    if operation.query is not None or operation.path_kinds:
        found.add(422)
    if operation.path == "/readyz":
        found.add(503)
    return sorted(found - {operation.status})


def build_openapi(operations: Sequence[Operation], *, public_url: str | None) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of what is built: a client made from it finds nothing that answers 501."""
    operations = [operation for operation in operations if operation.status != NOT_BUILT]
    types = [t for o in operations for t in (o.body, o.reply) if t is not None and t is not bytes]
    schemas, components = msgspec.json.schema_components([*types, ProblemBody], ref_template=REF)
    by_type = dict(zip(map(repr, types), schemas, strict=False))
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        path = plain_path(operation.path)
        paths.setdefault(path, {})[operation.method.lower()] = _describe(operation, by_type)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Nightmail",
            "version": __version__,
            "description": "Email and SMS, in Resend's contract: the official Resend SDKs work unmodified.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": public_url or "/"}],
        "tags": [{"name": tag} for tag in dict.fromkeys(o.tag for o in operations)],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "apiKey": {"type": "http", "scheme": "bearer", "description": "nm_live_… or nm_test_…"},
                "adminToken": {"type": "http", "scheme": "bearer", "description": "ADMIN_TOKEN"},
            },
        },
    }


def plain_path(path: str) -> str:
    """Return the path without the kinds of its parts."""
    return re.sub(r"\{(\w+):\w+\}", r"{\1}", path)


def _describe(operation: Operation, by_type: Mapping[str, Any]) -> dict[str, Any]:
    reply = {"type": "string", "format": "binary"} if operation.reply is bytes else by_type[repr(operation.reply)]
    described: dict[str, Any] = {
        "operationId": operation.id,
        "summary": operation.summary,
        "tags": [operation.tag],
        "security": SECURITY[operation.access],
        "parameters": list(_parameters(operation)),
        "responses": {str(operation.status): _response(REASONS.get(operation.status, "Done."), operation.media, reply)},
    }
    if operation.description:
        described["description"] = operation.description
    problem = by_type[repr(ProblemBody)] if repr(ProblemBody) in by_type else {"$ref": REF.format(name="ProblemBody")}
    for status in statuses(operation):
        schema = reply if operation.path == "/readyz" and status == 503 else problem
        described["responses"][str(status)] = _response(REASONS[status], "application/json", schema)
    if operation.body is not None:
        content: dict[str, Any] = {"schema": by_type[repr(operation.body)]}
        if operation.example is not None:
            content["example"] = operation.example
        described["requestBody"] = {"required": True, "content": {"application/json": content}}
    return described


def _response(description: str, media: str, schema: Any) -> dict[str, Any]:
    return {"description": description, "content": {media: {"schema": schema}}}


def _parameters(operation: Operation) -> Iterable[dict[str, Any]]:
    kinds = {
        "uuid": {"type": "string", "format": "uuid"},
        "text": {"type": "string", "minLength": 1, "maxLength": 1000},
        "position": {"type": "string", "pattern": "^[0-9]{1,4}$"},
    }
    for name in re.findall(r"\{(\w+)", operation.path):
        kind = operation.path_kinds.get(name, "text")
        yield {"name": name, "in": "path", "required": True, "schema": kinds[kind]}
    if operation.query is not None:
        for info in msgspec.structs.fields(operation.query):
            schema = msgspec.json.schema(info.type)
            if "anyOf" in schema:
                described = {k: v for k, v in schema.items() if k != "anyOf"}
                schema = {**described, **next(part for part in schema["anyOf"] if part != {"type": "null"})}
            schema.pop("$defs", None)
            if "enum" in schema:
                schema["enum"] = [value for value in schema["enum"] if value is not None]
            if info.default is not None and info.default is not msgspec.NODEFAULT:
                schema["default"] = info.default
            yield {"name": info.encode_name, "in": "query", "required": False, "schema": schema}
    for name in operation.headers:
        yield {"name": name, "in": "header", "required": False, **HEADERS[name]}


def documentation_routes(services: Services, operations: Sequence[Operation]) -> list[BaseRoute]:
    """Return the routes of /openapi.json and /docs; both are made when first asked for, and kept."""

    @cache
    def document() -> dict[str, Any]:
        return build_openapi(operations, public_url=services.settings.public_url)

    @cache
    def document_json() -> bytes:
        return msgspec.json.encode(document())

    @cache
    def page() -> bytes:
        return render_docs(services, document(), operations).encode()

    async def openapi(_: Request) -> Response:
        return Response(document_json(), media_type="application/json")

    async def docs(_: Request) -> Response:
        return Response(page(), media_type="text/html", headers={"content-security-policy": CSP})

    async def docs_style(_: Request) -> Response:
        return Response((TEMPLATES / "docs.css").read_bytes(), media_type="text/css")

    return [
        Route("/openapi.json", openapi, methods=["GET"]),
        Route("/docs", docs, methods=["GET"]),
        Route("/docs/style.css", docs_style, methods=["GET"]),
    ]


def render_docs(services: Services, document: Mapping[str, Any], operations: Sequence[Operation]) -> str:
    """Return the page /docs."""
    base = services.settings.public_url or "http://localhost:8025"
    groups: dict[str, list[dict[str, Any]]] = {}
    for operation in operations:
        if operation.status == NOT_BUILT:
            continue
        described = document["paths"][plain_path(operation.path)][operation.method.lower()]
        groups.setdefault(operation.tag, []).append(
            {
                "method": operation.method,
                "path": plain_path(operation.path),
                "anchor": operation.id,
                "access": operation.access,
                "described": described,
                "curl": _curl(operation, base),
                "body": described.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema"),
            }
        )
    return services.templates.get_template("docs.html").render(
        document=document,
        groups=groups,
        schemas=document["components"]["schemas"],
        missing=[f"{o.method} {plain_path(o.path)}" for o in operations if o.status == NOT_BUILT],
        show=_show,
    )


def _show(schema: Any) -> str:
    return json.dumps(schema, indent=2, ensure_ascii=False)


def _curl(operation: Operation, base: str) -> str:
    token = {"open": None, "admin": "$ADMIN_TOKEN"}.get(operation.access, "$NIGHTMAIL_API_KEY")
    parts = ["curl", "-X", operation.method, shlex.quote(base + plain_path(operation.path))]
    if token is not None:
        parts += ["-H", f'"Authorization: Bearer {token}"']
    if operation.example is not None:
        parts += ["-H", "'Content-Type: application/json'", "-d", shlex.quote(json.dumps(operation.example))]
    return " ".join(parts)
