"""Where a pair's files are: the folders of a target and its drafter, and the profile of what was measured for them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from . import hub
from .errors import ProfileError
from .paths import expanded
from .tuning import profile as profiles

DEMO = Path(__file__).parent / "demo"
"""The embedded demo pair: folders `target` and `drafter`."""


def find_pair(
    target: str | Path | None,
    drafter: str | Path | Literal[False] | None,
    weights: bool = True,
    check: hub.Check = lambda folder: None,
) -> tuple[Path, Path | None]:
    """The folders of a target and its drafter, as `load` takes them; `weights` and `check` as for `hub.find`."""
    if target is None:
        target, drafter = DEMO / "target", DEMO / "drafter" if drafter is None else drafter
    folder = hub.find(target, weights, check)
    if drafter is None:
        return folder, hub.find_drafter(target, weights, check)
    return folder, None if drafter is False else hub.find(drafter, weights, check)


def find_profile(
    wanted: str | Path | None, folder: Path, drafter_folder: Path | None, quantize: int | None, dtype: str | None
) -> profiles.Profile | None:
    """The profile that `load` is to use, see there."""
    if wanted is None:
        return None
    if not isinstance(wanted, str | Path):
        raise ProfileError(f"profile must be 'auto', a file or None, not {wanted!r}")
    try:
        key = profiles.key_of(folder, drafter_folder, quantize, dtype)
    except OSError:
        return None  # a file is missing: reading the checkpoint says which
    if wanted == "auto":
        return profiles.find(key)
    path = expanded(wanted)
    found = profiles.read(path)
    profiles.check(found, key, path)
    return found
