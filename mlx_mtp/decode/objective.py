"""Objectives for choosing batch size and draft length, and the formula for tokens per round."""

from collections.abc import Sequence
from typing import Literal, get_args

Objective = Literal["balanced", "latency", "throughput"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)
"""latency: the fastest single row. throughput: most tokens per second of the whole batch. balanced: the same, as long
as each row has at least `BALANCED_SHARE` of the speed of plain decoding at batch 1."""

BALANCED_SHARE = 0.5
"""Least speed of a row under "balanced", as a share of plain decoding at batch 1."""


def tokens_per_round(acceptance: Sequence[float]) -> float:
    """Expected tokens of a row in a round: 1 + sum over j of the product of the first j acceptance rates.

    Args:
        acceptance: For each draft of a round, the probability that it is accepted if all before it were.

    Returns:
        Accepted drafts and the bonus token: at least 1.
    """
    total = reached = 1.0
    for chance in acceptance:
        reached *= chance
        total += reached
    return total
