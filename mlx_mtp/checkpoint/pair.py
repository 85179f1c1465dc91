"""Where a pair's files are: the folders of a target and its drafter, and the profile of what was measured for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from ..config import check_pair
from ..errors import MTPError, ProfileError
from ..files import listed
from ..models.drafter import POSITIONS
from ..paths import expanded
from ..tuning import profile as profiles
from . import hub
from . import load as checkpoint
from .quantization import Format
from .safetensors_files import weight_files

DEMO = Path(__file__).parents[1] / "demo"
"""The embedded demo pair: folders `target` and `drafter`."""


def find_pair(
    target: str | Path | None,
    drafter: str | Path | Literal[False] | None,
    weights: bool = True,
    check: hub.Check = lambda folder: None,
) -> tuple[Path, Path | None]:
    """The folders of a target and its drafter, as `load` takes them; the same twice if one is merged into the other.

    A drafter that wasn't asked for is one that can be loaded, or there is none and one line is logged that says why.

    Args:
        target, drafter: As for `load`.
        weights, check: As for `hub.find`. `check` is asked about local drafters that weren't asked for, too.

    Raises:
        CheckpointError: The target, or the drafter that was asked for, can't be had.
        MTPError: What `check` raises.
    """
    if target is None:
        target, drafter = DEMO / "target", DEMO / "drafter" if drafter is None else drafter
    folder = hub.find(target, weights, check)
    if drafter is False:
        return folder, None
    if drafter is not None:
        with way_out():
            return folder, hub.find(drafter, weights, check)
    config = checkpoint.read_target(folder)[1]

    def usable(found: Path, weights: bool) -> None:
        check_pair(config, checkpoint.read_drafter(found)[1])
        if not checkpoint.holds_drafter(found):  # else what is asked of that target doesn't matter here
            check(found)
        if weights or _is_complete(found):
            checkpoint.open_drafter(found, config, POSITIONS[0])

    merged = folder if checkpoint.holds_drafter(folder) else None
    return folder, hub.find_drafter(target, usable, weights, merged)


def _is_complete(folder: Path) -> bool:
    """Whether all weights of a folder are there, which needn't be before they are wanted."""
    return bool(listed(folder, "*.safetensors")) and all(path.is_file() for path in weight_files(folder))


@contextmanager
def way_out() -> Iterator[None]:
    """Adds to what speaks against a drafter that was asked for how to do without it."""
    try:
        yield
    except MTPError as error:
        raise type(error)(f"{error}; --no-draft (drafter=False) goes without a drafter") from error


def find_profile(
    wanted: str | Path | None,
    folder: Path,
    drafter_folder: Path | None,
    quantize: int | None,
    dtype: str | None,
    adapter: Path | None = None,
    drafter_format: Format | None = None,
) -> profiles.Profile | None:
    """The profile that `load` is to use, see there."""
    if wanted is None:
        return None
    if not isinstance(wanted, str | Path):
        raise ProfileError(f"profile must be 'auto', a file or None, not {wanted!r}")
    try:
        key = profiles.key_of(folder, drafter_folder, quantize, dtype, adapter, drafter_format)
    except OSError:
        return None  # a file is missing: reading the checkpoint says which
    if wanted == "auto":
        return profiles.find(key)
    path = expanded(wanted)
    found = profiles.read(path)
    profiles.check(found, key, path)
    return found
