"""Reads ranges of rows of tensors from safetensors files.

MLX can only read whole tensors, and the largest of Gemma 4 have more than 5 GB. A tensor is read here as a matrix: all
axes except the last are flattened into rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_mtp.checkpoint.safetensors_files import TYPES, read_header, weight_files
from mlx_mtp.errors import CheckpointError

DTYPES = {name: TYPES[name] for name in ("F32", "F16", "BF16", "I64", "I32", "U32", "U8")}
"""Names of the types that can be converted."""

_PLAIN = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Tensor:
    """A tensor in a safetensors file.

    Attributes:
        name: Its name.
        file: The file.
        offset: Offset of its first byte in the file.
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
        """Elements in a row, the length of the last axis."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Number of rows."""
        return math.prod(self.shape[:-1])

    def read(self, start: int, stop: int) -> mx.array:
        """Reads rows `start` to `stop`, without the last, as a matrix [stop - start, width].

        Raises:
            CheckpointError: The file is truncated.
            OSError: The file can't be read.
        """
        count = (stop - start) * self.width
        with self.file.open("rb") as file:
            file.seek(self.offset + start * self.width * self.dtype.size)
            plain = np.fromfile(file, _PLAIN[self.dtype.size], count)
        if plain.size != count:
            raise CheckpointError(f"{self.file} is truncated: download it again")
        return mx.array(plain).view(self.dtype).reshape(stop - start, self.width)


def find_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name; reads only the headers of its files.

    Raises:
        CheckpointError: A file is missing, truncated or corrupt, or has a tensor of an unsupported type.
    """
    found = {}
    for file in weight_files(folder):
        header = read_header(file)
        for name, it in header.tensors.items():
            if it.type not in DTYPES:
                raise CheckpointError(
                    f"{file}: {name} is of type {it.type}, which can't be converted: use the original"
                )
            found[name] = Tensor(name, file, header.start + it.begin, DTYPES[it.type], it.shape)
    return found
