"""Measures, on this machine and for a loaded pair, what rounds cost and how often drafts are kept.

The very functions that the engine runs are timed, on the target's own text: rows that hold different texts, whose next
tokens are known, so that a mixture of experts is asked for the experts that it would be asked for. Rounds are handed
over as the engine does it, one ahead, so that the host's work is hidden where it would be hidden.

Measured, not interpreted: which batch and draft length follow from it is for choose.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from statistics import fmean, median
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..checkpoint.sizes import format_bytes
from ..decode.engine import submits_late
from ..decode.prefill import prefill
from ..decode.round import RoundState, draft, verify
from ..decode.sampling import Sampler, SamplingOptions
from ..errors import MemoryBudgetError
from ..kv import BatchKV, KVBuffers, kv_bytes
from ..models.drafter import Drafter
from ..models.target import Target
from .experts import recorded_experts

if TYPE_CHECKING:
    pass

BATCHES = (1, 2, 4, 6, 8)
LENGTHS = tuple(range(1, 10))
CONTEXTS = (256, 2048)

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
                    f"batch {rows} at context {context:,}: needs {format_bytes(_needed(target, rows, room))}, "
                    f"and {format_bytes(kv_budget)} are left"
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
