"""What fine-tuning tools leave behind loads and converts, or is refused in a line; mlx-lm loads what we write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest

import mlx_mtp
from mlx_mtp import profile
from mlx_mtp.checkpoint.description import read_target
from mlx_mtp.checkpoint.pair import DEMO
from mlx_mtp.checkpoint.quantization import Format, Scheme
from mlx_mtp.errors import CheckpointError
from mlx_mtp.text.template_files import chat_templates
from tests.support.tiny_checkpoints import VOCAB, make_pair
from weights_convert import convert
from weights_convert.files import verify_sums

TOKENS = [2, 40, 50, 60, 7, 8, 9]
EMBEDDING = "model.language_model.embed_tokens.weight"
Tensors = dict[str, mx.array]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair("e2b", tmp_path_factory.mktemp("original"))[0]


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tuned"))


def logits(folder: Path) -> np.ndarray:
    with mlx_mtp.load(folder, drafter=False, dtype="float32", profile=None) as lm:
        return np.array(lm.logits(TOKENS))


def in_mlx_lm(folder: Path) -> np.ndarray:
    """What mlx-lm computes, loading it as its users do."""
    model, _ = mlx_lm.utils.load_model(folder)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array([TOKENS]))[0])


def edit(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = str(folder / "model.safetensors")
    held = dict(mx.load(path))
    mx.eval(held)
    mx.save_safetensors(path, change(held))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def left_by_peft(tensors: Tensors) -> Tensors:
    return {f"base_model.model.{name.replace('q_proj.', 'q_proj.base_layer.')}": t for name, t in tensors.items()}


def mixed(tensors: Tensors) -> Tensors:
    types = (mx.float16, mx.bfloat16, mx.float32)
    return {name: t.astype(types[i % 3] if t.ndim > 1 else mx.float32) for i, (name, t) in enumerate(tensors.items())}


@pytest.mark.parametrize("change, tolerance", [(left_by_peft, 0.0), (mixed, 0.15)])
def test_merged_fine_tunes(original: Path, folder: Path, change: Callable[[Tensors], Tensors], tolerance: float):
    edit(folder, change)
    np.testing.assert_allclose(logits(folder), logits(original), atol=tolerance)
    converted = convert(folder, folder.with_name("converted"), dtype="float32")
    np.testing.assert_allclose(logits(converted), logits(folder), atol=1e-5)
    np.testing.assert_allclose(in_mlx_lm(converted), logits(folder), atol=1e-3)


@pytest.mark.parametrize("name", [
    "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight",
    "model.language_model.layers.0.mlp.up_proj.lora_b", "x.lora_embedding_A", "x.lora_magnitude_vector.default.weight",
])  # fmt: skip
def test_an_adapter_that_is_not_merged(folder: Path, name: str):
    edit(folder, lambda tensors: {**tensors, name: mx.zeros((4, 4))})
    for use in (logits, lambda it: convert(it, it.with_name("converted"))):
        with pytest.raises(CheckpointError, match="isn't merged: merge it, or load it as adapter=") as error:
            use(folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("head", [
    lambda embedding: embedding, lambda embedding: embedding.astype(mx.bfloat16),
])  # fmt: skip
def test_a_head_that_is_the_embedding_again(original: Path, folder: Path, head: Callable[[mx.array], mx.array]):
    edit(folder, lambda tensors: {**tensors, "lm_head.weight": head(tensors[EMBEDDING])})
    np.testing.assert_array_equal(logits(folder), logits(original))


@pytest.mark.parametrize("head", [
    lambda embedding: embedding + 0.01, lambda embedding: embedding[:10], lambda embedding: embedding[:, None],
])  # fmt: skip
def test_a_head_of_its_own_that_is_said_to_be_tied(folder: Path, head: Callable[[mx.array], mx.array]):
    edit(folder, lambda tensors: {**tensors, "lm_head.weight": head(tensors[EMBEDDING])})
    for use in (logits, lambda it: convert(it, it.with_name("converted"))):
        with pytest.raises(CheckpointError, match="lm_head.weight isn't the embedding, though config.json ties them"):
            use(folder)


@pytest.mark.parametrize("kind", ["e2b", "12b", "26b"])
def test_a_grown_vocabulary_in_mlx_lm(kind: str, tmp_path: Path):
    folder, _ = make_pair(kind, tmp_path)
    more = 64

    def grow(tensors: Tensors) -> Tensors:
        tables = [name for name in tensors if name.endswith(("embed_tokens.weight", "embed_tokens_per_layer.weight"))]
        grown = {name: mx.concatenate([tensors[name], tensors[name][:more]]) for name in tables}
        return {**tensors, **grown}

    edit(folder, grow)
    edit_config(folder, lambda config: config["text_config"].update(vocab_size=VOCAB + more))
    if kind == "e2b":
        edit_config(folder, lambda config: config["text_config"].update(vocab_size_per_layer_input=VOCAB + more))
    for scheme in (None, Scheme(Format(4))):
        converted = convert(folder, tmp_path / f"converted {scheme is None}", scheme)
        ours = logits(converted)
        assert ours.shape == (len(TOKENS), VOCAB + more)
        np.testing.assert_allclose(in_mlx_lm(converted), ours, atol=1e-3)


@pytest.mark.parametrize("kind", ["e4b", "12b", "26b"])
def test_plain_text_models_in_mlx_lm(kind: str, tmp_path: Path):
    folder, _ = make_pair(kind, tmp_path, text_only=True)
    converted = convert(folder, tmp_path / "converted", Scheme(Format(4)))
    np.testing.assert_allclose(in_mlx_lm(converted), logits(converted), atol=1e-3)


def test_what_a_config_does_not_name_isn_t_there_for_mlx_lm_either(tmp_path: Path):
    """Its defaults are E2B's."""
    folder, _ = make_pair("31b", tmp_path)
    absent = ("num_kv_shared_layers", "use_double_wide_mlp", "hidden_size_per_layer_input", "final_logit_softcapping")
    edit_config(folder, lambda config: [config["text_config"].pop(field, None) for field in absent])
    converted = convert(folder, tmp_path / "converted")
    np.testing.assert_allclose(in_mlx_lm(converted), logits(folder), atol=1e-3)


def test_the_embedded_pair_in_mlx_lm():
    ours = logits(DEMO / "target")
    np.testing.assert_allclose(in_mlx_lm(DEMO / "target"), ours, atol=1e-3)
    _, tokenizer = mlx_lm.load(str(DEMO / "target"))
    with mlx_mtp.load(drafter=False) as lm:
        messages = [{"role": "user", "content": "Who are you?"}]
        theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)
        assert theirs == lm.encode(messages)


def test_what_macos_leaves_beside_further_chat_templates(tmp_path: Path):
    templates = tmp_path / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("for tools")
    (templates / "._tool_use.jinja").write_bytes(b"\0\5\26\7\xff")
    assert chat_templates(tmp_path, {}) == {"tool_use": "for tools"}


def test_what_macos_leaves_beside_files(original: Path, folder: Path, tmp_path: Path):
    """On disks that can't hold its attributes: ._NAME for every NAME, which is no checkpoint's."""
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    plain = profile.key_of(read_target(folder), None)
    for path in list(folder.iterdir()):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7")
    np.testing.assert_array_equal(logits(folder), logits(original))
    assert profile.key_of(read_target(folder), None) == plain
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "._").write_bytes(b"\0\5\26\7")
    shutil.rmtree(tmp_path / "converted")
    converted = convert(folder, tmp_path / "converted")
    assert verify_sums(converted) and not list(converted.glob("._*"))
