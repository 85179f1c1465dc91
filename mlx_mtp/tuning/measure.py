"""Measures, on this machine and for a loaded pair, what rounds cost and how often drafts are kept.

The very functions that the engine runs are timed, on the target's own text: rows that hold different texts, whose next
tokens are known, so that a mixture of experts is asked for the experts that it would be asked for. Rounds are handed
over as the engine does it, one ahead, so that the host's work is hidden where it would be hidden.

Measured, not interpreted: which batch and draft length follow from it is for choose.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..checkpoint.sizes import in_words
from ..decode.engine import hands_over_late
from ..decode.limits import MAX_AUTO_LENGTH
from ..decode.prefill import prefill
from ..decode.request import check_prompt
from ..decode.round import RoundState, draft, verify
from ..decode.sampling import Sampler, SamplingOptions
from ..errors import MemoryBudgetError, PromptError
from ..kv import BatchKV, KVBuffers, kv_bytes
from ..models.drafter import POSITIONS, Drafter
from ..models.target import Target
from .experts import recorded_experts

if TYPE_CHECKING:
    from ..api import MTPModel

BATCHES = (1, 2, 4, 6, 8)
LENGTHS = tuple(range(1, 10))
CONTEXTS = (256, 2048)

PROMPTS: dict[str, tuple[str, ...]] = {
    "chat": (
        "What is speculative decoding?",
        "What is the capital of France, and what is it known for?",
        "How many minutes are 3 hours?",
    ),
    "code": (
        "Write a Python function that reverses a string.",
        "Write a Python function that counts the words of a text.",
        "Write a Python function that adds two numbers.",
    ),
    "JSON": (
        "Give me a JSON record for a book.",
        "Write a JSON object that describes a city.",
        "Give me the JSON for a person named Anna.",
    ),
    "prose": (
        "Tell me a short story about a fox.",
        "Describe a walk along a river in autumn.",
        "Tell me about the history of the bicycle.",
    ),
}
"""What acceptance is measured on, by kind of text."""

ANSWER_TOKENS = 96
"""Most tokens of an answer when acceptance is measured."""

_SWEEPS, _SECONDS = 3, 0.12
"""How often all points of a batch are gone through, and the time spent on each then, unless two laps take longer."""

_APART = 13
"""Tokens between rows of one text, where there are more rows than texts: no block reads what another one reads."""

_DRAFTS = 4
"""Drafts of which the time of one is taken."""

_PACKED = -1
"""Stands among block widths for a pass over rows of different ones."""


@dataclass(frozen=True)
class Seconds:
    """A time, measured several times.

    Attributes:
        median: Seconds.
        low, high: The lowest and the highest.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, laps: Sequence[float]) -> Seconds:
        """From single times."""
        return cls(median(laps), min(laps), max(laps))


@dataclass(frozen=True)
class Step:
    """What some rows cost at a context length.

    Attributes:
        context: Committed tokens of each row.
        rows: Rows of the batch.
        verify: By block width, a pass of the target that ends in chosen tokens; 1 is a plain decoding step.
        draft: One step of the drafter, or None without one.
        host: Building the graph of a verify pass of the widest block, which goes on while another one runs.
        experts: By block width, the mean number of distinct experts that a layer is asked for; empty if dense.
        packing: Seconds that a pass takes more if the rows have different widths and as many tokens in all.
    """

    context: int
    rows: int
    verify: dict[int, Seconds]
    draft: Seconds | None
    host: float
    experts: dict[int, float]
    packing: float = 0.0


