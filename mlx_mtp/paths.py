"""Paths as users write them."""

from __future__ import annotations

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
        return Path(path).expanduser()
    except RuntimeError as error:
        raise MTPError(f"can't use the path {path}: {error}") from None
