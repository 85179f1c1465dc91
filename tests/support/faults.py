"""Runs long work while something goes wrong: it is killed, the disk is full, the folder is read-only."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from .killed import Plan
from .long_work import ROOT, Work

SECONDS = 600
"""Longest run, for a machine that does much else."""


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        code: Exit code; negative for a signal.
        errors: What it wrote to stderr.
        changes: Changes of files that it has made; 0 if it was killed.
        seconds: How long it took.
    """

    code: int
    errors: str
    changes: int
    seconds: float

    @property
    def killed(self) -> bool:
        """Whether it was killed."""
        return self.code == -signal.SIGKILL


def run(work: Work, folder: Path, plan: Plan, seconds: float | None = None) -> Ended:
    """Runs a work in its own process group.

    Args:
        work: The work.
        folder: Where its results go.
        plan: When it kills itself, and what it may write.
        seconds: When it is killed from outside; None for never.
    """
    with tempfile.TemporaryDirectory() as beside:
        report = Path(beside, "changes")
        command = replace(plan, report=str(report)).command(*work.arguments(folder))
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **work.environment(folder)}
        keyboard, screen = pty.openpty()
        begun = time.monotonic()
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=screen if work.typed else subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
            )  # fmt: skip
            os.write(keyboard, work.typed.format(folder=folder).encode())
            try:
                _, errors = process.communicate(timeout=SECONDS if seconds is None else seconds)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                _, errors = process.communicate()
                if seconds is None:
                    raise AssertionError(f"{work.name} takes more than {SECONDS} s") from None
        finally:
            os.close(keyboard)
            os.close(screen)
        written = report.read_text() if report.exists() else ""  # it may be killed right there
        return Ended(process.returncode, errors, int(written or 0), time.monotonic() - begun)


class Trial:
    """One folder: what went wrong in it, and what must be found in it from then on."""

    def __init__(self, work: Work, folder: Path) -> None:
        """Makes the folder, with what an earlier run has left."""
        self.work, self.folder = work, folder
        self.plan = Plan(str(folder))
        self.problems: list[str] = []
        self._finished: dict[str, object] = {}
        folder.mkdir(exist_ok=True)
        work.begin(folder)

    def run(self, plan: Plan | None = None, seconds: float | None = None) -> Ended:
        """Runs the work, and checks the folder."""
        ended = run(self.work, self.folder, plan or self.plan, seconds)
        if not ended.killed and "Traceback" in ended.errors:
            self.problems.append(f"a traceback: {ended.errors[-600:]}")
        try:
            self.problems += self.work.wrong(self.folder)
            now = self.work.finished(self.folder)
            lost = [name for name, it in self._finished.items() if now.get(name) != it]
            self.problems += [f"finished, and not there any more: {name}" for name in lost]
            self._finished.update(now)
        except Exception as error:  # half a file can give any
            self.problems.append(f"{type(error).__name__}: {error}")
        return ended

    def fail(self, plan: Plan | None = None) -> Ended:
        """Runs the work where it can't write all: that must be said in a line, unless all did fit."""
        ended = self.run(plan)
        said = [line for line in ended.errors.splitlines() if line.startswith("error: ")]
        if ended.code not in (0, 1) or (ended.code == 1 and len(said) != 1):
            self.problems.append(f"exit code {ended.code}, and it says {ended.errors[-300:]!r}")
        return ended

    def complete(self, expected: object, names: set[str]) -> None:
        """Runs the work to its end, and compares what it leaves with that of a run to which nothing happened."""
        ended = self.run()
        if ended.code != 0:
            self.problems.append(f"the rerun ends with {ended.code}: {ended.errors[-300:]!r}")
            return
        if self.work.result(self.folder) != expected:
            self.problems.append("the rerun's result is another one")
        left = self.work.names(self.folder)
        if left != names:
            self.problems.append(f"left behind: {sorted(left - names)}, missing: {sorted(names - left)}")


def some_kill(rng: Random, whole: Ended) -> tuple[int, float, float | None]:
    """Draws when a run is killed: half of them at any moment, half right before or soon after a change of a file.

    Args:
        rng: The source of randomness.
        whole: A run that nothing happened to.

    Returns:
        `change` and `delay` of a `Plan`, and the argument `seconds` of `run`.
    """
    if rng.random() < 0.5:
        return 0, 0.0, rng.uniform(0.0, whole.seconds)
    return rng.randint(1, whole.changes), rng.choice((0.0, rng.uniform(0.0, 0.02))), None
