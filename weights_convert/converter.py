"""A Hugging Face folder becomes an MLX folder, quantised or not, that mlx_mtp and (a target) mlx-lm load.

Weights are read, converted and written some rows at a time, so memory doesn't grow with the model. The result is made
in `DST.partial` and renamed when it is complete: a folder of the wanted name is never half a model. What an
interrupted conversion has finished stays there, and the same conversion goes on with it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlx_mtp.checkpoint import hub
from mlx_mtp.checkpoint.description import read, read_drafter
from mlx_mtp.checkpoint.quantization import Scheme
from mlx_mtp.checkpoint.sizes import format_bytes
from mlx_mtp.errors import CheckpointError
from mlx_mtp.files import expanded, listed, read_json, replacing, sha256

from . import files
from .learned import Learning, learn
from .plan import FINGERPRINT, Plan, check_original, file_bytes, make_plan

log = logging.getLogger("mlx_mtp.convert")

Progress = Callable[[str, int, int], None]
"""Told a parameter's name, the bytes written so far, and the bytes that there will be."""

_JOURNAL = "conversion.json"
_COPIED = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Conversion:
    """A conversion that can be made; from `prepare`.

    Attributes:
        source: Folder of the original.
        destination: Folder to make.
        plan: What it will hold.
        done: Whether it is there already.
        learning: How the weights are learnt; None if they are rounded plainly.
        scheme: How matrices are quantised.
        dtype: As for `prepare`.
    """

    source: Path
    destination: Path
    plan: Plan
    done: bool
    learning: Learning | None = None
    scheme: Scheme | None = None
    dtype: str | None = None

    @property
    def aside(self) -> Path:
        """Where it is made before it is renamed."""
        return self.destination.with_name(f"{self.destination.name}.partial")

    def run(self, progress: Progress = lambda name, written, total: None) -> Path:
        """Makes it, or goes on where it was interrupted.

        Args:
            progress: Called while weights are written.

        Returns:
            The new folder.

        Raises:
            CheckpointError: The source can't be read, or the destination can't be written.
        """
        if self.done:
            log.info("%s is there already", self.destination)
            return self.destination
        try:
            with _locked(self.aside):
                self._run(progress)
        except OSError as error:
            culprit, kept = error.filename or self.destination, ""
            if Path(culprit).is_relative_to(self.aside):
                culprit = self.destination  # nobody asked for what it is made in
            if os.path.isdir(self.aside):
                kept = "; the same command goes on where this one stopped"
            raise CheckpointError(f"{culprit} can't be read or written: {error.strerror or error}{kept}") from error
        return self.destination

    def _run(self, progress: Progress) -> None:
        aside, plan = self.aside, self.plan
        finished = _finished_files(aside, plan)
        try:
            if self.learning and len(finished) < len(plan.files):
                finished.clear()  # what is learnt belongs together
                plan = self._learned(self.learning)
            _check_space(aside, plan, finished)
            _write_weights(aside, plan, finished, progress)
            _write_rest(aside, self.plan, self.source, finished)
        finally:
            if not finished:
                shutil.rmtree(aside, ignore_errors=True)  # nothing in it is worth going on with
        if self.destination.exists():
            self.destination.rmdir()
        aside.rename(self.destination)
        (self.destination / _JOURNAL).unlink()

    def _learned(self, learning: Learning) -> Plan:
        """The plan with learnt weights. For that an unquantised conversion lies beside the destination meanwhile."""
        assert self.scheme is not None
        data = learning.sequences(self.source)
        beside = self.destination.with_name(f"{self.destination.name}.unquantised")
        plain = prepare(self.source, beside, None, self.dtype)
        learning.check_memory(plain.plan.total)
        try:
            plain.run()
            return learn(self.plan, beside, data, learning.method, self.scheme.common)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def prepare(
    source: str | Path,
    destination: str | Path,
    scheme: Scheme | None = None,
    dtype: str | None = None,
    merged: bool = False,
    learning: Learning | None = None,
) -> Conversion:
    """Plans the conversion of a target or a drafter, and checks that it can be made.

    Args:
        source: Folder or hub repository.
        destination: Folder to make; it must not exist yet, be empty, or be what this very conversion made.
        scheme: How matrices are quantised; None leaves all as it is.
        dtype: Type of what isn't quantised, "float32", "bfloat16" or "float16"; None keeps the stored one.
        merged: Of a target that has its drafter merged into it, convert the drafter and not the target.
        learning: How a target's quantised weights are learnt; None to round them plainly.

    Raises:
        CheckpointError: The source can't be used, or the destination is something else or a part of the source.
    """
    if learning:
        learning.check(scheme)
    destination = expanded(destination)
    taken = os.path.lexists(destination) and (not os.path.isdir(destination) or bool(listed(destination)))
    in_the_way = CheckpointError(f"{destination} exists already, from something else: choose another name")
    if taken and not os.path.isfile(destination / files.SUMS):
        raise in_the_way  # before anything is downloaded
    place = hub.find(source)
    described = read_drafter(place.folder) if merged else read(place.folder)
    check_original(described)  # before its weights are downloaded
    folder = place.fetch_weights()
    plan = make_plan(described, scheme, dtype)
    if learning and scheme:
        plan = learning.planned(plan, scheme)
    done = _is_result(destination, plan)
    if taken and not done:
        raise in_the_way
    if Path(os.path.realpath(destination)).is_relative_to(folder.resolve()):  # `resolve` stumbles over odd links
        raise CheckpointError(f"{destination} lies in the folder that is to be converted: choose another place")
    return Conversion(folder, destination, plan, done, learning, scheme, dtype)


