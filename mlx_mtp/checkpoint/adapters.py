"""LoRA adapters: small matrices that a fine-tune adds to a target's weights, in the formats of mlx-lm and PEFT.

They aren't merged into the weights, which may be quantised: a linear map becomes x W + scale (x A) B. So an adapter
costs two thin products per map, and the same weights can be used with any adapter.

    adapter_config.json    the kind of adapter, its rank and its scale
    adapters.safetensors   A and B of each adapted map, in mlx-lm's format (adapter_model.safetensors in PEFT's)

Not here: fine-tuning, and merging an adapter into the weights (`mlx_lm.fuse`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import CheckpointError
from ..files import read_json
from ..models.moe import ExpertLinear, QuantizedExpertLinear
from ..models.target import Target
from ..system.fusing import counting
from .safetensors_files import load
from .tensor_names import VISION_AND_AUDIO, RenameTable

CONFIG = "adapter_config.json"
WEIGHTS, PEFT_WEIGHTS = "adapters.safetensors", "adapter_model.safetensors"

_PART = re.compile(r"(.+)\.lora_(a|b|A|B)(?:\.weight)?")
_FUSE = "merge it with the tool that made it (mlx_lm.fuse), and load the result"


class _LoRA(nn.Module):
    """A module with an adapter.

    Attributes:
        base: The module itself, which may be quantised.
        lora_a: A; the subclasses give the shapes.
        lora_b: B.
    """

    def __init__(self, base: nn.Module, a: mx.array, b: mx.array, scale: float) -> None:
        """Adds an adapter to a module; arguments as the attributes."""
        super().__init__()
        self.base, self.lora_a, self.lora_b, self._scale = base, a, b, scale


class LoRALinear(_LoRA):
    """A linear map with an adapter, A [in, rank] and B [rank, out]: base(x) + scale (x A) B."""

    def __call__(self, x: mx.array) -> mx.array:
        """Maps x [..., in] to [..., out]."""
        y: mx.array = self.base(x)
        return y + (self._scale * ((x @ self.lora_a) @ self.lora_b)).astype(y.dtype)


class LoRAExperts(_LoRA):
    """One linear map per expert with an adapter, A [experts, rank, in] and B [experts, out, rank]."""

    def __call__(self, x: mx.array, experts: mx.array, in_order: bool, rows: mx.array | None = None) -> mx.array:
        """As `ExpertLinear`."""
        y: mx.array = self.base(x, experts, in_order, rows)
        own = None if rows is None else counting(experts.size, np.uint32).reshape(experts.shape)
        z = mx.gather_mm(x, self.lora_a.swapaxes(-1, -2), rows, experts, sorted_indices=in_order)
        z = mx.gather_mm(z, self.lora_b.swapaxes(-1, -2), own, experts, sorted_indices=in_order)
        return y + (self._scale * z).astype(y.dtype)


class LoRAEmbedding(_LoRA):
    """An embedding with an adapter, A [tokens, rank] and B [rank, size]; it may also be the output head."""

    def __call__(self, tokens: mx.array) -> mx.array:
        """Embeddings [..., size] of token ids [...], in the wider type of table and adapter.

        MLX gives the rows of mxfp4, mxfp8 and nvfp4 tables in bfloat16, whatever the model computes in.
        """
        y: mx.array = self.base(tokens)
        return y + self._scale * (self.lora_a[tokens] @ self.lora_b)

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits [..., tokens] of hidden states [..., size], as `nn.Embedding.as_linear`."""
        y: mx.array = self.base.as_linear(x)
        return y + (self._scale * ((x @ self.lora_b.T) @ self.lora_a.T)).astype(y.dtype)


@dataclass(frozen=True)
class Adapter:
    """An adapter as it is stored.

    Attributes:
        folder: Its folder.
        scale: Factor of its products.
        rank: Its rank according to adapter_config.json.
        parts: A and B by stored module name, with the axes of `LoRALinear`, `LoRAExperts` and `LoRAEmbedding`.
    """

    folder: Path
    scale: float
    rank: int
    parts: Mapping[str, tuple[mx.array, mx.array]]


