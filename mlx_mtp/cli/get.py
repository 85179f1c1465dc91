"""`mlx-mtp get`: downloads a model and its drafter to the hub's cache."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import MTPError
from . import options as o
from . import render

if TYPE_CHECKING:
    from ..checkpoint.description import DrafterDescription, TargetDescription


def _sizes(incomplete: str) -> list[str]:
    """The sizes that begin so, for the shell's completion."""
    from ..checkpoint.candidates import SIZES

    return [size for size in SIZES if size.lower().startswith(incomplete.lower())]


def get(
    name: Annotated[
        str,
        typer.Argument(
            help="E2B, E4B, 12B, 26B-A4B, 31B, or a repository.",
            metavar="NAME",
            show_default=False,
            autocompletion=_sizes,
        ),
    ],
    no_draft: Annotated[bool, typer.Option("--no-draft", help="Download no drafter.")] = False,
    debug: o.Debug = False,  # noqa: ARG001 - `main` reads it
) -> None:
    """Downloads a model and its drafter, and says how to use them; goes on where an earlier attempt stopped."""
    from .. import catalog
    from ..checkpoint.pair import find_pair

    repository = catalog.repository(name)
    if repository == name and os.path.isdir(name):
        raise typer.BadParameter(f"{name} is a folder: there is nothing to download", param_hint="NAME")
    with render.loading() as progress:
        target, drafter = find_pair(repository, False if no_draft else None, progress=progress)
    if not (drafter or no_draft):
        raise MTPError(f"{repository} is downloaded, but no drafter for it: --no-draft says that it needs none")
    rows = [("target", str(target.folder))]
    if drafter:
        rows.append(("drafter", str(drafter.folder)))
    render.show([render.pairs([*rows, ("chat", _how_to_chat(repository, target, drafter))])])


def _how_to_chat(repository: str, target: TargetDescription, drafter: DrafterDescription | None) -> str:
    """The command to chat with a pair on this machine."""
    from ..checkpoint import fit, sizes

    found = fit.best(target, drafter)
    if not found:
        have = sizes.format_bytes(sizes.memory_for_models())
        return f"this machine has {have} for models, too little for it: see mlx-mtp models"
    command = f"mlx-mtp chat {repository}"
    command += "" if drafter else " --no-draft"
    return command + (f" --quantize {found.quantize}" if found.quantize else "")
