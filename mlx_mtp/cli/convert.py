"""`mlx-mtp convert`: a checkpoint becomes an MLX folder."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from . import options as o


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder or repository of a target or a drafter.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="Folder to make.")],
    bits: Annotated[
        int | None, typer.Option(help="Bits of quantised weights: 2, 3, 4, 5, 6 or 8. Default: don't quantise.")
    ] = None,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale: 32, 64 or 128.")] = 64,
    mode: Annotated[
        str, typer.Option(help="affine, mxfp4, mxfp8 or nvfp4; all but affine fix bits and groups.")
    ] = "affine",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 for the rest. Default: as stored.")
    ] = None,
    debug: o.Debug = False,
) -> None:
    """Converts a checkpoint, quantised or not."""
    from weights_convert.converter import MODES, Format
    from weights_convert.converter import convert as run

    fixed = MODES.get(mode)
    how = Format(*fixed, mode) if fixed else Format(bits or 4, group_size, mode) if bits or mode != "affine" else None

    def progress(name: str, written: int) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{written / 1e9:6.2f} GB  {name}", end="", file=sys.stderr, flush=True)

    folder = run(source, destination, how, dtype, progress)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    print(folder)
