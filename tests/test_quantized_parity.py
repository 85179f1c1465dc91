"""Quantised conversions compute here what they compute in mlx-lm: the same logits and the same long texts."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import mlx_mtp
from tests.support.tiny_checkpoints import VOCAB, make_pair
from weights_convert import Format, Scheme, convert

PROMPT = [int(t) for t in np.random.default_rng(1).integers(0, VOCAB, 40)]


def theirs(folder: Path, length: int) -> tuple[mx.array, list[int]]:
    """mlx-lm's logits of the prompt, and its greedy text, with float32 activations."""
    config = {"vocab_size": VOCAB, "model_type": "gemma4"}
    model, _ = mlx_lm.utils.load_model(folder, strict=False, model_config=config)
    model.set_dtype(mx.float32)
    cache = make_prompt_cache(model)
    logits = prompt = model(mx.array([PROMPT]), cache=cache)[0]
    text: list[int] = []
    for _ in range(length):
        text.append(int(logits[-1].argmax().item()))
        logits = model(mx.array([text[-1:]]), cache=cache)[0]
    return prompt, text


@pytest.mark.parametrize(
    "kind, bits, length",
    [("e2b", 4, 120), ("26b", 8, 120), ("31b", 4, 120), ("e2b", 8, 40), ("26b", 4, 40), ("31b", 8, 40)],
)
def test_logits_and_greedy_text(kind: str, bits: int, length: int, tmp_path: Path):
    """Drafting with the quantised drafter: the text is the target's."""
    scheme = Scheme(Format(bits))
    source, drafter_source = make_pair(kind, tmp_path)
    folder = convert(source, tmp_path / "new", scheme)
    drafter = convert(drafter_source, tmp_path / "new-assistant", scheme)
    expected, text = theirs(folder, length)
    lm = mlx_mtp.load(folder, drafter=drafter, dtype="float32")
    assert mx.abs(lm.logits(PROMPT) - expected).max() <= 1e-3
    answer = lm.generate(PROMPT, max_tokens=length, temperature=0, draft_length=2, ignore_eos=True)
    assert answer.tokens == text
    assert len(set(text)) > 20  # it doesn't just repeat itself


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("kind", ["e2b", "12b", "26b"])
def test_what_mlx_lm_converted(kind: str, mode: str, tmp_path: Path):
    """A folder that mlx-lm itself has quantised and written loads here, with its own bits for some modules."""
    source, _ = make_pair(kind, tmp_path)
    config = {"vocab_size": VOCAB, "model_type": "gemma4"}
    model, config = mlx_lm.utils.load_model(source, strict=False, model_config=config)
    fixed = Format.make(mode)

    def choose(path: str, _: object) -> bool | dict[str, int]:
        if path.endswith("o_proj"):
            return False
        return {"group_size": 64, "bits": 8} if path.endswith(("router.proj", "1.mlp.down_proj")) else True

    model, config = mlx_lm.utils.quantize_model(
        model, config, fixed.group_size, fixed.bits, mode, quant_predicate=choose
    )
    folder = tmp_path / "theirs"
    mlx_lm.utils.save_model(folder, model)
    mlx_lm.utils.save_config(config, folder / "config.json")
    lm = mlx_mtp.load(folder, drafter=False, dtype="float32")
    difference = mx.abs(lm.logits(PROMPT) - model(mx.array([PROMPT]))[0])
    assert difference.max() <= 1e-3 if mode == "affine" else difference.mean() <= 0.3  # see test_convert.py
