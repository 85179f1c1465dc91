"""`mlx-mtp models`: the sizes of Gemma 4, what fits, how fast, and what is in the hub's cache. Downloads nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o
from . import render
from .info import HOW_GOOD, PREDICTED, chip_named, speed_range

if TYPE_CHECKING:
    from ..catalog import Size
    from ..checkpoint.cache import CachedModel
    from ..simulate.chips import Chip


def models(
    chip: Annotated[
        str | None, typer.Option(help="For a Mac with this Apple chip instead of this machine.", metavar="CHIP")
    ] = None,
    memory: Annotated[
        int | None,
        typer.Option(help="Memory of that Mac. Default: the most that the chip comes with.", metavar="GB", min=1),
    ] = None,
    as_json: o.Json = False,
    debug: o.Debug = False,  # noqa: ARG001 - `main` reads it
) -> None:
    """Lists the sizes of Gemma 4: what is downloaded, what fits in memory, and the predicted speed."""
    if memory and not chip:
        raise typer.BadParameter("only with --chip: this machine's memory is known", param_hint="--memory")
    from .. import catalog
    from ..checkpoint import sizes
    from ..checkpoint.cache import cached_models

    machine = chip_named(chip)
    if machine and memory:
        machine = replace(machine, memory=memory)
    have = machine.memory_for_models if machine and chip else None
    found, cached = catalog.sizes_on(machine, have), cached_models()
    have = have or sizes.memory_for_models()
    if as_json:
        print(json.dumps(_facts(found, cached, machine, have)))
        return
    parts: list[render.Part] = [_heading(machine if chip else None, have), "", _sizes(found, cached)]
    if any(size.expected for size in found):
        parts += ["", f"Speeds with {catalog.SPEED_BITS} bits are {PREDICTED}: one row, in tokens a second{HOW_GOOD}."]
    if cached:
        parts += ["", "In the hub's cache:", _cache(cached)]
    render.show([*parts, "", "mlx-mtp get NAME downloads a model and its drafter."])


def _facts(found: list[Size], cached: list[CachedModel], machine: Chip | None, memory: int) -> dict[str, Any]:
    """The lists as JSON values."""
    return {
        "machine": {"chip": machine.name if machine else None, "memory_for_models": memory},
        "models": [asdict(size) for size in found],
        "cache": [asdict(model) | {"folder": str(model.folder)} for model in cached],
    }


def _heading(machine: Chip | None, memory: int) -> str:
    from ..checkpoint.sizes import format_bytes

    name = f"{machine.name} with {machine.memory} GB" if machine else "This machine"
    return f"{name}: {format_bytes(memory)} for models. Longest context in tokens by the bits of the weights:"


def _sizes(found: list[Size], cached: list[CachedModel]) -> render.Part:
    """The table of sizes."""
    fast = any(size.expected for size in found)
    bits = [f"{it.quantize} bits" if it.quantize else "unquantised" for it in found[0].fits]
    rows = []
    for size in found:
        kinds = {it.kind for it in cached if it.size == size.name and it.state == "complete"}
        there = " + ".join(kind for kind in ("target", "drafter") if kind in kinds)
        contexts = [f"{it.longest_context:,}" if it.longest_context else "-" for it in size.fits]
        rows.append([size.name, *contexts, *(_speeds(size.expected) if fast else []), there or "-"])
    headers = ["model", *bits, *(["plain", "drafting"] if fast else []), "downloaded"]
    return render.table(headers, rows, left=(0, len(headers) - 1))


def _speeds(expected: dict[str, Any] | None) -> list[str]:
    if not expected or not expected["plain_tps"]:
        return ["-", "-"]
    drafting = expected["drafting_tps"]
    return [speed_range(expected["plain_tps"]), speed_range(drafting) if drafting else "no gain"]


def _cache(cached: list[CachedModel]) -> render.Part:
    """The table of what is in the cache."""
    from ..checkpoint.sizes import format_bytes

    rows = []
    for it in cached:
        state = f"{it.state}: {it.problem}" if it.problem else it.state
        rows.append([it.repository, it.kind or "-", format_bytes(it.bytes), state])
    return render.table(["repository", "kind", "size", "state"], rows, left=(0, 1, 3))