@dataclass
class Measurement:
    """All that was measured; it grows meanwhile, so that an interruption loses nothing.

    Attributes:
        steps: What rounds cost.
        acceptance: By kind of text and position, the chance that a draft is kept if those before it were.
        drafter_position: Of `models.drafter.POSITIONS`, the one with which more drafts are kept; None without drafter.
        prefill_tps: Prompt tokens per second of one row, by context length.
        skipped: What was left out, and why.
        complete: Whether all that was asked for is there.
    """

    steps: list[Step] = field(default_factory=list)
    acceptance: dict[str, list[float]] = field(default_factory=dict)
    drafter_position: str | None = None
    prefill_tps: dict[int, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    complete: bool = False


Progress = Callable[[str], None]


def points(batches: Sequence[int], contexts: Sequence[int]) -> int:
    """How often `measure` calls its `progress`."""
    return 1 + len(batches) * len(contexts)


def measure(
    lm: MTPModel,
    result: Measurement,
    batches: Sequence[int] = BATCHES,
    lengths: Sequence[int] = LENGTHS,
    contexts: Sequence[int] = CONTEXTS,
    prompts: Mapping[str, Sequence[Any]] = PROMPTS,
    progress: Progress = lambda done: None,
) -> None:
    """Measures a pair.

    Args:
        lm: The pair, with or without a drafter.
        result: Takes what is measured, at once.
        batches: Numbers of rows.
        lengths: Widths of verify blocks; with a drafter they begin at 1 and have no gaps.
        contexts: Committed tokens of each row. Those that the model has no room for are left out.
        prompts: By kind of text, prompts as `MTPModel.generate` takes them.
        progress: Called for each of `points` with what it was.

    Raises:
        PromptError: A prompt can't be used.
        MemoryBudgetError: Not even one row fits in memory.
    """
    texts = _answers(lm, result, prompts)
    progress("acceptance")
    # Sampling from a large vocabulary takes its time too, and what most requests do is what the model says.
    defaults = lm.defaults
    sampling = SamplingOptions(defaults.temperature, defaults.top_k, defaults.top_p, defaults.min_p)
    with lm.models() as (target, drafter):
        measure_costs(
            target, drafter, texts, sampling, lm.kv_budget, result, batches, lengths, contexts, progress,
            defaults.suppress_tokens,
        )  # fmt: skip
    result.complete = True


def measure_costs(
    target: Target,
    drafter: Drafter | None,
    texts: Sequence[Sequence[int]],
    sampling: SamplingOptions,
    kv_budget: int,
    result: Measurement,
    batches: Sequence[int] = BATCHES,
    lengths: Sequence[int] = LENGTHS,
    contexts: Sequence[int] = CONTEXTS,
    progress: Progress = lambda done: None,
    suppress_tokens: Sequence[int] = (),
) -> None:
    """Measures what prefill and rounds cost, and what a mixture of experts is asked for: all but acceptance.

    Args:
        target: The target.
        drafter: Its drafter, or None.
        texts: Token ids that rows consist of, over and over; each row begins at another place.
        sampling: How every row chooses tokens.
        kv_budget: Bytes that the KV of all rows may take.
        result: Takes what is measured, at once.
        batches: As for `measure`, and so are the next three.
        lengths: See there.
        contexts: See there.
        progress: See there; not called for acceptance.
        suppress_tokens: Token ids that are never chosen.

    Raises:
        MemoryBudgetError: Not even one row fits in memory.
    """
    config = target.config
    for context in contexts:
        room = context + max(lengths)
        if room > config.max_positions:
            result.skipped.append(f"context {context:,}: the model's own is {config.max_positions:,} tokens")
            for _ in batches:
                progress("left out")
            continue
        fitting = [b for b in batches if _needed(target, b, room) <= kv_budget]
        for rows in batches:
            if rows not in fitting:
                result.skipped.append(
                    f"batch {rows} at context {context:,}: needs {in_words(_needed(target, rows, room))}, "
                    f"and {in_words(kv_budget)} are left"
                )
                progress("left out")
        rows_of_text = [_row_of_text(texts, i, room) for i in range(max(fitting, default=0))]
        prefilled = []
        for tokens in rows_of_text:
            started = time.perf_counter()
            prefilled.append(prefill(target, tokens[:context]))
            result.prefill_tps[context] = context / (time.perf_counter() - started)  # the last one is warm
        for rows in fitting:
            sampler = Sampler([sampling] * rows, config.logit_softcap, suppress_tokens, config.vocab_size)
            result.steps.append(_step(target, drafter, sampler, prefilled[:rows], rows_of_text, context, lengths))
            progress(f"batch {rows}, context {context}")
    if not result.steps:
        raise MemoryBudgetError("nothing could be measured: " + "; ".join(result.skipped))


def _answers(lm: MTPModel, result: Measurement, prompts: Mapping[str, Sequence[Any]]) -> list[list[int]]:
    """Lets the model answer, notes how many drafts were kept, and returns prompts and answers."""
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
            kept = [answer.stats.accepted / max(1, answer.stats.rounds) for answer in found]
            if before and (best is None or _clearly_more(kept, best)):
                best, result.drafter_position = kept, position
                result.acceptance = {
                    kind: _acceptance([answer.stats for answer, of in zip(found, kinds, strict=True) if of == kind])
                    for kind in prompts
                }
    finally:
        if before:
            _set_position(lm, before)
    return answers


def _set_position(lm: MTPModel, position: str) -> None:
    """Has the drafter's queries sit somewhere else from the next round on."""
    with lm.models() as (_, drafter):
        assert drafter
        drafter.position = position


def _clearly_more(kept: Sequence[float], before: Sequence[float]) -> bool:
    """Whether drafts kept per round, answer by answer, rose by more than two standard errors.

    The first position is what load takes without a profile, and a few short answers scatter: so it stays otherwise.
    """
    rise = [new - old for new, old in zip(kept, before, strict=True)]
    error = stdev(rise) / len(rise) ** 0.5 if len(rise) > 1 else 0.0
    return fmean(rise) > 2 * error


def _acceptance(stats: Sequence[Any]) -> list[float]:
    """Chance that a draft is kept if those before it were, by position."""
    reached = [sum(s.rounds - s.draft_lengths.get(0, 0) for s in stats)]
    for j in range(MAX_AUTO_LENGTH):
        reached.append(sum(s.accepted_by_position[j] for s in stats if j < len(s.accepted_by_position)))
    return [after / before if before else 0.0 for before, after in zip(reached, reached[1:], strict=False)]


def _row_of_text(texts: Sequence[Sequence[int]], row: int, count: int) -> list[int]:
    """Tokens for a row: all texts over and over, each row beginning with another one, or at another place."""
    again, first = divmod(row, len(texts))
    tokens = [token for text in (*texts[first:], *texts[:first]) for token in text]
    begin = again * _APART
    return list(islice(cycle(tokens), begin, begin + count))


def _needed(target: Target, rows: int, positions: int) -> int:
    """Bytes of KV while a batch is measured: its rows, and the prefilled ones they are copied from."""
    return 2 * rows * kv_bytes(target.config, positions, target.dtype.size)


def _step(
    target: Target,
    drafter: Drafter | None,
    sampler: Sampler,
    prefilled: Sequence[tuple[KVBuffers, mx.array]],
    texts: Sequence[Sequence[int]],
    context: int,
    lengths: Sequence[int],
) -> Step:
    rows, widest = len(prefilled), max(lengths)
    kv = BatchKV.of([own for own, _ in prefilled], context + widest)
    committed = mx.full((rows,), context, dtype=mx.int32)
    block = mx.array([text[context : context + widest] for text in texts[:rows]], dtype=mx.int32)
    state = RoundState(committed, block[:, 0], mx.concatenate([hidden for _, hidden in prefilled]))

    def verifying(width: int, counts: Sequence[int] | None = None) -> Callable[[], mx.array]:
        # The committed length never advances: every pass writes the same slots.
        return lambda: verify(target, kv, sampler, committed, block[:, :width], counts=counts)[0]

    work = {width: verifying(width) for width in lengths}
    if drafter is not None:
        work[0] = lambda: draft(target, drafter, kv, sampler, state, _DRAFTS)
        if rows > 1 and (even := (widest + 1) // 2) > 1 and even in work:
            # As many tokens as in an even pass: every other row has all drafts that the ones between leave out.
            counts = [2 * even - 1, 1] * (rows // 2) + [even] * (rows % 2)
            work[_PACKED] = verifying(2 * even - 1, counts)
    laps: dict[int, list[float]] = {width: [] for width in work}
    host: list[float] = []
    # In sweeps, so that a moment in which the machine does something else can't fall on all laps of a point.
    for _ in range(_SWEEPS):
        for width, run in work.items():
            times, building = _time(run, kv)
            laps[width] += times
            host += building if width == widest else []
    verified = {width: Seconds.of(laps[width]) for width in lengths}
    drafted = Seconds.of([lap / _DRAFTS for lap in laps[0]]) if drafter else None
    experts = {}
    if target.config.num_experts:
        with recorded_experts(target) as asked:
            for width in lengths:
                asked.clear()
                mx.eval(verifying(width)())
                experts[width] = fmean(np.unique(np.array(layer)).size for layer in asked)
    packing = max(0.0, median(laps[_PACKED]) - verified[even].median) if _PACKED in work else 0.0
    return Step(context, rows, verified, drafted, median(host), experts, packing)


def _time(run: Callable[[], mx.array], kv: BatchKV) -> tuple[list[float], list[float]]:
    """Seconds of a piece of work, done over and over without a gap, and those that building it took the host."""
    mx.eval(run())
    late = hands_over_late(kv)
    laps: list[float] = []
    hosts: list[float] = []
    pending = run()
    mx.async_eval(pending)
    begun = last = time.perf_counter()
    # The first lap is part of the warm-up.
    while len(laps) < 3 or (time.perf_counter() - begun < _SECONDS and len(laps) < 20):
        started = time.perf_counter()
        following = run()
        hosts.append(time.perf_counter() - started)
        if not late:
            mx.async_eval(following)
        mx.eval(pending)
        if late:
            mx.async_eval(following)
        pending, now = following, time.perf_counter()
        laps.append(now - last)
        last = now
    mx.eval(pending)
    return laps[1:], hosts
