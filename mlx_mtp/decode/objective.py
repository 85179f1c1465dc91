"""What a setting of batch and draft length is chosen for, and the formula that measured and predicted speeds share."""

from collections.abc import Sequence
from typing import Literal, get_args

Objective = Literal["balanced", "latency", "throughput"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)
"""balanced: most tokens a second in all while a row keeps its share (`BALANCED_SHARE`) of what plain decoding
gives it alone. latency: the fastest single row. throughput: most tokens a second in all."""

BALANCED_SHARE = 0.5
"""Least share of the speed of plain decoding at batch 1 that every row keeps in the balanced choice."""


def tokens_per_round(acceptance: Sequence[float]) -> float:
    """Tokens that a round yields for a row: 1 + sum over j of the product of the first j acceptances.

    Args:
        acceptance: Chance that a draft is accepted if those before it were, one for each draft.
    """
    total = reached = 1.0
    for chance in acceptance:
        reached *= chance
        total += reached
    return total
