"""What every page of the operator has: session first, no request from elsewhere, strict headers, bounded reads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, urlencode
from uuid import UUID

import jinja2
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from nightmail import __version__
from nightmail.clock import now
from nightmail.engine.runner import Engine
from nightmail.errors import DatabaseAway
from nightmail.rules.webhook_urls import mask_url
from nightmail.store.database import Connection
from nightmail.web import admin_session, wording
from nightmail.web.client_address import client_address
from nightmail.web.failures import Failures
from nightmail.web.problems import Problem
from nightmail.web.services import Services, template_environment

FORM_MAX = 4096
# For what one page reads or writes; a frozen database then shows as one that is away.
LIMIT_S = 10.0

# `style` lets the mail of a message page keep its own look: it is inherited by the frame that shows it.
POLICY = (
    "default-src 'none'; style-src 'self'{style}; img-src 'self'{images}; script-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
PAGE_POLICY = POLICY.format(style="", images="")
MAIL_POLICY = POLICY.format(style=" 'unsafe-inline'", images=" data:")
# Not `no-referrer`: with it browsers name the origin of a form's POST as `null`.
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "X-DNS-Prefetch-Control": "off",
    "Cross-Origin-Opener-Policy": "same-origin",
}

Handler = Callable[["Page"], Awaitable[Response]]


class Dashboard:
    """What the pages share; made once per process."""

    def __init__(self, services: Services, engine: Engine) -> None:
        self.services = services
        self.engine = engine
        self.failures = Failures(admin_session.FAILURES_MAX)
        self.templates = page_templates()

    def route(self, path: str, handler: Handler, *, method: str = "GET", is_public: bool = False) -> Route:
        """Return the route of a page: session first, then the handler, every refusal a page too."""

        async def endpoint(request: Request) -> Response:
            page = Page(self, request)
            try:
                if not is_public and not admin_session.check_session(self.services, page.headers):
                    return page.to_login()
                if method == "POST":
                    admin_session.refuse_foreign(page.headers)
                return await handler(page)
            except Problem as problem:
                return page.refuse(problem.status, problem.message)
            except DatabaseAway:
                return page.refuse(503, "The database cannot be reached. This page tries again by itself.")

        return Route("/dashboard" + path, endpoint, methods=[method])


class Page:
    """One request for a page."""

    def __init__(self, dashboard: Dashboard, request: Request) -> None:
        self.dashboard = dashboard
        self.services = dashboard.services
        self.engine = dashboard.engine
        self.request = request
        self.headers: Mapping[bytes, bytes] = dict(request.scope["headers"])
        self.now = now()

    async def read(self, step: Callable[[Connection], Awaitable[Any]]) -> Any:
        """Run one or several SELECTs, or one short transaction. Raises DatabaseAway."""
        try:
            return await self.engine.background.within(LIMIT_S, self.services.database.run(step))
        except TimeoutError as error:
            raise DatabaseAway(str(error)) from error

    def show(self, template: str, *, status: int = 200, policy: str = PAGE_POLICY, **values: Any) -> Response:
        """Return the page."""
        text = self.dashboard.templates.get_template(template).render(
            page=self, now=self.now, path=self.request.url.path, **values
        )
        return self._guarded(HTMLResponse(text, status_code=status), policy)

    def refuse(self, status: int, message: str) -> Response:
        """Return the page that says why not."""
        return self.show("refused.html.j2", status=status, status_code=status, message=message)

    def go(self, address: str, cookie: str | None = None) -> Response:
        """Send the browser to a page of ours."""
        response = self._guarded(RedirectResponse(address, status_code=303), PAGE_POLICY)
        if cookie is not None:
            response.headers["Set-Cookie"] = cookie
        return response

    def to_login(self) -> Response:
        """Send the browser to the login, and back here afterwards when this was a plain look."""
        url = self.request.url
        wanted = url.path + (f"?{url.query}" if url.query else "") if self.request.method in ("GET", "HEAD") else ""
        return self.go("/dashboard/login" + (f"?{urlencode({'next': wanted})}" if wanted else ""))

    def query(self, name: str, among: Sequence[str] | None = None) -> str:
        """Return a query parameter, '' when it is absent or not one of those allowed."""
        text = self.request.query_params.get(name, "").replace("\x00", "").strip()[:320]
        return text if among is None or text in among else ""

    async def form(self) -> dict[str, str]:
        """Return the fields of a small form. Raises Problem 413."""
        body = b""
        async for chunk in self.request.stream():
            body += chunk
            if len(body) > FORM_MAX:
                raise Problem(413, "payload_too_large", "This form is too large.")
        try:
            return dict(parse_qsl(body.decode("utf-8", "replace"), max_num_fields=10))
        except ValueError:
            raise Problem(422, "validation_error", "This form has too many fields.") from None

    @property
    def is_open(self) -> bool:
        """Return whether everyone on this machine may look, because no ADMIN_TOKEN is set."""
        return self.services.settings.admin_token is None

    @property
    def env(self) -> str:
        """Return the kind of installation."""
        return self.services.settings.nightmail_env

    @property
    def version(self) -> str:
        """Return the version of Nightmail."""
        return __version__

    @property
    def address(self) -> str:
        """Return where the request comes from, as a key for counting."""
        return str(client_address(self.request.scope, self.services.settings.trusted_proxies))

    def _guarded(self, response: Response, policy: str) -> Response:
        response.headers.update({**HEADERS, "Content-Security-Policy": policy})
        return response


def page_templates() -> jinja2.Environment:
    """Return the templates with the pages' words for times and amounts."""
    environment = template_environment()
    environment.filters.update(
        amount=wording.amount,
        bounded=wording.bounded,
        mask_url=mask_url,
        duration=wording.duration,
        utc=wording.utc,
        precise=wording.precise,
        spaced=wording.spaced,
        byte_size=wording.byte_size,
    )
    environment.globals.update(distance=wording.distance, standing=wording.standing, payment=wording.payment)
    return environment


def uuid_of(text: str) -> UUID | None:
    """Return the id, None for anything that is not written like one."""
    try:
        return UUID(text) if len(text) == 36 else None
    except ValueError:
        return None


def address_of(path: str, **query: str) -> str:
    """Return the path with those of the parameters that say something."""
    return f"{path}?{urlencode({name: value for name, value in query.items() if value})}"
