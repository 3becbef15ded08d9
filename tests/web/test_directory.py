"""Looking a route up must find what Starlette's own search finds, for every path of the API."""

from __future__ import annotations

import random

from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from nightmail.web.api.table import OPERATIONS
from nightmail.web.directory import Directory

PATHS = sorted(
    {operation.path for operation in OPERATIONS}, key=lambda path: [part.startswith("{") for part in path.split("/")]
)


class Nothing:
    """An app that is never called."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Not called here."""


def test_every_path_and_what_is_near_it_is_found_as_by_searching_all() -> None:
    routes = [Route(path, Nothing()) for path in PATHS]
    directory = Directory(routes)
    chance = random.Random(4)
    words = [*sorted({part for path in PATHS for part in path.split("/") if part and "{" not in part}), "x", "", "a b"]
    found = 0
    asked = [path.replace("{rest:path}", "a/b/c").replace("{", "").replace("}", "") for path in PATHS] + [
        "/" + "/".join(chance.choices(words, k=chance.randint(1, 5))) for _ in range(5000)
    ]
    for path in asked:
        scope = {"type": "http", "path": path, "method": "GET", "root_path": ""}
        first = next((route for route in routes if route.matches(scope)[0] is Match.FULL), None)
        match, child = directory.matches(scope)
        assert child.get("route") is first, path
        if first is not None:
            assert match is Match.FULL
            assert child["path_params"] == first.matches(scope)[1]["path_params"]
            found += 1
    assert found > len(PATHS)
