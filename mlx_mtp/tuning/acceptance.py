"""Measures a loaded pair: acceptance on answers to sample prompts, then the cost of rounds (costs.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from ..decode.limits import MAX_AUTO_LENGTH
from ..decode.request import Stats, check_prompt
from ..decode.sampling import SamplingOptions
from ..errors import PromptError
from ..measuring.prompts import PROMPTS
from ..models.drafter import POSITIONS
from .costs import BATCHES, CONTEXTS, LENGTHS, Measurement, Progress, measure_costs, no_progress

if TYPE_CHECKING:
    from ..api import MTPModel

ANSWER_TOKENS = 96
"""Most tokens of an answer that acceptance is measured on."""


def measure(
    lm: MTPModel,
    result: Measurement,
    batches: Sequence[int] = BATCHES,
    lengths: Sequence[int] = LENGTHS,
    contexts: Sequence[int] = CONTEXTS,
    prompts: Mapping[str, Sequence[Any]] = PROMPTS,
    progress: Progress = no_progress,
) -> None:
    """Measures a pair.

    Args:
        lm: The pair, with or without a drafter.
        result: Receives each figure as soon as it is measured.
        batches: Batch sizes, in rows.
        lengths: Widths of verify blocks, in tokens: 1, 2, ... without gaps if there is a drafter.
        contexts: Committed tokens of each row; contexts that the model has no room for are skipped.
        prompts: Prompts for `MTPModel.generate`, by kind of text.
        progress: Called with a description after each of the `points`.

    Raises:
        PromptError: A prompt can't be used.
        MemoryBudgetError: Not even one row fits in memory.
    """
    texts = _answers(lm, result, prompts)
    progress("acceptance")
    # Sampling from a large vocabulary takes time, so rounds are timed with the sampling that most requests use.
    defaults = lm.defaults
    sampling = SamplingOptions(defaults.temperature, defaults.top_k, defaults.top_p, defaults.min_p)
    with lm.models() as (target, drafter):
        measure_costs(
            target, drafter, texts, sampling, lm.kv_budget, result, batches, lengths, contexts, progress,
            defaults.suppress_tokens,
        )  # fmt: skip
    result.complete = True


def _answers(lm: MTPModel, result: Measurement, prompts: Mapping[str, Sequence[Any]]) -> list[list[int]]:
    """Generates answers, stores their acceptance in `result`, and returns the token ids of prompts with answers."""
    if lm.tokenizer is None and any(isinstance(p, str) for group in prompts.values() for p in group):
        raise PromptError(f"{lm.folder} has no tokenizer.json: give prompts as token ids")
    kinds = [kind for kind, group in prompts.items() for _ in group]
    encoded = []
    for number, prompt in enumerate((prompt for group in prompts.values() for prompt in group), 1):
        try:
            encoded.append(lm.encode(prompt))
            check_prompt(encoded[-1], lm.config.text)
        except PromptError as error:
            raise PromptError(f"prompt {number}: {error}") from error
    if not encoded:
        raise PromptError("there are no prompts to measure acceptance on")
    best: list[float] | None = None
    answers: list[list[int]] = []
    with lm.models() as (_, drafter):
        before = drafter.position if drafter else None
    try:
        for position in POSITIONS if before else (None,):
            if position:
                _set_position(lm, position)
            found = lm.generate_batch(
                encoded, max_tokens=ANSWER_TOKENS, draft_length=MAX_AUTO_LENGTH if before else 0, seed=0
            )
            answers = [[*prompt, *answer.tokens] for prompt, answer in zip(encoded, found, strict=True)]
            accepted = [answer.stats.accepted / max(1, answer.stats.rounds) for answer in found]
            if before and (best is None or _clearly_more(accepted, best)):
                best, result.drafter_position = accepted, position
                result.acceptance = {
                    kind: _acceptance([answer.stats for answer, of in zip(found, kinds, strict=True) if of == kind])
                    for kind in prompts
                }
    finally:
        if before:
            _set_position(lm, before)
    return answers


def _set_position(lm: MTPModel, position: str) -> None:
    """Sets the position of the drafter's queries, for the rounds that follow."""
    with lm.models() as (_, drafter):
        assert drafter
        drafter.position = position


def _clearly_more(accepted: Sequence[float], before: Sequence[float]) -> bool:
    """Whether drafts accepted per round, paired by answer, rose by more than two standard errors.

    A smaller rise may be noise of a few short answers; then the first position stays, `load`'s default.
    """
    rise = [new - old for new, old in zip(accepted, before, strict=True)]
    error = stdev(rise) / len(rise) ** 0.5 if len(rise) > 1 else 0.0
    return fmean(rise) > 2 * error


def _acceptance(stats: Sequence[Stats]) -> list[float]:
    """Probability that a draft is accepted if those before it were, by position."""
    drafting = sum(s.rounds - s.draft_lengths.get(0, 0) for s in stats)
    accepted = [
        sum(s.accepted_by_position[j] for s in stats if j < len(s.accepted_by_position)) for j in range(MAX_AUTO_LENGTH)
    ]
    return [after / before if before else 0.0 for before, after in pairwise([drafting, *accepted])]
