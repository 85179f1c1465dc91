"""How the weights of a random target are stored: in 16 bits, quantised in any format, with an adapter beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import numpy as np

Json = dict[str, Any]

FORMATS = [
    *((bits, group, "affine") for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64)),
    *[(4, 32, "affine"), (4, 64, "affine"), (8, 32, "affine"), (8, 64, "affine")] * 2,
    (4, 32, "mxfp4"), (8, 32, "mxfp8"), (4, 16, "nvfp4"),
]  # fmt: skip
"""Bits, group size and mode: all that MLX has and a width of 64 allows, the usual ones more often."""


@dataclass(frozen=True)
class Storage:
    """How weights are stored.

    Attributes:
        dtype: Type of what isn't quantised, and of scales.
        quantised: Whether matrices are quantised, most of them in one format.
        seed: Of the formats.
    """

    dtype: str = "float32"
    quantised: bool = False
    seed: int = 0

    def stored(self, config: Json, tensors: dict[str, np.ndarray]) -> dict[str, mx.array]:
        """The tensors of a file; adds the section "quantization" to its config.json."""
        arrays = {name: mx.array(tensor).astype(getattr(mx, self.dtype)) for name, tensor in tensors.items()}
        if not self.quantised:
            return arrays
        rng = Random(self.seed)
        common = rng.choice(FORMATS)
        config["quantization"] = section = _entry(common)
        found: dict[str, mx.array] = {}
        for name, array in arrays.items():
            module, kind = name.removesuffix(".weight"), rng.choice(["common"] * 6 + ["other", "none"])
            form = rng.choice(FORMATS) if kind == "other" else common
            if array.ndim < 2 or kind == "none" or array.shape[-1] % form[1]:
                found[name] = array
                if array.ndim > 1:
                    section[module] = False
                continue
            if form != common:
                section[module] = _entry(form)
            parts = mx.quantize(array, group_size=form[1], bits=form[0], mode=form[2])
            found |= {f"{module}.{part}": it for part, it in zip(("weight", "scales", "biases"), parts, strict=False)}
        return found


def _entry(form: tuple[int, int, str]) -> Json:
    return {"bits": form[0], "group_size": form[1], "mode": form[2]}


def write_adapter(folder: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> Path:
    """Writes a random LoRA adapter for some of a target's maps, in mlx-lm's form or PEFT's.

    Args:
        folder: Where to write it.
        shapes: The shapes of the target's weights before quantisation, by Google's names without prefix.
        seed: Of everything about it.
    """
    rng, values = Random(seed), np.random.default_rng(seed)
    peft, rank, scale = rng.random() < 0.4, rng.randint(1, 4), rng.choice([0.5, 2.0, 8.0])
    possible = {name: it for own, shape in shapes.items() for name, it in _adapted(own, shape, rank)}
    if peft:  # which has no form of its own for experts and embeddings here
        possible = {name: it for name, it in possible.items() if "embed" not in name and "experts" not in name}
    chosen = [name for name in possible if rng.random() < 0.5] or [next(iter(possible))]
    found = {}
    for module in chosen:
        for part, shape in zip("ab", possible[module], strict=True):
            value = (values.standard_normal(shape) * 0.3 / rank**0.5).astype(np.float32)
            name = f"base_model.model.model.language_model.{module}.lora_{part.upper()}.weight"
            name = name if peft else f"language_model.model.{module}.lora_{part}"
            found[name] = mx.array(np.ascontiguousarray(value.T) if peft else value)
    config: Json = {"fine_tune_type": "lora", "num_layers": 100, "lora_parameters": {"rank": rank, "scale": scale}}
    if peft:
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": scale * rank}
    folder.mkdir()
    mx.save_safetensors(str(folder / ("adapter_model.safetensors" if peft else "adapters.safetensors")), found)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _adapted(name: str, shape: tuple[int, ...], rank: int) -> Iterator[tuple[str, tuple[tuple[int, ...], ...]]]:
    """The modules of a weight that may have an adapter, with the shapes of A and B in mlx-lm's form."""
    module = name.removesuffix(".weight")
    if ".experts." in module:
        rows = shape[1] // 2 if "gate_up" in module else shape[1]
        for part in ("gate_proj", "up_proj") if "gate_up" in module else ("down_proj",):
            yield f"{module.rpartition('.')[0]}.switch_glu.{part}", ((shape[0], rank, shape[2]), (shape[0], rows, rank))
    elif module.startswith("embed_tokens"):
        yield module, ((shape[0], rank), (rank, shape[1]))
    elif len(shape) == 2 and module != "lm_head":
        yield module, ((shape[1], rank), (rank, shape[0]))
