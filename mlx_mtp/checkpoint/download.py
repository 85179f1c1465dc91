"""Downloads files of hub repositories into the cache of huggingface_hub.

The library downloads the files, over Xet if the repository has it, and shows progress. But after an interruption it
starts a file from its beginning, and a model's files have up to 50 GB. So only the first attempt uses the library.
After an interrupted attempt this module downloads the weights, over plain HTTP, to a partial file in the library's
cache, and later attempts resume it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from inspect import signature
from pathlib import Path

from ..errors import CheckpointError, one_line
from ..files import sha256
from .progress import PARTIAL, ProgressCallback, bytes_in, watching
from .sizes import format_bytes

_LARGEST = 50 * 10**9
"""Largest file, in bytes, that hubs send over plain HTTP; larger ones are left to huggingface_hub."""

_LEFTOVER = re.compile(r"([^.]+)\.[0-9a-f]{8}\.incomplete")
"""Name of a file that the library is downloading, or was: its etag, and what no other attempt has."""

_LOCK_SECONDS = 0.01
"""How long the lock of a leftover is waited for; 0 would mean ten seconds to the library."""

_BELOW = ["*/*"]
"""Matches files in subfolders, which have the model in other formats; without it, patterns match in all folders."""


def description(repository: str) -> Path:
    """Downloads a repository's files except the weights, and returns its local folder.

    Raises:
        CheckpointError: The download failed.
    """
    with _without_bars(), _clear_errors(repository):
        # Leaves out all subfolders except "ad...", which has additional chat templates.
        return _snapshot(repository, None, ["*.json", "*.jinja", "tokenizer.model"], ["[!a]*/*", "?[!d]*/*"])


def weights(repository: str, folder: Path, patterns: list[str], progress: ProgressCallback | None = None) -> None:
    """Downloads the files of a repository's top folder that match one of the patterns.

    Args:
        repository: The repository.
        folder: Its local folder, from `description`.
        patterns: File names, or glob patterns of them.
        progress: Receives reports, in place of huggingface_hub's progress bars; none if all files are there.

    Raises:
        CheckpointError: The download failed, and another call resumes it; or the disk has no room for it.
    """
    commit = folder.name  # the same commit as the files that are there
    begun = folder.parents[1] / f"{commit}.mlx-mtp.begun"
    blobs = folder.parents[1] / "blobs"
    _delete_leftovers(blobs)
    missing = _missing(repository, folder, patterns)
    total = sum(missing.values())
    _check_room(repository, blobs, total)
    with (
        _without_bars() if progress else nullcontext(),
        watching(blobs, repository, total, progress) if progress and missing else nullcontext(),
        _clear_errors(repository),
    ):
        if begun.exists() and (library := _library()):
            for name in missing:
                _fetch(library, blobs, repository, commit, name)
        with suppress(OSError):  # the cache may be read-only
            begun.touch()
        _snapshot(repository, commit, patterns)
        with suppress(OSError):
            begun.unlink()


@contextmanager
def _without_bars() -> Iterator[None]:
    """Meanwhile huggingface_hub shows no progress bars."""
    from huggingface_hub import utils

    shown = not utils.are_progress_bars_disabled()  # type: ignore[attr-defined]  # the package has no __all__
    if shown:
        utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if shown:
            utils.enable_progress_bars()  # type: ignore[attr-defined]


def _delete_leftovers(blobs: Path) -> None:
    """Deletes what killed processes have left of the library's own downloads, which it never goes on with.

    The library locks an etag while it downloads the file.
    """
    try:
        from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # the package has no __all__
    except ImportError:
        return
    locks = blobs.parents[1] / ".locks" / blobs.parent.name
    for path in blobs.glob("*.incomplete"):
        if found := _LEFTOVER.fullmatch(path.name):
            with suppress(OSError), WeakFileLock(locks / f"{found[1]}.lock", timeout=_LOCK_SECONDS):
                path.unlink()


def _check_room(repository: str, blobs: Path, total: int) -> None:
    """Checks that the disk of the cache has room for what is still to come.

    Raises:
        CheckpointError: It hasn't.
    """
    needed = total - bytes_in(blobs, f"*{PARTIAL}")
    free = shutil.disk_usage(blobs.parent).free
    if needed > free:
        raise CheckpointError(
            f"{repository}: {format_bytes(needed)} are still to be downloaded, and the disk of the hub's cache has "
            f"{format_bytes(free)} left: make room, or set HF_HOME to a folder on another disk"
        )


@dataclass(frozen=True)
class _Library:
    """Functions of huggingface_hub that aren't part of its stable interface."""

    http_get: Callable[..., None]
    build_hf_headers: Callable[[], dict[str, str]]