def convert(
    source: str | Path, destination: str | Path, scheme: Scheme | None = None, dtype: str | None = None
) -> Path:
    """`prepare` and `Conversion.run` in one."""
    return prepare(source, destination, scheme, dtype).run()


def _is_result(destination: Path, plan: Plan) -> bool:
    """Whether a folder is what this plan makes."""
    if not os.path.isfile(destination / files.SUMS):
        return False
    ours = read_json(destination / "config.json").get("mlx_mtp")
    return isinstance(ours, dict) and ours.get(FINGERPRINT) == plan.fingerprint


@contextmanager
def _locked(aside: Path) -> Iterator[None]:
    """Makes the folder, and keeps other conversions out of it."""
    aside.mkdir(parents=True, exist_ok=True)
    handle = os.open(aside, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{aside} is in use: another conversion to this place is running") from None
        yield
    finally:
        os.close(handle)


def _finished_files(aside: Path, plan: Plan) -> dict[str, str]:
    """Files that an interrupted conversion has finished, with their checksums. All others are deleted."""
    if listed(aside) and not (aside / _JOURNAL).is_file():
        raise CheckpointError(f"{aside} is in the way, and holds no interrupted conversion: move it")
    journal = read_json(aside / _JOURNAL, required=False)
    done: dict[str, str] = {}
    if journal.get("fingerprint") == plan.fingerprint:
        # Of a journal that is damaged nothing is taken up: its files are made again.
        noted = journal.get("files")
        for name in plan.files:
            digest = noted.get(name) if isinstance(noted, dict) else None
            if digest and (aside / name).is_file() and sha256(aside / name) == digest:
                done[name] = digest
        log.info("going on with %s: %d of %d files are there", aside, len(done), len(plan.files))
    elif journal:
        log.warning("%s is of another source, or of other options: starting again", aside)
    _write_journal(aside, plan, done)
    for path in listed(aside):
        if path.name != _JOURNAL and path.name not in done:
            path.unlink()
    return done


def _write_journal(aside: Path, plan: Plan, done: dict[str, str]) -> None:
    with replacing(aside / _JOURNAL) as unfinished:
        _write_json(unfinished, {"fingerprint": plan.fingerprint, "files": done})


def _check_space(aside: Path, plan: Plan, done: dict[str, str]) -> None:
    needed = sum(file_bytes(parameters) for name, parameters in plan.files.items() if name not in done)
    if needed > (free := shutil.disk_usage(aside).free):
        raise CheckpointError(
            f"{format_bytes(needed)} are to be written, and {aside.parent} has {format_bytes(free)} free"
        )


def _write_weights(aside: Path, plan: Plan, done: dict[str, str], progress: Progress) -> None:
    """Writes all files that aren't there, and enters each in `done` and in the journal when it is complete."""
    written = 0

    def step(name: str, added: int) -> None:
        nonlocal written
        written += added
        progress(name, written, plan.total)

    for name, parameters in plan.files.items():
        if name in done:
            step(name, file_bytes(parameters))
            continue
        with replacing(aside / name) as unfinished:
            digest = files.write_safetensors(unfinished, parameters, step)
        done[name] = digest
        _write_journal(aside, plan, done)


def _write_rest(aside: Path, plan: Plan, folder: Path, done: dict[str, str]) -> None:
    """Writes all files but the weights, then the checksums of all."""
    _write_json(aside / "config.json", plan.config)
    if len(plan.files) > 1:
        weight_map = {
            entry.name: name
            for name, group in plan.files.items()
            for parameter in group
            for entry in parameter.entries()
        }
        index = {"metadata": {"total_size": plan.total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(aside / "model.safetensors.index.json", index)
    for name in _COPIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, aside / name)
    sums = {path.name: done.get(path.name) or sha256(path) for path in listed(aside) if path.name != _JOURNAL}
    files.write_sums(aside, sums)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
