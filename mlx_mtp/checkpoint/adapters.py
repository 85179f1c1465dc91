"""LoRA adapters: small matrices that a fine-tune adds to a target's own, as mlx-lm writes them, and PEFT.

They stay apart from the weights, which may be quantised: a linear map becomes x W + scale (x A) B. So an adapter costs
two thin products a layer, and the same base serves any number of them.

    adapter_config.json    what kind it is, its rank and its scale
    adapters.safetensors   A and B of every map that has them, under mlx-lm's names (adapter_model.safetensors: PEFT's)

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


class LoRALinear(nn.Module):
    """A linear map with an adapter: base(x) + scale (x A) B.

    Attributes:
        base: The map itself.
        lora_a: A, [in, rank].
        lora_b: B, [rank, out].
    """

    def __init__(self, base: nn.Module, a: mx.array, b: mx.array, scale: float):
        super().__init__()
        self.base, self.lora_a, self.lora_b, self._scale = base, a, b, scale

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        return y + (self._scale * ((x @ self.lora_a) @ self.lora_b)).astype(y.dtype)


class LoRAExperts(nn.Module):
    """The same for one linear map per expert, A [experts, rank, in] and B [experts, out, rank]."""

    def __init__(self, base: nn.Module, a: mx.array, b: mx.array, scale: float):
        super().__init__()
        self.base, self.lora_a, self.lora_b, self._scale = base, a, b, scale

    def __call__(self, x: mx.array, experts: mx.array, in_order: bool, rows: mx.array | None = None) -> mx.array:
        """As `ExpertLinear`."""
        y = self.base(x, experts, in_order, rows)
        own = None if rows is None else counting(experts.size, np.uint32).reshape(experts.shape)
        z = mx.gather_mm(x, self.lora_a.swapaxes(-1, -2), rows, experts, sorted_indices=in_order)
        z = mx.gather_mm(z, self.lora_b.swapaxes(-1, -2), own, experts, sorted_indices=in_order)
        return y + (self._scale * z).astype(y.dtype)


class LoRAEmbedding(nn.Module):
    """The same for a table of embeddings, A [tokens, rank] and B [rank, size], which may be the output head too."""

    def __init__(self, base: nn.Module, a: mx.array, b: mx.array, scale: float):
        super().__init__()
        self.base, self.lora_a, self.lora_b, self._scale = base, a, b, scale

    def __call__(self, tokens: mx.array) -> mx.array:
        y = self.base(tokens)
        return y + (self._scale * (self.lora_a[tokens] @ self.lora_b)).astype(y.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Scores of all tokens, as `nn.Embedding.as_linear`."""
        y = self.base.as_linear(x)
        return y + (self._scale * ((x @ self.lora_b.T) @ self.lora_a.T)).astype(y.dtype)


@dataclass(frozen=True)
class Adapter:
    """An adapter as it is stored.

    Attributes:
        folder: Where it lies.
        scale: What its products are multiplied by.
        rank: Its rank as adapter_config.json has it.
        parts: A and B by stored module name, oriented as in the classes above.
    """

    folder: Path
    scale: float
    rank: int
    parts: Mapping[str, tuple[mx.array, mx.array]]


