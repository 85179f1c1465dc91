"""The Gemma 4 models in the hub's cache, and whether they are complete. Reads no weights and asks no hub.

Doesn't use huggingface_hub's `scan_cache_dir`, which leaves out the damaged ones: those are wanted here most.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config import DrafterConfig
from ..errors import CheckpointError
from ..files import listed, published_name
from . import candidates, description
from .safetensors_files import read_header, weight_files

State = Literal["complete", "incomplete", "damaged", "no weights"]


@dataclass(frozen=True)
class CachedModel:
    """A repository in the cache.

    Attributes:
        repository: Its name.
        folder: The folder of its files.
        kind: "target" or "drafter"; None if its config.json can't be read.
        size: One of `candidates.SIZES`, by its name; None if the name doesn't say.
        bytes: Bytes of its files, those of all its versions and unfinished ones included.
        state: "no weights" if only the files that describe it were downloaded.
        problem: What is wrong, in one line, if the state is "incomplete" or "damaged".
    """

    repository: str
    folder: Path
    kind: Literal["target", "drafter"] | None
    size: str | None
    bytes: int
    state: State
    problem: str | None


def cached_models() -> list[CachedModel]:
    """The Gemma 4 models in the hub's cache, by name."""
    from huggingface_hub import constants

    found = (_cached(path) for path in listed(Path(constants.HF_HUB_CACHE), "models--*--*"))
    return [it for it in found if it]


def _cached(path: Path) -> CachedModel | None:
    """The model in a repository's folder of the cache; None if it isn't Gemma 4."""
    snapshots = listed(path / "snapshots")
    with suppress(OSError, ValueError):
        snapshots.append(path / "snapshots" / (path / "refs" / "main").read_text().strip())
    if not snapshots:
        return None
    folder = snapshots[-1]
    name = published_name(folder)
    size = candidates.size_of(name)
    kind: Literal["target", "drafter"] | None = None
    try:
        kind = "drafter" if isinstance(description.read(folder).config, DrafterConfig) else "target"
        state, problem = _state(folder)
    except CheckpointError as error:
        if kind is None and size is None:
            return None
        state, problem = "damaged", str(error)
    held = sum(blob.stat().st_size for blob in listed(path / "blobs"))
    return CachedModel(name, folder, kind, size, held, state, problem)


def _state(folder: Path) -> tuple[State, str | None]:
    """Whether the weights in a folder are complete, and what is missing.

    Raises:
        CheckpointError: A file is damaged.
    """
    files: list[Path] = []
    with suppress(CheckpointError):
        files = weight_files(folder)
    missing = [path.name for path in files if not path.is_file()]
    if files and not missing:
        for path in files:
            read_header(path)
        return "complete", None
    if len(missing) == len(files) and not listed(folder.parents[1] / "blobs", "*.incomplete"):
        return "no weights", None
    which = f"{missing[0]} is missing, {len(missing)} in all" if missing else "its weights are missing"
    return "incomplete", f"the download was broken off: {which}"
