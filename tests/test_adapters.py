"""LoRA adapters: what mlx-lm would compute with them, beside weights of any kind, and whatever is drafted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

import mlx_mtp
from mlx_mtp import profile
from mlx_mtp.checkpoint.description import read_drafter, read_target
from mlx_mtp.checkpoint.load import load_target
from mlx_mtp.checkpoint.quantization import Format, Scheme
from mlx_mtp.errors import CheckpointError
from mlx_mtp.kv import KVBuffers
from tests.support.oracle import Oracle
from tests.support.tiny_checkpoints import VOCAB, make_pair
from weights_convert import convert

PROMPT = [2, 40, 50, 60, 7, 8, 9]
RANK, SCALE = 4, 3.0
Edit = Callable[[Path], None]


def in_mlx_lm(folder: Path) -> Any:
    model, _ = mlx_lm.utils.load_model(folder, strict=False, model_config={"vocab_size": VOCAB, "model_type": "gemma4"})
    return model


def make_adapter(target: Path, folder: Path, keys: list[str] | None = None, seed: int = 0) -> Path:
    """Has mlx-lm make an adapter for a target, and gives it random values."""
    model = in_mlx_lm(target)
    model.freeze()
    parameters = {"rank": RANK, "scale": SCALE, "dropout": 0.0} | ({"keys": keys} if keys else {})
    linear_to_lora_layers(model, 100, parameters)
    rng = np.random.default_rng(seed)
    values = {
        name: mx.array(rng.normal(0, 0.05, array.shape).astype(np.float32))
        for name, array in tree_flatten(model.trainable_parameters())
    }
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), values)
    config = {"fine_tune_type": "lora", "num_layers": 100, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair("e2b", tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def adapter(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(pair[0], tmp_path_factory.mktemp("made") / "adapter")


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", ["e2b", "12b", "26b"])
def test_logits_are_those_of_mlx_lm(kind: str, bits: int | None, tmp_path: Path):
    """Every linear map, every expert; per-layer embeddings and shared KV; stored in bits or not."""
    folder, _ = make_pair(kind, tmp_path)
    folder = convert(folder, tmp_path / "converted", Scheme(Format(bits)) if bits else None)
    made = make_adapter(folder, tmp_path / "adapter")
    model = in_mlx_lm(folder)
    load_adapters(model, str(made))
    expected = np.array(model(mx.array([PROMPT]))[0].astype(mx.float32))
    with mlx_mtp.load(folder, drafter=False, adapter=made, dtype="float32", profile=None) as lm:
        found = np.array(lm.logits(PROMPT))
    with mlx_mtp.load(folder, drafter=False, dtype="float32", profile=None) as lm:
        plain = np.array(lm.logits(PROMPT))
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert np.abs(found - plain).max() > 0.1, "the adapter makes no difference"


def test_embeddings_may_have_one_too(pair: tuple[Path, Path], tmp_path: Path):
    """Read as a table and as the output head."""
    made = make_adapter(pair[0], tmp_path / "adapter", keys=["language_model.model.embed_tokens"])
    model = in_mlx_lm(pair[0])
    load_adapters(model, str(made))
    with mlx_mtp.load(pair[0], drafter=False, adapter=made, profile=None) as lm:
        found = np.array(lm.logits(PROMPT))
    np.testing.assert_allclose(found, np.array(model(mx.array([PROMPT]))[0]), atol=2e-3)


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_one_of_a_quantised_embedding_is_added_in_full(mode: str, pair: tuple[Path, Path], tmp_path: Path):
    """MLX reads rows of three of these formats in bfloat16, whatever the target computes in."""
    folder = convert(pair[0], tmp_path / "converted", Scheme(Format.make(mode)))
    made = make_adapter(pair[0], tmp_path / "adapter", keys=["language_model.model.embed_tokens"])
    oracle = Oracle(folder, made)
    expected = oracle.cap * np.tanh(oracle.see(PROMPT).logits / oracle.cap)
    with mlx_mtp.load(folder, drafter=False, adapter=made, dtype="float32", profile=None) as lm:
        np.testing.assert_allclose(np.array(lm.logits(PROMPT)), expected, atol=1e-4)


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4"])
def test_a_target_computes_in_its_own_type_whatever_its_tables_give(mode: str, pair: tuple[Path, Path], tmp_path: Path):
    folder = convert(pair[0], tmp_path / "converted", Scheme(Format.make(mode)))
    made = make_adapter(pair[0], tmp_path / "adapter", keys=["language_model.model.embed_tokens"])
    for dtype in ("float32", "float16", "bfloat16"):
        target = load_target(replace(read_target(folder), dtype=dtype), made)
        kv = KVBuffers(target.config, 1, target.dtype)
        kv.reserve(3)
        hidden = target(mx.array([[5, 6, 7]]), mx.array([0]), kv)
        assert hidden.dtype == target.embed(mx.array([5])).dtype == target.dtype == getattr(mx, dtype)


def test_texts_don_t_depend_on_drafting(pair: tuple[Path, Path], adapter: Path):
    with mlx_mtp.load(*pair, adapter=adapter, profile=None) as lm, mlx_mtp.load(*pair, profile=None) as base:
        for options in ({"temperature": 0}, {"temperature": 1.0, "seed": 3}):
            plain = lm.generate(PROMPT, max_tokens=40, draft_length=0, ignore_eos=True, **options)
            drafted = lm.generate(PROMPT, max_tokens=40, draft_length=3, ignore_eos=True, **options)
            rows = lm.generate_batch([PROMPT, PROMPT[:3]], max_tokens=40, ignore_eos=True, **options)
            assert plain.tokens == drafted.tokens == rows[0].tokens
            assert drafted.stats.drafted and lm.drafter_config and lm.adapter == adapter
            assert plain.tokens != base.generate(PROMPT, max_tokens=40, ignore_eos=True, **options).tokens


def test_weights_may_be_quantised_while_loading(pair: tuple[Path, Path], adapter: Path, tmp_path: Path):
    converted = convert(pair[0], tmp_path / "converted", Scheme(Format(4)))
    with mlx_mtp.load(*pair, adapter=adapter, quantize=4, profile=None) as lm:
        found = lm.logits(PROMPT)
    with mlx_mtp.load(converted, drafter=False, adapter=adapter, profile=None) as lm:
        assert mx.allclose(found, lm.logits(PROMPT), atol=1e-4).item()


@pytest.mark.parametrize("stabilised", [False, True])
def test_peft_s_own_format(pair: tuple[Path, Path], adapter: Path, tmp_path: Path, stabilised: bool):
    """The same matrices the other way round, other names, and a scale that is alpha by rank or by its root."""
    values = {}
    for name, array in mx.load(str(adapter / "adapters.safetensors")).items():
        name, _, part = name.replace("language_model.model.", "model.language_model.").rpartition(".")
        values[f"base_model.model.{name}.{part.replace('_a', '_A').replace('_b', '_B')}.weight"] = array.T
    mx.save_safetensors(str(tmp_path / "adapter_model.safetensors"), values)
    alpha = SCALE * (RANK**0.5 if stabilised else RANK)
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": alpha,
        "use_rslora": stabilised,
        "target_modules": ["q_proj"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with mlx_mtp.load(*pair, adapter=tmp_path, profile=None) as lm:
        found = lm.logits(PROMPT)
    with mlx_mtp.load(*pair, adapter=adapter, profile=None) as lm:
        assert mx.allclose(found, lm.logits(PROMPT), atol=1e-5).item()


def test_profiles_and_saved_prompts_tell_adapters_apart(pair: tuple[Path, Path], adapter: Path, tmp_path: Path):
    other = make_adapter(pair[0], tmp_path / "other", seed=1)
    described = read_target(pair[0]), read_drafter(pair[1])
    keys = {profile.key_of(*described, it).files for it in (None, adapter, other)}
    assert len(keys) == 3
    with mlx_mtp.load(*pair, adapter=adapter, profile=None) as lm:
        lm.save_prompt(PROMPT, tmp_path / "prompt.safetensors")
        assert lm.load_prompt(tmp_path / "prompt.safetensors") == len(PROMPT)
    with mlx_mtp.load(*pair, adapter=other, profile=None) as lm, pytest.raises(CheckpointError, match="another model"):
        lm.load_prompt(tmp_path / "prompt.safetensors")


def config(**fields: Any) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


def tensors(change: Callable[[dict[str, mx.array]], object]) -> Edit:
    def edit(folder: Path) -> None:
        path = str(folder / "adapters.safetensors")
        held = dict(mx.load(path))
        mx.eval(held)
        change(held)
        mx.save_safetensors(path, held)

    return edit


def one(held: dict[str, mx.array]) -> str:
    return next(name for name in held if name.endswith("0.self_attn.q_proj.lora_a"))


@pytest.mark.parametrize("edit, why", [
    (lambda folder: shutil.rmtree(folder), "there is no folder"),
    (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
    (lambda folder: (folder / "adapters.safetensors").unlink(), "adapters.safetensors is missing"),
    (lambda folder: (folder / "adapters.safetensors").write_bytes(b"x" * 100), "truncated or not a safetensors"),
    (lambda folder: (folder / "adapter_config.json").write_text("{"), "can't be read as JSON"),
    (config(fine_tune_type="dora"), "fine-tune of the type 'dora'.*mlx_lm.fuse"),
    (config(fine_tune_type="full"), "fine-tune of the type 'full'"),
    (config(lora_parameters={"rank": RANK, "alpha": 8}), "lora_parameters.scale is None"),
    (config(lora_parameters={"rank": RANK, "scale": float("nan")}), "expected a number"),
    (config(lora_parameters=None), "scale is None"),
    (config(lora_parameters={"rank": True, "scale": 1.0}), "the rank is True"),
    (config(lora_parameters={"rank": 16, "scale": 1.0}), "has rank 4, adapter_config.json says 16"),
    (config(peft_type="IA3"), "of the type 'IA3', not LORA"),
    (config(peft_type="LORA", r=4, lora_alpha=8, use_dora=True), "with use_dora"),
    (config(peft_type="LORA", r=4, lora_alpha=8), "adapter_model.safetensors is missing"),
    (tensors(lambda held: held.clear()), "is empty"),
    (tensors(lambda held: held.pop(one(held))), "has only one of lora_a and lora_b"),
    (tensors(lambda held: held.update({one(held): mx.zeros((5, RANK))})), r"has A \[5, 4\] and B .* instead of"),
    (tensors(lambda held: held.update({one(held): mx.zeros((5,))})), "instead of"),
    (tensors(lambda held: held.update({"odd.m": mx.zeros((5,))})), "odd.m isn.t part of a LoRA adapter"),
    (tensors(lambda held: held.update({f"model.no.lora_{it}": mx.zeros((4, 4)) for it in "ab"})), "doesn.t exist in"),
    (tensors(lambda held: (held.clear(), held.update({f"vision_tower.x.lora_{it}": mx.zeros((4, 4)) for it in "ab"}))),
     "has nothing for the text model"),
])  # fmt: skip
def test_adapters_that_cannot_be_used(pair: tuple[Path, Path], adapter: Path, tmp_path: Path, edit: Edit, why: str):
    folder = tmp_path / "edited"
    shutil.copytree(adapter, folder)
    edit(folder)
    with pytest.raises(CheckpointError, match=why) as error:
        mlx_mtp.load(*pair, adapter=folder, profile=None)
    assert "\n" not in str(error.value)


def test_an_adapter_of_another_size(adapter: Path, tmp_path: Path):
    folder, _ = make_pair("12b", tmp_path)
    with pytest.raises(CheckpointError, match="the adapter in .* doesn't fit"):
        mlx_mtp.load(folder, drafter=False, adapter=adapter, profile=None)


def test_vision_s_part_of_an_adapter_is_left_out(pair: tuple[Path, Path], adapter: Path, tmp_path: Path):
    folder = tmp_path / "edited"
    shutil.copytree(adapter, folder)
    tensors(lambda held: held.update({f"vision_tower.x.lora_{it}": mx.zeros((4, 4)) for it in "ab"}))(folder)
    with mlx_mtp.load(*pair, adapter=folder, profile=None) as lm:
        found = lm.logits(PROMPT)
    with mlx_mtp.load(*pair, adapter=adapter, profile=None) as lm:
        assert mx.array_equal(found, lm.logits(PROMPT)).item()
