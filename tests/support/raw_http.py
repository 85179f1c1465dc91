"""HTTP by hand: what no well-behaved client sends."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit


@contextmanager
def connected(url: str, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    """A connection to a server.

    Args:
        url: The server's.
        receive_buffer: Bytes that the system takes from the server before it is read; None for its usual number.
    """
    address = urlsplit(url)
    with socket.socket() as it:
        if receive_buffer is not None:
            it.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        it.settimeout(30)
        it.connect((address.hostname, address.port))
        yield it


def head(path: str, *headers: str, method: str = "POST", host: str | None = "localhost") -> bytes:
    """The head of a request."""
    named = [] if host is None else [f"Host: {host}"]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *named, *headers, "", ""]).encode("latin-1")


def post(path: str, body: bytes, *headers: str) -> bytes:
    """A request with a JSON body."""
    return head(path, "Content-Type: application/json", f"Content-Length: {len(body)}", *headers) + body


def rest(connection: socket.socket) -> bytes:
    """Everything that the server sends until it closes the connection."""
    received = b""
    try:
        while part := connection.recv(65536):
            received += part
    except ConnectionError:
        pass  # closed while it was still being sent to
    return received


def statuses(received: bytes) -> list[int]:
    """The status of each response in what was received."""
    return [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:]]
