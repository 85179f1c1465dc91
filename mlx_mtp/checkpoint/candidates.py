"""Candidates for the drafter of a target: the names under which drafters are published, and folders near a target's.

Looks at names and folders only; pair.py checks whether a candidate can be used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

from ..files import published_name

_FORMAT = re.compile(r"(.+?)-((?:OptiQ-)?\d+bit|bf16|fp16|mxfp4|mxfp8|nvfp4)")
SIZES = ("E2B", "E4B", "12B", "26B-A4B", "31B")
"""The sizes of Gemma 4, as they stand in the names of repositories."""

_SIZE = re.compile(rf"(?:^|/)gemma-4-({'|'.join(SIZES)})-it(?![a-z])", re.IGNORECASE)


def size_of(name: str) -> str | None:
    """The size that a repository's name contains, one of SIZES; None without one."""
    found = _SIZE.search(name)
    return next(size for size in SIZES if size.lower() == found[1].lower()) if found else None


def drafter_names(target: str) -> list[str]:
    """Names under which the drafter of a target may be published, the likeliest first.

    Google appends "-assistant". mlx-community puts it before the suffix for the format, and has some drafters in
    bfloat16 only. The last candidate is Google's drafter for the target's size, if its name contains one.

    Args:
        target: Name of the target's repository.
    """
    names = [f"{target}-assistant"]
    if stored := _FORMAT.fullmatch(target):
        model, form = stored.groups()
        names += [f"{base}-assistant-{f}" for base in (model, model.removesuffix("-qat")) for f in (form, "bf16")]
        names.append(f"{model}-assistant")
    if size := size_of(target):
        names.append(f"google/gemma-4-{size}-it-assistant")
    return list(dict.fromkeys(names))


def folder_names(path: Path) -> list[str]:
    """Folder names that are looked for next to a target's folder and in the hub's cache."""
    return list(dict.fromkeys(name.rpartition("/")[2] for place in _places(path) for name in _names(place)))


def _places(path: Path) -> list[Path]:
    """A folder's path as given and, if it differs, with links resolved; without the root folder."""
    return [place for place in dict.fromkeys([Path(os.path.abspath(path)), path.resolve()]) if place.name]


def _names(place: Path) -> list[str]:
    return drafter_names(published_name(place))


def on_this_machine(path: Path) -> Iterator[Path]:
    """Folders on this machine with a name from `drafter_names`, each once, the likeliest first."""
    seen = set()
    for folder in _with_names(_places(path)):
        if os.path.isdir(folder) and (real := folder.resolve()) not in seen:
            seen.add(real)
            yield folder


def _with_names(places: list[Path]) -> Iterator[Path]:
    for place in places:
        yield from _children(place.parent, [name.rpartition("/")[2] for name in _names(place)])
    wanted = [(place, name.rpartition("/")) for place in places for name in _names(place)]
    for place, (owner, _, model) in wanted:  # LM Studio's folders: OWNER/NAME
        for folder in _children(place.parent.parent, [owner]):
            yield from _children(folder, [model])
    from huggingface_hub import constants

    caches = [place.parents[2] for place in places if place.match("*/models--*/snapshots/*")]
    for cache in dict.fromkeys([*caches, Path(constants.HF_HUB_CACHE)]):
        for repository in _children(cache, [f"models--{owner}--{model}" for _, (owner, _, model) in wanted]):
            with suppress(OSError, ValueError):
                yield repository / "snapshots" / (repository / "refs" / "main").read_text().strip()


def _children(parent: Path, names: Iterable[str]) -> Iterator[Path]:
    """A folder's entries with these names, ignoring case; for each name the exact match first."""
    entries: dict[str, list[Path]] = {}
    with suppress(OSError):
        for path in sorted(parent.iterdir()):
            entries.setdefault(path.name.lower(), []).append(path)
    for name in names:
        yield from sorted(entries.get(name.lower(), []), key=lambda path: path.name != name)


def neighbours(path: Path) -> list[Path]:
    """All model folders next to a folder; first those whose names have the longest prefix in common with its name."""
    common: dict[Path, int] = {}
    for place in _places(path):
        with suppress(OSError):
            for folder in sorted(place.parent.iterdir()):
                # False too without the permission to look.
                if folder != place and os.path.isfile(folder / "config.json"):
                    pairs = zip(folder.name.lower(), place.name.lower(), strict=False)
                    length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
                    common[folder] = max(length, common.get(folder, 0))
    return sorted(common, key=lambda folder: -common[folder])
