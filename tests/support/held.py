"""What this process holds: memory, threads, descriptors, tasks, files. And errors that nobody is told."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_mtp.session.threads import ModelThread


@dataclass(frozen=True)
class Held:
    """What is held at one moment, after garbage was collected.

    Attributes:
        resident: Bytes of the process that are in memory.
        active: Bytes of MLX's arrays.
        pool: Bytes that MLX keeps of freed arrays.
        things: Running threads, open descriptors, unfinished tasks of asyncio, and files, each by a name, which several
            may share. Threads that wait for another model (session/threads.py) don't count.
    """

    resident: int
    active: int
    pool: int
    things: Counter[str]

    @classmethod
    def now(cls, folder: Path) -> Held:
        """What is held now; `folder` is where the process puts temporary files."""
        gc.collect()
        active, pool = mx.get_active_memory(), mx.get_cache_memory()
        things = Counter[str]()
        idle = {it.thread for it in ModelThread.idle}
        things.update(f"thread {it.name}" for it in threading.enumerate() if it not in idle)
        things.update(f"descriptor of {it}" for it in _descriptors())
        tasks = [it for it in gc.get_objects() if issubclass(type(it), asyncio.Task)]
        things.update(f"task {it.get_coro()!r:.60}".split(" at 0x")[0] for it in tasks if not it.done())
        things.update(f"file {it.relative_to(folder)}" for it in folder.rglob("*"))
        return cls(resident_bytes(), active, pool, things)

    def since(self, before: Held) -> list[str]:
        """What has come since an earlier moment and is still there."""
        return [f"{count} x {name}" for name, count in sorted((self.things - before.things).items())]


def resident_bytes() -> int:
    """Bytes of this process that are in memory."""
    shown = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True)
    return int(shown.stdout) * 1024


_ARENA_MAX = -8  # M_ARENA_MAX of glibc's malloc.h


def use_one_arena() -> None:
    """Has glibc allocate from one place; before any thread is started.

    Else threads share up to eight arenas for each core, each with pages that are partly in use and can't be returned: a
    process grows as long as threads find new company in them, though it loses nothing.
    """
    if libc := _glibc():
        libc.mallopt(_ARENA_MAX, 1)


def return_freed() -> None:
    """Has glibc return the freed memory that it keeps, as much as the process has ever needed at a time."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library if it is glibc, whose allocator has these knobs."""
    libc = ctypes.CDLL(None)
    return libc if sys.platform == "linux" and hasattr(libc, "malloc_trim") else None


def _descriptors() -> Iterator[str]:
    """What each open descriptor is of, where the system says it."""
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):  # that of the listing itself is closed again
            os.fstat(int(name))
            try:
                yield re.sub(r"\d+", "", os.readlink(f"/proc/self/fd/{name}"))
            except OSError:
                yield "something"


class _Told(logging.Handler):
    def __init__(self, heard: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self._heard.append(f"{record.name} logs: {self.format(record)}")


@contextmanager
def listening() -> Iterator[list[str]]:
    """Collects what is logged as an error, and exceptions that end threads or come where nothing can take them."""
    heard: list[str] = []
    handler, hooks = _Told(heard), (threading.excepthook, sys.unraisablehook)
    logging.getLogger().addHandler(handler)
    threading.excepthook = lambda args: heard.append(f"{args.thread} ends with {args.exc_value!r}")
    sys.unraisablehook = lambda args: heard.append(f"{args.object!r} can't raise {args.exc_value!r}")
    try:
        yield heard
    finally:
        logging.getLogger().removeHandler(handler)
        threading.excepthook, sys.unraisablehook = hooks
