"""Who may call the server: the API key, the name by which it is called, and the web pages that call it.

A browser lets any web page send requests to this machine. A page whose own name has been pointed to 127.0.0.1 (DNS
rebinding) may even read the answers. Such requests carry the page's name in `Host`, so only "localhost", IP addresses
and the names that were allowed are served. Other pages are known by their `Origin`.
"""

from __future__ import annotations

import ipaddress
import secrets
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import RequestError, response
from .settings import ServerOptions

OPEN_PATHS = ("/", "/health")
"""Paths that need no key: they tell nothing about models or texts."""


class Guard:
    """ASGI middleware that refuses requests."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        """Takes what the requests are for, and the rules."""
        self._app, self._options = app, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it with an error."""
        if scope["type"] == "http":
            try:
                self._check(scope["path"], Headers(scope=scope))
            except RequestError as error:
                await response(scope["path"], error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> None:
        """Checks the headers of a request.

        Raises:
            RequestError: Status 401 or 403.
        """
        hosts, origin, options = headers.getlist("host"), headers.get("origin"), self._options
        host = hosts[0] if len(hosts) == 1 else ""  # with two, a proxy in front may have gone by the other one
        if not _is_known(host, options.allowed_hosts):
            raise RequestError(403, f"this server isn't called {host!r}: --allow-host allows a name")
        foreign = origin is not None and urlsplit(origin).netloc != host
        if foreign and not {"*", origin} & set(options.cors_origins):
            raise RequestError(403, f"pages of {origin!r} may not call this server: --cors-origin allows them")
        if options.api_key is None or path in OPEN_PATHS:
            return
        kind, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        # Clients send the bytes of UTF-8, which ASGI's headers hold as characters of Latin-1.
        if not secrets.compare_digest(given.encode("latin-1"), options.api_key.encode()):
            raise RequestError(401, "the API key is missing or wrong", "invalid_api_key")


def _is_known(host: str, allowed: tuple[str, ...]) -> bool:
    """Whether a `Host` header has a name that can't be another site's."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return name == "localhost" or name in allowed or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
