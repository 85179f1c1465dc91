"""Options that several commands share, and loading the model that they describe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..decode.limits import MAX_DRAFT_LENGTH
from ..system.blas import use_openblas
from . import render

if TYPE_CHECKING:
    from ..api import MTPModel
    from ..decode.request import Stats
    from ..session.answer import Chunk

INTERRUPTED = 130

_BITS = (2, 3, 4, 5, 6, 8)
"""As `quantization.BITS`, whose module imports MLX; options are parsed before that."""


def _quantize_drafter(value: str) -> str | int:
    if value in ("auto", "none"):
        return value
    if not value.isdecimal() or int(value) not in _BITS:
        raise typer.BadParameter("expected auto, none, or 2, 3, 4, 5, 6 or 8 bits")
    return int(value)


Drafter = Annotated[
    str | None,
    typer.Option(
        help="Folder or repository of the drafter. Default: the model's own, if one is found.", metavar="MODEL"
    ),
]
NoDraft = Annotated[bool, typer.Option("--no-draft", help="Plain decoding, without a drafter.")]
Adapter = Annotated[
    str | None, typer.Option(help="Folder of a LoRA adapter for the model, as mlx-lm writes it.", metavar="PATH")
]
Quantize = Annotated[
    int | None, typer.Option(help="Bits to quantise both models to while loading: 2, 3, 4, 5, 6 or 8.", metavar="BITS")
]
QuantizeDrafter = Annotated[
    Any,
    typer.Option(
        help="Precision of the drafter: the model's (auto), as stored (none), or bits. Doesn't change the text.",
        metavar="auto|none|BITS",
        parser=_quantize_drafter,
    ),
]
System = Annotated[str | None, typer.Option(help="System prompt.", metavar="TEXT")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.", metavar="TEXT")]
Think = Annotated[bool, typer.Option("--think", help="Ask the model to think first.")]
Raw = Annotated[bool, typer.Option("--raw", help="Complete the text as it is, without the chat template.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")]
Model = Annotated[
    str | None,
    typer.Argument(help="Folder or repository. Default: the demo pair.", metavar="MODEL", show_default=False),
]
TraceFile = Annotated[
    Path | None,
    typer.Option("--trace", help="Write a Chrome trace of draft, verify and host to this file.", metavar="FILE"),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def check_stop(stop: Sequence[str] | None) -> None:
    """Checks the texts that end an answer.

    Raises:
        typer.BadParameter: Exit code 2.
    """
    if stop and not all(stop):
        raise typer.BadParameter("an empty text would stop everything", param_hint="--stop")


def check_loading(
    drafter: str | None, no_draft: bool, quantize: int | None, quantize_drafter: str | int = "auto"
) -> None:
    """Checks options of loading whose values typer can't check.

    Raises:
        typer.BadParameter: Exit code 2.
    """
    if drafter and no_draft:
        raise typer.BadParameter("either a drafter or --no-draft, not both", param_hint="--drafter")
    if no_draft and isinstance(quantize_drafter, int):
        raise typer.BadParameter("--no-draft loads no drafter", param_hint="--quantize-drafter")
    if quantize not in (None, *_BITS):
        raise typer.BadParameter("expected 2, 3, 4, 5, 6 or 8", param_hint="--quantize")


def load(
    model: str | None,
    drafter: str | None,
    no_draft: bool,
    quantize: int | None,
    quantize_drafter: str | int,
    profile: str | None = "auto",
    adapter: str | None = None,
    cache_bytes: int | None = None,
) -> MTPModel:
    """Loads the pair that the options name, with a fast BLAS."""
    check_loading(drafter, no_draft, quantize, quantize_drafter)
    use_openblas()
    from .. import api

    with render.loading() as progress:
        return api.load(
            model,
            drafter=False if no_draft else drafter,
            quantize=quantize,
            quantize_drafter=quantize_drafter,  # type: ignore[arg-type]  # the option's parser has checked it
            profile=profile,
            adapter=adapter,
            cache_bytes=cache_bytes,
            progress=progress,
        )


def numbers(text: str, option: str) -> list[int]:
    """The value of an option that is a list of whole numbers from 1, sorted.

    Raises:
        typer.BadParameter: Exit code 2.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter("expected whole numbers from 1, with commas between them", param_hint=option)
    return sorted({int(part) for part in parts})


def draft_lengths(text: str) -> list[int | str]:
    """The value of --draft-lengths: numbers and "auto" with commas between them, in their order.

    Raises:
        typer.BadParameter: Exit code 2.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part == "auto" or (part.isdecimal() and int(part) <= MAX_DRAFT_LENGTH) for part in parts):
        raise typer.BadParameter(
            f"expected auto and numbers from 0 to {MAX_DRAFT_LENGTH}, with commas between them",
            param_hint="--draft-lengths",
        )
    return [part if part == "auto" else int(part) for part in dict.fromkeys(parts)]


def tracing(lm: MTPModel, file: Path | None) -> AbstractContextManager[None]:
    """Records a trace, if a file for it is given."""
    return lm.trace(file) if file else nullcontext()


def show(chunks: Iterable[Chunk]) -> list[Chunk]:
    """Prints an answer as it is generated, with its reasoning on stderr; returns its chunks.

    A terminal gets no control characters; a pipe gets the text as it is.
    """
    seen, reasoning = [], ""
    out, err = ((render.harmless if stream.isatty() else str) for stream in (sys.stdout, sys.stderr))
    for chunk in chunks:
        seen.append(chunk)
        if chunk.reasoning:
            reasoning = chunk.reasoning
            print(err(reasoning), end="", file=sys.stderr, flush=True)
        if chunk.text:
            if reasoning:
                print("---" if reasoning.endswith("\n") else "\n---", file=sys.stderr, flush=True)
                reasoning = ""
            print(out(chunk.text), end="", flush=True)
    return seen


def os_message(error: OSError) -> str:
    """The message of an error of the operating system: the file and the reason."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason


def status(stats: Stats) -> str:
    """One line of statistics about a generation."""
    line = f"{stats.generated_tokens} tokens, {stats.generation_tps:.1f} tok/s"
    if stats.drafted:
        drafting = {k: n for k, n in stats.draft_lengths.items() if k}
        mean = sum(k * n for k, n in drafting.items()) / sum(drafting.values())
        line += f", {stats.mean_accepted:.2f} drafts accepted a round, draft length {mean:.1f}"
        if plain := stats.draft_lengths.get(0):
            line += f" ({plain} of {stats.rounds} rounds without)"
    else:
        line += ", nothing drafted"
    return line
