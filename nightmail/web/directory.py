"""Finding the route of a path by looking it up, where Starlette tries one pattern after the other.

Paths without parameters are found by themselves, the others by their first part and how many parts they have, and last
by their first part alone where a parameter takes many. What is written out wins over what is a parameter.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.routing import BaseRoute, Match, Route
from starlette.types import Receive, Scope, Send

# Stands for a number of parts that is not fixed.
ANY = 0


class Directory(BaseRoute):
    """Many routes as one; they begin with a part that is written out, and let every method through."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self.routes = list(routes)
        self._fixed = {route.path: route for route in routes if "{" not in route.path}
        self._shaped: dict[tuple[str, int], list[Route]] = {}
        for route in routes:
            first, count = _shape(route.path)
            if "{" in route.path:
                key = (first, ANY) if ":path}" in route.path else (first, count)
                self._shaped.setdefault(key, []).append(route)

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Return whether one of the routes is the path's; the scope then names that route."""
        if scope["type"] != "http":
            return Match.NONE, {}
        path = scope["path"]
        fixed = self._fixed.get(path)
        if fixed is not None:
            return Match.FULL, {"endpoint": fixed.endpoint, "path_params": {}, "route": fixed}
        first, count = _shape(path)
        for key in ((first, count), (first, ANY)):
            for route in self._shaped.get(key, ()):
                match, child = route.matches(scope)
                if match is Match.FULL:
                    return match, {**child, "route": route}
        return Match.NONE, {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request that matched."""
        await scope["route"].handle(scope, receive, send)


def _shape(path: str) -> tuple[str, int]:
    """Return the first part of a path and how many it has."""
    end = path.find("/", 1)
    return path[1:end] if end > 0 else path[1:], path.count("/")
