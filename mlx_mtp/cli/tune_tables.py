"""The tables of `mlx-mtp tune`: measurements and choices, and the predictions of --simulate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .render import Part, table

if TYPE_CHECKING:
    from ..config import TextConfig
    from ..simulate import cost_model
    from ..simulate.chips import Chip
    from ..tuning.choose import Choice, Option
    from ..tuning.costs import Measurement


def tables(found: Measurement, options: list[Option], choices: list[Choice], config: TextConfig) -> list[Part]:
    """The measurements and choices as tables and sentences."""
    from ..tuning import choose

    parts: list[Part] = []
    for part in (_seconds(found), _experts(found, config), _split(found, config), _acceptance(found), _speeds(options)):
        parts += [*part, ""] if part else []
    parts += [f"left out: {skipped}" for skipped in found.skipped]
    if why := choose.timing_anomaly(found.steps):
        parts += [f"The machine was busy with something else: {why}. Tune again when it is idle.", ""]
    return [*parts, *(f"{choice.objective:10} {choice.why}" for choice in choices)]


def _seconds(found: Measurement) -> list[Part]:
    parts: list[Part] = []
    for context in sorted({step.context for step in found.steps}):
        own = [step for step in found.steps if step.context == context]
        widths = sorted(own[0].verify)
        rows = []
        for step in own:
            spread = max((s.high - s.low) / s.median for s in step.verify.values())
            passes = [f"{step.verify[width].median * 1e3:.2f}" for width in widths]
            drafted = f"{step.draft.median * 1e3:.2f}" if step.draft else "-"
            rows.append([str(step.rows), *passes, drafted, f"{step.host * 1e3:.2f}", f"up to {spread:.0%}"])
        speed = f"; prefill {found.prefill_tps[context]:,.0f} tok/s" if context in found.prefill_tps else ""
        parts += [
            *([""] if parts else []),
            f"Context {context:,}{speed}. Milliseconds of a verify pass by block width, of a draft, and of the host:",
            table(["batch", *map(str, widths), "draft", "host", "spread"], rows),
        ]
    return parts


def _experts(found: Measurement, config: TextConfig) -> list[Part]:
    from ..simulate.cost_model import distinct_experts

    if not config.num_experts or not found.steps:
        return []
    rows = []
    for step in (step for step in found.steps if step.context == found.steps[0].context):
        cells = [str(step.rows)]
        for width, count in step.experts.items():
            uniform = distinct_experts(config.num_experts, config.experts_per_token, step.rows * width)
            cells.append(f"{count:.1f} ({uniform:.1f})")
        rows.append(cells)
    return [
        "Distinct experts of a layer by block width: measured (expected if tokens chose independently):",
        table(["batch", *map(str, sorted(found.steps[0].experts))], rows),
    ]


def _split(found: Measurement, config: TextConfig) -> list[Part]:
    from ..tuning import choose

    parts = choose.split(found.steps)
    if parts is None:
        return []
    experts = f" + {parts.expert * 1e3:.3f} per distinct expert" if config.num_experts else ""
    return [
        (
            f"Verify at context {parts.context:,}, in ms: {parts.fixed * 1e3:.2f} fixed + "
            f"{parts.dense * 1e3:.3f} per token{experts}; mean error {parts.residual:.0%}."
        )
    ]


def _acceptance(found: Measurement) -> list[Part]:
    if not found.acceptance or not found.drafter_position:
        return []
    longest = max(map(len, found.acceptance.values()))
    rows = [[kind, *(f"{chance:.2f}" for chance in chances)] for kind, chances in found.acceptance.items()]
    why = "the default" if found.drafter_position == "committed" else "where clearly more drafts are accepted"
    return [
        "Probability that a draft is accepted if those before it were, by position:",
        table(["texts", *map(str, range(1, longest + 1))], rows, left=(0,)),
        f"Position of the drafter's queries: {found.drafter_position}, {why}.",
    ]


def _speeds(options: list[Option]) -> list[Part]:
    if not options:
        return []
    speeds: dict[int, dict[int, float]] = {}
    for option in options:
        speeds.setdefault(option.rows, {})[option.drafts] = option.total_tps
    return [
        "Expected tokens per second of all rows, by batch and draft length (* marks the best of a batch):",
        _by_draft_length(speeds),
    ]


def _by_draft_length(speeds: dict[int, dict[int, float]]) -> Part:
    """A table of speeds by batch (rows) and draft length (columns); the best of each row is marked."""
    lengths = sorted({drafts for row in speeds.values() for drafts in row})
    rows = []
    for batch, row in sorted(speeds.items()):
        best = max(row, key=lambda drafts: row[drafts])
        cells = (f"{row[k]:.1f}{'*' if k == best else ' '}" if k in row else "" for k in lengths)
        rows.append([str(batch), *cells])
    return table(["batch", *(f"{k} " for k in lengths)], rows)


def simulation(
    chip: Chip,
    name: str,
    pair: cost_model.Pair,
    context: int,
    batches: Sequence[int],
    objective: str = "balanced",
) -> list[Part]:
    """The predictions for a context as tables and sentences.

    Args:
        chip: The chip.
        name: The name of the model.
        pair: The models.
        context: Committed tokens of each row.
        batches: Batch sizes.
        objective: One of `decode.objective.OBJECTIVES`.
    """
    from ..simulate.cost_model import PUBLISHED_ACCEPTANCE, tokens_per_second
    from ..simulate.report import choices, chosen

    stored = f"{pair.how.bits} bits" if pair.how else "16-bit"
    accepted = " ".join(f"{chance:.2f}" for chance in PUBLISHED_ACCEPTANCE)
    parts: list[Part] = [
        (
            f"PREDICTION, not a measurement: {name}, {stored}, on {chip.name} ({chip.bandwidth:.0f} GB/s, "
            f"{chip.gpu_cores} GPU cores), {context:,} tokens of context"
        ),
        (f"Assumed: drafts are accepted with {accepted} by position; " if pair.drafter else "Without a drafter; ")
        + "the largest configuration of the chip. Gain: best over plain in the same batch."
        + (" Experts: distinct experts that a pass reads in a layer." if pair.target.num_experts else ""),
    ]
    found = choices(chip, pair, context, batches=batches)
    if not found:
        return [*parts, f"It doesn't fit: the chip has at most {chip.memory} GB. Use fewer bits, or a shorter context."]
    rows = [
        [str(c.batch), str(c.drafts), f"{c.plain:.1f}", f"{c.best:.1f}", f"{c.best / c.plain:.2f}x",
         f"{c.best / c.batch:.1f}", *([f"{c.experts:.1f}"] if c.experts else [])]
        for c in found
    ]  # fmt: skip
    headers = ["batch", "drafts", "plain tok/s", "best tok/s", "gain", "per row"]
    parts.append(table([*headers, "experts"] if found[0].experts else headers, rows))
    if pair.drafter:
        parts += [
            "Tokens per second of all rows, by batch and draft length (* marks the best of a batch):",
            _by_draft_length({c.batch: dict(enumerate(c.speeds)) for c in found}),
        ]
    if left := sorted(set(batches) - {c.batch for c in found}):
        parts.append(f"Left out: batch {', '.join(map(str, left))}, which {chip.memory} GB have no room for.")
    alone = tokens_per_second(chip, pair, 1, (), context)
    best = chosen(found, alone, objective)
    share = best.best / best.batch / alone
    parts.append(
        f"{objective.capitalize()}: batch {best.batch}, draft length {best.drafts}; each row has {share:.0%} of the "
        "speed of plain decoding at batch 1."
    )
    return parts
