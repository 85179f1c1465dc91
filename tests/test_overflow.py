"""A model that float16 is too small for says so when it is loaded, not in its text."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

import mlx_mtp
from mlx_mtp.checkpoint import description
from mlx_mtp.models.self_test import SWITCH
from tests.support.tiny_checkpoints import make_pair


def enlarge(folder: Path, times: int, dtype: mx.Dtype = mx.float32) -> None:
    """Has one layer add numbers of more than 65,504, by a norm whose own weights are smaller.

    Args:
        folder: The model's.
        times: How much larger the norm's weights become.
        dtype: What all weights are saved in.
    """
    path = folder / "model.safetensors"
    tensors = {
        name: tensor * (times if name.endswith("layers.1.post_feedforward_layernorm.weight") else 1)
        for name, tensor in mx.load(str(path)).items()
    }
    tensors = {n: t.astype(dtype) if mx.issubdtype(t.dtype, mx.floating) else t for n, t in tensors.items()}
    assert all(mx.isfinite(tensor).all().item() for tensor in tensors.values())
    mx.save_safetensors(str(path), tensors, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["e2b", "e4b", "12b", "31b"])
def test_what_fits_loads(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    lm = mlx_mtp.load(make_pair(kind, tmp_path)[0], dtype="float16")
    assert lm.generate([2, 5, 7], max_tokens=4).tokens and not caplog.records


@pytest.mark.parametrize("stored", [False, True])
def test_a_target_that_overflows(stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whether float16 was asked for, or is what its files have and so, on a GPU, what it would run in."""
    folder, _ = make_pair("31b", tmp_path)
    enlarge(folder, 8000, mx.float16 if stored else mx.float32)
    if stored:
        monkeypatch.setattr(description, "on_gpu", lambda: True)
    dtype = None if stored else "float16"
    with pytest.raises(mlx_mtp.CheckpointError, match="overflow float16.*dtype='bfloat16'"):
        mlx_mtp.load(folder, dtype=dtype)
    with mlx_mtp.load(folder, dtype="bfloat16") as lm:
        assert mx.isfinite(lm.logits([2, 5, 7])).all().item()
    monkeypatch.setenv(SWITCH, "0")
    with mlx_mtp.load(folder, dtype=dtype) as lm:  # as it was asked for
        assert not mx.isfinite(lm.logits([2, 5, 7])).all().item()


def test_a_drafter_that_overflows_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder, drafter = make_pair("12b", tmp_path)
    alone = mlx_mtp.load(folder, drafter=False, dtype="float16").generate([2, 5, 7], max_tokens=8, temperature=0)
    enlarge(drafter, 40_000)
    lm = mlx_mtp.load(folder, dtype="float16")
    assert "this drafter" in caplog.text and "bfloat16" in caplog.text
    assert lm.generate([2, 5, 7], max_tokens=8, temperature=0, draft_length=2).tokens == alone.tokens
