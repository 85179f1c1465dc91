"""`mlx-mtp bench`: speed and memory of a pair on this machine, also beside other programs on the same weights."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import MTPError
from . import options as o
from . import render
from .bench_report import facts, report

if TYPE_CHECKING:
    from ..api import MTPModel
    from ..measuring.peers import Peer


def bench(
    model: o.Model = None,
    drafter: o.Drafter = None,
    no_draft: o.NoDraft = False,
    quantize: o.Quantize = None,
    quantize_drafter: o.QuantizeDrafter = "auto",
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes.", metavar="N,N,...")] = "1,4",
    draft_lengths: Annotated[
        str, typer.Option(help="Draft lengths; 0, plain decoding, is always measured too.", metavar="auto|N,...")
    ] = "0,2,4,auto",
    contexts: Annotated[str, typer.Option(help="Prompt tokens of each row.", metavar="N,N,...")] = "128,1024",
    tokens: Annotated[int, typer.Option(help="Tokens to generate for each row.", min=2, metavar="N")] = 128,
    turns: Annotated[int, typer.Option(help="Turns in which everything is measured once.", min=1, metavar="N")] = 3,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Other programs to measure in the same turns: mlx-lm, mlx-vlm. Each loads the weights once more.",
            metavar="NAME,...",
        ),
    ] = None,
    as_json: o.Json = False,
    debug: o.Debug = False,  # noqa: ARG001 - `main` reads it
) -> None:
    """Measures prompt and generation speed, acceptance and memory; prints tables in Markdown, to paste."""
    rows, lengths = o.numbers(batch_sizes, "--batch-sizes"), o.draft_lengths(draft_lengths)
    prompts = o.numbers(contexts, "--contexts")
    names = _peers(compare, quantize)
    if names and quantize_drafter == "auto":
        quantize_drafter = "none"  # the same weights for all
    # Without a profile, so that figures don't depend on what this machine was tuned for.
    with ExitStack() as stack:
        lm = stack.enter_context(
            o.load(model, drafter, no_draft, quantize, quantize_drafter, profile=None, cache_bytes=0)
        )
        from ..decode.scheduler import MAX_ROWS
        from ..measuring import speed

        if max(rows) > MAX_ROWS:
            raise typer.BadParameter(f"at most {MAX_ROWS} rows decode together here", param_hint="--batch-sizes")
        if (longest := max(prompts) + tokens) > (room := lm.config.text.max_positions):
            raise typer.BadParameter(
                f"{longest:,} tokens with --tokens, and the model's context is {room:,}", param_hint="--contexts"
            )
        peers = _start(lm, names, stack)
        programs: list[speed.Program] = [speed.Ours(lm), *(speed.Theirs(it.name, it.run, it.drafts) for it in peers)]
        lengths = [0, *(it for it in lengths if it != 0)]
        found, complete = speed.Speeds(tokens), True
        total = (turns + 1) * len(speed.cases_of(programs, prompts, rows, lengths))
        try:
            with render.progress("measuring", total) as done:
                speed.measure(lm, programs, prompts, rows, lengths, turns, found, done)
        except KeyboardInterrupt:
            complete = False
            print("\nstopped: partial results" if found.cases() else "\nstopped", file=sys.stderr)
        versions = {it.name: it.version for it in peers}
        if as_json:
            print(json.dumps(facts(lm, found, versions) | {"complete": complete}))
        else:
            print("\n".join(report(lm, found, versions, shlex.join(["mlx-mtp", *sys.argv[1:]]))))
    if not complete:
        raise typer.Exit(o.INTERRUPTED)
    if not found.cases():
        raise MTPError("the runs were too short to measure: give more --tokens")


def _peers(compare: str | None, quantize: int | None) -> list[str]:
    """The peers to compare with, installed ones.

    Raises:
        typer.BadParameter: An unknown peer, or weights that it can't share.
        MTPError: A peer isn't installed.
    """
    if compare is None:
        return []
    from ..measuring.peers import PEERS, check_installed

    names = [name.strip() for name in dict.fromkeys(compare.split(","))]
    if unknown := [name for name in names if name not in PEERS]:
        raise typer.BadParameter(f"no {unknown[0]!r}: expected some of {', '.join(PEERS)}", param_hint="--compare")
    if quantize:
        raise typer.BadParameter(
            "others can't quantise the same way while loading: give the folder that mlx-mtp convert writes",
            param_hint="--quantize",
        )
    check_installed(names)
    return names


def _start(lm: MTPModel, names: list[str], stack: ExitStack) -> list[Peer]:
    """Starts the peers; the stack closes them.

    Raises:
        MemoryBudgetError: The weights don't fit so many times.
        MTPError: A peer can't run this pair.
    """
    if not names:
        return []
    from ..checkpoint.sizes import format_bytes, memory_for_models, weight_bytes
    from ..errors import MemoryBudgetError
    from ..measuring.peers import Peer

    with lm.models() as (target, drafter):
        needed = (1 + len(names)) * weight_bytes(target, drafter)
        dtype = str(target.dtype).removeprefix("mlx.core.")
    if needed > (have := memory_for_models()):
        raise MemoryBudgetError(
            f"comparing loads the weights {1 + len(names)} times, {format_bytes(needed)}, and there are "
            f"{format_bytes(have)}: compare with one program at a time, or a smaller model"
        )
    merged = lm.drafter_description is not None and lm.drafter_description.merged
    folder = None if merged or lm.drafter_folder is None else str(lm.drafter_folder)
    peers = []
    for name in names:
        print(f"loading in {name}", file=sys.stderr, flush=True)
        peer = Peer(name, {"target": str(lm.folder), "drafter": folder, "dtype": dtype})
        stack.callback(peer.close)
        peers.append(peer)
    return peers
