"""Where a checkpoint lies, a folder or the local copy of a hub repository, and where the drafter that belongs to it.

Of a repository only what is used is downloaded: what describes the model first, then those safetensors files that hold
a tensor of the text model. How: download.py.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ..errors import CheckpointError, MTPError
from ..paths import published_name
from . import download
from .safetensors_files import INDEX, weight_files

log = logging.getLogger(__name__)

_FORMAT = re.compile(r"(.+?)-((?:OptiQ-)?\d+bit|bf16|fp16|mxfp4|mxfp8|nvfp4)")
_SIZES = {size.lower(): size for size in ("E2B", "E4B", "12B", "26B-A4B", "31B")}
_SIZE = re.compile(rf"(?:^|/)gemma-4-({'|'.join(_SIZES)})-it(?![a-z])", re.IGNORECASE)


Check = Callable[[Path], object]
"""Told the folder that has what describes a model; raises what speaks against downloading its weights."""

Usable = Callable[[Path, bool], object]
"""Told a drafter's folder, and whether its weights should be there too; raises what speaks against the drafter."""


def find(name: str | Path, weights: bool = True, check: Check = lambda folder: None) -> Path:
    """The folder of a checkpoint: `name` itself, or the local copy of the hub repository of that name.

    Args:
        name: Folder or repository.
        weights: Whether a repository's weights are wanted, or only what describes them.
        check: Called before a repository's weights are downloaded.

    Raises:
        CheckpointError: No such folder, or a repository that can't be had.
        MTPError: What `check` raises.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # "~somebody" whom this machine doesn't know
        raise CheckpointError(f"there is no folder {name}: {error}") from None
    # Both are False too for what mustn't be looked at, or can't be a path.
    if os.path.isdir(path) and str(name):
        return path
    if os.path.exists(path) and str(name):
        raise CheckpointError(f"{path} is a file: give the folder it lies in")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        raise CheckpointError(f"there is no folder {str(name)!r}")
    folder = download.description(str(name))
    if not weights:
        return folder
    check(folder)
    if (folder / INDEX).is_file():
        download.weights(str(name), folder, [path.name for path in weight_files(folder)])
        return folder
    download.weights(str(name), folder, ["model*.safetensors"])
    if not any(folder.glob("model*.safetensors")):  # else others are copies in another layout
        download.weights(str(name), folder, ["*.safetensors"])
    return folder


def find_drafter(target: str | Path, usable: Usable, weights: bool = True, merged: Path | None = None) -> Path | None:
    """The drafter that belongs to a target: the first one that is usable; None, with a warning that says why, for none.

    One that is merged into the target comes first, then those with a name that a drafter of this target has. A
    repository's are looked for on the hub; a folder's beside it and in the hub's cache, and nothing is downloaded.
    Whatever the names, any other drafter beside a folder is better than none.

    Args:
        target: Folder or repository.
        usable: Judges what is found.
        weights: As for `find`.
        merged: Folder of the target, if it holds a drafter.
    """
    why: dict[str, str] = {}

    def first(candidates: Iterable[str | Path]) -> Path | None:
        for candidate in candidates:
            try:
                folder = find(candidate, weights, check=lambda it: usable(it, False))
                usable(folder, weights)
            except (MTPError, OSError) as error:
                why[str(candidate)] = str(error)
            else:
                return folder
        return None

    path = Path(target).expanduser()
    local = path.is_dir()
    if merged and first([merged]):
        return merged
    if found := first(_named_drafters(path) if local else drafter_names(str(target))):
        return found
    if local and (fitting := [folder for folder in _beside(path) if _is_usable(folder, usable, weights)]):
        if len(fitting) > 1:
            log.info("%d drafters beside %s fit it: taking %s", len(fitting), path, fitting[0].name)
        return fitting[0]
    if why:
        reason = next(iter(why.values()))
        log.warning(
            "no drafter, going on without one: tried %s; %s; --drafter (drafter=) names another", ", ".join(why), reason
        )
    else:
        names = dict.fromkeys(name.rpartition("/")[2] for place in _places(path) for name in _names(place))
        log.warning(
            "%s has no drafter beside it, going on without one: looked there and in the hub's cache for %s, and there "
            "for any that fits; --drafter (drafter=) names one", path, ", ".join(names),
        )  # fmt: skip
    return None


def _is_usable(folder: Path, usable: Usable, weights: bool) -> bool:
    with suppress(MTPError, OSError):
        usable(folder, weights)
        return True
    return False


def _places(path: Path) -> list[Path]:
    """A folder as it was given and, if there are links in its path, where these lead; not the root folder."""
    return [place for place in dict.fromkeys([Path(os.path.abspath(path)), path.resolve()]) if place.name]


def _names(place: Path) -> list[str]:
    return drafter_names(published_name(place))


def _named_drafters(path: Path) -> Iterator[Path]:
    """Folders on this machine that have a name of a target's drafter, each once, the likeliest first."""
    seen = set()
    for folder in _with_names(_places(path)):
        if os.path.isdir(folder) and (real := folder.resolve()) not in seen:
            seen.add(real)
            yield folder


