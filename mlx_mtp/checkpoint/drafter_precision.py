"""Chooses the precision of a drafter, by `api.load`'s argument `quantize_drafter`.

Next to a target in 4 bits, a drafter in 16 bits takes a large share of a round: 26B-A4B's reads 0.84 GB per draft, and
0.24 GB in 4 bits. Fewer bits cost a few accepted drafts at most, and never change the text. So by default the drafter
of a quantised target is quantised as well, with one exception: a drafter with a clustered head (E2B's, E4B's) reads so
little that its time doesn't depend on it.
"""

from __future__ import annotations

from dataclasses import replace

from ..config import DrafterConfig
from ..errors import CheckpointError, MTPError
from .description import DrafterDescription, TargetDescription
from .quantization import BITS, Format

LEAST_BITS = 4
"""Fewest bits that a drafter gets by default: with 2 bits, the embedded pair loses half of its accepted drafts
(docs/measurements/convert.md). Conversions have the same minimum."""


def check(choice: object) -> None:
    """Checks an argument `quantize_drafter`.

    Raises:
        MTPError: It isn't None, "none", "auto" or a possible number of bits.
    """
    # The type is checked because 4.0 == 4.
    if not (choice is None or choice in ("auto", "none") or (isinstance(choice, int) and choice in BITS)):
        raise MTPError(f"quantize_drafter must be 'auto', 'none' or 2, 3, 4, 5, 6 or 8 bits, not {choice!r}")


def drafter_format(
    config: DrafterConfig, target: Format | None, asked: bool, choice: int | str | None
) -> Format | None:
    """The format to which a drafter is quantised while loading, if its files aren't quantised.

    Args:
        config: The drafter's config.
        target: The target's format once it is loaded; None if it isn't quantised.
        asked: Whether the target is quantised by `api.load`'s argument `quantize`, not in its files.
        choice: `api.load`'s argument `quantize_drafter`.

    Returns:
        The format; None to leave the drafter as stored.
    """
    if isinstance(choice, int):
        return Format(choice)
    # `quantize` is meant for both models, since it also saves memory.
    if choice != "auto" or target is None or (config.num_clusters and not asked):
        return None
    return replace(target, bits=LEAST_BITS) if target.bits < LEAST_BITS else target


def for_target(drafter: DrafterDescription, target: TargetDescription, choice: int | str | None) -> DrafterDescription:
    """The description of a drafter as it is loaded with a target.

    Args:
        drafter: The drafter as it is stored.
        target: The target as it is loaded.
        choice: `api.load`'s argument `quantize_drafter`.

    Raises:
        CheckpointError: A number of bits is given, but the drafter's files are quantised.
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
