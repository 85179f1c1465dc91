"""Reads rows of tensors straight from safetensors files.

MLX reads a tensor as a whole; the largest ones of Gemma 4 have more than 5 GB. A tensor is taken here as a matrix whose
rows lie one after the other: all axes but the last are one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.checkpoint import check_safetensors, weight_files
from mlx_mtp.errors import CheckpointError

DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "I64": mx.int64,
    "I32": mx.int32,
    "U32": mx.uint32,
    "U8": mx.uint8,
}
"""safetensors' names of types."""

_SAMPLES, _SAMPLE_BYTES = 64, 2**12

_PLAIN = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Tensor:
    """A tensor in a safetensors file.

    Attributes:
        name: Its name.
        file: Where it is.
        offset: Its first byte there.
        dtype: Its type.
        shape: Its shape.
    """

    name: str
    file: Path
    offset: int
    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Length of a row: the last axis."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Number of rows."""
        return math.prod(self.shape[:-1])

    def read(self, start: int, stop: int) -> mx.array:
        """Rows from `start` to before `stop`, as a matrix.

        Raises:
            CheckpointError: The file has become shorter.
            OSError: It can't be read.
        """
        count = (stop - start) * self.width
        with self.file.open("rb") as file:
            file.seek(self.offset + start * self.width * self.dtype.size)
            plain = np.fromfile(file, _PLAIN[self.dtype.size], count)
        if plain.size != count:
            raise CheckpointError(f"{self.file} is truncated: download it again")
        return mx.array(plain).view(self.dtype).reshape(stop - start, self.width)


def find_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by name; reads the headers of its files only.

    Raises:
        CheckpointError: A file is missing, truncated or corrupt, or holds a type that isn't supported.
    """
    found = {}
    for file in weight_files(folder):
        header = check_safetensors(file)
        with file.open("rb") as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
        for name, entry in header.items():
            found[name] = _tensor(name, file, start, entry)
    return found


def sample(file: Path) -> bytes:
    """A few bytes from all over a file, its header included: other weights have others."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        parts = [stream.read(8 + int.from_bytes(stream.read(8), "little"))]
        for i in range(_SAMPLES):
            stream.seek(size * i // _SAMPLES)
            parts.append(stream.read(_SAMPLE_BYTES))
    return b"".join(parts)


def _tensor(name: str, file: Path, start: int, entry: dict[str, Any]) -> Tensor:
    dtype, shape = entry.get("dtype"), entry.get("shape")
    begin, end = entry["data_offsets"]
    if dtype not in DTYPES:
        raise CheckpointError(f"{file}: {name} is of type {dtype}, which can't be converted: take the original")
    if not isinstance(shape, list) or math.prod(shape) * DTYPES[dtype].size != end - begin:
        raise CheckpointError(f"{file} is corrupt: {name} has {end - begin:,} bytes for the shape {shape}")
    return Tensor(name, file, start + begin, DTYPES[dtype], tuple(shape))