def read_adapter(folder: Path) -> Adapter:
    """Reads an adapter's files; its arrays are read when they are evaluated.

    Raises:
        CheckpointError: It is missing or damaged, or none that can be run beside the weights.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}: give one with {CONFIG} and {WEIGHTS}")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}: it holds no adapter, or not all of it")
    config = read_json(folder / CONFIG)
    peft = "peft_type" in config
    scale, rank = _peft_facts(folder, config) if peft else _facts(folder, config)
    path = folder / (PEFT_WEIGHTS if peft else WEIGHTS)
    found: dict[str, dict[str, mx.array]] = {}
    for name, array in load(path).items():
        match = _PART.fullmatch(name)
        if not match:
            raise CheckpointError(
                f"{path}: {name} is no part of a LoRA adapter that can run beside the weights: {_FUSE}"
            )
        array = array.T if peft and array.ndim == 2 else array
        found.setdefault(match[1], {})[match[2].lower()] = array
    if not found:
        raise CheckpointError(f"{path} is empty")
    for name, parts in found.items():
        if len(parts) < 2:
            raise CheckpointError(f"{path}: {name} has only one of lora_a and lora_b")
    return Adapter(folder, scale, rank, {name: (parts["a"], parts["b"]) for name, parts in found.items()})


def apply(adapter: Adapter, target: Target, table: RenameTable) -> None:
    """Puts an adapter beside a target's weights; to be called before these are prepared for running.

    Args:
        adapter: The adapter.
        target: The target, quantised if it is to be.
        table: What stored names mean.

    Raises:
        CheckpointError: The adapter was made for another model.
    """
    modules = dict(target.named_modules())
    used = 0
    for stored, (a, b) in adapter.parts.items():
        about = f"the adapter in {adapter.folder} doesn't fit: {stored}"
        name = re.sub(r"^base_model\.model\.", "", stored)
        ours = table.modules(name)
        if not ours:  # such as those of vision, and of keys that no layer has of its own
            continue
        if len(ours) > 1:
            raise CheckpointError(f"{about} stands for {' and '.join(ours)} here: {_FUSE}")
        base = modules.get(ours[0])
        if not isinstance(base, tuple(_KINDS)):
            raise CheckpointError(f"{about} is nothing that this model has")
        kind = next(new for old, new in _KINDS.items() if isinstance(base, old))
        expected_a, expected_b = _shapes(kind, base, a)
        if (a.shape, b.shape) != (expected_a, expected_b):
            raise CheckpointError(
                f"{about} has A {list(a.shape)} and B {list(b.shape)} instead of {list(expected_a)} and "
                f"{list(expected_b)}"
            )
        if a.shape[1] != adapter.rank:
            raise CheckpointError(f"{about} has rank {a.shape[1]}, {CONFIG} says {adapter.rank}")
        parent, _, last = ours[0].rpartition(".")
        modules[parent][last] = kind(base, a, b, adapter.scale)
        used += 1
    if not used:
        raise CheckpointError(f"the adapter in {adapter.folder} has nothing for the text model: {VISION_AND_AUDIO}")


_KINDS: dict[type[nn.Module], type[LoRALinear] | type[LoRAExperts] | type[LoRAEmbedding]] = {
    nn.Linear: LoRALinear,
    nn.QuantizedLinear: LoRALinear,
    ExpertLinear: LoRAExperts,
    QuantizedExpertLinear: LoRAExperts,
    nn.Embedding: LoRAEmbedding,
    nn.QuantizedEmbedding: LoRAEmbedding,
}


def _facts(folder: Path, config: Mapping[str, Any]) -> tuple[float, int]:
    """Scale and rank of an adapter that mlx-lm has made."""
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise CheckpointError(f"{folder} holds a fine-tune of the type {kind!r}, and only LoRA runs apart: {_FUSE}")
    parameters = config.get("lora_parameters")
    parameters = parameters if isinstance(parameters, Mapping) else {}
    return _number(folder, "lora_parameters.scale", parameters.get("scale")), _whole(folder, parameters.get("rank"))


def _peft_facts(folder: Path, config: Mapping[str, Any]) -> tuple[float, int]:
    """The same for PEFT, whose scale is alpha by rank, or by its root."""
    if config["peft_type"] != "LORA":
        raise CheckpointError(f"{folder} holds an adapter of the type {config['peft_type']!r}, not LORA: {_FUSE}")
    special = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "target_parameters")
    for name in special:
        if config.get(name):
            raise CheckpointError(f"{folder} holds an adapter with {name}, which can't run apart: {_FUSE}")
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
    """The shapes that A and B must have beside a module, with the rank that A has."""
    *first, outputs, inputs = base.weight.shape
    if hasattr(base, "bits"):
        inputs = inputs * 32 // base.bits
    rank = a.shape[1] if a.ndim > 1 else 0
    if kind is LoRAExperts:
        return (*first, rank, inputs), (*first, outputs, rank)
    return ((outputs, rank), (rank, inputs)) if kind is LoRAEmbedding else ((inputs, rank), (rank, outputs))
