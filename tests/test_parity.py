"""Targets and drafters of every size compute what transformers computes, from the very same folders."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from transformers import AutoConfig, PreTrainedModel

import mlx_mtp
import mlx_mtp.config
from mlx_mtp.checkpoint.description import read_target
from mlx_mtp.checkpoint.load import load_target
from mlx_mtp.config import in_published_fields
from mlx_mtp.decode.prefill import prefill
from tests.support import reference
from tests.support.real_tensors import SIZES, target_config
from tests.support.tiny_checkpoints import KINDS, VOCAB, WINDOW, make_pair
from weights_convert import convert

TOLERANCE = 1e-4
DECODED = 120
# Around the window (16), around the drafter's (17), and far beyond; a prefill chunk has 16 tokens.
PROMPT_LENGTHS = (1, 9, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 2, 40, 150)


def random_tokens(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB - 2, length).tolist()


@dataclass(frozen=True)
class Both:
    """One pair in both implementations, and what transformers says of one text.

    Attributes:
        folder, drafter_folder: Where the pair lies.
        ours: The pair in our implementation.
        target, drafter: The pair in transformers.
        prompt: Longer than the window.
        text: transformers' greedy continuation.
        text_logits: The logits behind each token of it, [DECODED, vocab].
    """

    folder: Path
    drafter_folder: Path
    ours: mlx_mtp.MTPModel
    target: PreTrainedModel
    drafter: PreTrainedModel
    prompt: list[int]
    text: list[int]
    text_logits: np.ndarray


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder, drafter_folder = make_pair(request.param, tmp_path_factory.mktemp(request.param))
    ours = load(folder, drafter_folder)
    target, drafter = reference.load(folder), reference.load(drafter_folder)
    prompt = random_tokens(40)
    text, text_logits = reference.greedy(target, prompt, DECODED)
    return Both(folder, drafter_folder, ours, target, drafter, prompt, text, text_logits)


def load(folder: Path, drafter_folder: Path | bool = False) -> mlx_mtp.MTPModel:
    return mlx_mtp.load(folder, drafter=drafter_folder, dtype="float32", drafter_position="bonus")


def test_the_comparison_has_teeth(both: Both) -> None:
    """Texts vary, and logits are large enough for 1e-4 to be a narrow bound."""
    assert len(set(both.text)) > DECODED / 8
    assert np.abs(both.text_logits).mean() > 1


def test_logits_of_a_prompt(both: Both) -> None:
    """Chunk by chunk here, in one pass there."""
    tokens = both.prompt + both.text
    difference = np.abs(np.array(both.ours.logits(tokens)) - reference.logits(both.target, tokens))
    assert difference.max() <= TOLERANCE


def test_logits_while_decoding(both: Both) -> None:
    """Token by token, each with the KV that decoding has left behind."""
    target = load_target(read_target(both.folder, dtype="float32"))
    kv, hidden = prefill(target, both.prompt)
    decoded = [target.logits(hidden)]
    for position, token in enumerate(both.text[:-1], start=len(both.prompt)):
        kv.reserve(position + 1)
        hidden = target(mx.array([[token]], dtype=mx.int32), mx.array([position], dtype=mx.int32), kv)
        decoded.append(target.logits(hidden[:, -1]))
    difference = np.abs(np.array(mx.concatenate(decoded)) - both.text_logits)
    assert difference.max() <= TOLERANCE


@pytest.mark.parametrize("draft_length", [0, 3])
def test_greedy_text(both: Both, draft_length: int) -> None:
    made = both.ours.generate(
        both.prompt, max_tokens=DECODED, temperature=0, draft_length=draft_length, ignore_eos=True
    )
    assert made.tokens == both.text


def test_proposals(both: Both) -> None:
    """`propose` gives what assisted generation drafts after the same prompt."""
    prompts = [random_tokens(length, seed=length) for length in PROMPT_LENGTHS]
    ours = [both.ours.propose(prompt, 6) for prompt in prompts]
    assert ours == [reference.first_drafts(both.target, both.drafter, prompt, 6) for prompt in prompts]
    assert len({draft for _, *drafts in ours for draft in drafts}) > 2 * len(prompts)


def test_saved_again_by_transformers(both: Both, tmp_path: Path) -> None:
    """The same numbers from what `save_pretrained` writes: `per_layer_config`, shards, unused KV left out."""
    both.target.save_pretrained(tmp_path / "target", max_shard_size="300KB")
    both.drafter.save_pretrained(tmp_path / "drafter")
    for name in ("target", "drafter"):
        text = json.loads((tmp_path / name / "config.json").read_text())["text_config"]
        assert "per_layer_config" in text and "global_head_dim" not in text
    assert len(list((tmp_path / "target").glob("*.safetensors"))) > 1

    again = load(tmp_path / "target", tmp_path / "drafter")
    assert mx.array_equal(again.logits(both.prompt), both.ours.logits(both.prompt))
    assert again.propose(both.prompt, 6) == both.ours.propose(both.prompt, 6)


def test_saved_again_and_converted(both: Both, tmp_path: Path) -> None:
    """mlx-lm doesn't read `per_layer_config`, and can load what is made of it."""
    both.target.save_pretrained(tmp_path / "target")
    folder = convert(tmp_path / "target", tmp_path / "mlx")
    # Versions before 0.32 don't know "gemma4_unified".
    model, _ = mlx_lm.utils.load_model(folder, model_config={"vocab_size": VOCAB, "model_type": "gemma4"})
    assert mx.abs(load(folder).logits(both.prompt) - model(mx.array([both.prompt]))[0]).max() <= TOLERANCE


