"""Files of users and checkpoints: paths as users write them, JSON read with bounds, files replaced when complete."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import CheckpointError, MTPError

LARGEST_JSON = 2**27
"""Largest JSON file that is read, in bytes; the largest of a checkpoint is a tokenizer.json of 32 MB."""

_DEEPEST_JSON = 100
"""Deepest nesting that is accepted: configs have five levels, and recursive functions copy and print what is read."""

_LONGEST_NAME = 40
"""Characters of a file's name in that of its temporary file; a name has at most 255 bytes, a character up to four."""

_SAMPLES, _SAMPLE_BYTES = 64, 2**12
"""Number of pieces that `sample` reads, and bytes of each: a disk reads at least that many for a single byte."""


def read_json(path: Path, required: bool = True) -> dict[str, Any]:
    """Reads a JSON object from a file of a checkpoint.

    Args:
        path: The file.
        required: Whether a missing file is an error.

    Returns:
        The object; {} if the file is missing and not required.

    Raises:
        CheckpointError: The file is missing, unreadable, or not a JSON object.
    """
    if not os.path.isfile(path):  # False too without the permission to look
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
        raise CheckpointError(f"{path} isn't a JSON object")
    return value


def listed(folder: Path, pattern: str = "*") -> list[Path]:
    """The entries of a folder whose names match a glob pattern, sorted.

    Leaves out "._NAME", which macOS writes next to NAME on disks that can't store its attributes.
    """
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("._"))


def parse_json(
    text: str,
    object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
    parse_float: Callable[[str], Any] | None = None,
    parse_constant: Callable[[str], Any] | None = None,
) -> Any:
    """Parses JSON of limited depth, so that recursive functions can process the result.

    Args:
        text: The text.
        object_pairs_hook: As for `json.loads`.
        parse_float: As for `json.loads`.
        parse_constant: As for `json.loads`.

    Raises:
        ValueError: The text isn't JSON, or is nested too deeply.
    """
    too_deep = f"lists and objects are nested more than {_DEEPEST_JSON} deep"
    try:
        value = json.loads(
            text, object_pairs_hook=object_pairs_hook, parse_float=parse_float, parse_constant=parse_constant
        )
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
    """Reads a plain file of at most LARGEST_JSON bytes; others, such as pipes and devices, may never end.

    Raises:
        OSError: It can't be read, is too large, or isn't a plain file.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    if size > LARGEST_JSON:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes, and at most {LARGEST_JSON:,} are read", str(path))
    return path.read_bytes()


def sample(path: Path) -> bytes:
    """Reads some bytes from all over a file, the first ones included: enough to tell different weights apart.

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


def data_folder() -> Path:
    """The package's folder among the user's data; it may not exist yet."""
    if sys.platform == "darwin":
        return Path.home() / "Library/Application Support/mlx_mtp"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "mlx_mtp"


@contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """Writes a file completely or not at all.

    The `with` statement gives a temporary file in the same folder, which replaces `path` at the end; after an error it
    is deleted. Its name is unique, so that two processes can write the same file: the last one wins. It is locked, so
    that one that a killed process has left can be told from one in use, and is deleted by the next attempt. The
    permissions of a replaced file are kept.

    Args:
        path: The file to write; links are followed.
        suffix: What the temporary file's name must end with.

    Yields:
        The temporary file, which exists and is empty.

    Raises:
        OSError: A file couldn't be written; always names `path`.
    """
    aside, handle = None, -1
    try:
        path = writable(path)
        _delete_leftovers(path)
        aside, handle = _new_file_beside(path, suffix)
        yield aside
        with suppress(FileNotFoundError):
            shutil.copymode(path, aside)
        os.fsync(handle)  # or the name could outlive a loss of power, and the contents not
        os.replace(aside, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        if aside:
            with suppress(OSError):
                aside.unlink()
            os.close(handle)


def _new_file_beside(path: Path, suffix: str) -> tuple[Path, int]:
    """Makes a temporary file for `path`, and locks it; returns it and the handle that holds the lock."""
    while True:
        aside = path.with_name(f"{path.name[:_LONGEST_NAME]}.{secrets.token_hex(8)}.partial{suffix}")
        handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):  # some file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if aside.exists():  # another process may have taken it for a leftover before it was locked
            return aside, handle
        os.close(handle)


def _delete_leftovers(path: Path) -> None:
    """Deletes the temporary files for `path` that no process has locked: those who made them were killed."""
    ours = re.compile(rf"{re.escape(path.name[:_LONGEST_NAME])}\.[0-9a-f]{{16}}\.partial(\.\w+)?")
    with suppress(OSError):  # the folder can't be listed
        for name in filter(ours.fullmatch, os.listdir(path.parent)):
            with suppress(OSError):  # it is locked, gone meanwhile, or the file system has no locks
                handle = os.open(path.with_name(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.with_name(name).unlink()
                finally:
                    os.close(handle)


def writable(path: Path) -> Path:
    """Resolves a path at which a file can be written: nothing is there yet, or a plain file.

    Raises:
        OSError: Something else is there.
    """
    try:
        real = path.resolve()
    except RuntimeError:  # Python before 3.13, for links that lead to themselves
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None
    if real.exists() and not real.is_file():
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return real


def sha256(path: Path) -> str:
    """A file's SHA-256, in hexadecimal.

    Raises:
        OSError: It can't be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def expanded(path: str | Path) -> Path:
    """A path with ~ and ~USER replaced by home folders.

    Raises:
        MTPError: It isn't a possible path, or there is no such user.
    """
    if not isinstance(path, str | Path) or not str(path) or "\0" in str(path):
        raise MTPError(f"{path!r} isn't a path")
    try:
        os.fsencode(path)
        return Path(path).expanduser()
    except UnicodeEncodeError:  # half a surrogate pair, for instance
        raise MTPError(f"{path!r} isn't a path") from None
    except RuntimeError as error:
        raise MTPError(f"can't use the path {path}: {error}") from None


def published_name(folder: Path) -> str:
    """The hub repository that a folder seems to be a copy of, by its path.

    Args:
        folder: An absolute path.

    Returns:
        OWNER/NAME.
    """
    if folder.parent.name == "snapshots":  # the hub's cache: models--OWNER--NAME/snapshots/COMMIT
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return "/".join(folder.parts[-2:]).lstrip("/")
