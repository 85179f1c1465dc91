"""Conversions load here and in mlx-lm, and compute what their sources compute (weights_convert)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import pytest
from tiny_checkpoints import KINDS, VOCAB, make_pair

import mlx_mtp
import weights_convert.converter as module
from mlx_mtp.errors import CheckpointError, MTPError
from weights_convert import Format, convert

TOKENS = list(range(7, 47))
FORMATS = [None, Format(4), Format(8, 32), Format(4, 32, "mxfp4"), Format(8, 32, "mxfp8"), Format(4, 16, "nvfp4")]


def theirs(folder: Path) -> mx.array:
    model, _ = mlx_lm.utils.load_model(folder, strict=False, model_config={"vocab_size": VOCAB, "model_type": "gemma4"})
    return model(mx.array([TOKENS]))[0]


@pytest.mark.parametrize("how", FORMATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_target_loads_here_and_in_mlx_lm(kind: str, how: Format | None, tmp_path: Path):
    source, _ = make_pair(kind, tmp_path)
    folder = convert(source, tmp_path / "new", how)
    ours = mlx_mtp.load(folder, drafter=False, dtype="float32").logits(TOKENS)
    difference = mx.abs(ours - theirs(folder))
    if how is None or how.mode == "affine":
        assert difference.max() <= 1e-3
    else:
        # Embeddings in these modes come out of MLX in bfloat16, in which mlx-lm then goes on; that can
        # send tokens to other experts.
        assert difference.mean() <= 0.3
    original = mlx_mtp.load(source, drafter=False).logits(TOKENS)
    error = mx.linalg.norm(ours - original) / mx.linalg.norm(original)
    if how is None:
        assert error == 0
    else:
        # 1.4 would be another model's logits; random weights forgive less than trained ones.
        assert error < (0.15 if how == Format(8, 32) else 1.1)
        stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert stored < sum(path.stat().st_size for path in source.glob("*.safetensors")) * (how.bits + 3) / 32


@pytest.mark.parametrize("kind", ["e2b", "31b"])
def test_a_drafter(kind: str, tmp_path: Path):
    target, drafter = make_pair(kind, tmp_path)
    same = convert(drafter, tmp_path / "same")
    small = convert(drafter, tmp_path / "small", Format(8))
    proposals = [mlx_mtp.load(target, drafter=folder).propose(TOKENS, 4) for folder in (drafter, same, small)]
    assert proposals[0] == proposals[1]
    assert proposals[2][0] == proposals[0][0]


def test_quantised_on_disk_or_while_loading_is_the_same(tmp_path: Path):
    source, _ = make_pair("26b", tmp_path)
    folder = convert(source, tmp_path / "new", Format(4))
    assert json.loads((folder / "config.json").read_text())["quantization"]["bits"] == 4
    on_disk = mlx_mtp.load(folder, drafter=False).logits(TOKENS)
    assert mx.array_equal(on_disk, mlx_mtp.load(source, drafter=False, quantize=4).logits(TOKENS))


def test_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, _ = make_pair("e2b", tmp_path)
    monkeypatch.setattr(module, "FILE_BYTES", 200_000)
    names: list[str] = []
    folder = convert(source, tmp_path / "new", Format(8), progress=lambda name, written: names.append(name))
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files) and len(names) > len(files)
    expected = mlx_mtp.load(source, drafter=False, quantize=8).logits(TOKENS)
    assert mx.array_equal(mlx_mtp.load(folder, drafter=False).logits(TOKENS), expected)


def test_nothing_is_left_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, _ = make_pair("e2b", tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.mx, "save_safetensors", full)
    with pytest.raises(CheckpointError, match="No space left"):
        convert(source, tmp_path / "new")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob("*.partial"))


def test_what_cannot_be_converted(tmp_path: Path):
    source, _ = make_pair("e2b", tmp_path)
    converted = convert(source, tmp_path / "new", Format(4))
    for wrong, culprit in (
        (lambda: convert(converted, tmp_path / "again", Format(4)), "quantised already"),
        (lambda: convert(source, tmp_path / "new"), "exists already"),
        (lambda: convert(tmp_path / "nothing", tmp_path / "x"), "no folder"),
        (lambda: convert(source, tmp_path / "x", dtype="int3"), "int3"),
        (lambda: Format(7), "7 bits"),
        (lambda: Format(4, 48), "48"),
        (lambda: Format(4, 32, "q4_k"), "q4_k"),
        (lambda: Format(8, 32, "mxfp4"), "mxfp4"),
    ):
        with pytest.raises(MTPError, match=culprit) as caught:
            wrong()
        assert "\n" not in str(caught.value)


def test_the_command(tmp_path: Path):
    source, _ = make_pair("e4b", tmp_path)
    for i, program in enumerate((["mlx_mtp", "convert"], ["weights_convert"])):
        done = subprocess.run(
            [sys.executable, "-m", *program, str(source), str(tmp_path / f"new{i}"), "--bits", "4"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / f"new{i}"), done.stderr
    assert mlx_mtp.load(tmp_path / "new0", drafter=False).logits(TOKENS).shape == (len(TOKENS), VOCAB)
