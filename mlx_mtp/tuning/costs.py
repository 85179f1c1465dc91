"""Times the parts of a round for a loaded pair: verify passes, draft steps, and prefill.

Times the same functions that the engine runs. Rows hold different texts that the target itself generated, so that a
mixture of experts is asked for realistic experts. Passes are submitted one ahead, as the engine does, so that the
host's work overlaps with the device's in the same way.

Not here: choosing a batch size and a draft length from the times (choose.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from statistics import fmean, median

import mlx.core as mx
import numpy as np

from ..checkpoint.sizes import format_bytes
from ..decode.in_flight import submits_late
from ..decode.prefill import prefill
from ..decode.round import RoundState, draft, verify
from ..decode.sampling import Sampler, SamplingOptions
from ..errors import MemoryBudgetError
from ..kv import BatchKV, KVBuffers, kv_bytes
from ..measuring.spread import Spread
from ..models.drafter import Drafter
from ..models.target import Target
from .experts import recorded_experts

BATCHES = (1, 2, 4, 6, 8)
LENGTHS = tuple(range(1, 10))
CONTEXTS = (256, 2048)

_SWEEPS, _SECONDS = 3, 0.12
"""Sweeps over all points of a batch, and seconds spent on each point in a sweep, unless two laps take longer."""

_ROW_OFFSET = 13
"""Offset in tokens between rows of the same text, if there are more rows than texts: more than the widest block."""

_DRAFTS = 4
"""Draft steps timed together; the time of one is a share of them."""

_PACKED = -1
"""Key, in place of a block width, of a pass over a ragged block."""


@dataclass(frozen=True)
class Step:
    """Times of the parts of a round, for a batch size and a context.

    Attributes:
        context: Committed tokens of each row.
        rows: Rows of the batch.
        verify: By block width, seconds of a verify pass with sampling; width 1 is a plain decoding step.
        draft: Seconds of one step of the drafter; None without one.
        host: Seconds in which the host builds the graph of the widest verify pass, while the device is busy.
        experts: By block width, the mean number of distinct experts that a layer is asked for; empty for dense models.
        packing: Seconds by which a pass over a ragged block exceeds one over equal widths with as many tokens.
    """

    context: int
    rows: int
    verify: dict[int, Spread]
    draft: Spread | None
    host: float
    experts: dict[int, float]
    packing: float = 0.0


@dataclass
class Measurement:
    """The figures measured so far; it grows while measuring, so that an interruption loses nothing.

    Attributes:
        steps: Times of rounds.
        acceptance: By kind of text and position, the probability that a draft is accepted if those before it were.
        drafter_position: The one of `models.drafter.POSITIONS` with the higher acceptance; None without a drafter.
        prefill_tps: Prompt tokens per second of one row, by context length.
        skipped: Points that were left out, with the reason.
        complete: Whether everything was measured that was asked for.
    """

    steps: list[Step] = field(default_factory=list)
    acceptance: dict[str, list[float]] = field(default_factory=dict)
    drafter_position: str | None = None
    prefill_tps: dict[int, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    complete: bool = False


Progress = Callable[[str], None]


def no_progress(_: str) -> None:
    """A `Progress` that reports nothing."""


def points(batches: Sequence[int], contexts: Sequence[int]) -> int:
    """The number of times that `measure` calls its `progress`."""
    return 1 + len(batches) * len(contexts)


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
    progress: Progress = no_progress,
    suppress_tokens: Sequence[int] = (),
) -> None:
    """Measures everything but acceptance: times of prefill and rounds, and the experts that layers are asked for.

    Args:
        target: The target.
        drafter: Its drafter, or None.
        texts: Token ids of texts, repeated to fill the rows; each row begins at another place.
        sampling: The sampling options of every row.
        kv_budget: Bytes that the KV of all rows may take.
        result: Receives each figure as soon as it is measured.
        batches: See `acceptance.measure`.
        lengths: See `acceptance.measure`.
        contexts: See `acceptance.measure`.
        progress: See `acceptance.measure`; not called for acceptance.
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
                    f"batch {rows} at context {context:,}: needs {format_bytes(_needed(target, rows, room))}, "
                    f"and {format_bytes(kv_budget)} are left"
                )
                progress("left out")
        rows_of_text = [_row_of_text(texts, i, room) for i in range(max(fitting, default=0))]
        prefilled = []
        for tokens in rows_of_text:
            started = time.perf_counter()
            prefilled.append(prefill(target, tokens[:context]))
            result.prefill_tps[context] = context / (
                time.perf_counter() - started
            )  # of the last row, when caches are warm
        for rows in fitting:
            sampler = Sampler([sampling] * rows, config.logit_softcap, suppress_tokens, config.vocab_size)
            result.steps.append(_step(target, drafter, sampler, prefilled[:rows], rows_of_text, context, lengths))
            progress(f"batch {rows}, context {context}")
    if not result.steps:
        raise MemoryBudgetError("nothing could be measured: " + "; ".join(result.skipped))


def _row_of_text(texts: Sequence[Sequence[int]], row: int, count: int) -> list[int]:
    """`count` tokens for a row: all texts, repeated; each row begins with another text, or at another place in it."""
    again, first = divmod(row, len(texts))
    tokens = [token for text in (*texts[first:], *texts[:first]) for token in text]
    begin = again * _ROW_OFFSET
    return list(islice(cycle(tokens), begin, begin + count))


def _needed(target: Target, rows: int, positions: int) -> int:
    """Bytes of KV while a batch is measured: its rows, and the prefilled rows that they are copied from."""
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
            # As many tokens as in the even pass: rows alternate between 2 * even - 1 tokens and 1.
            counts = [2 * even - 1, 1] * (rows // 2) + [even] * (rows % 2)
            work[_PACKED] = verifying(2 * even - 1, counts)
    laps: dict[int, list[float]] = {width: [] for width in work}
    host: list[float] = []
    # In sweeps, so that a disturbance can't affect all laps of a point.
    for _ in range(_SWEEPS):
        for width, run in work.items():
            times, building = _time(run, kv)
            laps[width] += times
            host += building if width == widest else []
    verified = {width: Spread.of(laps[width]) for width in lengths}
    drafted = Spread.of([lap / _DRAFTS for lap in laps[0]]) if drafter else None
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
    """Repeats a piece of work without gaps; returns the seconds of each lap, and the host's seconds to build it."""
    mx.eval(run())
    late = submits_late(kv)
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
