"""Converts a Hugging Face folder to an MLX folder, quantised or not. mlx-lm can load a converted target too.

Weights are read, converted and written in chunks of rows, so memory doesn't grow with the model. The result is written
to `DST.partial` and renamed when it is complete, so that DST is never incomplete. After an interruption the finished
files stay there, and the same conversion continues with them.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
"""Called with a parameter's name, the bytes written so far, and the bytes in total."""

_JOURNAL = "conversion.json"
_UNQUANTISED = "unquantised"
_COPIED = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Conversion:
    """A checked conversion, ready to run; made by `prepare`.

    Attributes:
        source: Folder of the original.
        destination: Folder to create.
        plan: Its contents.
        done: Whether the destination is already complete.
        learning: How the quantised weights are learnt; None if they are rounded to nearest.
        scheme: Quantisation of the matrices, or None.
        dtype: See `prepare`.
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
        """The folder in which the result is written before it is renamed."""
        return self.destination.with_name(f"{self.destination.name}.partial")

    def run(self, progress: Progress | None = None) -> Path:
        """Runs the conversion, or continues an interrupted one.

        Args:
            progress: Called while weights are written.

        Returns:
            The new folder.

        Raises:
            CheckpointError: The source can't be read, or the destination can't be written.
        """
        if self.done:
            with suppress(OSError):  # it is left if the process was killed at the end; the folder may be read-only
                (self.destination / _JOURNAL).unlink()
            log.info("%s is there already", self.destination)
            return self.destination
        try:
            with _locked(self.aside):
                self._run(progress)
        except OSError as error:
            culprit, resume = error.filename or self.destination, ""
            if Path(culprit).is_relative_to(self.aside):
                culprit = self.destination  # the user doesn't know the partial folder
            if os.path.isdir(self.aside):
                resume = "; the same command continues"
            raise CheckpointError(f"{culprit} can't be read or written: {error.strerror or error}{resume}") from error
        return self.destination

    def _run(self, progress: Progress | None) -> None:
        aside, plan = self.aside, self.plan
        finished = _finished_files(aside, plan)
        try:
            if self.learning and len(finished) < len(plan.files):
                finished.clear()  # all learnt weights must come from the same run
                plan = self._learned(self.learning)
            _check_space(aside, plan, finished)
            _write_weights(aside, plan, finished, progress)
            _write_rest(aside, self.plan, self.source, finished)
        finally:
            if not finished:
                _delete(aside)  # there is nothing to continue with
        if self.destination.exists():
            self.destination.rmdir()
        aside.rename(self.destination)
        (self.destination / _JOURNAL).unlink()

    def _learned(self, learning: Learning) -> Plan:
        """The plan with learnt weights. Makes a temporary unquantised conversion in the partial folder."""
        assert self.scheme is not None
        data = learning.sequences(self.source)
        plain = prepare(self.source, self.aside / _UNQUANTISED, None, self.dtype)
        learning.check_memory(plain.plan.total)
        try:
            plain.run()
            return learn(self.plan, plain.destination, data, learning.method, self.scheme.common)
        finally:
            shutil.rmtree(plain.destination, ignore_errors=True)


def prepare(
    source: str | Path,
    destination: str | Path,
    scheme: Scheme | None = None,
    dtype: str | None = None,
    merged: bool = False,
    learning: Learning | None = None,
) -> Conversion:
    """Plans the conversion of a target or a drafter, and checks that it can be run.

    Args:
        source: Folder or hub repository; its weights are downloaded.
        destination: Folder to create. It must not exist, be empty, or be the result of the same conversion.
        scheme: Quantisation of the matrices; None quantises nothing.
        dtype: Type of unquantised weights, "float32", "bfloat16" or "float16"; None keeps the stored type.
        merged: Whether to convert the drafter that is merged into the source, instead of the target.
        learning: How a target's quantised weights are learnt; None rounds them to nearest.

    Raises:
        CheckpointError: The source can't be used, or the destination is another folder or lies in the source.
    """
    if learning:
        learning.check(scheme)
    destination = expanded(destination)
    taken = os.path.lexists(destination) and (not os.path.isdir(destination) or bool(listed(destination)))
    in_the_way = CheckpointError(f"{destination} exists and isn't the result of this conversion: choose another name")
    if taken and not os.path.isfile(destination / files.SUMS):
        raise in_the_way  # fail before downloading anything
    place = hub.find(source)
    described = read_drafter(place.folder) if merged else read(place.folder)
    check_original(described)  # fail before downloading the weights
    folder = place.fetch_weights()
    plan = make_plan(described, scheme, dtype)
    if learning and scheme:
        plan = learning.planned(plan, scheme)
    done = _is_result(destination, plan)
    if taken and not done:
        raise in_the_way
    if Path(os.path.realpath(destination)).is_relative_to(folder.resolve()):  # `resolve` raises for circular links
        raise CheckpointError(f"{destination} lies in the folder that is to be converted: choose another place")
    return Conversion(folder, destination, plan, done, learning, scheme, dtype)


def convert(
    source: str | Path, destination: str | Path, scheme: Scheme | None = None, dtype: str | None = None
) -> Path:
    """`prepare` and `Conversion.run` in one."""
    return prepare(source, destination, scheme, dtype).run()


def _is_result(destination: Path, plan: Plan) -> bool:
    """Whether a folder is the complete result of a plan."""
    if not os.path.isfile(destination / files.SUMS):
        return False
    ours = read_json(destination / "config.json").get("mlx_mtp")
    return isinstance(ours, dict) and ours.get(FINGERPRINT) == plan.fingerprint


@contextmanager
def _locked(aside: Path) -> Iterator[None]:
    """Creates the folder, and holds a lock on it.

    Raises:
        CheckpointError: Another process holds the lock.
    """
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
    """The files that an interrupted conversion has finished, with their checksums. Deletes all others.

    Raises:
        CheckpointError: The folder isn't that of a conversion.
    """
    # The process may have been killed when it wrote the first journal.
    if not (aside / _JOURNAL).is_file() and any(not path.name.startswith(_JOURNAL) for path in listed(aside)):
        raise CheckpointError(f"{aside} is in the way, and isn't an interrupted conversion: move it")
    done = _recorded_files(aside, plan)
    _write_journal(aside, plan, done)
    _delete_unquantised(aside)
    for path in listed(aside):
        if path.name != _JOURNAL and path.name not in done:
            path.unlink()
    return done


def _recorded_files(aside: Path, plan: Plan) -> dict[str, str]:
    """The files of a plan that are as the journal says, with their checksums; none if the journal is another plan's.

    Raises:
        CheckpointError: The journal isn't JSON, or the folder can't be read.
    """
    journal = read_json(aside / _JOURNAL, required=False)
    done: dict[str, str] = {}
    if journal.get("fingerprint") == plan.fingerprint:
        # If the journal is damaged, all files are written again.
        recorded = journal.get("files")
        for name in plan.files:
            digest = recorded.get(name) if isinstance(recorded, dict) else None
            if digest and (aside / name).is_file() and sha256(aside / name) == digest:
                done[name] = digest
        log.info("continuing %s: %d of %d files are complete", aside, len(done), len(plan.files))
    elif journal:
        log.warning("%s is from another source or other options: starting again", aside)
    return done


def _delete(aside: Path) -> None:
    """Deletes a partial folder as far as possible.

    The journal goes last: a process that is killed here leaves a folder that the next one knows as a conversion's.
    """
    with suppress(OSError):
        _delete_unquantised(aside)
        for path in sorted(aside.iterdir(), key=lambda path: path.name == _JOURNAL):
            path.unlink()
        aside.rmdir()


def _delete_unquantised(aside: Path) -> None:
    """Deletes what learning weights has left in a partial folder: a conversion, complete or not."""
    for path in aside.glob(f"{_UNQUANTISED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _write_journal(aside: Path, plan: Plan, done: dict[str, str]) -> None:
    with replacing(aside / _JOURNAL) as unfinished:
        _write_json(unfinished, {"fingerprint": plan.fingerprint, "files": done})


def _check_space(aside: Path, plan: Plan, done: dict[str, str]) -> None:
    needed = sum(file_bytes(parameters) for name, parameters in plan.files.items() if name not in done)
    if needed > (free := shutil.disk_usage(aside).free):
        raise CheckpointError(
            f"{format_bytes(needed)} are to be written, and {aside.parent} has {format_bytes(free)} free: make room"
        )


def _write_weights(aside: Path, plan: Plan, done: dict[str, str], progress: Progress | None) -> None:
    """Writes the missing weight files, and adds each complete one to `done` and to the journal."""
    written = 0

    def step(name: str, added: int) -> None:
        nonlocal written
        written += added
        if progress:
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
    """Writes all files except the weights, then the checksums of all files."""
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
