"""Interrupted conversions lose nothing that was finished, and never leave half a model (weights_convert)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

import weights_convert.files
import weights_convert.plan
from mlx_mtp.errors import CheckpointError
from tests.support.tiny_checkpoints import make_pair
from weights_convert import Format, Scheme, convert, verify_sums

SLOW = """
import sys, time
import weights_convert.plan
from mlx_mtp.cli import main
weights_convert.plan.FILE_BYTES, weights_convert.plan.CHUNK_BYTES = 100_000, 5_000
quick = weights_convert.plan.Parameter.chunks
def slow(parameter):
    for chunk in quick(parameter):
        time.sleep(0.005)
        yield chunk
weights_convert.plan.Parameter.chunks = slow
sys.argv[0] = "mlx-mtp"
main()
"""
"""The command, with small files that are written slowly enough to be interrupted."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_pair("e2b", tmp_path)[0]


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_convert.plan, "FILE_BYTES", 100_000)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int, fail: Callable[[], None]) -> None:
    """Makes the writing of the file with this number fail when it is half written."""
    write, count = weights_convert.files.write_safetensors, [0]

    def writing(path, parameters, progress):
        count[0] += 1
        digest = write(path, parameters, progress)
        if count[0] == number:
            path.write_bytes(path.read_bytes()[:1000])
            fail()
        return digest

    monkeypatch.setattr(weights_convert.files, "write_safetensors", writing)


def disk_full() -> None:
    raise OSError(28, "No space left on device")


def ctrl_c() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("fail, error", [(disk_full, CheckpointError), (ctrl_c, KeyboardInterrupt)])
@pytest.mark.usefixtures("small_files")
def test_going_on(
    source: Path, tmp_path: Path, fail: Callable[[], None], error: type[BaseException], monkeypatch: pytest.MonkeyPatch
):
    expected = contents(convert(source, tmp_path / "expected", Scheme(Format(4))))
    with monkeypatch.context() as patched:
        fail_at(patched, 4, fail)
        with pytest.raises(error, match="No space left.*the same command continues" if fail is disk_full else None):
            convert(source, tmp_path / "new", Scheme(Format(4)))
    aside = tmp_path / "new.partial"
    assert not (tmp_path / "new").exists() and len(list(aside.glob("*.safetensors"))) == 3
    finished = {path: path.stat().st_mtime_ns for path in aside.glob("*.safetensors")}
    with monkeypatch.context() as patched:
        fail_at(patched, 3, fail)  # interrupted again, further on
        with pytest.raises(error):
            convert(source, tmp_path / "new", Scheme(Format(4)))
    assert len(list(aside.glob("*.safetensors"))) == 5
    assert all(path.stat().st_mtime_ns == times for path, times in finished.items())
    assert contents(convert(source, tmp_path / "new", Scheme(Format(4)))) == expected
    assert not aside.exists()


@pytest.mark.usefixtures("small_files")
def test_nothing_is_left_when_nothing_was_finished(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fail_at(monkeypatch, 1, disk_full)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        convert(source, tmp_path / "new")
    assert "continues" not in str(caught.value) and not list(tmp_path.glob("new*"))


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("change", ["options", "source", "a finished file"])
def test_what_is_not_gone_on_with(
    change: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Files of another conversion, or damaged ones, aren't used."""
    with monkeypatch.context() as patched:
        fail_at(patched, 3, ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "new", Scheme(Format(4)))
    bits = 8 if change == "options" else 4
    if change == "source":
        tensors = mx.load(str(source / "model.safetensors"))
        mx.eval(tensors)
        mx.save_safetensors(str(source / "model.safetensors"), {name: 2 * t for name, t in tensors.items()})
    if change == "a finished file":
        path = next((tmp_path / "new.partial").glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    folder = convert(source, tmp_path / "new", Scheme(Format(bits)))
    assert ("starting again" in caplog.text) == (change != "a finished file")
    assert contents(folder) == contents(convert(source, tmp_path / "expected", Scheme(Format(bits))))


def test_a_full_disk_is_known_before_anything_is_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match="are to be written, and .* has 1.00 kB free"):
        convert(source, tmp_path / "new")
    assert not list(tmp_path.glob("new*"))


def test_a_folder_of_somebody_else_is_left_alone(source: Path, tmp_path: Path):
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "diary.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="new.partial is in the way"):
        convert(source, tmp_path / "new")
    assert contents(tmp_path / "new.partial") == {"diary.txt": b"mine"} and not (tmp_path / "new").exists()


def start(source: Path, destination: Path) -> subprocess.Popen[str]:
    """Starts the slow command and waits until it has finished a file."""
    command = [sys.executable, "-c", SLOW, "convert", str(source), str(destination), "--bits", "4", "--no-draft"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    aside, end = destination.with_name(destination.name + ".partial"), time.monotonic() + 60
    while not list(aside.glob("*.safetensors")):
        assert running.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    return running


@pytest.mark.usefixtures("small_files")
def test_ctrl_c_and_kill(source: Path, tmp_path: Path):
    running = start(source, tmp_path / "new")
    with pytest.raises(CheckpointError, match="another conversion"):
        convert(source, tmp_path / "new", Scheme(Format(4)))
    os.kill(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130 and errors == "interrupted: the same command continues\n"

    running = start(source, tmp_path / "new")
    os.kill(running.pid, signal.SIGKILL)
    running.communicate(timeout=60)
    journal = json.loads((tmp_path / "new.partial" / "conversion.json").read_text())
    assert journal["files"] and not (tmp_path / "new").exists()

    folder = convert(source, tmp_path / "new", Scheme(Format(4)))
    assert verify_sums(folder) == len(list(folder.iterdir())) - 1
    assert contents(folder) == contents(convert(source, tmp_path / "expected", Scheme(Format(4))))
