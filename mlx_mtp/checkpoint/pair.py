"""Finds a pair: a target, and the drafter that was given or that belongs to it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from ..config import check_pair
from ..errors import MTPError
from ..files import listed
from . import candidates, drafter_precision, hub
from .description import AnyDescription, DrafterDescription, TargetDescription, check_dtype, read_drafter, read_target
from .load import open_drafter
from .progress import ProgressCallback
from .quantization import Format
from .safetensors_files import weight_files

log = logging.getLogger(__name__)

DEMO = Path(__file__).parents[1] / "demo"
"""The embedded demo pair: folders `target` and `drafter`."""

Check = Callable[[AnyDescription], None]
"""Raises an MTPError if a model can't be used; called before its weights are downloaded."""


def _no_check(_: AnyDescription) -> None:
    """Accepts every model."""


def find_pair(
    target: str | Path | None,
    drafter: str | Path | Literal[False] | None,
    quantize: int | None = None,
    dtype: str | None = None,
    quantize_drafter: int | str | None = None,
    weights: bool = True,
    check: Check = _no_check,
    progress: ProgressCallback | None = None,
) -> tuple[TargetDescription, DrafterDescription | None]:
    """Finds a target and its drafter.

    If no drafter is given, the first candidate that can be loaded is taken. If there is none, a warning says why.

    Args:
        target: As for `api.load`.
        drafter: As for `api.load`.
        quantize: As for `api.load`.
        dtype: As for `api.load`.
        quantize_drafter: As for `api.load`.
        weights: Whether to download a repository's weights, or only the files that describe the model.
        check: Called with the description of each model before its weights are downloaded, and of each candidate.
        progress: Receives reports of downloads.

    Returns:
        The descriptions of target and drafter as they are to be loaded; both have the same folder if the drafter is
        merged into the target.

    Raises:
        CheckpointError: The target or the given drafter can't be found or can't be used, or an option is wrong.
        MTPError: From `check`.
    """
    check_dtype(dtype)
    common = Format(quantize) if quantize else None
    drafter_precision.check(quantize_drafter)
    if target is None:
        target, drafter = DEMO / "target", DEMO / "drafter" if drafter is None else drafter
    place = hub.find(target)
    described = read_target(place.folder, common, dtype)
    _check_and_fetch(place, described, weights, check, progress)
    if drafter is False:
        return described, None
    if drafter is not None:
        with suggest_no_draft():
            place = hub.find(drafter)
            own = drafter_precision.for_target(read_drafter(place.folder, dtype=dtype), described, quantize_drafter)
            _check_and_fetch(place, own, weights, check, progress)
            return described, own

    def usable(candidate: str | Path) -> DrafterDescription:
        """Describes a candidate as it is stored; raises an error if it can't be loaded."""
        place = hub.find(candidate)
        found = read_drafter(place.folder, dtype=dtype)
        check_pair(described.config, found.config)
        check(found if found.stored else drafter_precision.for_target(found, described, quantize_drafter))
        if weights:
            place.fetch_weights(progress)
        if weights or _is_complete(found.folder):
            open_drafter(found, described.config)
        return found

    found = _first_usable(target, usable, described.folder if described.holds_drafter else None)
    if found is None:
        return described, None
    with suggest_no_draft():
        return described, drafter_precision.for_target(found, described, quantize_drafter)


def _check_and_fetch(
    place: hub.Place, described: AnyDescription, weights: bool, check: Check, progress: ProgressCallback | None
) -> None:
    """Checks a model and downloads its weights, if it is in a repository and weights are wanted."""
    if weights and place.repository:
        check(described)
        place.fetch_weights(progress)


def _is_complete(folder: Path) -> bool:
    """Whether all of a folder's weight files are there."""
    return bool(listed(folder, "*.safetensors")) and all(path.is_file() for path in weight_files(folder))


def _first_usable(
    target: str | Path, usable: Callable[[str | Path], DrafterDescription], merged: Path | None
) -> DrafterDescription | None:
    """The first usable drafter of a target; None, with a warning that says why, if there is none.

    A drafter merged into the target comes first, then those with the name of a drafter of this target. For a repository
    they are looked for on the hub; for a folder next to it and in the hub's cache, without a download. Last comes any
    other drafter next to the target's folder.

    Args:
        target: Folder or repository.
        usable: Describes a candidate; raises an error if it can't be used.
        merged: Folder of the target, if a drafter is merged into it.
    """
    failures: dict[str, str] = {}

    def first(named: Iterable[str | Path]) -> DrafterDescription | None:
        for candidate in named:
            try:
                return usable(candidate)
            except (MTPError, OSError) as error:
                failures[str(candidate)] = str(error)
        return None

    path = Path(target).expanduser()
    local = path.is_dir()
    if merged and (found := first([merged])):
        return found
    if found := first(candidates.on_this_machine(path) if local else candidates.drafter_names(str(target))):
        return found
    if local and (fitting := list(_all_usable(candidates.neighbours(path), usable))):
        if len(fitting) > 1:
            name = fitting[0].folder.name
            log.info("%d drafters next to %s fit it: taking %s", len(fitting), path, name)
        return fitting[0]
    if failures:
        log.warning(
            "no drafter can be used, decoding without one: tried %s; %s; choose another with --drafter (drafter=)",
            ", ".join(failures), next(iter(failures.values())),
        )  # fmt: skip
    else:
        log.warning(
            "no drafter found for %s, decoding without one: looked next to it for any that fits, and in the hub's "
            "cache for %s; choose one with --drafter (drafter=)", path, ", ".join(candidates.folder_names(path)),
        )  # fmt: skip
    return None


def _all_usable(
    folders: Iterable[Path], usable: Callable[[str | Path], DrafterDescription]
) -> Iterator[DrafterDescription]:
    for folder in folders:
        with suppress(MTPError, OSError):
            yield usable(folder)


@contextmanager
def suggest_no_draft() -> Iterator[None]:
    """Adds to the errors of a drafter that the user can also decode without one."""
    try:
        yield
    except MTPError as error:
        raise type(error)(f"{error}; or decode without a drafter: --no-draft (drafter=False)") from error
