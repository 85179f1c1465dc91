"""Does long work survive that its process is killed, that the disk is full, that a folder is read-only?

Starts the work in processes of their own and kills them, with all that they started: half of them at any moment, half
right before or soon after a file is opened, renamed or deleted. After each kill nothing that was finished may be lost,
and no half-written file be taken for a whole one. After one to three kills in the same folder the work runs to its end:
the result and the names of all files must be those of a run that nothing happened to.

Then the same where the disk becomes full at a random byte (a small file system in memory, if this user may mount one,
and a limit on the size of files), and where the folder is read-only: one line that says so, the older file as it was,
and a rerun that ends right.

    python scripts/prove_kills.py [--kills 300] [--seed 0] [--kind batch] [--full 10]
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Annotated

import typer

from tests.support.faults import Ended, Trial, some_kill
from tests.support.long_work import KINDS, Work, files

DISK_BYTES = 2**26
"""Size of the small file system, more than any work here needs."""

_MOST_KILLS = 3
"""Most kills before the work runs to its end."""


class Proof:
    """What is proven of one kind of work.

    Attributes:
        counts: What was done, for the report.
    """

    def __init__(self, work: Work, folder: Path, seed: int) -> None:
        """Runs the work once to its end, to compare with."""
        self.work, self.folder = work, folder
        self.rng = Random(f"{seed} {work.name}")
        self.counts = Counter[str]()
        for _ in range(2):  # the second run finds what the first has left, as all others do
            whole = self._trial("whole")
            self.whole = whole.run()
            if self.whole.code != 0:
                raise SystemExit(f"{work.name} doesn't work at all: {self.whole.errors}")
            self.expected, self.names = work.result(whole.folder), work.names(whole.folder)
            sizes = [len(content) for content in files(whole.folder).values()]
            self._end(whole, "whole")
        self.bytes, self.largest = sum(sizes), max(sizes)

    def kill(self, kills: int) -> None:
        """Kills it so many times."""
        while self.counts["kills"] < kills:
            trial, how = self._trial(), list[str]()
            for _ in range(self.rng.randint(1, _MOST_KILLS)):
                change, delay, seconds = some_kill(self.rng, self.whole)
                ended = trial.run(replace(trial.plan, change=change, delay=delay), seconds)
                self.counts.update(kills=ended.killed, near=ended.killed and bool(change))
                how.append(f"{seconds:.3f} s" if seconds is not None else f"change {change} + {delay:.3f} s")
            trial.complete(self.expected, self.names)
            self._end(trial, f"killed at {', '.join(how)}")

    def limit(self, times: int) -> None:
        """Limits the size of files."""
        for _ in range(times):
            trial, limit = self._trial(), self.rng.randrange(self.largest)
            self._failed(trial, trial.fail(replace(trial.plan, largest=limit)), f"files of at most {limit} bytes")

    def fill(self, times: int) -> None:
        """Fills the disk up to a few bytes."""
        for _ in range(times):
            room = self.rng.randrange(2 * self.bytes)
            with small_disk(self.folder / "disk") as disk:
                trial, ballast = Trial(self.work, disk / "trial"), disk / "ballast"
                ballast.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - room)))
                ended = trial.fail()
                ballast.unlink()
                self._failed(trial, ended, f"{room} bytes of room")

    def forbid(self) -> None:
        """Makes the folder read-only."""
        with small_disk(self.folder / "disk") as disk:
            trial = Trial(self.work, disk / "trial")
            before = files(trial.folder)
            mount("-o", "remount,ro", disk)
            ended = trial.fail()
            mount("-o", "remount,rw", disk)
            if files(trial.folder) != before:
                trial.problems.append("a read-only folder has changed")
            self._failed(trial, ended, "read-only")

    def _failed(self, trial: Trial, ended: Ended, how: str) -> None:
        self.counts.update(faults=1, refused="error: " in ended.errors)
        trial.complete(self.expected, self.names)
        self._end(trial, how)

    def _trial(self, name: str | None = None) -> Trial:
        return Trial(self.work, self.folder / (name or str(self.counts["trials"])))

    def _end(self, trial: Trial, how: str) -> None:
        self.counts.update(trials=1, wrong=bool(trial.problems))
        for problem in trial.problems:
            print(f"{self.work.name}, {how}: {problem}", flush=True)
        shutil.rmtree(trial.folder)


def mount(*arguments: object) -> None:
    """Runs the system's `mount`."""
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of DISK_BYTES in memory."""
    folder.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this user may mount a small file system."""
    try:
        with small_disk(folder):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def prove(kind: type[Work], folder: Path, seed: int, kills: int, full: int, mounting: bool) -> Counter[str]:
    """Proves one kind; returns what was done."""
    (folder / "shared").mkdir(parents=True)
    work = kind(folder / "shared")
    try:
        proof = Proof(work, folder, seed)
        proof.kill(kills)
        proof.limit(full)
        if mounting:
            proof.fill(full)
            proof.forbid()
    finally:
        work.close()
    return proof.counts


def main(
    kills: Annotated[int, typer.Option(help="How many kills in all.")] = 300,
    seed: Annotated[int, typer.Option(help="What they are drawn with.")] = 0,
    kind: Annotated[list[str] | None, typer.Option(help="Which kinds of work; all by default.")] = None,
    full: Annotated[int, typer.Option(help="How often a disk is full for each kind, and files limited.")] = 10,
) -> None:
    """Prints everything that is wrong, and a table; exits with 1 if anything is wrong."""
    kinds = [it for it in KINDS if not kind or it.name in kind]
    if not kinds:
        raise typer.BadParameter(f"expected some of {', '.join(it.name for it in KINDS)}", param_hint="--kind")
    rows, total = [], Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        if not (mounting := can_mount(folder / "disk")):
            print("this user may mount no file system: only the size of files is limited, and nothing is read-only")
        for it in kinds:
            own = -(-kills * it.share // sum(other.share for other in kinds))
            found = prove(it, folder / it.__name__, seed, own, full, mounting)
            total += found
            rows.append((it.name, found))
            print(f"{it.name}: {dict(found)}", flush=True)
    print("\n| work | kills | of them near a change of a file | full disks and read-only folders | refused | wrong |")
    print("|---|---|---|---|---|---|")
    for what, found in [*rows, ("in all", total)]:
        numbers = (found[count] for count in ("kills", "near", "faults", "refused", "wrong"))
        print(f"| {what} | {' | '.join(map(str, numbers))} |")
    raise SystemExit(total["wrong"] > 0)


if __name__ == "__main__":
    typer.run(main)
