"""Every tensor of every published checkpoint finds its place, and every parameter gets one (tensor_names.py).

The models have their real shapes here; nothing is evaluated, so nothing is allocated.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_mtp import config
from mlx_mtp.checkpoint import load, quantization
from mlx_mtp.checkpoint.description import Description, read
from mlx_mtp.checkpoint.tensor_names import RenameTable, drafter_table, target_table
from mlx_mtp.errors import CheckpointError
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target
from tests.support.real_tensors import (
    SIZES,
    Tensors,
    drafter,
    drafter_config,
    mlx_community,
    payload,
    target,
    target_config,
)
from weights_convert import Format, Scheme
from weights_convert.plan import make_plan

DTYPES = {"BF16": mx.bfloat16, "U32": mx.uint32, "I64": mx.int64}
HERE = Path("checkpoint")


def described(raw: dict[str, Any], table: RenameTable) -> Description[Any]:
    kind = config.drafter_config if raw["model_type"] in config.DRAFTER_TYPES else config.target_config
    stored = quantization.stored(raw, table)
    return Description(folder=HERE, raw=raw, config=kind(raw), table=table, stored=stored)


def target_of(raw: dict[str, Any]) -> tuple[nn.Module, RenameTable]:
    text = config.target_config(raw).text
    return Target(text), target_table(text)


def drafter_of(raw: dict[str, Any]) -> tuple[nn.Module, RenameTable]:
    parsed = config.drafter_config(raw)
    return Drafter(parsed, "committed"), drafter_table(parsed)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in tree_flatten(model.parameters())}


def assign(model: nn.Module, table: RenameTable, tensors: Tensors, raw: dict[str, Any]) -> None:
    """Loads a checkpoint as far as that goes without its values."""
    stored = {name: mx.zeros(shape, DTYPES[dtype]) for name, (dtype, shape) in tensors.items()}
    before = mx.get_active_memory()
    load.assign(model, stored, described(raw, table))
    assert mx.get_active_memory() - before < 10**6


def found(table: RenameTable, tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Our parameters and their shapes, as a checkpoint with these tensors has them."""
    given = {name: shape for name, (_, shape) in tensors.items()}
    return {ours: source.shape(given) for ours, source in table.layout(given).sources.items()}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("part", ["target", "drafter"])
def test_each_tensor_is_used_once_or_skipped_for_a_reason(name: str, part: str) -> None:
    if part == "target":
        tensors, raw, (model, table) = target(name), target_config(name), target_of(target_config(name))
    else:
        tensors, raw, (model, table) = drafter(name), drafter_config(name), drafter_of(drafter_config(name))
    layout = table.layout(tensors)
    uses = Counter((stored, source.half) for source in layout.sources.values() for stored in source.names)
    assert set(uses.values()) == {1}
    cut = {stored for stored, half in uses if half is not None}
    assert all((stored, 0) in uses and (stored, 1) in uses and (stored, None) not in uses for stored in cut)
    assert {stored for stored, _ in uses} | layout.skipped.keys() == tensors.keys()
    assert not {stored for stored, _ in uses} & layout.skipped.keys()
    assert all(layout.skipped.values())
    assert found(table, tensors) == shapes(model)
    assign(model, table, tensors, raw)
    assert {value.dtype for _, value in tree_flatten(model.parameters())} <= {mx.float32, mx.bfloat16, mx.int64}


@pytest.mark.parametrize("name", SIZES)
def test_only_these_tensors_are_skipped(name: str) -> None:
    """Towers, and keys and values of layers that read those of lower ones: nothing else."""
    _, table = target_of(target_config(name))
    skipped = table.layout(target(name)).skipped
    size = SIZES[name]
    tower = {n for n in skipped if re.match(r"model\.(vision|audio|embed_vision|embed_audio)", n)}
    kv = skipped.keys() - tower
    layers = {int(re.fullmatch(r"model\.language_model\.layers\.(\d+)\.self_attn\.(k|v)_.*", n)[1]) for n in kv}
    assert len(kv) == 3 * size.shared and layers == set(range(size.depth - size.shared, size.depth))
    assert not any("language_model" in n for n in tower)
    assert not drafter_of(drafter_config(name))[1].layout(drafter(name)).skipped


# Other layouts


def in_mlx_lm(tensors: Tensors) -> Tensors:
    return {
        name.removeprefix("model.").replace("language_model.", "language_model.model."): tensor
        for name, tensor in tensors.items()
        if "language_model" in name
    }


def text_only(tensors: Tensors) -> Tensors:
    return {n.replace("language_model.", ""): t for n, t in tensors.items() if "language_model" in n}


