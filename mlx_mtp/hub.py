"""Where a checkpoint lies: a folder, or the local copy of a hub repository.

Knows nothing of what is in the files (checkpoint.py).
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from .errors import CheckpointError, one_line

log = logging.getLogger(__name__)

WEIGHTS = "*.safetensors"

HUB_PATTERNS = [WEIGHTS, "*.json", "*.jinja"]
"""Files of a hub repository that are used."""


def find(name: str | Path, weights: bool = True) -> Path:
    """The folder of a checkpoint: `name` itself, or the local copy of the hub repository of that name.

    Args:
        name: Folder or repository.
        weights: Whether a repository's weights are wanted, or only what describes them.

    Raises:
        CheckpointError: No such folder, or a repository that can't be had.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # "~somebody" whom this machine doesn't know
        raise CheckpointError(f"there is no folder {name}: {error}") from None
    if path.is_dir() and str(name):
        return path
    if path.exists() and str(name):
        raise CheckpointError(f"{path} is a file: give the folder it lies in")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        raise CheckpointError(f"there is no folder {str(name)!r}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        patterns = HUB_PATTERNS if weights else [p for p in HUB_PATTERNS if p != WEIGHTS]
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except RepositoryNotFoundError:
        raise CheckpointError(f"{name} is neither a folder nor a repository you can read on the hub") from None
    except HFValidationError:
        raise CheckpointError(f"there is no folder {str(name)!r}, and no repository can have this name") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{name} is not a folder, and the hub can't be reached to download it ({one_line(error)})"
        ) from None


def find_drafter(target: str | Path, weights: bool = True) -> Path | None:
    """The drafter that belongs to a target: its sibling with "-assistant" after the name; None if there is none."""
    path = Path(target).expanduser()
    if path.is_dir():
        path = path.resolve()
        sibling = path.with_name(path.name + "-assistant")
        return sibling if sibling.is_dir() else None
    try:
        return find(f"{target}-assistant", weights)
    except CheckpointError as error:
        log.warning("no drafter: %s", error)
        return None
