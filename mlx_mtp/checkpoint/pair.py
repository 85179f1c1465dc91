"""Which pair is meant: a target, and the drafter that was named for it or is found beside it."""

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
from .quantization import Format
from .safetensors_files import weight_files

log = logging.getLogger(__name__)

DEMO = Path(__file__).parents[1] / "demo"
"""The embedded demo pair: folders `target` and `drafter`."""

Check = Callable[[AnyDescription], object]
"""Raises what speaks against a model, before its weights are downloaded."""


def find_pair(
    target: str | Path | None,
    drafter: str | Path | Literal[False] | None,
    quantize: int | None = None,
    dtype: str | None = None,
    quantize_drafter: int | str | None = None,
    weights: bool = True,
    check: Check = lambda described: None,
) -> tuple[TargetDescription, DrafterDescription | None]:
    """A target and its drafter, as `load` takes them; both lie in one folder if one is merged into the other.

    A drafter that wasn't asked for is one that can be loaded, or there is none and one line is logged that says why.

    Args:
        target, drafter, quantize, dtype, quantize_drafter: As for `load`.
        weights: Whether a repository's weights are wanted, or only what describes them.
        check: Asked about every model before its weights are downloaded, and about drafters that are only found.

    Raises:
        CheckpointError: The target, or the drafter that was asked for, can't be had or can't be used, or an option is
            wrong.
        MTPError: What `check` raises.
    """
    check_dtype(dtype)
    common = Format(quantize) if quantize else None
    drafter_precision.check(quantize_drafter)
    if target is None:
        target, drafter = DEMO / "target", DEMO / "drafter" if drafter is None else drafter
    place = hub.find(target)
    described = read_target(place.folder, common, dtype)
    _complete(place, described, weights, check)
    if drafter is False:
        return described, None
    if drafter is not None:
        with way_out():
            place = hub.find(drafter)
            own = drafter_precision.beside(read_drafter(place.folder, dtype=dtype), described, quantize_drafter)
            _complete(place, own, weights, check)
            return described, own

    def usable(candidate: str | Path) -> DrafterDescription:
        """A drafter as it is stored, if it can be loaded."""
        place = hub.find(candidate)
        found = read_drafter(place.folder, dtype=dtype)
        check_pair(described.config, found.config)
        check(found if found.stored else drafter_precision.beside(found, described, quantize_drafter))
        if weights:
            place.fetch_weights()
        if weights or _is_complete(found.folder):
            open_drafter(found, described.config)
        return found

    found = _first_usable(target, usable, described.folder if described.holds_drafter else None)
    if found is None:
        return described, None
    with way_out():
        return described, drafter_precision.beside(found, described, quantize_drafter)


def _complete(place: hub.Place, described: AnyDescription, weights: bool, check: Check) -> None:
    """Downloads what is wanted of a repository, unless something speaks against it."""
    if weights and place.repository:
        check(described)
        place.fetch_weights()


def _is_complete(folder: Path) -> bool:
    """Whether all weights of a folder are there, which needn't be before they are wanted."""
    return bool(listed(folder, "*.safetensors")) and all(path.is_file() for path in weight_files(folder))


def _first_usable(
    target: str | Path, usable: Callable[[str | Path], DrafterDescription], merged: Path | None
) -> DrafterDescription | None:
    """The drafter that belongs to a target: the first one that is usable; None, with a warning that says why, for none.

    One that is merged into the target comes first, then those with a name that a drafter of this target has. A
    repository's are looked for on the hub; a folder's beside it and in the hub's cache, and nothing is downloaded.
    Whatever the names, any other drafter beside a folder is better than none.

    Args:
        target: Folder or repository.
        usable: Describes a drafter; raises what speaks against it.
        merged: Folder of the target, if it holds a drafter.
    """
    why: dict[str, str] = {}

    def first(named: Iterable[str | Path]) -> DrafterDescription | None:
        for candidate in named:
            try:
                return usable(candidate)
            except (MTPError, OSError) as error:
                why[str(candidate)] = str(error)
        return None

    path = Path(target).expanduser()
    local = path.is_dir()
    if merged and (found := first([merged])):
        return found
    if found := first(candidates.named(path) if local else candidates.drafter_names(str(target))):
        return found
    if local and (fitting := list(_all_usable(candidates.beside(path), usable))):
        if len(fitting) > 1:
            name = fitting[0].folder.name
            log.info("%d drafters beside %s fit it: taking %s", len(fitting), path, name)
        return fitting[0]
    if why:
        reason = next(iter(why.values()))
        log.warning(
            "no drafter, going on without one: tried %s; %s; --drafter (drafter=) names another", ", ".join(why), reason
        )
    else:
        log.warning(
            "%s has no drafter beside it, going on without one: looked there and in the hub's cache for %s, and there "
            "for any that fits; --drafter (drafter=) names one", path, ", ".join(candidates.names_beside(path)),
        )  # fmt: skip
    return None


def _all_usable(
    folders: Iterable[Path], usable: Callable[[str | Path], DrafterDescription]
) -> Iterator[DrafterDescription]:
    for folder in folders:
        with suppress(MTPError, OSError):
            yield usable(folder)


@contextmanager
def way_out() -> Iterator[None]:
    """Adds to what speaks against a drafter that was asked for how to do without it."""
    try:
        yield
    except MTPError as error:
        raise type(error)(f"{error}; --no-draft (drafter=False) goes without a drafter") from error
