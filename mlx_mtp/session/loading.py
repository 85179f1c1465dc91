"""Loads a pair of models: checks of arguments and machine, the models, and the scheduler that runs them."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint import sizes
from ..checkpoint.description import DrafterDescription, TargetDescription
from ..checkpoint.load import load_drafter, load_target
from ..checkpoint.pair import suggest_no_draft
from ..checkpoint.progress import ProgressCallback
from ..decode.draft_length import DraftLengthPolicy
from ..decode.limits import is_int
from ..decode.overflow import check_overflow
from ..decode.scheduler import MAX_ROWS, Scheduler
from ..errors import MemoryBudgetError, MTPError
from ..models import self_test
from ..models.drafter import POSITIONS, Drafter
from ..models.target import Target
from ..text.tokenizer import Tokenizer, has_tokenizer

if TYPE_CHECKING:
    from ..profile import Profile

log = logging.getLogger(__name__)


@dataclass
class Loaded:
    """What a session's thread owns.

    Attributes:
        name: The target's folder, for messages.
        target, drafter: The models; `drafter` may be None.
        scheduler: Runs requests on them.
        weights: Bytes of the weights of both.
        cache_bytes: See `api.load`.
    """

    name: str
    target: Target
    drafter: Drafter | None
    scheduler: Scheduler
    weights: int
    cache_bytes: int | None

    def limit_kv(self, most: int) -> int:
        """See `MTPModel.limit_kv`; returns the bytes for rows."""
        budget, cached = sizes.divide_kv(most, self.cache_bytes)
        scheduler = self.scheduler
        if budget < scheduler.needed:
            raise MemoryBudgetError(
                f"requests that run or wait need {sizes.format_bytes(scheduler.needed)} of KV, more than the "
                f"{sizes.format_bytes(budget)} that would be left: try again when they have ended"
            )
        scheduler.capacity.kv_budget, scheduler.cache.limit = budget, cached
        scheduler.cache.make_room(0)
        return budget


def check_arguments(
    target: object, drafter: object, drafter_position: str, cache_bytes: object, idle_unload: object
) -> None:
    """Checks those arguments of `api.load` that nothing else checks.

    Raises:
        MTPError: One of them has the wrong type or value.
    """
    if not isinstance(target, str | Path | None) or not (drafter is False or isinstance(drafter, str | Path | None)):
        raise MTPError("target and drafter must be folders or repository names: strings or paths")
    if drafter_position not in (*POSITIONS, "auto"):
        raise MTPError(f"drafter_position must be auto, {' or '.join(POSITIONS)}, not {drafter_position!r}")
    if cache_bytes is not None and (not is_int(cache_bytes) or cache_bytes < 0):
        raise MTPError(f"cache_bytes must be a whole number of bytes or None, not {cache_bytes!r}")
    if idle_unload is not None and (
        isinstance(idle_unload, bool) or not isinstance(idle_unload, int | float) or not idle_unload > 0
    ):
        raise MTPError(f"idle_unload must be a number of seconds above 0 or None, not {idle_unload!r}")


def load_models(
    description: TargetDescription,
    drafter_description: DrafterDescription | None,
    adapter: Path | None,
    position: str,
    cache_bytes: int | None,
    profile: Profile | None,
    suppress_tokens: tuple[int, ...],
    progress: ProgressCallback | None = None,
) -> Loaded:
    """Loads a pair.

    Args:
        description: The target, as `find_pair` returns it.
        drafter_description: The drafter, or None.
        adapter: Folder of the target's LoRA adapter, or None.
        position: Position of the drafter's queries: "committed" or "bonus".
        cache_bytes: See `api.load`.
        profile: The pair's profile, or None.
        suppress_tokens: Token ids that are never chosen.
        progress: See `api.load`.

    Raises:
        MTPError: See `api.load`.
    """
    target, drafter = load_target(description, adapter, progress), None
    if drafter_description:
        with suggest_no_draft():
            drafter = load_drafter(drafter_description, description.config, position, progress)
    self_test.at_load(target, drafter)
    check_overflow(target, drafter)
    weights = sizes.weight_bytes(target, drafter)
    budget, cached = sizes.kv_budget(weights, cache_bytes)
    scheduler = Scheduler(
        target,
        drafter,
        suppress_tokens,
        max_rows=profile.rows if profile else MAX_ROWS,
        kv_budget=budget,
        cache_bytes=cached,
        policy=DraftLengthPolicy(profile.prices) if profile else None,
    )
    log.debug("loaded %s: %s of weights, %s for KV", description.folder, *map(sizes.format_bytes, (weights, budget)))
    return Loaded(str(description.folder), target, drafter, scheduler, weights, cache_bytes)


def load_tokenizer(folder: Path, stop_tokens: Collection[int]) -> Tokenizer | None:
    """A target's tokenizer, or None if its folder has none; warns about a base model, which can't chat.

    Args:
        folder: The target's.
        stop_tokens: Those of its generation_config.
    """
    if not has_tokenizer(folder):
        return None
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.seems_base(stop_tokens):
        log.warning(
            "%s has no chat template and seems to be a base model, which can't chat: chat_template=False (--raw) "
            "completes text as it is",
            folder,
        )
    return tokenizer
