"""Connections: how many there may be, and how slowly a client may send a request or read its response.

uvicorn has no limits for these. A client that sends a byte now and then, a header without an end, or never reads what
it asked for, would keep its connection, its memory, and its place in the queue.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from typing import ClassVar

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .service import Service
from .settings import ServerOptions

MOST_HEAD_BYTES = 64 * 2**10
"""Largest head of a request, that is its first line and headers: four times what other servers take by default."""

_OWN_FILES = 256
"""File descriptors that the process needs besides connections; most are libraries and files of models."""

_TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_TOO_MANY = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 2\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Connection(HttpToolsProtocol):
    """A client's connection. A request must be complete, and a response that waits be read, within a time."""

    options: ClassVar[ServerOptions]

    _sending: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None
    _received = 0
    _begun = False
    _in_head = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Begins to wait for a request."""
        super().connection_made(transport)
        if len(self.connections) > self.options.max_connections:
            self._refuse(_TOO_MANY)
        else:
            self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the limits."""
        self._request_is_complete()
        self._response_is_read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Takes a part of a request, of which a limited number of bytes may come."""
        self._received += len(data)
        super().data_received(data)
        # Framing of a chunked body may double its size; the limit on the body itself is the application's.
        most = MOST_HEAD_BYTES if self._in_head else MOST_HEAD_BYTES + 2 * self.options.max_body_bytes
        if self._received > most and not self.transport.is_closing():
            self._refuse(_TOO_LARGE)

    def on_message_begin(self) -> None:
        """Called before a request's first line."""
        super().on_message_begin()
        self._begun = self._in_head = True
        if self._sending is None:
            self._expect_request()

    def on_headers_complete(self) -> None:
        """Called after a request's headers."""
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Called after a request's body."""
        self._request_is_complete()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Called when a response is written, though maybe not read."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._expect_reader()

    def timeout_keep_alive_handler(self) -> None:
        """Called when no other request has come after a response."""
        super().timeout_keep_alive_handler()
        self._expect_reader()

    def pause_writing(self) -> None:
        """Called when much of a response waits to be read."""
        super().pause_writing()
        self._expect_reader()

    def resume_writing(self) -> None:
        """Called when most of it has been read."""
        super().resume_writing()
        self._response_is_read()

    def _expect_request(self) -> None:
        self._sending = self.loop.call_later(self.options.stall_limit, self._sender_is_slow)

    def _request_is_complete(self) -> None:
        self._received, self._begun, self._in_head = 0, False, True
        if self._sending:
            self._sending.cancel()
            self._sending = None

    def _sender_is_slow(self) -> None:
        self._sending = None
        if self.flow.read_paused:  # it is the server that doesn't read
            self._expect_request()
        elif not self.transport.is_closing():
            self._refuse(_TOO_SLOW)

    def _refuse(self, response: bytes) -> None:
        """Ends the connection; with a response only if a request waits for one, not to answer a later one."""
        answered = self.cycle is None or self.cycle.response_complete
        waits = answered if self._in_head else not (self.cycle.response_started or self.pipeline)
        if waits and (self._begun or response is _TOO_MANY):
            self.transport.write(response)
        self.transport.close()
        self._expect_reader()

    def _expect_reader(self) -> None:
        if self._reading is None:
            self._reading = self.loop.call_later(self.options.stall_limit, self.transport.abort)

    def _response_is_read(self) -> None:
        if self._reading:
            self._reading.cancel()
            self._reading = None


class Server(uvicorn.Server):
    """uvicorn with these connections. When it is told to end, answers that run too long end with what they have."""

    def __init__(self, app: FastAPI, host: str = "127.0.0.1", port: int = 0) -> None:
        """Takes what it serves.

        Args:
            app: Made by `make_app`.
            host: Address to bind to.
            port: Port; 0 for a free one.
        """
        self._options: ServerOptions = app.state.options
        self._service: Service = app.state.service

        class Limited(Connection):
            options = self._options

        super().__init__(
            uvicorn.Config(
                app,
                host,
                port,
                http=Limited,
                ws="none",
                log_config=None,  # the command has set up logging
                server_header=False,
                timeout_graceful_shutdown=self._options.shutdown_limit,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more requests, and waits for the answers that run."""
        asyncio.get_running_loop().call_later(self._options.shutdown_limit * 2 / 3, self._service.end_answers)
        await super().shutdown(sockets)


def allow_connections(count: int) -> None:
    """Raises the process's limit of open files so that it can have this many connections, as far as it may.

    macOS begins with 256. Where the hard limit is lower, connections beyond it wait until others end.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OWN_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
