"""Watches over what reading a file does besides reading it."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Guard:
    """An audit hook that notes what a case must not do. Hooks can't be removed: it sleeps outside of `watching`."""

    def __init__(self, folder: Path) -> None:
        """Allows reading in this folder, and of Python's own files."""
        own = [sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *sys.path, "/usr/share/zoneinfo"]
        self._folder, self._own = str(folder), tuple(os.path.realpath(path) for path in own if path)
        self._awake, self.found = False, list[str]()
        sys.addaudithook(self._hook)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Notes what happens in the block, in `found`."""
        self.found.clear()
        self._awake = True
        try:
            yield
        finally:
            self._awake = False

    def _is_own(self, path: str) -> bool:
        return os.path.realpath(path).startswith(self._own)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._awake:
            return
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path, mode = os.fsdecode(arguments[0]), str(arguments[1] or "")
            inside = path.startswith(self._folder)
            if set(mode) & set("wax+") or (inside and path.endswith((".py", ".bin", ".pt"))):
                self.found.append(f"opens {path!r} with {mode!r}")
            elif not (inside or path == os.devnull or (os.path.isabs(path) and self._is_own(path))):
                self.found.append(f"reads {path!r}")
        elif event == "import" and "evil" in str(arguments[0]):
            self.found.append(f"imports {arguments[0]}")
        elif event.partition(".")[0] in ("socket", "subprocess", "shutil", "ctypes", "pickle") or event in (
            "os.system", "os.exec", "os.fork", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.link",
            "os.symlink", "os.truncate", "os.posix_spawn", "os.putenv",
        ):  # fmt: skip
            self.found.append(f"{event}{arguments!r:.200}")
