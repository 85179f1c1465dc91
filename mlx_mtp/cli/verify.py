"""`mlx-mtp verify`: is the text the same with and without drafting, on this machine? Exit code 1 if it isn't."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from ..decode.limits import MAX_AUTO_LENGTH
from ..errors import MTPError
from . import options as o
from . import render
from .verify_report import facts, report


def verify(
    model: o.Model = None,
    drafter: o.Drafter = None,
    no_draft: o.NoDraft = False,
    adapter: o.Adapter = None,
    quantize: o.Quantize = None,
    quantize_drafter: o.QuantizeDrafter = "auto",
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes to compare.", metavar="N,N,...")] = "1,4",
    draft_lengths: Annotated[
        str,
        typer.Option(
            help=f"Draft lengths to compare with plain decoding; {MAX_AUTO_LENGTH} is the longest that auto takes.",
            metavar="auto|N,...",
        ),
    ] = f"1,3,{MAX_AUTO_LENGTH},auto",
    seconds: Annotated[
        int, typer.Option(help="How long to compare texts; longer finds more.", min=1, metavar="SECONDS")
    ] = 120,
    as_json: o.Json = False,
    debug: o.Debug = False,  # noqa: ARG001 - `main` reads it
) -> None:
    """Checks kernels and texts on this machine, and prints a report; exits with 1 if something is wrong."""
    rows, lengths = o.numbers(batch_sizes, "--batch-sizes"), o.draft_lengths(draft_lengths)
    with o.load(model, drafter, no_draft, quantize, quantize_drafter, adapter=adapter, cache_bytes=0) as lm:
        from ..measuring import texts

        found, complete = texts.Comparison(), True
        try:
            with render.progress("verifying", seconds) as done:
                texts.compare(lm, texts.settings(rows, lengths, lm.drafter_config is not None), seconds, found, done)
        except KeyboardInterrupt:
            complete = False
            print("\nstopped: partial results" if found.compared else "\nstopped", file=sys.stderr)
        if as_json:
            print(json.dumps(facts(lm, found) | {"complete": complete}))
        else:
            render.show(report(lm, found))
    if not found.holds:
        raise typer.Exit(1)
    if not complete:
        raise typer.Exit(o.INTERRUPTED)
    if not found.compared:
        raise MTPError(f"{seconds} seconds were too short to compare a text: give more --seconds")
