"""`mlx-mtp serve`: models over HTTP; see server/."""

from __future__ import annotations

import ipaddress
import logging
import plistlib
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import MTPError
from ..system.blas import use_openblas
from . import options as o

if TYPE_CHECKING:
    from ..server.registry import Entry

KEY_VARIABLE = "MLX_MTP_API_KEY"

DEMO_NAME = "demo"
"""What requests call the embedded pair."""

LEAST_CONTEXT = 8192
"""Tokens of a row for whose KV there must be room before a model is loaded beside others: a chat of some length. With
less, those that aren't in use are unloaded instead."""


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Folders or repositories. Default: the demo pair.", metavar="MODEL", show_default=False),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to bind to.", metavar="ADDRESS")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 for a free one.", min=0, max=65535, metavar="N")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Key that clients must send. Other users of this machine can read it here, but not in the variable.",
            envvar=KEY_VARIABLE,
            metavar="KEY",
        ),
    ] = None,
    no_key: Annotated[bool, typer.Option("--no-key", help="Serve other machines without a key.")] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A name by which clients call this machine, besides localhost.", metavar="NAME"),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="A web page's origin that may call the server; * for all.", metavar="ORIGIN"),
    ] = None,
    max_queue: Annotated[
        int, typer.Option(help="Most answers of a model that wait for a row of its batch.", min=0, metavar="N")
    ] = 64,
    max_tokens: Annotated[
        int, typer.Option(help="Most tokens of an answer whose request doesn't say.", min=1, metavar="N")
    ] = 4096,
    max_prompt: Annotated[
        int | None, typer.Option(help="Longest prompt in tokens. Default: the model's context.", min=1, metavar="N")
    ] = None,
    time_limit: Annotated[
        float, typer.Option(help="Seconds after which an answer ends with what it has.", min=1, metavar="SECONDS")
    ] = 3600,
    idle_unload: Annotated[
        float | None,
        typer.Option(help="Unload a model that wasn't used for this time.", min=1, metavar="SECONDS"),
    ] = None,
    no_draft: o.NoDraft = False,
    quantize: o.Quantize = None,
    quantize_drafter: o.QuantizeDrafter = "auto",
    launchd: Annotated[
        bool, typer.Option("--launchd", help="Print a launchd property list that starts this command at login.")
    ] = False,
    debug: o.Debug = False,  # noqa: ARG001 - `main` reads it
) -> None:
    """Serves models over HTTP, with OpenAI's and Anthropic's interfaces."""
    o.check_loading(None, no_draft, quantize, quantize_drafter)
    if not (api_key or no_key or _is_loopback(host)):
        raise typer.BadParameter(f"an address that others reach needs --api-key or {KEY_VARIABLE}, or --no-key")
    if launchd:
        sys.stdout.write(plistlib.dumps(property_list(sys.argv[1:], api_key)).decode())
        return
    use_openblas()  # before MLX is imported
    try:
        from ..server.app import make_app
        from ..server.connections import Server, allow_connections
        from ..server.registry import Models
        from ..server.settings import ServerOptions
    except ModuleNotFoundError as error:
        raise MTPError(f"serve needs the package {error.name}: pip install 'mlx-mtp[server]'") from None
    entries = [entry(model, no_draft, quantize, quantize_drafter) for model in models or (None,)]
    if len({it.name for it in entries}) < len(entries):
        raise typer.BadParameter("two models have the same name: rename a folder", param_hint="MODEL")
    options = ServerOptions(
        api_key=api_key,
        allowed_hosts=tuple(allow_host or ()),
        cors_origins=tuple(cors_origin or ()),
        max_queue=max_queue,
        max_prompt_tokens=max_prompt,
        max_tokens=max_tokens,
        time_limit=time_limit,
        idle_unload=idle_unload,
    )
    logging.getLogger("uvicorn").setLevel(logging.INFO)
    allow_connections(options.max_connections)
    server = Server(make_app(Models(entries), options), host, port)
    with suppress(KeyboardInterrupt):  # which uvicorn raises once it has ended
        server.run()
    if not server.started:
        raise typer.Exit(1)  # the log says why


def entry(model: str | None, no_draft: bool, quantize: int | None, quantize_drafter: str | int) -> Entry:
    """A model of the server; reads its description, so that a wrong name is an error at once.

    Raises:
        MTPError: See `find_pair`.
    """
    from ..checkpoint import sizes
    from ..checkpoint.pair import find_pair
    from ..server.registry import Entry

    pair = find_pair(model, False if no_draft else None, quantize, None, quantize_drafter, weights=False)
    name = DEMO_NAME if model is None else model
    if model is not None and (folder := Path(model).expanduser()).is_dir():
        name = folder.resolve().name
    target = pair[0]
    least = min(LEAST_CONTEXT, target.config.text.max_positions)
    return Entry(
        name,
        partial(o.load, model, None, no_draft, quantize, quantize_drafter),
        sum(sizes.of(described).weights for described in pair if described),
        sizes.row_bytes(target.config.text, least, target.dtype_bytes),
    )


def property_list(arguments: list[str], api_key: str | None) -> dict[str, object]:
    """A launchd property list of a user's agent that runs this command.

    Args:
        arguments: Those of `mlx-mtp`; folders may be relative to the current one.
        api_key: The key, which goes into the agent's environment; None for none.
    """
    given = [str(Path(it).resolve()) if Path(it).is_dir() else it for it in arguments if it != "--launchd"]
    log = str(Path.home() / "Library" / "Logs" / "mlx-mtp.log")
    return {
        "Label": "mlx-mtp.serve",
        "ProgramArguments": [sys.executable, "-m", "mlx_mtp", *given],
        "EnvironmentVariables": {KEY_VARIABLE: api_key} if api_key else {},
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "StandardOutPath": log,
        "StandardErrorPath": log,
    }


def _is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
