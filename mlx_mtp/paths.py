"""Paths as users write them, and what they tell."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import MTPError


def expanded(path: str | Path) -> Path:
    """A path with ~ and ~somebody replaced by their home folders.

    Raises:
        MTPError: It can't be one, or this machine doesn't know that user.
    """
    if not isinstance(path, str | Path) or not str(path) or "\0" in str(path):
        raise MTPError(f"{path!r} is no path")
    try:
        os.fsencode(path)
        return Path(path).expanduser()
    except UnicodeEncodeError:  # as of half a surrogate pair
        raise MTPError(f"{path!r} is no path") from None
    except RuntimeError as error:
        raise MTPError(f"can't use the path {path}: {error}") from None


def published_name(folder: Path) -> str:
    """The repository, OWNER/NAME, that an absolute path is a copy of, as far as the path tells."""
    if folder.parent.name == "snapshots":  # the hub's cache: models--OWNER--NAME/snapshots/COMMIT
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return "/".join(folder.parts[-2:]).lstrip("/")
