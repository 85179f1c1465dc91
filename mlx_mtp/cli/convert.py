"""`mlx-mtp convert`: converts a checkpoint and its drafter to MLX folders."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import CheckpointError, MemoryBudgetError
from ..system.blas import use_openblas
from . import options as o
from . import render

if TYPE_CHECKING:
    from weights_convert import Conversion, Learning

    from ..checkpoint.quantization import Scheme

EMBEDDINGS = ("embed_tokens*", "lm_head", "head.embedding")
"""Modules that --embeddings-bits applies to."""


def _override(value: str) -> tuple[str, int | None]:
    pattern, _, bits = value.rpartition("=")
    if not pattern or not (bits.isdecimal() or bits == "none"):
        raise typer.BadParameter(f"{value!r} isn't PATTERN=BITS, as in '*.mlp.down_proj=6' or 'embed_tokens=none'")
    return pattern, None if bits == "none" else int(bits)


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder or repository of a target or a drafter.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to create.")],
    bits: Annotated[
        int | None, typer.Option(help="Bits of quantised weights: 2, 3, 4, 5, 6 or 8. Default: don't quantise.")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale: 32, 64 or 128. Default: 64.", show_default=False)
    ] = None,
    mode: Annotated[
        str, typer.Option(help="affine, mxfp4, mxfp8 or nvfp4; all but affine fix bits and groups.")
    ] = "affine",
    embeddings_bits: Annotated[int | None, typer.Option(help="Bits of embeddings and output head.")] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=BITS",
            help="Bits, or none, of matrices with matching names, as in '*.mlp.down_proj=6'. May be repeated; the last "
            "match counts. The router of a mixture of experts has 8 bits unless it is named here.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 for the rest. Default: as stored.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="gptq or dwq: mlx-lm learns the target's quantised weights from the text of --calibration. Needs the "
            "unquantised model in memory, and temporarily the same space on disk. Default: round to nearest.",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text (UTF-8) that --method learns from, similar to the model's use."),
    ] = None,
    drafter: o.Drafter = None,
    no_draft: Annotated[bool, typer.Option("--no-draft", help="Convert the target alone.")] = False,
    drafter_bits: Annotated[
        int | None, typer.Option(help="Bits of the drafter. Default: 4 if the target is quantised.", show_default=False)
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Compare the result with its source on sample text, and verify its checksums. If an earlier run of "
            "the same command has finished, its result is checked.",
        ),
    ] = False,
    debug: o.Debug = False,  # noqa: ARG001 - `main` reads it
) -> None:
    """Converts a checkpoint to DST, and its drafter to DST-assistant. Continues after an interruption.

    A converted target also loads in mlx-lm.
    """
    o.check_loading(drafter, no_draft, None)
    use_openblas()  # --check runs the models
    _check_dtype(dtype)
    if drafter_bits is not None and no_draft:
        raise typer.BadParameter("--no-draft converts no drafter", param_hint="--drafter-bits")
    common = _scheme(mode, bits, group_size, embeddings_bits, override or [])
    learning = _learning(method, calibration, common)
    conversions = _prepare(source, destination, common, dtype, False if no_draft else drafter, drafter_bits, learning)
    _check_overrides(override or [], conversions[0].plan.modules)
    for conversion in conversions:
        _run(conversion)
        print(conversion.destination)
    if check:
        for conversion in conversions:
            alone = _is_drafter(conversions[0])
            print(_compared(conversion, target=None if alone else conversions[0].source))


@contextmanager
def _value_of(option: str) -> Iterator[None]:
    """Turns a CheckpointError of the block into an error of usage."""
    try:
        yield
    except CheckpointError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def _check_dtype(dtype: str | None) -> None:
    from ..checkpoint.description import DTYPES

    if dtype not in (None, *DTYPES):
        raise typer.BadParameter(f"expected {', '.join(DTYPES)}", param_hint="--dtype")


def _scheme(
    mode: str, bits: int | None, group_size: int | None, embeddings_bits: int | None, overrides: list[str]
) -> Scheme | None:
    from ..checkpoint.quantization import Format, Scheme

    rows: list[tuple[str, int | None]] = [
        (pattern, embeddings_bits) for pattern in EMBEDDINGS if embeddings_bits is not None
    ]
    named = [_override(text) for text in overrides]
    if bits is None and mode == "affine":
        if rows or named or group_size is not None:
            raise typer.BadParameter("--group-size, --embeddings-bits and --override need --bits or --mode")
        return None
    with _value_of("--mode"):
        Format.make(mode)
    with _value_of("--bits"):
        Format.make(mode, bits)
    with _value_of("--group-size"):
        common = Format.make(mode, bits, group_size)
    for option, special in (("--embeddings-bits", rows), ("--override", named)):
        with _value_of(option):
            Scheme(common, tuple(special))
    return Scheme(common, (*rows, *named))


def _learning(method: str | None, calibration: Path | None, scheme: Scheme | None) -> Learning | None:
    from weights_convert.learned import Learning

    if method is None:
        if calibration is not None:
            raise typer.BadParameter("only --method learns from text", param_hint="--calibration")
        return None
    with _value_of("--method"):
        learning = Learning(method, calibration or Path())
        learning.check(scheme)
    if calibration is None:
        raise typer.BadParameter(f"{method} learns from text: name a file", param_hint="--calibration")
    return learning


def _check_overrides(overrides: list[str], modules: tuple[str, ...]) -> None:
    """Checks that each pattern matches a module; a misspelt one would silently change nothing.

    Raises:
        typer.BadParameter: One matches nothing.
    """
    for pattern, _ in map(_override, overrides):
        if not any(fnmatchcase(module, pattern) for module in modules):
            raise typer.BadParameter(
                f"no matrix has a name like {pattern!r}; there are {', '.join(modules[:3])} and others",
                param_hint="--override",
            )


def _prepare(
    source: str,
    destination: Path,
    scheme: Scheme | None,
    dtype: str | None,
    drafter: str | Literal[False] | None,
    drafter_bits: int | None,
    learning: Learning | None,
) -> list[Conversion]:
    """The conversion of the model itself, and of its drafter if there is one."""
    from weights_convert import Format, Scheme, prepare
    from weights_convert.plan import check_original

    from ..checkpoint.pair import find_pair, suggest_no_draft

    bits = (4 if scheme else None) if drafter_bits is None else drafter_bits
    with _value_of("--drafter-bits"):
        drafter_scheme = None if bits is None else Scheme(Format(bits))
    conversions = [prepare(source, destination, scheme, dtype, learning=learning)]
    if _is_drafter(conversions[0]):
        if learning:
            raise typer.BadParameter(f"{source} is a drafter, which can only be rounded", param_hint="--method")
        if drafter or drafter_bits is not None:
            raise typer.BadParameter(f"{source} is a drafter itself: it takes --bits, not --drafter or --drafter-bits")
        return conversions
    _, own = find_pair(source, drafter, check=check_original)
    if own:
        sibling = destination.with_name(f"{destination.name}-assistant")
        with suggest_no_draft():
            conversions.append(prepare(own.folder, sibling, drafter_scheme, dtype, merged=own.merged))
    return conversions


def _is_drafter(conversion: Conversion) -> bool:
    from ..config import DRAFTER_TYPES

    return conversion.plan.config["model_type"] in DRAFTER_TYPES


def _run(conversion: Conversion) -> None:
    """Runs a conversion with a progress bar."""
    try:
        name, total = conversion.destination.name, conversion.plan.total
        with render.progress(name, total, in_bytes=True, announce=False) as report:
            conversion.run(lambda _name, written, _total: report(written))
    except KeyboardInterrupt:
        resumable = conversion.aside.exists()
        more = "the same command continues" if resumable else "nothing was finished"
        print(f"interrupted: {more}", file=sys.stderr)
        raise typer.Exit(o.INTERRUPTED) from None


def _compared(conversion: Conversion, target: Path | None) -> str:
    """Checks a result, and compares it with its source.

    Args:
        conversion: The finished conversion.
        target: Folder of the original target; None if a drafter was converted alone.

    Returns:
        The findings, in one line.

    Raises:
        CheckpointError: A file of the result is missing or damaged.
        MemoryBudgetError: The models don't fit in memory; the message has the other findings.
    """
    from weights_convert.files import verify_sums

    made = conversion.destination
    checked = f"{made}: {verify_sums(made)} files as they were written"
    try:
        return f"{checked}; {_difference(conversion, target)}"
    except MemoryBudgetError as error:
        raise MemoryBudgetError(f"{checked}; {error}") from error


def _difference(conversion: Conversion, target: Path | None) -> str:
    """How a result differs from its source; arguments as for `_compared`."""
    from weights_convert.check import DRAFTS, acceptance, compare

    made = conversion.destination
    if not _is_drafter(conversion):
        found = compare(conversion.source, made)
        return (
            f"KL divergence {found.kl:.4f} nats per token, top-1 agreement {found.top1:.1%}, over {found.tokens} tokens"
        )
    if target is None:
        return "convert it with its target to see how many drafts are accepted"
    before, after = acceptance(target, conversion.source), acceptance(target, made)
    return f"{after:.2f} of {DRAFTS} drafts accepted a round, {before:.2f} before"