@pytest.mark.parametrize("name", SIZES)
def test_real_configs_saved_again(name: str) -> None:
    """Models of real depth say the same in `per_layer_config`, whose layers are "04" where there is a layer 10."""
    published = target_config(name)
    fields = published["text_config"]
    text = AutoConfig.for_model("gemma4_unified_text" if SIZES[name].unified else "gemma4_text", **fields).to_dict()
    assert "per_layer_config" in text and "global_head_dim" not in text
    read = mlx_mtp.config.target_config
    assert read(published | {"text_config": text}) == read(published)
    back = in_published_fields(text)
    assert "per_layer_config" not in back and read(published | {"text_config": back}) == read(published)


@pytest.mark.parametrize("bits", [None, 4])
def test_converted_by_mlx_lm(both: Both, tmp_path: Path, bits: int | None) -> None:
    """MLX conversions, quantised or not: other names, experts split in two, the router at 8 bits."""
    # Versions before 0.32 know neither "gemma4_unified" (the same decoder) nor the unused KV of published files.
    model, config = mlx_lm.utils.load_model(
        both.folder, strict=False, model_config={"vocab_size": VOCAB, "model_type": "gemma4"}
    )
    if bits:
        model, config = mlx_lm.utils.quantize_model(model, config, group_size=64, bits=bits)
    mlx_lm.utils.save_model(tmp_path, model)
    mlx_lm.utils.save_config(config, tmp_path / "config.json")
    difference = mx.abs(load(tmp_path).logits(both.prompt) - model(mx.array([both.prompt]))[0])
    assert difference.max() <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_text_only(kind: str, tmp_path: Path) -> None:
    """Plain text models (`Gemma4ForCausalLM`), with other tensor names and no `text_config`."""
    folder, _ = make_pair(kind, tmp_path, text_only=True)
    tokens = random_tokens(40)
    difference = np.abs(np.array(load(folder).logits(tokens)) - reference.logits(reference.load(folder), tokens))
    assert difference.max() <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_shards_and_towers(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Shards make no difference; vision and audio tensors are left out, and one line says so."""
    caplog.set_level(logging.INFO, logger="mlx_mtp")
    folder, _ = make_pair(kind, tmp_path / "plain")
    expected = load(folder).logits(random_tokens(40))
    assert not caplog.messages
    folder, _ = make_pair(kind, tmp_path / "more", shards=3, towers=True)
    assert len(list(folder.glob("*.safetensors"))) == 3
    assert mx.array_equal(load(folder).logits(random_tokens(40)), expected)
    (notice,) = caplog.messages
    assert "vision and audio" in notice and "\n" not in notice
