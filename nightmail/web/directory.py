"""Finding the route of a path by looking it up, where Starlette tries one pattern after the other.

With 76 routes that took 30 µs of a request of a few hundred. Paths without parameters are found by themselves, the
others by their first part and how many parts they have; what is written out wins over what is a parameter.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.routing import BaseRoute, Match, Route
from starlette.types import Receive, Scope, Send


class Directory(BaseRoute):
    """Many routes as one; they begin with a part that is written out, and let every method through."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self.routes = list(routes)
        self._fixed = {route.path: route for route in routes if "{" not in route.path}
        self._shaped: dict[tuple[str, int], list[Route]] = {}
        for route in routes:
            if "{" in route.path:
                self._shaped.setdefault(_shape(route.path), []).append(route)

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Return whether one of the routes is the path's; the scope then names that route."""
        if scope["type"] != "http":
            return Match.NONE, {}
        path = scope["path"]
        fixed = self._fixed.get(path)
        if fixed is not None:
            return Match.FULL, {"endpoint": fixed.endpoint, "path_params": {}, "route": fixed}
        for route in self._shaped.get(_shape(path), ()):
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
