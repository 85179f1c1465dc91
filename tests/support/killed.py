"""A process that is killed in the middle of its work, with all that it started.

    python -m tests.support.killed PLAN mlx-mtp ARGUMENTS...
    python -m tests.support.killed PLAN prompts FILE COUNT

PLAN is a `Plan` as JSON. Changes of files are counted by Python's audit events, which come before a file is opened for
writing, renamed or deleted; what C++ code writes, and the bytes of a write, aren't seen.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROMPTS = ("Who are you?", "Tell me a short story about a fox, an owl and a river, and then what they say.")
"""What `prompts` saves by turns in the same file."""

FILE_BYTES, CHUNK_BYTES = 400_000, 20_000
"""Sizes of the pieces in which `convert` writes, so that a tiny model has many."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_EVENTS = {f"os.{name}" for name in ("rename", "remove", "rmdir", "mkdir", "link", "symlink", "chmod", "truncate")}


@dataclass(frozen=True)
class Plan:
    """When a process is killed, and what it may write.

    Attributes:
        folder: Changes of files in this folder are counted.
        change: The change before which it is killed, from 1; 0 for never.
        delay: Seconds between that change and the kill.
        largest: Largest file that it can write, in bytes, as if the disk were full then; None for no limit.
        report: A file that receives the number of changes, unless it is killed.
    """

    folder: str
    change: int = 0
    delay: float = 0.0
    largest: int | None = None
    report: str | None = None

    def command(self, *arguments: object) -> list[str]:
        """What starts such a process."""
        return [sys.executable, "-m", __name__, json.dumps(asdict(self)), *map(str, arguments)]


class Counter:
    """An audit hook that counts changes, and kills the process."""

    def __init__(self, plan: Plan) -> None:
        """Counts from now on."""
        self.plan, self.count = plan, 0
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._is_change(event, arguments):
            return
        self.count += 1
        if self.count == self.plan.change:
            if self.plan.delay:
                threading.Timer(self.plan.delay, _die).start()
            else:
                _die()

    def _is_change(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            return bool(arguments[2] & _WRITING) and self._is_inside(arguments[0])
        if event not in _EVENTS:
            return False
        in_folder = arguments[-1] != -1 and event != "os.truncate"  # a path that begins in an open folder: rmtree's
        return in_folder or any(map(self._is_inside, arguments[:2]))

    def _is_inside(self, path: object) -> bool:
        return isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(self.plan.folder)


def _die() -> None:
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _command_line(arguments: list[str]) -> None:
    """The command line, with small pieces of work."""
    if arguments[0] == "convert":
        import weights_convert.plan as plan

        plan.FILE_BYTES, plan.CHUNK_BYTES = FILE_BYTES, CHUNK_BYTES
    elif arguments[0] == "get":
        import huggingface_hub.constants

        huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 16_384
    elif arguments[0] == "tune":
        from mlx_mtp.tuning import costs

        costs._SWEEPS, costs._SECONDS = 1, 0.0
    from mlx_mtp.cli import main

    sys.argv = ["mlx-mtp", *arguments]
    main()


def _save_prompts(file: str, count: str) -> None:
    import mlx_mtp

    with mlx_mtp.load() as lm:
        for i in range(int(count)):
            try:
                lm.save_prompt(PROMPTS[i % 2], file)
            except (mlx_mtp.MTPError, OSError) as error:
                sys.exit(f"error: {error}")


def main() -> None:
    """Runs the work."""
    plan = Plan(**json.loads(sys.argv[1]))
    what, *arguments = sys.argv[2:]
    counter = Counter(plan)
    if plan.largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan.largest, resource.RLIM_INFINITY))
    try:
        if what == "prompts":
            _save_prompts(*arguments)
        else:
            _command_line(arguments)
    finally:
        if plan.report:
            Path(plan.report).write_text(str(counter.count))


if __name__ == "__main__":
    main()
