"""A server in a thread of the tests' process, and what its clients ask for."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastapi import FastAPI

import mlx_mtp
from mlx_mtp.server.connections import Server
from mlx_mtp.server.registry import Entry

PROMPTS = ["What is a drafter?", "Tell me a short story about a fox.", "What can you do?", "Write a Python function."]
LIGHTS = {
    "type": "function",
    "function": {
        "name": "lights",
        "description": "Switches the lights",
        "parameters": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]},
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}},
    "required": ["yes"],
    "additionalProperties": False,
}


@contextmanager
def running(app: FastAPI, send_buffer: int | None = None) -> Iterator[str]:
    """Runs an application on a free port; gives its address.

    Args:
        app: Made by `make_app`.
        send_buffer: Bytes that the system takes of a response before it is read; None for its usual number.
    """
    listening = socket.socket()
    if send_buffer is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    listening.bind(("127.0.0.1", 0))
    server = Server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        listening.close()
        assert not thread.is_alive(), "the server didn't end"


def wait_until(true: Callable[[], bool], seconds: float = 30) -> None:
    """Waits until something is true; it is an error if that takes too long."""
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < seconds, "it didn't come true"
        time.sleep(0.01)


def entry(name: str = "demo", lm: mlx_mtp.MTPModel | None = None, weights: int = 1) -> Entry:
    """An entry of the embedded pair, or of a model that is loaded already."""
    return Entry(name, (lambda: lm) if lm else mlx_mtp.load, weights)
