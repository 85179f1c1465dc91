"""Chooses a batch size and a draft length from a measurement.

    tokens of a row per round       A(K) = 1 + a1 + a1 a2 + ... (K products), a_i: probability that draft i is accepted
                                    if those before it were; the 1 is the bonus token
    seconds of a round              T(B, K) = T_verify(B, K + 1) + K T_draft(B)
    tokens per second, all rows     B A(K) / T(B, K)

Pure functions. K = 0, plain decoding, is always an option, so nothing slower than it is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

import numpy as np

from ..decode.limits import MAX_AUTO_LENGTH
from ..decode.objective import BALANCED_SHARE, tokens_per_round
from ..decode.round_cost import Prices
from ..errors import MTPError
from .costs import Measurement, Step

_ANOMALY = 1.3
"""Ratio of a block's time to that of a wider block, and of its slowest lap to its fastest, that shows a disturbance."""


@dataclass(frozen=True)
class Option:
    """A batch size and a draft length.

    Attributes:
        rows: Rows that decode together.
        drafts: Tokens drafted in a round; 0 is plain decoding.
        total_tps: Expected tokens per second of all rows.
    """

    rows: int
    drafts: int
    total_tps: float

    @property
    def row_tps(self) -> float:
        """Expected tokens per second of a row."""
        return self.total_tps / self.rows


@dataclass(frozen=True)
class Choice:
    """The option chosen for an objective.

    Attributes:
        objective: One of `decode.objective.OBJECTIVES`.
        option: The choice.
        why: The reason, in one sentence.
    """

    objective: str
    option: Option
    why: str


def prices(steps: Sequence[Step], rows: int) -> Prices:
    """Times of a batch's rounds, averaged over the contexts at which it was measured.

    Args:
        steps: All measured steps.
        rows: The batch size; without a step of it, the times are empty.
    """
    own = [step for step in steps if step.rows == rows]
    widths = set.intersection(*(set(step.verify) for step in own)) if own else set()
    drafts = [step.draft.median for step in own if step.draft]
    drafted = len(drafts) == len(own)
    return Prices(
        {
            width: fmean(step.verify[width].median for step in own)
            for width in sorted(widths)
            if width == 1 or (width - 1 <= MAX_AUTO_LENGTH and drafted)
        },
        fmean(drafts) if drafted and drafts else 0.0,
        fmean(step.packing for step in own) if own else 0.0,
    )


def timing_anomaly(steps: Sequence[Step]) -> str | None:
    """A sentence about a block that took much longer than a wider one, which makes the times doubtful; None if none.

    Blocks that are slower in every lap don't count: MLX has other kernels for wider blocks, some of them much faster.
    """
    worst, why = _ANOMALY, None
    for step in steps:
        for narrow, wide in combinations(sorted(step.verify), 2):
            own = step.verify[narrow]
            ratio = own.median / step.verify[wide].median
            if ratio > worst and own.high > _ANOMALY * own.low:
                worst = ratio
                why = (
                    f"at batch {step.rows} and context {step.context:,} a block of {narrow} took {ratio:.1f} times as "
                    f"long as one of {wide}"
                )
    return why


def comparable_steps(measurement: Measurement) -> list[Step]:
    """The steps by which batches can be compared.

    All steps of a complete measurement. Of an interrupted one, those of the contexts at which most batches were
    measured: with a further context, some batches would be averaged over longer contexts than others.
    """
    measured: dict[int, set[int]] = {}
    for step in measurement.steps:
        measured.setdefault(step.context, set()).add(step.rows)
    most = max(map(len, measured.values()), default=0)
    return [step for step in measurement.steps if measurement.complete or len(measured[step.context]) == most]


def options(measurement: Measurement) -> list[Option]:
    """The options of all batches that were measured at every comparable context, see `comparable_steps`."""
    steps = comparable_steps(measurement)
    contexts = {step.context for step in steps}
    batches = [
        rows
        for rows in sorted({step.rows for step in steps})
        if {step.context for step in steps if step.rows == rows} == contexts
    ]
    return [
        Option(rows, drafts, rows * _tokens(measurement, drafts) / seconds)
        for rows in batches
        for drafts, seconds in prices(steps, rows).even().items()
    ]


