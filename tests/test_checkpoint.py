"""Bad checkpoints: each a one-line error of the right type that names the culprit."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlx_mtp
from mlx_mtp.checkpoint.pair import DEMO
from mlx_mtp.config import check_pair, drafter_config, target_config
from mlx_mtp.errors import CheckpointError, MTPError, PairingError
from tests.support.tiny_checkpoints import VOCAB, make_pair

Q_PROJ = "model.language_model.layers.3.self_attn.q_proj.weight"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return make_pair("e2b", tmp_path)


def failure(kind: type[MTPError], target: str | Path, drafter: str | Path | bool = False, **options: Any) -> str:
    """The message that loading fails with."""
    with pytest.raises(MTPError) as caught:
        mlx_mtp.load(target, drafter=drafter, **options)
    assert caught.type is kind
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_json(file: Path, edit: Callable[[Any], None]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def edit_tensors(folder: Path, edit: Callable[[dict[str, mx.array]], None]) -> None:
    tensors = mx.load(str(folder / "model.safetensors"))
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    edit(tensors)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)


def edit_header(folder: Path, edit: Callable[[Any], None]) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    edit(header)
    file.write_bytes(safetensors(json.dumps(header).encode()) + content[8 + length :])


def safetensors(header: bytes) -> bytes:
    """The beginning of a file with this header."""
    return struct.pack("<Q", len(header)) + header


def test_the_undamaged_pair_loads(pair: tuple[Path, Path]) -> None:
    """What makes all other tests fail to load is the damage alone."""
    assert len(mlx_mtp.load(*pair).propose([1, 2, 3], 2)) == 3


# Folders


def test_missing_folder(tmp_path: Path) -> None:
    assert "nowhere" in failure(CheckpointError, tmp_path / "nowhere")


def test_missing_drafter_folder(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert "nowhere" in failure(CheckpointError, pair[0], tmp_path / "nowhere")


def test_file_instead_of_folder(pair: tuple[Path, Path]) -> None:
    assert "give the folder" in failure(CheckpointError, pair[0] / "model.safetensors")


def test_empty_folder(tmp_path: Path) -> None:
    assert "config.json" in failure(CheckpointError, tmp_path)


def test_only_pickle_files(pair: tuple[Path, Path]) -> None:
    (pair[0] / "model.safetensors").rename(pair[0] / "pytorch_model.bin")
    assert "no safetensors" in failure(CheckpointError, pair[0])


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=str)
def test_repository_without_network(environment: dict[str, str], tmp_path: Path) -> None:
    """In a process of its own, because huggingface_hub reads these variables when it is imported."""
    code = "import mlx_mtp\ntry: mlx_mtp.load('google/gemma-4-E2B-it')\nexcept mlx_mtp.CheckpointError as e: print(e)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stderr == "" and run.stdout.count("\n") == 1
    assert run.stdout.startswith("google/gemma-4-E2B-it is not a folder, and there is no connection to the hub: check")


# config.json


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00"], ids=["empty", "broken", "a list", "binary"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_that_cannot_be_read(pair: tuple[Path, Path], name: str, content: bytes) -> None:
    (pair[0] / name).write_bytes(content)
    assert str(pair[0] / name) in failure(CheckpointError, pair[0])


def test_unknown_model_type(pair: tuple[Path, Path]) -> None:
    edit_json(pair[0] / "config.json", lambda c: c.update(model_type="llama"))
    message = failure(CheckpointError, pair[0])
    assert "'llama'" in message and "gemma4_unified" in message


@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_size", None),
        ("hidden_size", "64"),
        ("hidden_size", -64),
        ("num_attention_heads", 0),
        ("sliding_window", 16.5),
        ("num_kv_shared_layers", 7),
        ("rms_norm_eps", 0),
        ("final_logit_softcapping", "30"),
        ("layer_types", ["sliding_attention"]),
        ("layer_types", ["linear_attention"] * 6),
        ("rope_parameters", {}),
        ("attention_bias", True),
        ("hidden_activation", "silu"),
        ("use_bidirectional_attention", "all"),
        ("per_layer_config", {"1": {"sliding_window": 8}}),
        ("per_layer_config", {"one": {}}),
        ("per_layer_config", [1]),
    ],
)
def test_field_of_the_text_config(pair: tuple[Path, Path], field: str, value: object) -> None:
    edit_json(pair[0] / "config.json", lambda c: c["text_config"].update({field: value}))
    culprit = value[0] if value == ["linear_attention"] * 6 else field
    message = failure(CheckpointError, pair[0])
    assert culprit in message and message.startswith(str(pair[0]))


@pytest.mark.parametrize("change", [{"rope_type": "yarn"}, {"factor": 4.0}, {"partial_rotary_factor": 2}], ids=str)
def test_rotary_embedding_of_another_kind(pair: tuple[Path, Path], change: dict[str, object]) -> None:
    edit_json(pair[0] / "config.json", lambda c: c["text_config"]["rope_parameters"]["full_attention"].update(change))
    assert next(iter(change)) in failure(CheckpointError, pair[0])


@pytest.mark.parametrize("value", [None, 3, []])
def test_text_config_that_is_no_object(pair: tuple[Path, Path], value: object) -> None:
    edit_json(pair[0] / "config.json", lambda c: c.update(text_config=value))
    assert "text_config" in failure(CheckpointError, pair[0])


@pytest.mark.parametrize(
    "field, value",
    [("num_centroids", 7), ("num_centroids", 0), ("centroid_intermediate_top_k", 17), ("backbone_hidden_size", "64")],
)
def test_field_of_a_drafter(pair: tuple[Path, Path], field: str, value: object) -> None:
    edit_json(pair[1] / "config.json", lambda c: c.update({field: value}))
    message = failure(CheckpointError, *pair)
    assert field in message and message.startswith(str(pair[1]))


def test_more_experts_per_token_than_experts(tmp_path: Path) -> None:
    target, _ = make_pair("26b", tmp_path)
    edit_json(target / "config.json", lambda c: c["text_config"].update(top_k_experts=9))
    assert "top_k_experts" in failure(CheckpointError, target)


@pytest.mark.parametrize("stored", [3, {"group_size": 64, "bits": 7}, {"group_size": 64, "bits": 4, "mode": "other"}])
def test_unusable_quantization(pair: tuple[Path, Path], stored: object) -> None:
    scales = Q_PROJ.replace("weight", "scales")
    edit_tensors(pair[0], lambda t: t.update({scales: mx.zeros((256, 1))}))
    edit_json(pair[0] / "config.json", lambda c: c.update(quantization=stored))
    assert "quantization in config.json" in failure(CheckpointError, pair[0])


@pytest.mark.parametrize("field, value", [("eos_token_id", "106"), ("temperature", []), ("suppress_tokens", [512])])
def test_generation_config(pair: tuple[Path, Path], field: str, value: object) -> None:
    edit_json(pair[0] / "generation_config.json", lambda c: c.update({field: value}))
    assert "generation_config.json" in failure(CheckpointError, pair[0])


# Weights


@pytest.mark.parametrize("kept", [0, 5, 1000, -70_000, -1])
def test_truncated_file(pair: tuple[Path, Path], kept: int) -> None:
    """Cut off before, in and after the header; negative numbers count from the end."""
    file = pair[0] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    message = failure(CheckpointError, pair[0])
    assert str(file) in message and "truncated" in message


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        safetensors(b"garbage!"),
        safetensors(b"[]"),
        safetensors(b'{"a": {"b": 1}}'),
        safetensors(b'{"__metadata__": 3}'),
    ],
    ids=["pointer of git lfs", "no JSON", "no object", "no tensors", "no metadata"],
)
def test_garbage_instead_of_weights(pair: tuple[Path, Path], content: bytes) -> None:
    (pair[0] / "model.safetensors").write_bytes(content)
    assert str(pair[0] / "model.safetensors") in failure(CheckpointError, pair[0])


@pytest.mark.parametrize("field, value", [("dtype", "F99"), ("shape", [1, 2]), ("shape", None)])
def test_header_that_contradicts_itself(pair: tuple[Path, Path], field: str, value: object) -> None:
    edit_header(pair[0], lambda header: header[Q_PROJ].update({field: value}))
    message = failure(CheckpointError, pair[0])
    assert str(pair[0] / "model.safetensors") in message and "corrupt" in message


def test_missing_tensor(pair: tuple[Path, Path]) -> None:
    edit_tensors(pair[0], lambda tensors: tensors.pop(Q_PROJ))
    message = failure(CheckpointError, pair[0])
    assert "1 tensors missing (layers.3.self_attn.q_proj.weight)" in message and "unknown" not in message


def test_unknown_tensor(pair: tuple[Path, Path]) -> None:
    edit_tensors(pair[0], lambda tensors: tensors.update({"model.language_model.surplus": mx.zeros((1,))}))
    message = failure(CheckpointError, pair[0])
    assert "1 tensors unknown (surplus)" in message and "missing" not in message


def test_tensor_of_the_wrong_shape(pair: tuple[Path, Path]) -> None:
    edit_tensors(pair[0], lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ][:-1]}))
    assert "layers.3.self_attn.q_proj.weight is [511, 64] instead of [512, 64]" in failure(CheckpointError, pair[0])


def test_tensor_of_the_wrong_type(pair: tuple[Path, Path]) -> None:
    edit_tensors(pair[0], lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].astype(mx.int8)}))
    assert "layers.3.self_attn.q_proj.weight is stored as int8" in failure(CheckpointError, pair[0])


@pytest.mark.parametrize("name", ["masked_embedding.token_ordering", "model.embed_tokens.weight", "model.norm.weight"])
def test_missing_tensor_of_a_drafter(pair: tuple[Path, Path], name: str) -> None:
    edit_tensors(pair[1], lambda tensors: tensors.pop(name))
    message = failure(CheckpointError, *pair)
    assert str(pair[1]) in message and name.split(".")[1].removeprefix("embed_tokens") in message


@pytest.mark.parametrize("damage", [lambda ids: ids[:-1], lambda ids: mx.zeros_like(ids), lambda ids: ids + 1])
def test_token_ordering_that_is_no_permutation(pair: tuple[Path, Path], damage: Callable[[mx.array], mx.array]) -> None:
    name = "masked_embedding.token_ordering"
    edit_tensors(pair[1], lambda tensors: tensors.update({name: damage(tensors[name])}))
    message = failure(CheckpointError, *pair)
    assert str(pair[1]) in message and name in message


def test_missing_shard(tmp_path: Path) -> None:
    target, _ = make_pair("e2b", tmp_path, shards=3)
    (target / "model-00002-of-00003.safetensors").unlink()
    message = failure(CheckpointError, target)
    assert "model-00002-of-00003.safetensors" in message and "missing" in message


@pytest.mark.parametrize("index", [{"metadata": {}}, {"weight_map": 3}, {"weight_map": {"a": 3}}], ids=str)
def test_index_without_weight_map(tmp_path: Path, index: object) -> None:
    target, _ = make_pair("e2b", tmp_path, shards=3)
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json has no weight_map" in failure(CheckpointError, target)


# Pairs


def test_drafter_as_target(pair: tuple[Path, Path]) -> None:
    assert "gemma4_assistant is a drafter" in failure(CheckpointError, pair[1])


def test_target_as_drafter(pair: tuple[Path, Path]) -> None:
    assert "'gemma4' isn't a drafter" in failure(CheckpointError, pair[0], pair[0])


@pytest.mark.parametrize(
    "target, drafter, clashes",
    [
        ("e2b", "e4b", ["sliding layers with 2 KV heads of 64, the target has 1 of 64", "full layers with 2 KV heads"]),
        ("26b", "31b", ["hidden size 64, the target has 128"]),
        ("31b", "12b", ["full layers with 1 KV heads of 128, the target has 2 of 128"]),
    ],
)
def test_drafter_of_another_size(target: str, drafter: str, clashes: list[str], tmp_path: Path) -> None:
    message = failure(PairingError, *make_pair(target, tmp_path, drafter=drafter))
    assert all(clash in message for clash in clashes)


def test_drafter_with_a_kind_of_layer_that_the_target_lacks(pair: tuple[Path, Path]) -> None:
    target, drafter = (json.loads((folder / "config.json").read_text()) for folder in pair)
    target["text_config"]["layer_types"] = ["full_attention"] * 6
    with pytest.raises(PairingError, match="it expects sliding layers, the target has none"):
        check_pair(target_config(target), drafter_config(drafter))


@pytest.mark.parametrize("field, value", [("sliding_window", 32), ("vocab_size", 1024)])
def test_drafter_for_another_window_or_vocabulary(pair: tuple[Path, Path], field: str, value: int) -> None:
    edit_json(pair[1] / "config.json", lambda c: c["text_config"].update({field: value}))
    assert str(value) in failure(PairingError, *pair)


def grow(target: Path, rows: Callable[[mx.array], mx.array]) -> None:
    """Adds 64 tokens to a target; `rows` makes their embeddings from the first 64."""

    def added(tensors: dict[str, mx.array]) -> None:
        for name, table in tensors.items():
            if name.endswith(("embed_tokens.weight", "embed_tokens_per_layer.weight")):
                tensors[name] = mx.concatenate([table, rows(table[:64]).astype(table.dtype)])

    edit_tensors(target, added)
    fields = ("vocab_size", "vocab_size_per_layer_input")
    edit_json(
        target / "config.json", lambda c: [c["text_config"].update({f: c["text_config"][f] + 64}) for f in fields]
    )


@pytest.mark.parametrize("kind", ["e2b", "31b"], ids=["clustered head", "dense head"])
def test_a_target_with_added_tokens_keeps_its_drafter_and_its_text(kind: str, tmp_path: Path) -> None:
    target, drafter = make_pair(kind, tmp_path)
    grow(target, lambda rows: 1.5 * rows[::-1])
    with mlx_mtp.load(target) as lm:
        assert lm.drafter_folder == drafter
        for options in ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 3}):
            run: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, **options}
            plain, drafted = (lm.generate([5, 6, 7], draft_length=k, **run) for k in (0, 4))
            assert drafted.tokens == plain.tokens and drafted.stats.drafted > 0
            assert max(plain.tokens) >= VOCAB, "new tokens are chosen, and drafted from"


def test_drafts_are_accepted_as_before_when_tokens_were_added(tmp_path: Path) -> None:
    shutil.copytree(DEMO / "target", tmp_path / "tuned")
    shutil.copytree(DEMO / "drafter", tmp_path / "tuned-assistant")
    grow(tmp_path / "tuned", lambda rows: 0 * rows)
    results = []
    for folder in (None, tmp_path / "tuned"):
        with mlx_mtp.load(folder) as lm:
            results.append(lm.generate("What is a drafter?", max_tokens=40, draft_length=4, temperature=0))
    assert results[0].tokens == results[1].tokens
    assert results[0].stats.mean_accepted == results[1].stats.mean_accepted > 1


# Options


@pytest.mark.parametrize("option, value", [("dtype", "float8"), ("quantize", 7)])
def test_unusable_option(pair: tuple[Path, Path], option: str, value: object) -> None:
    assert str(value) in failure(CheckpointError, pair[0], **{option: value})


def test_a_profile_that_is_none() -> None:
    with pytest.raises(mlx_mtp.ProfileError, match="profile must be 'auto', a file or None, not 5"):
        mlx_mtp.load(profile=5)  # type: ignore[arg-type]
