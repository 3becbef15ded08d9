"""/unsubscribe/{token}: one click ends one org's emails to one recipient (RFC 8058).

GET only shows a button, because scanners follow links. POST with `List-Unsubscribe=One-Click`, from a mail program or
from that button, is the click. Nobody signs in: the token in the link is the right to do this, and to nothing else.
"""

from __future__ import annotations

from functools import partial
from urllib.parse import parse_qsl

from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from nightmail import __version__
from nightmail.errors import DatabaseAway
from nightmail.rules.addresses import bare_address
from nightmail.rules.unsubscribe import FORM_NAME, FORM_VALUE, read_token
from nightmail.store.unsubscribes import find_subscription, read_unsubscribe_secret, unsubscribe
from nightmail.web.bodies import BodyBudget, read_body
from nightmail.web.client_address import client_address
from nightmail.web.failures import Failures
from nightmail.web.operation import Reply, send_reply
from nightmail.web.problems import Header, Problem
from nightmail.web.services import Services

TEMPLATE = "unsubscribe.html.j2"
CSP = (
    "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
HEADERS: tuple[Header, ...] = ((b"content-security-policy", CSP.encode()), (b"x-robots-tag", b"noindex"))
MAX_BODY = 4096
METHODS = ("GET", "HEAD", "POST")


class _Refused(Exception):
    """The page says why not."""

    def __init__(self, status: int, message: str, headers: tuple[Header, ...] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers


def unsubscribe_routes(services: Services) -> list[BaseRoute]:
    """Return the route of the links in our mail."""
    return [Route("/unsubscribe/{token}", UnsubscribeEndpoint(services), include_in_schema=False)]


class UnsubscribeEndpoint:
    """The ASGI app of the links; the installation's secret is read once."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._failures = Failures()
        self._budget = BodyBudget()
        self._secret: bytes | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request with a page."""
        try:
            reply = await self._answer(scope, receive)
        except _Refused as refused:
            reply = self._page(refused.status, refused.message, headers=refused.headers)
        except Problem as problem:
            reply = self._page(problem.status, problem.message)
        except DatabaseAway:
            reply = self._page(503, "This cannot be done right now. Please try again in a minute.")
        await send_reply(send, reply)

    async def _answer(self, scope: Scope, receive: Receive) -> Reply:
        if scope["method"] not in METHODS:
            raise _Refused(405, "Open the link, or press the button.", ((b"allow", ", ".join(METHODS).encode()),))
        address = str(client_address(scope, self._services.settings.trusted_proxies))
        message_id = read_token(await self._key(), scope["path_params"]["token"])
        if message_id is None:
            if self._failures.is_over(address):
                raise _Refused(429, "Too many links that do not work came from your address. Wait a minute.")
            self._failures.note(address)
            raise _gone()
        database = self._services.database
        if scope["method"] == "POST":
            declared = dict(scope["headers"]).get(b"content-length")
            body = await read_body(receive, declared=declared, limit=MAX_BODY, budget=self._budget)
            if not is_click(body):
                raise _Refused(400, f"The form must hold {FORM_NAME}={FORM_VALUE}.")
            if not await database.run(partial(unsubscribe, message_id=message_id)):
                raise _gone()
            return self._page(200, "You are unsubscribed and will get no more emails from this sender.")
        found = await database.run(partial(find_subscription, message_id=message_id))
        if found is None:
            raise _gone()
        return self._page(200, "Do you want to get no more emails from this sender?", bare_address(found.sender))

    async def _key(self) -> bytes:
        if self._secret is None:
            self._secret = await self._services.database.run(read_unsubscribe_secret)
        return self._secret

    def _page(self, status: int, message: str, sender: str = "", *, headers: tuple[Header, ...] = ()) -> Reply:
        """Return the page; with a sender it asks, and otherwise it tells."""
        template = self._services.templates.get_template(TEMPLATE)
        content = template.render(
            message=message, sender=sender, version=__version__, form_name=FORM_NAME, form_value=FORM_VALUE
        )
        return Reply(content.encode("utf-8", "replace"), status, (*HEADERS, *headers), "text/html; charset=utf-8")


def is_click(body: bytes) -> bool:
    """Return whether the body is the form of RFC 8058, as either of the two kinds that browsers post."""
    if body.startswith(b"--"):
        name = b'name="%b"\r\n\r\n%b\r\n' % (FORM_NAME.encode(), FORM_VALUE.encode())
        return name in body
    try:
        pairs = parse_qsl(body.decode("ascii"), max_num_fields=10)
    except ValueError:
        return False
    return (FORM_NAME, FORM_VALUE) in pairs


def _gone() -> _Refused:
    return _Refused(404, "This link does not work. It may be cut off: open it from the email again.")
