"""Limits on the size of a request's body, and of all of them. Other limits hold where their subject is known."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import RequestError, response

MOST_BODIES = 16
"""Bodies of the largest size that may be in memory together; of usual ones there may be thousands."""


class BodyLimit:
    """ASGI middleware that refuses bodies that are too large, whether or not they say their length."""

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        """Takes what the requests are for, and the largest size of a body."""
        self._app, self._most = app, most_bytes
        self._message = f"the body has more than {most_bytes} bytes"
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length, seen = Headers(scope=scope).get("content-length", ""), 0
        # No more digits than that: Python refuses to read a number of thousands.
        if length.isdecimal() and int(length[:20]) > self._most:
            await response(scope["path"], RequestError(413, self._message))(scope, receive, send)
            return

        async def counted() -> Message:
            nonlocal seen
            part = await receive()
            size = len(part.get("body", b""))
            seen, self._held = seen + size, self._held + size
            # While a body is read, FastAPI takes any other kind of exception for a broken body.
            if seen > self._most:
                raise HTTPException(413, self._message)
            if self._held > self._most * MOST_BODIES:
                raise HTTPException(429, "too many large requests are here: try again in a moment")
            return part

        try:
            await self._app(scope, counted, send)
        finally:
            self._held -= seen