def bare(tensors: Tensors) -> Tensors:
    return {n.removeprefix("model.language_model."): t for n, t in tensors.items() if "language_model" in n}


def one_by_one(tensors: Tensors) -> Tensors:
    """Experts as tensors of their own."""
    result = {}
    for name, (dtype, shape) in tensors.items():
        bank, _, kind = name.rpartition(".")
        if not bank.endswith(".experts"):
            result[name] = (dtype, shape)
            continue
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
        for expert in range(shape[0]):
            for part in parts:
                result[f"{bank}.{expert}.{part}.weight"] = (dtype, (shape[1] // len(parts), shape[2]))
    return result


def switch_glu(tensors: Tensors) -> Tensors:
    return {n.replace(".experts.", ".experts.switch_glu."): t for n, t in tensors.items()}


def with_more(tensors: Tensors) -> Tensors:
    return tensors | {
        "lm_head.weight": ("BF16", (262144, 2)),
        "language_model.lm_head.scales": ("BF16", (262144, 2)),
        "model.language_model.layers.0.self_attn.rotary_emb.inv_freq": ("BF16", (128,)),
        "model.language_model.layers.0.mlp.gate_proj.input_max": ("BF16", ()),
    }


@pytest.mark.parametrize("change", [in_mlx_lm, text_only, bare, one_by_one, switch_glu, with_more])
@pytest.mark.parametrize("name", ["E2B", "26B-A4B"])
def test_other_layouts_hold_the_same_model(name: str, change: Any) -> None:
    model, table = target_of(target_config(name))
    tensors = change(target(name))
    assert found(table, tensors) == shapes(model)
    if change is one_by_one:
        assign(model, table, tensors, target_config(name))


def test_without_what_is_not_used() -> None:
    """As Google's newer converter writes E2B: no keys and values in layers that read those of lower ones."""
    model, table = target_of(target_config("E2B"))
    skipped = table.layout(target("E2B")).skipped
    tensors = {name: tensor for name, tensor in target("E2B").items() if name not in skipped}
    assert found(table, tensors) == shapes(model) and not table.layout(tensors).skipped


def test_a_head_of_its_own() -> None:
    raw = target_config("E2B")
    raw["text_config"]["tie_word_embeddings"] = False
    model, table = target_of(raw)
    for name in ("lm_head.weight", "language_model.lm_head.weight", "model.language_model.lm_head.weight"):
        assert found(table, target("E2B") | {name: ("BF16", (262144, 1536))}) == shapes(model)


def test_a_drafter_with_more_than_it_needs() -> None:
    model, table = drafter_of(drafter_config("31B"))
    more: Tensors = {
        "lm_head.weight": ("BF16", (262144, 1024)),
        "model.layers.0.self_attn.k_proj.weight": ("BF16", (4096, 1024)),
        "masked_embedding.centroids.weight": ("BF16", (2048, 1024)),
    }
    assert found(table, drafter("31B") | more) == shapes(model)
    assert table.layout(drafter("31B") | more).skipped.keys() == more.keys()


@pytest.mark.parametrize(
    "extra, culprit",
    [
        ({"language_model.model.norm.weight": (4,)}, "are the same tensor"),
        ({"model.layers.0.experts.3.down_proj.weight": (4, 4)}, "stored one by one as well"),
        ({"model.layers.7.experts.1.down_proj.weight": (4, 4)}, "expert 0 is missing"),
    ],
)
def test_layouts_that_contradict_themselves(extra: dict[str, tuple[int, ...]], culprit: str) -> None:
    names = ["model.norm.weight", "model.layers.0.experts.down_proj"]
    with pytest.raises(CheckpointError, match=culprit):
        target_of(target_config("26B-A4B"))[1].layout([*names, *extra])


def test_experts_that_differ_in_shape() -> None:
    _, table = target_of(target_config("26B-A4B"))
    given = {"layers.0.experts.0.down_proj.weight": (4, 4), "layers.0.experts.1.down_proj.weight": (4, 5)}
    (source,) = table.layout(given).sources.values()
    with pytest.raises(CheckpointError, match=r"experts\.1\.down_proj\.weight is \[4, 5\]"):
        source.shape(given)


# Quantised conversions


@pytest.mark.parametrize(
    "name, bits, size, count",
    [
        # Bytes of the published files without their headers.
        ("26B-A4B", 4, 15_340_981_404, 1697),
        ("E4B", 4, 5_146_448_340, None),
        ("31B", 4, None, None),
        ("12B", 4, None, None),
        ("E2B", 4, 3_550_352_326, 2511),
        ("E2B", 8, None, None),
    ],
)
def test_mlx_community(name: str, bits: int, size: int | None, count: int | None) -> None:
    """Their conversions fill the model, each module in the bits that it is stored in."""
    tensors, section = mlx_community(name, bits)
    assert size in (None, payload(tensors)) and count in (None, len(tensors))
    raw = target_config(name) | {"quantization": section, "quantization_config": section}
    model, table = target_of(raw)
    assign(model, table, tensors, raw)
    formats = {path: m.bits for path, m in model.named_modules() if hasattr(m, "bits")}
    assert set(formats.values()) == ({4, 8} if name == "26B-A4B" else {bits})
    assert all(own == (8 if path.endswith("router.proj") else bits) for path, own in formats.items())
    assert "embed_tokens" in formats and ("embed_tokens_per_layer" in formats) == (name in ("E2B", "E4B"))
    used = {n for source in table.layout(tensors).sources.values() for n in source.names}
    assert len(formats) == sum(n.endswith(".scales") for n in used)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "language_model.", "model.", ""])
