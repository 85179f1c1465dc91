"""Files of users and checkpoints: JSON is read with bounds, and what is written takes its place when it is whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import CheckpointError

LARGEST_JSON = 2**27
"""Bytes. The largest that a checkpoint has is a tokenizer.json of 32 MB."""


def read_json(path: Path, required: bool = True) -> dict[str, Any]:
    """Reads a JSON object from a file; {} if the file is optional and missing.

    Raises:
        CheckpointError: Missing, unreadable, or no JSON object.
    """
    if not path.is_file():
        if required:
            raise CheckpointError(f"{path.parent} has no {path.name}: not a model folder, or not completely downloaded")
        return {}
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise CheckpointError(f"{path} has {size:,} bytes, and at most {LARGEST_JSON:,} are read")
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise CheckpointError(f"{path} can't be read as JSON: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def listed(folder: Path, pattern: str = "*") -> list[Path]:
    """What a folder holds under names of a pattern, sorted.

    Without "._NAME", which macOS puts beside every NAME on disks that can't hold its attributes.
    """
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("._"))


@contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """A file to write beside `path`, whose place it takes when the block ends; after an error it is deleted.

    Its name is its own, so that two processes that write the same file don't spoil each other's: the last one wins. A
    file that is replaced hands on its permissions.

    Args:
        path: The file that is wanted; links are followed.
        suffix: How the other file's name must end.

    Raises:
        OSError: About `path`, whichever of the two couldn't be written.
    """
    aside = None
    try:
        path = path.resolve()
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "not a plain file")
        aside = path.with_name(f"{path.name[:100]}.{secrets.token_hex(8)}.partial{suffix}")
        aside.touch(exist_ok=False)
        yield aside
        with suppress(FileNotFoundError):
            shutil.copymode(path, aside)
        os.replace(aside, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        if aside:
            with suppress(OSError):
                aside.unlink()


def sha256(path: Path) -> str:
    """A file's SHA-256, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()
