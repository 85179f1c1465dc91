"""How precise the drafter of a pair is: what `load`'s argument `quantize_drafter` comes to.

A drafter in 16 bits beside a target in 4 is a large share of a round: that of 26B-A4B reads 0.84 GB for every draft,
0.24 GB in 4 bits. Fewer bits cost a few accepted drafts at most, and never change a text, which the target decides. So
it goes along with a quantised target, with one exception: a clustered head reads a small part of itself, and such a
drafter (E2B's, E4B's) is so small that its time is not what it reads.
"""

from __future__ import annotations

from dataclasses import replace

from ..config import DrafterConfig
from ..errors import CheckpointError, MTPError
from .description import DrafterDescription, TargetDescription
from .quantization import BITS, Format

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


def drafter_format(
    config: DrafterConfig, target: Format | None, asked: bool, choice: int | str | None
) -> Format | None:
    """What a drafter whose files aren't quantised is quantised to while loading; None to take it as stored.

    Args:
        config: The drafter's config.
        target: The target's format once it is loaded; None if it isn't quantised.
        asked: Whether it has this format because bits were asked for (`quantize`), and not by its files.
        choice: `quantize_drafter`, as for `api.load`.
    """
    if isinstance(choice, int):
        return Format(choice)
    # Who asks for bits means both models, for less memory too.
    if choice != "auto" or target is None or (config.num_clusters and not asked):
        return None
    return replace(target, bits=LEAST_BITS) if target.bits < LEAST_BITS else target


def beside(drafter: DrafterDescription, target: TargetDescription, choice: int | str | None) -> DrafterDescription:
    """A drafter as it is loaded beside a target.

    Args:
        drafter: The drafter as it is stored.
        target: The target as it is loaded.
        choice: `quantize_drafter`, as for `api.load`.

    Raises:
        CheckpointError: Bits are asked for, and it is quantised already.
    """
    if not drafter.stored:
        asked = target.quantize is not None
        return replace(drafter, quantize=drafter_format(drafter.config, target.format, asked, choice))
    if isinstance(choice, int):
        raise CheckpointError(
            f"{drafter.folder}: the drafter is quantised already: load it without quantize_drafter "
            "(--quantize-drafter), or name one that isn't"
        )
    return drafter
