"""Operations of Resend and of our own specification that are not built yet: JSON 501, after the key was checked."""

from __future__ import annotations

from nightmail.web.operation import Call, Operation, Reply
from nightmail.web.problems import Problem, ProblemBody

# Path, methods. `{rest:path}` stands for everything below a noun of which nothing is planned soon.
PATHS = (
    ("/emails/{id}/share", "POST"),
    ("/emails/metrics", "GET"),
    ("/emails/receiving", "GET"),
    ("/emails/receiving/{rest:path}", "GET"),
    ("/domains", "GET POST"),
    ("/domains/claim", "POST"),
    ("/domains/{id}", "GET PATCH DELETE"),
    ("/domains/{id}/verify", "POST"),
    ("/domains/{id}/claim", "GET"),
    ("/domains/{id}/claim/verify", "POST"),
    ("/logs", "GET"),
    ("/logs/{id}", "GET"),
    ("/contacts", "GET POST"),
    ("/contacts/{rest:path}", "GET POST PATCH DELETE"),
    ("/segments", "GET POST"),
    ("/segments/{rest:path}", "GET POST PATCH DELETE"),
    ("/audiences", "GET POST"),
    ("/audiences/{rest:path}", "GET POST PATCH DELETE"),
    ("/topics", "GET POST"),
    ("/topics/{rest:path}", "GET POST PATCH DELETE"),
    ("/contact-properties", "GET POST"),
    ("/contact-properties/{rest:path}", "GET POST PATCH DELETE"),
    ("/templates", "GET POST"),
    ("/templates/{rest:path}", "GET POST PATCH DELETE"),
    ("/broadcasts", "GET POST"),
    ("/broadcasts/{rest:path}", "GET POST PATCH DELETE"),
    ("/automations", "GET POST"),
    ("/automations/{rest:path}", "GET POST PATCH DELETE"),
    ("/events", "GET POST"),
    ("/events/{rest:path}", "GET POST PATCH DELETE"),
    ("/oauth/grants", "GET"),
    ("/oauth/grants/{id}", "DELETE"),
    ("/inboxes", "GET POST"),
    ("/inboxes/{rest:path}", "GET POST PUT PATCH DELETE"),
    ("/brands", "GET POST"),
    ("/brands/{rest:path}", "GET POST PATCH DELETE"),
    ("/campaigns", "GET POST"),
    ("/campaigns/{rest:path}", "GET POST PATCH DELETE"),
    ("/phone-numbers", "GET POST"),
    ("/phone-numbers/{rest:path}", "GET POST PATCH DELETE"),
    ("/exports", "GET POST"),
    ("/exports/{rest:path}", "GET POST DELETE"),
    ("/stats", "GET"),
)


async def not_built(call: Call[None]) -> Reply:
    """Say that this is not built yet."""
    path = call.scope["route"].path.split("/{")[0]
    raise Problem(501, "not_implemented", f"`{path}` is not available in this version of Nightmail.")


OPERATIONS = tuple(
    Operation(
        method=method, path=path, handler=not_built, summary="Not built yet", access="full", tag="Not built yet",
        reply=ProblemBody, status=501,
    )
    for path, methods in PATHS
    for method in methods.split()
)  # fmt: skip