def _library() -> _Library | None:
    """These functions; None if this version of the library doesn't have them: then only the library downloads."""
    try:
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # the package has no __all__
    except ImportError:
        return None
    wanted = {"resume_size", "headers", "expected_size", "displayed_filename"}
    if not wanted <= signature(http_get).parameters.keys():
        return None
    return _Library(http_get, build_hf_headers)


def _snapshot(repository: str, commit: str | None, patterns: list[str], ignored: list[str] = _BELOW) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repository, revision=commit, allow_patterns=patterns, ignore_patterns=ignored))


def _missing(repository: str, folder: Path, patterns: list[str]) -> dict[str, int]:
    """Names and bytes of matching files that are yet to be downloaded; none if the hub can't be asked."""
    from huggingface_hub import constants, list_repo_tree
    from huggingface_hub.hf_api import RepoFile

    there = {path.name for pattern in patterns for path in folder.glob(pattern) if path.exists()}
    # Without an index, a model has a single file.
    complete = bool(there) if any("*" in pattern for pattern in patterns) else there == set(patterns)
    files: list[RepoFile] = []
    if not constants.HF_HUB_OFFLINE and not complete:
        with suppress(Exception):  # `_snapshot` says better what is wrong, if it needs the hub at all
            files = [it for it in list_repo_tree(repository, revision=folder.name) if isinstance(it, RepoFile)]
    wanted = [it for it in files if it.path not in there and any(fnmatchcase(it.path, p) for p in patterns)]
    return {it.path: it.size for it in wanted}


def _fetch(library: _Library, blobs: Path, repository: str, commit: str, name: str) -> None:
    """Downloads a file to the cache, resuming an earlier attempt."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url, headers = hf_hub_url(repository, name, revision=commit), library.build_hf_headers()
    known = get_hf_file_metadata(url, headers=headers)
    etag = known.etag or ""
    # The etag becomes a file name, and mirrors may send anything.
    if not re.fullmatch(r"[0-9a-f]{40,64}", etag) or known.size is None or known.size > _LARGEST:
        return
    blobs.mkdir(parents=True, exist_ok=True)
    whole, partial = blobs / etag, blobs / f"{etag}{PARTIAL}"
    with partial.open("ab") as file:
        with suppress(OSError):  # some file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)  # another process may be downloading it
        if whole.exists():
            partial.unlink(missing_ok=True)
            return
        begin = file.seek(0, os.SEEK_END)
        if begin > known.size:
            begin = file.truncate(0)
        library.http_get(
            url, file, resume_size=begin, headers=headers, expected_size=known.size, displayed_filename=name
        )
        file.flush()
        if not _has_checksum(partial, etag):
            partial.unlink()
            raise CheckpointError(f"{repository}: {name} arrived damaged, its checksum is wrong: download it again")
        partial.rename(whole)


def _has_checksum(path: Path, etag: str) -> bool:
    """Whether a file's contents match its etag, which for large files is their SHA-256; others aren't checked."""
    if not re.fullmatch(r"[0-9a-f]{64}", etag):
        return True
    return sha256(path) == etag


@contextmanager
def _clear_errors(repository: str) -> Iterator[None]:
    """Turns errors of a download into a CheckpointError of one line."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        yield
    except CheckpointError:
        raise
    except GatedRepoError:
        raise CheckpointError(
            f"{repository} has terms to accept: do so on its page on the hub, then log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"{repository} is neither a folder nor a repository you can read on the hub") from None
    except HFValidationError:
        raise CheckpointError(f"there is no folder {repository!r}, and no repository can have this name") from None
    except LocalEntryNotFoundError:  # the hub couldn't be reached
        raise CheckpointError(
            f"{repository} is not a folder, and there is no connection to the hub: check the network or give a folder"
        ) from None
    except Exception as error:  # the library's other errors, those of two HTTP clients, and the file system's
        raise CheckpointError(
            f"{repository} is not a folder, and can't be downloaded ({one_line(error)}); another attempt resumes it"
        ) from None
