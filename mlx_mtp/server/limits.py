"""The limit on the size of a request's body. The other limits hold where their subject is known: service.py."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import RequestError, response


class BodyLimit:
    """ASGI middleware that refuses bodies that are too large, whether or not they say their length."""

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        """Takes what the requests are for, and the largest size of a body."""
        self._app, self._most = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        message, seen = f"the body has more than {self._most} bytes", 0
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > self._most:
            await response(scope["path"], RequestError(413, message))(scope, receive, send)
            return

        async def counted() -> Message:
            nonlocal seen
            part = await receive()
            seen += len(part.get("body", b""))
            if seen > self._most:
                raise HTTPException(413, message)  # while the body is read, which the error handlers answer
            return part

        await self._app(scope, counted, send)
