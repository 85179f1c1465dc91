"""The five sizes of Gemma 4: their repositories, what they need, and their predicted speed. Downloads nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import fit
from .checkpoint.description import Description, DrafterDescription, TargetDescription
from .checkpoint.tensor_names import drafter_table, target_table
from .simulate import cost_model, report
from .simulate.chips import Chip
from .simulate.known_models import KNOWN_MODELS, known_pair

SPEED_BITS = 4
"""Bits for which speeds are predicted: those of most published conversions."""


@dataclass(frozen=True)
class Size:
    """A size of Gemma 4.

    Attributes:
        name: One of `KNOWN_MODELS`.
        repository: The target's repository.
        drafter: The drafter's repository.
        context: The target's context in tokens.
        fits: Its memory, for each of `fit.CHOICES`.
        expected: The predicted speed at SPEED_BITS, see `report.single_row`; None if it doesn't fit, or no chip is
            given.
    """

    name: str
    repository: str
    drafter: str
    context: int
    fits: tuple[fit.Fit, ...]
    expected: dict[str, Any] | None


def repository(name: str) -> str:
    """The target's repository of a size; other names are repositories already. Case doesn't matter for sizes."""
    known = {size.lower(): size for size in KNOWN_MODELS}.get(name.lower())
    return f"google/gemma-4-{known}-it" if known else name


def sizes_on(chip: Chip | None, memory: int | None) -> list[Size]:
    """The sizes with what they need and how fast they are.

    Args:
        chip: Chip to predict the speed for; None for no prediction.
        memory: Bytes that models and KV may take on another machine; None for this one.
    """
    return [_size(name, chip, memory) for name in KNOWN_MODELS]


def _size(name: str, chip: Chip | None, memory: int | None) -> Size:
    target, drafter = _described(name, None if memory is None else "bfloat16")
    fits = tuple(fit.fit(target, drafter, bits, memory=memory) for bits in fit.CHOICES)
    room = next(it.longest_context for it in fits if it.quantize == SPEED_BITS)
    expected = None
    if chip and room >= report.PREDICTED_AT:
        like, own = fit.at_bits(target, drafter, SPEED_BITS)
        pair = cost_model.pair(target.config, drafter.config, like.format, own.format if own else None)
        expected = report.single_row(chip, pair)
    own_name = repository(name)
    return Size(name, own_name, f"{own_name}-assistant", target.text.max_positions, fits, expected)


def _described(name: str, dtype: str | None) -> tuple[TargetDescription, DrafterDescription]:
    """Descriptions of a size's models as Google publishes them, in bfloat16; `dtype` as for `api.load`."""
    target, drafter = known_pair(name)
    folder, raw = Path(repository(name)), {"dtype": "bfloat16"}
    return (
        Description(folder=folder, raw=raw, config=target, table=target_table(target.text), dtype=dtype),
        Description(folder=folder, raw=raw, config=drafter, table=drafter_table(drafter), dtype=dtype),
    )
