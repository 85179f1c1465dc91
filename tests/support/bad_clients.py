"""Clients of a server that do what they shouldn't: they leave, close one half, stop sending, or don't read."""

from __future__ import annotations

import asyncio
import json
from random import Random
from typing import Any
from urllib.parse import urlsplit

from .raw_http import post

CHAT = "/v1/chat/completions"
KINDS = ("leave", "half", "stop", "silent")


async def misbehave(url: str, kind: str, body: dict[str, Any], dice: Random) -> None:
    """Asks for a long stream, on a connection of its own, and doesn't wait for its end.

    Args:
        url: The server's.
        kind: One of `KINDS`: the client leaves soon; closes its half of the connection; stops within the request; or
            reads nothing for a while.
        body: The request, which is made longer and streamed.
        dice: Draws when.

    Raises:
        ConnectionError: The server ended the connection first.
    """
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        whole = post(CHAT, json.dumps(body | {"max_tokens": 2000, "ignore_eos": True, "stream": True}).encode())
        writer.write(whole[: dice.randrange(len(whole))] if kind == "stop" else whole)
        await writer.drain()
        if kind == "half":
            writer.write_eof()
            await reader.read()
        elif kind == "stop":
            await reader.read()  # until the server ends it
        else:
            await asyncio.sleep(dice.random() * (2 if kind == "silent" else 0.2))
    finally:
        writer.close()
