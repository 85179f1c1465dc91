"""Loads a pair into the thread that is to own it: models, checks of the machine, and the scheduler over them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint import sizes
from ..checkpoint.description import DrafterDescription, TargetDescription
from ..checkpoint.load import load_drafter, load_target
from ..checkpoint.pair import suggest_no_draft
from ..decode.draft_length import DraftLengthPolicy
from ..decode.overflow import check_overflow
from ..decode.scheduler import MAX_ROWS, Scheduler
from ..models import self_test
from ..models.drafter import Drafter
from ..models.target import Target

if TYPE_CHECKING:
    from ..profile import Profile


@dataclass
class Loaded:
    """What the thread of a session owns.

    Attributes:
        target, drafter: The models; no drafter is None.
        scheduler: What runs requests on them.
        weights: Bytes of both.
        kv_budget: Bytes that all rows together may take for KV.
    """

    target: Target
    drafter: Drafter | None
    scheduler: Scheduler
    weights: int
    kv_budget: int


def load_models(
    description: TargetDescription,
    drafter_description: DrafterDescription | None,
    adapter: Path | None,
    position: str,
    cache_bytes: int | None,
    profile: Profile | None,
    suppress_tokens: tuple[int, ...],
) -> Loaded:
    """Loads a pair; arguments and errors are those of `api.load`, and the token ids that are never chosen."""
    target, drafter = load_target(description, adapter), None
    if drafter_description:
        with suggest_no_draft():
            drafter = load_drafter(drafter_description, description.config, position)
    self_test.at_load(target, drafter)
    check_overflow(target, drafter)
    weights = sizes.weight_bytes(target, drafter)
    budget, kept = sizes.kv_budget(weights, cache_bytes)
    scheduler = Scheduler(
        target,
        drafter,
        suppress_tokens,
        max_rows=profile.rows if profile else MAX_ROWS,
        kv_budget=budget,
        cache_bytes=kept,
        policy=DraftLengthPolicy(profile.prices) if profile else None,
    )
    return Loaded(target, drafter, scheduler, weights, budget)