def choose(found: Sequence[Option], objective: str) -> Choice:
    """The best option for an objective.

    Args:
        found: From `options`.
        objective: One of `decode.objective.OBJECTIVES`.

    Raises:
        MTPError: There are no options.
    """
    if not found:
        raise MTPError("no batch was measured completely: there is nothing to choose from")
    fewest = min(option.rows for option in found)
    plain = {option.rows: option for option in found if option.drafts == 0}
    alone = plain[fewest].row_tps
    candidates = [
        option
        for option in found
        if (objective != "latency" or option.rows == fewest)
        and (objective != "balanced" or option.row_tps >= BALANCED_SHARE * alone)
    ]
    best = max(candidates, key=lambda option: (option.total_tps, -option.drafts))
    gain = best.total_tps / plain[best.rows].total_tps
    drafting = f"draft {best.drafts}" if best.drafts else "don't draft"
    pays = (
        f"drafting makes that batch {gain:.2f} times as fast"
        if best.drafts
        else "no draft length is faster than plain decoding"
        if any(option.drafts for option in found)
        else "there is no drafter"
    )
    base = "plain decoding alone" if fewest == 1 else f"plain decoding at batch {fewest}"
    reason = {
        "latency": f"the fastest for {'a single row' if fewest == 1 else f'{fewest} rows'}",
        "throughput": "the most tokens a second in all",
        "balanced": f"the most in all while a row keeps {BALANCED_SHARE:.0%} of {base}",
    }[objective]
    why = (
        f"batch {best.rows}, {drafting}: {best.total_tps:.1f} tok/s in all, {best.row_tps:.1f} a row "
        f"({best.row_tps / alone:.0%} of {base}); {reason}, and {pays}."
    )
    return Choice(objective, best, why)


def _tokens(measurement: Measurement, drafts: int) -> float:
    """Tokens that a round yields for a row, bonus token included; the mean over the kinds of text."""
    if not drafts:
        return 1.0
    return fmean(tokens_per_round(chances[:drafts]) for chances in measurement.acceptance.values())


@dataclass(frozen=True)
class Split:
    """Verify time = fixed + tokens x dense + distinct experts x expert, fitted by least squares.

    Attributes:
        context: Committed tokens of each row in the measured passes.
        fixed: Seconds of any pass: reading the dense weights, launching kernels.
        dense: Seconds per token, counting the tokens of all rows.
        expert: Seconds per distinct expert that a layer reads; 0 for a dense model.
        residual: Mean relative deviation of the measured passes from the formula.
    """

    context: int
    fixed: float
    dense: float
    expert: float
    residual: float


def split(steps: Sequence[Step]) -> Split | None:
    """Fits a `Split` to the passes at the shortest context; None if there are fewer than six."""
    context = min((step.context for step in steps), default=0)
    passes = [
        (1.0, float(step.rows * width), step.experts.get(width, 0.0), seconds.median)
        for step in steps
        if step.context == context
        for width, seconds in step.verify.items()
    ]
    if len(passes) < 6:
        return None
    table = np.array(passes)
    features, seconds = table[:, :3] / table[:, 3:], np.ones(len(table))  # relative errors
    best: tuple[dict[int, float], float] | None = None
    # No part can take negative time: take the best fit of those sets of parts for which none does.
    for count in (3, 2, 1):
        for parts in combinations(range(3 if features[:, 2].any() else 2), min(count, 3)):
            found = np.linalg.lstsq(features[:, parts], seconds, rcond=None)[0]
            deviation = float(np.abs(features[:, parts] @ found - 1).mean())
            if (found >= 0).all() and (best is None or deviation < best[1]):
                best = dict(zip(parts, found.tolist(), strict=True)), deviation
    assert best  # the fit of one part alone is never negative
    fixed, dense, expert = (best[0].get(part, 0.0) for part in range(3))
    return Split(context, fixed, dense, expert, best[1])
