"""What the oracle reads: safetensors, quantised weights and LoRA adapters, each by its published definition, in numpy.

Shares no code with mlx_mtp, and none with MLX: a quantised matrix is unpacked bit by bit.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]

_KINDS = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "U32": np.uint32, "U8": np.uint8}
_PREFIX = re.compile(
    r"^(base_model\.model\.)?(model\.language_model\.|language_model\.model\.|language_model\.|model\.)?"
)


def read_safetensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a file; bfloat16 as float32, and everything else as it is stored."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    tensors = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            data = raw[start + begin : start + end]
            if entry["dtype"] == "BF16":  # the upper half of a float32
                flat = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                flat = np.frombuffer(data, _KINDS[entry["dtype"]])
            tensors[name] = flat.reshape(entry["shape"])
    return tensors


def read_weights(folder: Path, dtype: str) -> dict[str, Array]:
    """The weights of a target by Google's names without prefix, float64, dequantised.

    Args:
        folder: Its folder.
        dtype: What it is loaded in: "float32", or a type of 16 bits, to which weights, scales and biases are rounded.
    """
    stored = {
        _PREFIX.sub("", name): tensor if tensor.dtype.kind == "u" else rounded(tensor, dtype)
        for name, tensor in read_safetensors(folder / "model.safetensors").items()
    }
    section = json.loads((folder / "config.json").read_text()).get("quantization", {})
    formats = {_PREFIX.sub("", name): entry for name, entry in section.items() if isinstance(entry, dict)}
    weights = {}
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        if f"{module}.scales" not in stored:
            weights[name] = tensor.astype(np.float64)
        elif part == "weight":
            values = dequantised(
                tensor, stored[f"{module}.scales"], stored.get(f"{module}.biases"), formats.get(module, section)
            )
            weights[module if ".experts." in module else name] = values
    return weights


def dequantised(
    packed: npt.NDArray[np.uint32], scales: Array, biases: Array | None, form: dict[str, Any]
) -> npt.NDArray[np.float64]:
    """A quantised matrix, or one for each expert: float64 [..., rows, width].

    Args:
        packed: uint32 [..., rows, width * bits / 32]; the first code is in the lowest bits.
        scales: [..., rows, width / group_size]; numbers, or for the modes other than affine their code, uint8.
        biases: As the scales; None but for affine.
        form: "bits", "group_size" and perhaps "mode", as in config.json.
    """
    bits, mode = form["bits"], form.get("mode", "affine")
    every = np.unpackbits(np.ascontiguousarray(packed).view(np.uint8), axis=-1, bitorder="little")
    codes = every.reshape(*every.shape[:-1], -1, bits) @ (1 << np.arange(bits))
    values = {"affine": lambda: codes, "mxfp4": lambda: _small_float(codes, 2, 1)}.get(
        mode, lambda: _small_float(codes, 2, 1) if bits == 4 else _small_float(codes, 4, 3)
    )()
    factors = {"affine": lambda: scales, "nvfp4": lambda: _small_float(scales, 4, 3)}.get(
        mode, lambda: 2.0 ** (scales.astype(np.float64) - 127)
    )()
    groups = values.reshape(*scales.shape, form["group_size"]) * factors[..., None].astype(np.float64)
    if biases is not None:
        groups = groups + biases[..., None]
    return groups.reshape(codes.shape).astype(np.float64)


def _small_float(codes: npt.NDArray[Any], exponent_bits: int, fraction_bits: int) -> npt.NDArray[np.float64]:
    """Floating-point numbers of 4 or 8 bits: a sign, an exponent, a fraction; without infinities."""
    codes = codes.astype(np.int64)
    fraction = (codes & (1 << fraction_bits) - 1) / (1 << fraction_bits)
    exponent = codes >> fraction_bits & (1 << exponent_bits) - 1
    bias = (1 << exponent_bits - 1) - 1
    size = np.where(exponent > 0, (1 + fraction) * 2.0 ** (exponent - bias), fraction * 2.0 ** (1 - bias))
    return np.where(codes >> exponent_bits + fraction_bits & 1, -size, size)


def rounded(x: npt.NDArray[Any], dtype: str) -> Array:
    """Numbers rounded to the nearest of "float32", "float16" or "bfloat16" (there, ties to even), as float32."""
    single = x.astype(np.float32)
    if dtype == "float16":
        return single.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(single).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return single


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to a map x W.

    Attributes:
        a: [..., in, rank]; the first axis of a mixture's is the expert.
        b: [..., rank, out].
        scale: Its factor.
    """

    a: Array
    b: Array
    scale: float

    def __call__(self, x: Array, expert: int | None = None) -> Array:
        """scale (x A) B, of rows [n, in]."""
        a, b = (self.a, self.b) if expert is None else (self.a[expert], self.b[expert])
        return self.scale * ((x @ a) @ b)


def read_adapter(folder: Path) -> dict[str, Delta]:
    """An adapter in mlx-lm's form or in PEFT's, by the names of the target's modules."""
    config = json.loads((folder / "adapter_config.json").read_text())
    peft = "peft_type" in config
    scale = config["lora_alpha"] / config["r"] if peft else config["lora_parameters"]["scale"]
    stored = read_safetensors(folder / ("adapter_model.safetensors" if peft else "adapters.safetensors"))
    found = {}
    for name, tensor in stored.items():
        if ".lora_A" in name or ".lora_a" in name:
            other = stored[name.replace(".lora_A", ".lora_B").replace(".lora_a", ".lora_b")]
            # mlx-lm has A [in, rank] and B [rank, out] of plain maps, and the other way round of experts; PEFT of all.
            turned = peft or tensor.ndim == 3
            a, b = (it.swapaxes(-1, -2) if turned else it for it in (tensor, other))
            module = _PREFIX.sub("", name.split(".lora_")[0]).replace(".switch_glu.", ".")
            found[module] = Delta(a.astype(np.float64), b.astype(np.float64), scale)
    return found
