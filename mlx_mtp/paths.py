"""Paths as users write them."""

from __future__ import annotations

from pathlib import Path

from .errors import MTPError


def expanded(path: str | Path) -> Path:
    """A path with ~ and ~somebody replaced by their home folders.

    Raises:
        MTPError: This machine doesn't know that user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise MTPError(f"can't use the path {path}: {error}") from None