def _with_names(places: list[Path]) -> Iterator[Path]:
    for place in places:
        yield from _children(place.parent, [name.rpartition("/")[2] for name in _names(place)])
    wanted = [(place, name.rpartition("/")) for place in places for name in _names(place)]
    for place, (owner, _, model) in wanted:  # as LM Studio has them: OWNER/NAME
        for folder in _children(place.parent.parent, [owner]):
            yield from _children(folder, [model])
    from huggingface_hub import constants

    caches = [place.parents[2] for place in places if place.match("*/models--*/snapshots/*")]
    for cache in dict.fromkeys([*caches, Path(constants.HF_HUB_CACHE)]):
        for repository in _children(cache, [f"models--{owner}--{model}" for _, (owner, _, model) in wanted]):
            with suppress(OSError, ValueError):
                yield repository / "snapshots" / (repository / "refs" / "main").read_text().strip()


def _children(parent: Path, names: Iterable[str]) -> Iterator[Path]:
    """What a folder holds under some names in upper or lower case, name by name; what is written alike comes first."""
    there: dict[str, list[Path]] = {}
    with suppress(OSError):
        for path in sorted(parent.iterdir()):
            there.setdefault(path.name.lower(), []).append(path)
    for name in names:
        yield from sorted(there.get(name.lower(), []), key=lambda path: path.name != name)


def _beside(path: Path) -> list[Path]:
    """All model folders beside a folder; those first whose names begin most like its own."""
    alike: dict[Path, int] = {}
    for place in _places(path):
        with suppress(OSError):
            for folder in sorted(place.parent.iterdir()):
                if folder != place and os.path.isfile(folder / "config.json"):  # False too if it mustn't be looked at
                    common = os.path.commonprefix([folder.name.lower(), place.name.lower()])
                    alike[folder] = max(len(common), alike.get(folder, 0))
    return sorted(alike, key=lambda folder: -alike[folder])


def drafter_names(target: str) -> list[str]:
    """Names under which the drafter of a target is published, the likeliest first.

    Google appends "-assistant"; mlx-community puts it before the suffix that tells the format, and has some drafters
    in bfloat16 only. A copy of a published size under any other name goes with Google's drafter.
    """
    names = [f"{target}-assistant"]
    if stored := _FORMAT.fullmatch(target):
        model, form = stored.groups()
        names += [f"{base}-assistant-{f}" for base in (model, model.removesuffix("-qat")) for f in (form, "bf16")]
        names.append(f"{model}-assistant")
    if size := _SIZE.search(target):
        names.append(f"google/gemma-4-{_SIZES[size[1].lower()]}-it-assistant")
    return list(dict.fromkeys(names))
