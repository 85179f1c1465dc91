"""Progress of downloading and loading a model, for the callback of `api.load`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_POLL_SECONDS = 0.2
"""Seconds between two looks at a download: often enough for a progress bar, and a few `stat` calls each."""

PARTIAL = ".mlx-mtp.incomplete"
"""End of the names of files that an earlier attempt has begun, and that the next one goes on with."""


@dataclass(frozen=True)
class Progress:
    """How far a download, or the loading of a model, is.

    `api.load` goes through these stages: downloads of target and drafter, if they are in a repository and not in the
    hub's cache yet, then loading of the target and of the drafter. The first report of a stage has `done` at what was
    there before, the last one has `done == total`.

    Attributes:
        stage: "download", or "load": reading weights into memory, and quantising them if that is asked for.
        model: The repository; for a folder elsewhere than in the hub's cache the end of its path.
        done: Bytes so far.
        total: Bytes at the end of the stage; of a download those of its files, of a model those it has in memory.
    """

    stage: Literal["download", "load"]
    model: str
    done: int
    total: int


ProgressCallback = Callable[[Progress], None]
"""Called with each report; see `api.load`."""


@contextmanager
def watching(folder: Path, model: str, total: int, callback: ProgressCallback) -> Iterator[None]:
    """Reports the progress of a download that runs meanwhile, by the bytes that arrive in a folder.

    Looks at the files because that works for all ways to download, in all versions of huggingface_hub. A thread calls
    the callback.

    Args:
        folder: The folder that receives the files, of whatever names; it needn't exist yet.
        model: The repository.
        total: Bytes that are to arrive, those of earlier attempts included.
        callback: Receives the reports. What it raises is raised at the end of the block.
    """
    before, ended, failed = bytes_in(folder), threading.Event(), list[Exception]()
    arrived = bytes_in(folder, f"*{PARTIAL}")

    def report(done: int) -> None:
        callback(Progress("download", model, min(max(done, 0), total), total))

    def watch() -> None:
        try:
            report(arrived)
            while not ended.wait(_POLL_SECONDS):
                report(arrived + bytes_in(folder) - before)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=watch, name="mlx_mtp progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if failed:
        raise failed[0]
    report(total)


def bytes_in(folder: Path, pattern: str = "*") -> int:
    """Bytes of the files in a folder whose names match a pattern; 0 without a folder."""
    total = 0
    for path in folder.glob(pattern):
        try:
            total += path.stat().st_size
        except OSError:  # the download has renamed it meanwhile
            continue
    return total