def read_adapter(folder: Path) -> Adapter:
    """Reads an adapter's files; its arrays are read when they are evaluated.

    Raises:
        CheckpointError: It is missing or damaged, or is of a kind that must be merged into the weights.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}: give one with {CONFIG} and {WEIGHTS}")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}: it isn't an adapter's folder, or is incomplete")
    config = read_json(folder / CONFIG)
    peft = "peft_type" in config
    scale, rank = _peft_facts(folder, config) if peft else _facts(folder, config)
    path = folder / (PEFT_WEIGHTS if peft else WEIGHTS)
    found: dict[str, dict[str, mx.array]] = {}
    for name, stored in load(path).items():
        match = _PART.fullmatch(name)
        if not match:
            raise CheckpointError(
                f"{path}: {name} isn't part of a LoRA adapter that can run without being merged: {_FUSE}"
            )
        found.setdefault(match[1], {})[match[2].lower()] = stored.T if peft and stored.ndim == 2 else stored
    if not found:
        raise CheckpointError(f"{path} is empty")
    for name, parts in found.items():
        if len(parts) < 2:
            raise CheckpointError(f"{path}: {name} has only one of lora_a and lora_b")
    return Adapter(folder, scale, rank, {name: (parts["a"], parts["b"]) for name, parts in found.items()})


def apply(adapter: Adapter, target: Target, table: RenameTable) -> None:
    """Adds an adapter to a target; must be called before the target's weights are prepared (`load._materialize`).

    Args:
        adapter: The adapter.
        target: The target, already quantised if it is to be.
        table: The names of the target's tensors.

    Raises:
        CheckpointError: The adapter was made for another model.
    """
    modules: dict[str, nn.Module] = dict(target.named_modules())
    used = 0
    for stored, (a, b) in adapter.parts.items():
        problem = f"the adapter in {adapter.folder} doesn't fit: {stored}"
        names = table.modules(re.sub(r"^base_model\.model\.", "", stored))
        if not names:  # a module of vision, or keys of a layer that reads another's
            continue
        if len(names) > 1:
            raise CheckpointError(f"{problem} stands for {' and '.join(names)} here: {_FUSE}")
        base = modules.get(names[0])
        kind = next((new for old, new in _KINDS.items() if isinstance(base, old)), None)
        if base is None or kind is None:
            raise CheckpointError(f"{problem} doesn't exist in this model")
        expected_a, expected_b = _shapes(kind, base, a)
        if (a.shape, b.shape) != (expected_a, expected_b):
            raise CheckpointError(
                f"{problem} has A {list(a.shape)} and B {list(b.shape)} instead of {list(expected_a)} and "
                f"{list(expected_b)}"
            )
        if a.shape[1] != adapter.rank:
            raise CheckpointError(f"{problem} has rank {a.shape[1]}, {CONFIG} says {adapter.rank}")
        parent, _, last = names[0].rpartition(".")
        modules[parent][last] = kind(base, a, b, adapter.scale)
        used += 1
    if not used:
        raise CheckpointError(f"the adapter in {adapter.folder} has nothing for the text model: {VISION_AND_AUDIO}")


_KINDS: dict[type[nn.Module], type[_LoRA]] = {
    nn.Linear: LoRALinear,
    nn.QuantizedLinear: LoRALinear,
    ExpertLinear: LoRAExperts,
    QuantizedExpertLinear: LoRAExperts,
    nn.Embedding: LoRAEmbedding,
    nn.QuantizedEmbedding: LoRAEmbedding,
}


def _facts(folder: Path, config: Mapping[str, Any]) -> tuple[float, int]:
    """Scale and rank from mlx-lm's adapter_config.json."""
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise CheckpointError(f"{folder} has a fine-tune of the type {kind!r}, not lora: {_FUSE}")
    parameters = config.get("lora_parameters")
    parameters = parameters if isinstance(parameters, Mapping) else {}
    return _number(folder, "lora_parameters.scale", parameters.get("scale")), _whole(folder, parameters.get("rank"))


def _peft_facts(folder: Path, config: Mapping[str, Any]) -> tuple[float, int]:
    """Scale and rank from PEFT's adapter_config.json; its scale is alpha / rank, or alpha / sqrt(rank)."""
    if config["peft_type"] != "LORA":
        raise CheckpointError(f"{folder} has an adapter of the type {config['peft_type']!r}, not LORA: {_FUSE}")
    special = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "target_parameters")
    for name in special:
        if config.get(name):
            raise CheckpointError(f"{folder} has an adapter with {name}, which can't run without being merged: {_FUSE}")
    rank, alpha = _whole(folder, config.get("r")), _number(folder, "lora_alpha", config.get("lora_alpha"))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank), rank


def _number(folder: Path, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e6:
        raise CheckpointError(f"{folder / CONFIG}: {name} is {value!r:.80}, expected a number")
    return float(value)


def _whole(folder: Path, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{folder / CONFIG}: the rank is {value!r:.80}, expected a whole number from 1")
    return value


def _shapes(kind: type[nn.Module], base: nn.Module, a: mx.array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes that A and B must have for a module, with the rank that A has."""
    *first, outputs, inputs = base.weight.shape
    if hasattr(base, "bits"):
        inputs = inputs * 32 // base.bits
    rank = a.shape[1] if a.ndim > 1 else 0
    if kind is LoRAExperts:
        return (*first, rank, inputs), (*first, outputs, rank)
    return ((outputs, rank), (rank, inputs)) if kind is LoRAEmbedding else ((inputs, rank), (rank, outputs))
