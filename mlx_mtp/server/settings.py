"""The server's options."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How the server runs.

    Attributes:
        api_key: What clients must send; None for no key.
        allowed_hosts: Names, besides "localhost" and IP addresses, by which clients may call the server.
        cors_origins: Origins of web pages that may call it, such as "http://localhost:3000"; ("*",) for all.
        max_queue: Most answers of a model that wait for a row of its batch; more are refused with status 429.
        max_body_bytes: Largest body of a request.
        max_prompt_tokens: Longest prompt, in tokens; None for the model's context.
        max_tokens: Most tokens of an answer whose request doesn't say.
        time_limit: Seconds that an answer may take, waiting included; then it ends with what it has.
        stall_limit: Seconds that a client may take to send a request, or not read a response.
        max_connections: Most connections; more are refused.
        shutdown_limit: Seconds that running answers have when the server ends. After two thirds of them they end with
            what they have; launchd kills a process after 20.
        idle_unload: Seconds without a request after which a model is unloaded; None for never.
    """

    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_queue: int = 64
    max_body_bytes: int = 16 * 2**20
    max_prompt_tokens: int | None = None
    max_tokens: int = 4096
    time_limit: float = 3600.0
    stall_limit: float = 30.0
    max_connections: int = 2048
    shutdown_limit: int = 15
    idle_unload: float | None = None