def test_entries_of_the_quantization_section(prefix: str) -> None:
    """Whatever their prefix; `false` is "not quantised", and entries that name no mode are affine."""
    section = {
        "group_size": 32,
        "bits": 4,
        "mode": "mxfp4",
        f"{prefix}layers.0.router.proj": {"group_size": 64, "bits": 8},
        f"{prefix}layers.0.mlp.down_proj": False,
        f"{prefix}layers.1.mlp.down_proj": True,
        f"{prefix}layers.0.experts.switch_glu.up_proj": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
        "vision_tower.encoder.layers.0.mlp.down_proj": {"group_size": 64, "bits": 3},
    }
    for key in ("quantization", "quantization_config"):
        stored = quantization.stored({key: section}, target_of(target_config("26B-A4B"))[1])
        assert stored is not None
        common = Format(4, 32, "mxfp4")
        for path, expected in (
            ("layers.0.router.proj", Format(8, 64)),
            ("layers.0.mlp.down_proj", None),
            ("layers.1.mlp.down_proj", common),
            ("layers.0.experts.up_proj", Format(4, 16, "nvfp4")),
            ("layers.5.experts.up_proj", common),
        ):
            assert stored.format(path, 2816) == expected


def test_bits_that_only_the_shapes_tell() -> None:
    """Some conversions don't name the router's own bits."""
    tensors, section = mlx_community("26B-A4B", 4)
    section = {key: value for key, value in section.items() if not isinstance(value, dict)}
    raw = target_config("26B-A4B") | {"quantization": section}
    model, table = target_of(raw)
    assign(model, table, tensors, raw)
    assert model.layers[0].router.proj.bits == 8 and model.layers[0].mlp.down_proj.bits == 4


def test_other_kinds_of_quantization_are_named() -> None:
    table = target_of(target_config("E2B"))[1]
    with pytest.raises(CheckpointError, match="gptq, which MLX can't run"):
        quantization.stored({"quantization_config": {"quant_method": "gptq", "desc_act": False}}, table)


def test_the_drafter_does_not_inherit() -> None:
    """A drafter without a section of its own isn't quantised."""
    assert quantization.stored(drafter_config("E2B"), drafter_of(drafter_config("E2B"))[1]) is None


# Converting


def write_hollow(folder: Path, tensors: Tensors, raw: dict[str, Any]) -> None:
    """A checkpoint of its full size whose weights are a hole in a file, which takes no space."""
    folder.mkdir()
    header, end = {}, 0
    for name, entry in tensors.items():
        start, end = end, end + payload({name: entry})
        header[name] = {"dtype": entry[0], "shape": entry[1], "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("name", SIZES)
def test_a_conversion_is_laid_out_as_mlx_community_has_it(name: str, tmp_path: Path) -> None:
    write_hollow(tmp_path / "source", target(name), target_config(name))
    plan = make_plan(read(tmp_path / "source"), Scheme(Format(4)), None)
    entries = [entry for group in plan.files.values() for parameter in group for entry in parameter.entries()]
    expected, section = mlx_community(name, 4)
    text = {n: tensor for n, tensor in expected.items() if n.startswith("language_model.")}
    assert {entry.name: (entry.dtype, entry.shape) for entry in entries} == {
        n: (DTYPES[dtype], shape) for n, (dtype, shape) in text.items()
    }
    assert len(entries) == len(text) and plan.total == payload(text)
    for module, how in section.items():
        assert plan.config["quantization"][module] == (how | {"mode": "affine"} if isinstance(how, dict) else how)
