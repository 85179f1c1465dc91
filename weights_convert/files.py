"""Writes safetensors files, and writes and verifies checksums.

Checksums are kept as `sha256sum` has them, in SHA256SUMS: `sha256sum -c SHA256SUMS` verifies a folder too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_mtp.checkpoint.safetensors_files import header_of, is_file_name
from mlx_mtp.errors import CheckpointError
from mlx_mtp.files import read_bytes, sha256

from .plan import Parameter
from .source import DTYPES

SUMS = "SHA256SUMS"

_PLAIN = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(path: Path, parameters: list[Parameter], progress: Callable[[str, int], None]) -> str:
    """Writes parameters to a file, some rows at a time. What isn't written yet is never more than these rows.

    Args:
        path: The file.
        parameters: What it holds.
        progress: Called with a parameter's name and the number of bytes just written.

    Returns:
        The file's SHA-256, in hexadecimal.

    Raises:
        OSError: It can't be written.
    """
    with path.open("wb") as file:
        entries = (entry for parameter in parameters for entry in parameter.entries())
        file.write(header := header_of((it.name, _NAMES[it.dtype], it.shape, it.nbytes) for it in entries))
        offset = len(header)
        for parameter in parameters:
            # A chunk has rows of the weight, its scales and its biases, and each of them lies in a place of its own.
            places = []
            for entry in parameter.entries():
                places.append(offset)
                offset += entry.nbytes
            for chunk in parameter.chunks():
                mx.eval(*chunk)
                for i, part in enumerate(chunk):
                    file.seek(places[i])
                    places[i] += file.write(_bytes(part))
                    progress(parameter.name, part.nbytes)
            mx.clear_cache()
        file.flush()
        os.fsync(file.fileno())
    return sha256(path)


def write_sums(folder: Path, sums: dict[str, str]) -> None:
    """Writes SHA256SUMS of a folder, from the checksums of its files."""
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))


def verify_sums(folder: Path) -> int:
    """Reads all files of a converted folder and compares their checksums.

    Returns:
        The number of files.

    Raises:
        CheckpointError: One is missing or differs, or there are no checksums.
    """
    again = f"delete the folder {folder} and convert again"
    try:
        lines = read_bytes(folder / SUMS).decode().splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        for name, digest in sums.items():
            if not is_file_name(name):
                raise ValueError("not the name of a file")
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name} is missing: {again}")
            if sha256(folder / name) != digest:
                raise CheckpointError(f"{folder / name} is damaged, its checksum is wrong: {again}")
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {SUMS}: it isn't a folder that mlx-mtp converted") from None
    except ValueError:
        raise CheckpointError(f"{folder / SUMS} is damaged, it holds no checksums: {again}") from None
    except OSError as error:
        raise CheckpointError(f"{folder} can't be read: {error}") from error
    return len(sums)


def _bytes(array: mx.array) -> memoryview:
    """An array's bytes, without a copy where it can be."""
    return np.ascontiguousarray(np.array(array.view(_PLAIN[array.dtype.size]), copy=None)).reshape(-1).data.cast("B")
