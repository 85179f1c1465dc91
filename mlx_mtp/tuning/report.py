"""The table that a simulation prints: what drafting should bring on a chip, by batch; a prediction and labelled so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import cost_model as model
from .chips import Chip

BATCHES = (1, 2, 4, 6, 8)
LONGEST_DRAFT = 8
BALANCED_SHARE = 0.5
"""Least share of the speed of plain decoding at batch 1 that every row keeps in the balanced choice."""


@dataclass(frozen=True)
class Choice:
    """What is predicted for a batch at its best draft length.

    Attributes:
        batch: Rows.
        drafts: Draft length with the most tokens a second; 0 is plain decoding.
        speeds: Tokens a second of all rows together, by draft length from 0 on.
        plain: The first of `speeds`.
        best: The one of `drafts`.
        experts: Distinct experts that the verify pass touches in a layer; 0 for a dense model.
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
    """The best draft length of each batch; batches that don't fit in the chip's largest memory are left out.

    Args:
        chip: Where.
        pair: The models.
        context: Committed tokens of each row.
        acceptance: By position, see `model.acceptance_for`.
        batches: Which batches.
        overlap: See `model.distinct_experts`.
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
        alone: Tokens a second of plain decoding at batch 1.
        objective: One of `tuning.OBJECTIVES`.
    """
    if objective == "latency":
        return max(found, key=lambda c: c.best / c.batch)
    if objective == "throughput":
        return max(found, key=lambda c: c.best)
    kept = [c for c in found if c.best / c.batch >= BALANCED_SHARE * alone]
    return max(kept, key=lambda c: c.best) if kept else min(found, key=lambda c: c.batch)


def simulation(
    chip: Chip,
    name: str,
    pair: model.Pair,
    context: int,
    acceptance: Sequence[float] = model.PUBLISHED_ACCEPTANCE,
    overlap: float = 0.0,
    batches: Sequence[int] = BATCHES,
    objective: str = "balanced",
) -> str:
    """The table as text, for people.

    Args:
        chip: Where.
        name: What to call the model.
        pair: The models.
        context: Committed tokens of each row.
        acceptance: By position, see `model.acceptance_for`.
        overlap: See `model.distinct_experts`.
        batches: Which batches.
        objective: One of `tuning.OBJECTIVES`.
    """
    stored = f"{pair.how.bits} bits" if pair.how else "16-bit"
    accepted = " ".join(f"{chance:.2f}" for chance in acceptance)
    lines = [
        f"PREDICTION, not a measurement: {name}, {stored}, on {chip.name} ({chip.bandwidth:.0f} GB/s, "
        f"{chip.gpu_cores} GPU cores), {context:,} tokens of context",
        (f"Assumed: drafts are accepted with {accepted} by position; " if pair.drafter else "Without a drafter; ")
        + "the largest configuration of the chip. Gain: best over plain in the same batch."
        + (" Experts: distinct ones that a pass reads in a layer." if pair.target.num_experts else ""),
    ]
    found = choices(chip, pair, context, acceptance, batches, overlap)
    if not found:
        return "\n".join(
            [*lines, f"It doesn't fit: the chip has at most {chip.memory} GB. Use fewer bits, or a shorter context."]
        )
    lines.append("batch  drafts  plain tok/s  best tok/s  gain  per row" + ("  experts" if found[0].experts else ""))
    for c in found:
        experts = f"  {c.experts:7.1f}" if c.experts else ""
        row = f"{c.batch:5d}  {c.drafts:6d}  {c.plain:11.1f}  {c.best:10.1f}  {c.best / c.plain:3.2f}x"
        lines.append(f"{row}  {c.best / c.batch:7.1f}{experts}")
    if pair.drafter:
        lines.append("Tokens a second of all rows, by batch and draft length (* the best of the batch):")
        lines.append("batch" + "".join(f"{drafts:9d}" for drafts in range(LONGEST_DRAFT + 1)))
        for c in found:
            marks = ("*" if drafts == c.drafts else " " for drafts in range(len(c.speeds)))
            cells = (f"{speed:8.1f}{mark}" for speed, mark in zip(c.speeds, marks, strict=True))
            lines.append(f"{c.batch:5d} " + "".join(cells).rstrip())
    if left := sorted(set(batches) - {c.batch for c in found}):
        lines.append(f"Left out: batch {', '.join(map(str, left))}, which {chip.memory} GB have no room for.")
    alone = model.tokens_per_second(chip, pair, 1, (), context, overlap)
    best = chosen(found, alone, objective)
    share = best.best / best.batch / alone
    lines.append(
        f"{objective.capitalize()}: batch {best.batch}, draft length {best.drafts}; each row has {share:.0%} of plain "
        "batch 1."
    )
    return "\n".join(lines)


def simulation_facts(
    chip: Chip, pair: model.Pair, context: int, batches: Sequence[int] = BATCHES, objective: str = "balanced"
) -> dict[str, Any]:
    """What is predicted for a context, for programs. Arguments as for `simulation`."""
    found = choices(chip, pair, context, batches=batches)
    alone = model.tokens_per_second(chip, pair, 1, (), context)
    return {
        "context": context,
        "choices": [asdict(choice) for choice in found],
        "chosen": asdict(chosen(found, alone, objective)) if found else None,
    }
