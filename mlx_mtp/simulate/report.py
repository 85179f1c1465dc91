"""The predicted best draft length of each batch size on a chip, and the choice for an objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..decode.objective import BALANCED_SHARE
from . import cost_model as model
from .chips import Chip

BATCHES = (1, 2, 4, 6, 8)
LONGEST_DRAFT = 8

PREDICTED_AT = 1024
"""Context in tokens for which `single_row` predicts."""

TYPICAL_ERROR = 0.15
"""Median error of the cost model against published figures, see docs/cost_model.md."""


@dataclass(frozen=True)
class Choice:
    """The prediction for a batch size.

    Attributes:
        batch: Rows.
        drafts: Draft length with the most tokens per second; 0 is plain decoding.
        speeds: Tokens per second of all rows together, by draft length from 0.
        plain: The speed of plain decoding, `speeds[0]`.
        best: The speed of the best draft length, `speeds[drafts]`.
        experts: Distinct experts that the verify pass reads in a layer; 0 for a dense model.
    """

    batch: int
    drafts: int
    speeds: tuple[float, ...]
    plain: float
    best: float
    experts: float


def choices(
    chip: Chip,
    pair: model.Pair,
    context: int,
    acceptance: Sequence[float] = model.PUBLISHED_ACCEPTANCE,
    batches: Sequence[int] = BATCHES,
    overlap: float = 0.0,
) -> list[Choice]:
    """The best draft length of each batch size; those that don't fit in the chip's largest memory are left out.

    Args:
        chip: The chip.
        pair: The models.
        context: Committed tokens of each row.
        acceptance: By position, see `cost_model.acceptance_for`.
        batches: Batch sizes.
        overlap: See `cost_model.distinct_experts`.
    """
    found = []
    for batch in (b for b in batches if model.fits(chip, pair, b, context)):

        def speed(drafts: int, batch: int = batch) -> float:
            accepted = model.acceptance_for(drafts, acceptance)
            return model.tokens_per_second(chip, pair, batch, accepted, context, overlap)

        speeds = tuple(speed(drafts) for drafts in range(LONGEST_DRAFT + 1 if pair.drafter else 1))
        drafts = speeds.index(max(speeds))
        text = pair.target
        tokens = batch * (drafts + 1)
        experts = (
            model.distinct_experts(text.num_experts, text.experts_per_token, tokens, overlap)
            if text.num_experts
            else 0.0
        )
        found.append(Choice(batch, drafts, speeds, speeds[0], speeds[drafts], experts))
    return found


def chosen(found: Sequence[Choice], alone: float, objective: str) -> Choice:
    """The choice for an objective.

    Args:
        found: At least one choice.
        alone: Tokens per second of plain decoding at batch 1.
        objective: One of `decode.objective.OBJECTIVES`.
    """
    if objective == "latency":
        return max(found, key=lambda c: c.best / c.batch)
    if objective == "throughput":
        return max(found, key=lambda c: c.best)
    balanced = [c for c in found if c.best / c.batch >= BALANCED_SHARE * alone]
    return max(balanced, key=lambda c: c.best) if balanced else min(found, key=lambda c: c.batch)


def simulation_facts(
    chip: Chip, pair: model.Pair, context: int, batches: Sequence[int] = BATCHES, objective: str = "balanced"
) -> dict[str, Any]:
    """The predictions for a context as JSON values.

    Args:
        chip: The chip.
        pair: The models.
        context: Committed tokens of each row.
        batches: Batch sizes.
        objective: One of `decode.objective.OBJECTIVES`.
    """
    found = choices(chip, pair, context, batches=batches)
    alone = model.tokens_per_second(chip, pair, 1, (), context)
    return {
        "context": context,
        "choices": [asdict(choice) for choice in found],
        "chosen": asdict(chosen(found, alone, objective)) if found else None,
    }


def single_row(chip: Chip, pair: model.Pair) -> dict[str, Any]:
    """The prediction for one row as JSON values, speeds as ranges.

    A range is the prediction within TYPICAL_ERROR; half of the published figures lie outside theirs. `drafting_tps` is
    None without a drafter, or if no draft length is faster than plain decoding; `draft_length` is then None or 0. All
    are None if the pair doesn't fit in the chip's largest memory.
    """
    (alone, *_) = choices(chip, pair, PREDICTED_AT, batches=(1,)) or (None,)

    def around(speed: float) -> list[float]:
        return [speed / (1 + TYPICAL_ERROR), speed * (1 + TYPICAL_ERROR)]

    return {
        "chip": chip.name,
        "context": PREDICTED_AT,
        "typical_error": TYPICAL_ERROR,
        "plain_tps": around(alone.plain) if alone else None,
        "drafting_tps": around(alone.best) if alone and alone.drafts else None,
        "draft_length": alone.drafts if alone and pair.drafter else None,
    }
