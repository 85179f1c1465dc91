"""Files of users and checkpoints: paths as users write them, JSON read with bounds, files replaced when complete."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import CheckpointError, MTPError

LARGEST_JSON = 2**27
"""Bytes. The largest that a checkpoint has is a tokenizer.json of 32 MB."""

_DEEPEST_JSON = 100
"""Objects and lists in each other. Configs have five; what is read is copied and printed by functions that recurse."""

_SAMPLES, _SAMPLE_BYTES = 64, 2**12
"""Places of a file that `sample` looks at, and what it takes of each: about what a disk reads for one byte."""


def read_json(path: Path, required: bool = True) -> dict[str, Any]:
    """Reads a JSON object from a file; {} if the file is optional and missing.

    Raises:
        CheckpointError: Missing, unreadable, or no JSON object.
    """
    if not os.path.isfile(path):  # False too if it mustn't be looked at
        if required:
            raise CheckpointError(f"{path.parent} has no {path.name}: not a model folder, or not completely downloaded")
        return {}
    try:
        value = parse_json(read_bytes(path).decode())
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def listed(folder: Path, pattern: str = "*") -> list[Path]:
    """What a folder holds under names of a pattern, sorted.

    Without "._NAME", which macOS puts beside every NAME on disks that can't hold its attributes.
    """
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("._"))


def parse_json(text: str, **hooks: Callable[..., Any]) -> Any:
    """What a text says in JSON, if it isn't nested so deeply that somebody would stumble over it.

    Args:
        text: The text.
        **hooks: As for `json.loads`.

    Raises:
        ValueError: It is no JSON, or nested too deeply.
    """
    too_deep = f"lists and objects lie more than {_DEEPEST_JSON} deep in each other"
    try:
        value = json.loads(text, **hooks)
    except RecursionError:
        raise ValueError(too_deep) from None
    level: list[Any] = [[value]]
    for _ in range(_DEEPEST_JSON + 1):
        parts = (part for it in level for part in (it.values() if isinstance(it, dict) else it))
        level = [part for part in parts if isinstance(part, dict | list)]
        if not level:
            return value
    raise ValueError(too_deep)


def read_bytes(path: Path) -> bytes:
    """All of a file, which must be a plain one (reading others may never end) and of a size that JSON can have.

    Raises:
        OSError: It can't be read.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    if size > LARGEST_JSON:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes, and at most {LARGEST_JSON:,} are read", str(path))
    return path.read_bytes()


def sample(path: Path) -> bytes:
    """Some bytes from all over a file, its first ones included: other weights of the same shapes have others.

    Raises:
        OSError: It can't be read.
    """
    size = path.stat().st_size
    found = []
    with path.open("rb") as file:
        for i in range(_SAMPLES):
            file.seek(size * i // _SAMPLES)
            found.append(file.read(_SAMPLE_BYTES))
    return b"".join(found)


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
        path = writable(path)
        # A name has at most 255 bytes, and a character up to four of them.
        aside = path.with_name(f"{path.name[:40]}.{secrets.token_hex(8)}.partial{suffix}")
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


def writable(path: Path) -> Path:
    """Where a path leads to, if a file can stand there: there is none yet, or a plain one.

    Raises:
        OSError: Something else is there.
    """
    try:
        real = path.resolve()
    except RuntimeError:  # what Python before 3.13 says of links that lead to themselves
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None
    if real.exists() and not real.is_file():
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return real


def sha256(path: Path) -> str:
    """A file's SHA-256, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


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
