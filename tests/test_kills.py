"""Processes that are killed, and disks that are full: nothing finished is lost, and nothing is left behind.

scripts/prove_kills.py does the same at random moments, hundreds of times, for all kinds of work.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub.utils import WeakFileLock

from mlx_mtp.checkpoint.download import weights
from mlx_mtp.cli.chatting.store import Store
from mlx_mtp.errors import CheckpointError
from mlx_mtp.files import replacing
from mlx_mtp.tuning.choose import Option
from mlx_mtp.tuning.plot import write_plot
from tests.support.command_line import run
from tests.support.faults import Trial
from tests.support.killed import FILE_BYTES
from tests.support.long_work import Batch, Convert, files
from tests.support.tiny_checkpoints import make_pair
from weights_convert import converter


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared"


def test_a_conversion_that_was_killed_runs_to_its_end(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    work = Convert(shared)
    whole, trial = Trial(work, tmp_path / "whole"), Trial(work, tmp_path / "killed")
    monkeypatch.setattr("weights_convert.plan.FILE_BYTES", FILE_BYTES)
    assert run(*work.arguments(whole.folder)[1:]).returncode == 0
    for change in (15, 16, 17):  # each run goes on where the one before was killed
        assert trial.run(replace(trial.plan, change=change)).killed
    trial.complete(work.result(whole.folder), work.names(whole.folder))
    assert not trial.problems


def test_a_batch_that_is_killed_twice_and_then_finds_the_disk_full(shared: Path, tmp_path: Path):
    work = Batch(shared)
    trial = Trial(work, tmp_path / "new")
    for change in (2, 3):
        assert trial.run(replace(trial.plan, change=change)).killed
    failed = trial.fail(replace(trial.plan, largest=3_000))
    output = tmp_path / "new" / "out.jsonl"
    assert f"error: {output} can't be written: File too large; the same command continues" in failed.errors
    kept = work.finished(trial.folder)
    assert 0 < len(kept) < 16 and not trial.problems
    assert run(*work.arguments(trial.folder)[1:]).returncode == 0
    assert work.finished(trial.folder).items() >= kept.items() and work.names(trial.folder) == {"out.jsonl"}
    assert [index for index, _, _ in work.result(trial.folder)] == list(range(16))


def test_an_output_that_ends_in_its_first_word(tmp_path: Path):
    """As much as did fit on a full disk."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Who are you?", "max_tokens": 3}\n')
    output.write_text('{"ind')
    assert run("batch", source, "-o", output).returncode == 0
    assert json.loads(output.read_text())["index"] == 0


def leftover(folder: Path, name: str) -> Path:
    path = folder / f"{name}.0123456789abcdef.partial"
    path.write_text("hal")
    return path


def test_leftovers_of_a_file_are_deleted_by_the_next_attempt(tmp_path: Path):
    path, others = tmp_path / "file.json", [leftover(tmp_path, "other.json"), tmp_path / "file.json.partial"]
    others[1].write_text("the user's own")
    leftover(tmp_path, "file.json")
    with replacing(path, ".safetensors") as first, replacing(path) as second:  # those in use stay
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and sorted(tmp_path.iterdir()) == sorted([path, *others])


def test_a_conversion_that_was_killed_at_its_edges(tmp_path: Path):
    source = make_pair("e2b", tmp_path)[0]
    expected = files(converter.convert(source, tmp_path / "expected"))
    new, aside = tmp_path / "new", tmp_path / "new.partial"
    aside.mkdir()
    leftover(aside, "conversion.json")  # before the first journal was complete
    assert files(converter.convert(source, new)) == expected
    (new / "conversion.json").write_text("{}")  # after the folder was renamed
    assert files(converter.convert(source, new)) == expected


def test_an_unquantised_model_is_made_again(tmp_path: Path):
    """The process was killed while it learned weights from one, or while it wrote it."""
    source = make_pair("e2b", tmp_path)[0]
    expected = files(converter.convert(source, tmp_path / "expected"))
    aside = tmp_path / "new.partial"
    for name in ("unquantised", "unquantised.partial"):
        shutil.copytree(tmp_path / "expected", aside / name)
    (aside / "conversion.json").write_text("{}")
    assert files(converter.convert(source, tmp_path / "new")) == expected


def test_a_partial_folder_is_known_until_it_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing was finished, and the process is killed while it deletes what is left."""
    source, deleted = make_pair("e2b", tmp_path)[0], list[str]()
    unlink = Path.unlink

    def noting(path: Path, missing_ok: bool = False) -> None:
        if path.parent.name == "new.partial":
            deleted.append(path.name)
        unlink(path, missing_ok)

    def fail(path: Path, *_: object) -> None:
        (path.parent / "rest").write_text("half")
        full_disk()

    monkeypatch.setattr("weights_convert.files.write_safetensors", fail)
    monkeypatch.setattr(Path, "unlink", noting)
    with pytest.raises(CheckpointError, match="No space left"):
        converter.convert(source, tmp_path / "new")
    assert deleted[-2:] == ["rest", "conversion.json"] and not (tmp_path / "new.partial").exists()


def conversation(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": str(number)}]


@pytest.fixture
def chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a chat that has kept a conversation."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    Store().keep(conversation(1))
    return next(tmp_path.rglob("last.json")).parent


def test_a_full_disk_takes_no_conversation_away(chats: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full_disk)
        with pytest.raises(OSError, match="No space left"):
            Store().keep(conversation(2))
    assert Store().resume() == conversation(1) and os.listdir(chats) == ["last.json"]


def test_a_chat_that_was_killed_between_two_files(chats: Path):
    (chats / "last.json").rename(chats / "before.json")
    store = Store()
    assert store.resume() == conversation(1)
    store.keep(conversation(2))
    assert store.resume() == conversation(1) and Store().resume() == conversation(2)


def test_a_plot_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plot = tmp_path / "plot.png"
    plot.write_text("an older plot")

    def half(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        full_disk()

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    with pytest.raises(OSError, match=r"No space left.*plot\.png"):
        write_plot([Option(1, 0, 5.0)], plot, "title")
    assert files(tmp_path) == {"plot.png": b"an older plot"}


def test_leftovers_of_downloads_are_deleted_unless_they_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    repository = tmp_path / "models--org--model"
    folder, blobs, locks = (
        repository / "snapshots" / "0123",
        repository / "blobs",
        tmp_path / ".locks/models--org--model",
    )
    for path in (folder, blobs, locks):
        path.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: folder)
    # What the next attempt goes on with, what older libraries go on with, and what another process downloads.
    kept = {"cafe.mlx-mtp.incomplete", "cafe.incomplete", "beef.12345678.incomplete"}
    for name in (*kept, "cafe.12345678.incomplete", "cafe.9abcdef0.incomplete"):
        (blobs / name).write_bytes(b"half")
    with WeakFileLock(locks / "beef.lock"):
        weights("org/model", folder, ["model.safetensors"])
    assert {path.name for path in blobs.iterdir()} == kept
