"""How precise the drafter of a pair is: what `load`'s argument `quantize_drafter` comes to.

A drafter in 16 bits beside a target in 4 is a large share of a round: that of 26B-A4B reads 0.84 GB for every draft,
0.24 GB in 4 bits. Fewer bits cost a few accepted drafts at most, and never change a text, which the target decides. So
it goes along with a quantised target, with one exception: a clustered head reads a small part of itself, and such a
drafter (E2B's, E4B's) is so small that its time is not what it reads.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..config import DrafterConfig
from ..errors import CheckpointError, MTPError
from . import load as checkpoint
from .pair import way_out
from .quantization import BITS, Format, Stored
from .tensor_names import drafter_table, target_table

LEAST_BITS = 4
"""Fewest bits that a drafter gets without being asked for: with 2 the embedded pair's loses half of what is accepted
(docs/measurements/convert.md), and conversions give theirs 4 as well."""


def check(choice: object) -> None:
    """Checks an argument `quantize_drafter`.

    Raises:
        MTPError: It is none of None, "none", "auto" and the numbers of bits that there are.
    """
    # Not by `in` alone: 4.0 is equal to 4.
    if not (choice is None or choice in ("auto", "none") or (isinstance(choice, int) and choice in BITS)):
        raise MTPError(f"quantize_drafter must be 'auto', 'none' or 2, 3, 4, 5, 6 or 8 bits, not {choice!r}")


def expected_bits(quantize: int | None, choice: int | str | None) -> int | None:
    """To how many bits a drafter is quantised, as far as it is known before there is one; None for as stored.

    Raises:
        MTPError: See `check`.
    """
    check(choice)
    if choice == "auto":
        return max(quantize, LEAST_BITS) if quantize else None
    return choice if isinstance(choice, int) else None


def drafter_format(
    config: DrafterConfig,
    stored: Stored | None,
    target: Format | None,
    quantize: int | None,
    choice: int | str | None,
) -> Format | None:
    """What a drafter is quantised to while loading; None to take it as stored.

    Args:
        config: The drafter's config.
        stored: How it is quantised; None if it isn't.
        target: The target's format, as it is stored or as `quantize` makes it; None if it isn't quantised.
        quantize: Bits to quantise the pair to, as for `api.load`.
        choice: `quantize_drafter`, as for `api.load`.

    Raises:
        MTPError: See `check`.
        CheckpointError: Bits are asked for, and it is quantised already.
    """
    check(choice)
    if isinstance(choice, int):
        if stored:
            raise CheckpointError("the drafter is quantised already: load it without quantize_drafter "
                                  "(--quantize-drafter), or name one that isn't")  # fmt: skip
        return Format(choice)
    if choice != "auto" or stored:
        return None
    # Who asks for bits means both models, for less memory too.
    if target is None or (config.num_clusters and not quantize):
        return None
    return replace(target, bits=LEAST_BITS) if target.bits < LEAST_BITS else target


def of_pair(folder: Path, drafter_folder: Path | None, quantize: int | None, choice: int | str | None) -> Format | None:
    """`drafter_format` for folders of a target and its drafter; None without a drafter.

    Raises:
        CheckpointError: See `drafter_format`, or a config.json can't be used.
    """
    if drafter_folder is None:
        return None
    raw, target = checkpoint.read_target(folder)
    of_target = checkpoint.read_quantization(raw, target_table(target.text), folder, quantize)
    common = of_target.common if of_target else Format(quantize) if quantize else None
    with way_out():
        raw, config = checkpoint.read_drafter(drafter_folder)
        stored = checkpoint.read_quantization(raw, drafter_table(config), drafter_folder)
        with checkpoint.about(drafter_folder):
            return drafter_format(config, stored, common, quantize, choice)
