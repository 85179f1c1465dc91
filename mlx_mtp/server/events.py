"""Responses, whole or written while a text is generated, and clients that leave meanwhile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


def event(data: Any, name: str | None = None) -> str:
    """A server-sent event.

    Args:
        data: Written as JSON.
        name: Its type, or None.
    """
    text = f"data: {_dumped(data)}\n\n"
    return text if name is None else f"event: {name}\n{text}"


def whole(data: Any) -> Response:
    """A response that isn't streamed.

    Args:
        data: Written as JSON.
    """
    return Response(_encoded(_dumped(data)), media_type="application/json")


def _dumped(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def _encoded(text: str) -> bytes:
    """UTF-8. Half a surrogate pair, which a client may have sent as an escape, can't be encoded and becomes "?"."""
    return text.encode(errors="replace")


class Events(Response):
    """Server-sent events; a client that leaves ends them."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        failed: Callable[[Exception], str],
        close: Callable[[], Awaitable[None]],
    ) -> None:
        """Takes the events.

        Args:
            events: Yields them.
            failed: Makes the last event from an exception of `events`.
            close: Called in the end, whatever happens.
        """
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._failed, self._close = events, failed, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - the ASGI signature
        """Sends the events."""
        try:
            await unless_disconnected(receive, self._send(send))
        finally:
            await self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for text in self._events:
                await send({"type": "http.response.body", "body": _encoded(text), "more_body": True})
        except Exception as error:
            await send({"type": "http.response.body", "body": _encoded(self._failed(error)), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Awaits work, and cancels it when the client leaves.

    Args:
        receive: The request's, whose body has been read.
        work: What to await.

    Returns:
        Its result; None if the client left.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
