"""What is known of a checkpoint before its weights are read (checkpoint/description.py), and who may know it."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlx_mtp
from mlx_mtp import CheckpointError
from mlx_mtp.checkpoint import sizes
from mlx_mtp.checkpoint.description import read, read_drafter, read_target
from mlx_mtp.checkpoint.quantization import Format
from mlx_mtp.config import DrafterConfig, TargetConfig
from tests.support.tiny_checkpoints import make_pair

QUANTIZED = {"quantization": {"bits": 4, "group_size": 32}}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return make_pair("31b", tmp_path)


def edit(folder: Path, change: dict[str, Any]) -> Path:
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_is_what_its_config_says(pair: tuple[Path, Path]):
    target, drafter = map(read, pair)
    assert isinstance(target.config, TargetConfig) and isinstance(drafter.config, DrafterConfig)
    assert (target.folder, drafter.folder) == pair and not drafter.merged and not target.holds_drafter


def test_a_merged_drafter_is_described_in_its_own_words(pair: tuple[Path, Path]):
    own = json.loads((pair[1] / "config.json").read_text())
    raw = json.loads((pair[0] / "config.json").read_text())
    edit(pair[0], {"text_config": raw["text_config"] | {"mtp_assistant_config": own}})
    target, drafter = read_target(pair[0]), read_drafter(pair[0])
    assert target.holds_drafter and drafter.merged and drafter.folder == pair[0]
    assert drafter.raw == own and drafter.config == read_drafter(pair[1]).config
    assert isinstance(read(pair[0]).config, TargetConfig), "by itself it is a target"


def test_the_wanted_format_counts_where_nothing_is_stored(pair: tuple[Path, Path]):
    plain = read_target(pair[0])
    assert plain.format is None and plain.rule is None
    wanted = replace(plain, quantize=Format(4))
    assert wanted.format == Format(4) and sizes.of(wanted).weights < sizes.of(plain).weights / 3
    stored = read_target(edit(pair[0], QUANTIZED))
    assert stored.format == Format(4, 32) and stored.quantize is None


def test_what_is_quantised_is_not_quantised_again(pair: tuple[Path, Path]):
    edit(pair[0], QUANTIZED)
    with pytest.raises(CheckpointError, match="target is quantised already: load it without quantize"):
        read_target(pair[0], Format(8))
    with pytest.raises(CheckpointError, match="quantised already"):
        replace(read_target(pair[0]), quantize=Format(8))


@pytest.mark.parametrize("where", ["dtype", "torch_dtype", "text_config"])
def test_the_type_is_named_in_several_places(where: str, pair: tuple[Path, Path]):
    raw = json.loads((pair[0] / "config.json").read_text())
    for part in (raw, raw["text_config"]):
        for name in ("dtype", "torch_dtype"):
            part.pop(name, None)
    if where == "text_config":
        raw["text_config"]["dtype"] = "float16"
    else:
        raw[where] = "float16"
    (pair[0] / "config.json").write_text(json.dumps(raw))
    described = read_target(pair[0])
    assert described.stated_dtype == "float16"
    assert [replace(described, dtype=name).dtype_bytes for name in ("bfloat16", "float32")] == [2, 4]
    assert replace(described, dtype="bfloat16").dtype_here(mx.float32) == mx.bfloat16


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (lambda it: (it / "config.json").unlink(), "has no config.json"),
    "another architecture": (lambda it: edit(it, {"model_type": "llama"}), "'llama' isn't supported"),
    "a drafter": (lambda it: edit(it, {"model_type": "gemma4_assistant"}), "is a drafter, not a target"),
    "another quantisation": (lambda it: edit(it, {"quantization_config": {"quant_method": "awq"}}), "by awq"),
    "a nonsensical one": (lambda it: edit(it, {"quantization": True}), "quantization in config.json can't be used"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_what_is_wrong_is_said_of_its_folder(damage: str, pair: tuple[Path, Path]):
    break_it, reason = BROKEN[damage]
    break_it(pair[0])
    with pytest.raises(CheckpointError, match=reason) as error:
        read_target(pair[0])
    assert str(error.value).startswith(str(pair[0]))


def test_options_are_checked_and_nothing_changes_afterwards(pair: tuple[Path, Path]):
    with pytest.raises(CheckpointError, match="dtype 'int8' isn't supported"):
        read_target(pair[0], dtype="int8")
    with pytest.raises(FrozenInstanceError):
        read_target(pair[0]).dtype = "float16"  # type: ignore[misc]


def test_a_model_keeps_what_it_was_loaded_by(pair: tuple[Path, Path]):
    with mlx_mtp.load(*pair, quantize=4, profile=None) as lm:
        assert lm.drafter_description and lm.drafter_description.quantize == lm.drafter_format == Format(4)
        assert lm.description.quantize == Format(4) and lm.config is lm.description.config


def test_checkpoints_know_nothing_of_what_uses_them():
    """Arrows point down: config, files and models lie below; decoding, tuning and the interfaces above."""
    folder = Path(mlx_mtp.__file__).parent / "checkpoint"
    below = {"config", "errors", "files", "kv", "models", "system"}
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                used = {node.module.partition(".")[0]} if node.module else {name.name for name in node.names}
                assert used <= below, f"{path.name} imports {used - below}"
            if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
                assert not any(str(module).startswith(("mlx_mtp", "weights_convert")) for module in modules)
