"""Writes safetensors files, and writes and verifies checksums.

Checksums are in SHA256SUMS, in the format of sha256sum: `sha256sum -c SHA256SUMS` verifies a folder too.
"""

from __future__ import annotations

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
    """Writes parameters to a file in chunks of rows; only one chunk is in memory at a time.

    Args:
        path: The file.
        parameters: The parameters to write.
        progress: Called with a parameter's name and the number of bytes just written.

    Returns:
        The file's SHA-256 in hexadecimal.

    Raises:
        OSError: The file can't be written.
        CheckpointError: A source file is truncated.
    """
    with path.open("wb") as file:
        entries = (entry for parameter in parameters for entry in parameter.entries())
        file.write(header := header_of((it.name, _NAMES[it.dtype], it.shape, it.nbytes) for it in entries))
        offset = len(header)
        for parameter in parameters:
            # A chunk has rows of the weight, its scales and its biases, which are stored apart.
            offsets = []
            for entry in parameter.entries():
                offsets.append(offset)
                offset += entry.nbytes
            for chunk in parameter.chunks():
                mx.eval(*chunk)
                for i, part in enumerate(chunk):
                    file.seek(offsets[i])
                    offsets[i] += file.write(_bytes(part))
                    progress(parameter.name, part.nbytes)
            mx.clear_cache()
    return sha256(path)


def write_sums(folder: Path, sums: dict[str, str]) -> None:
    """Writes a folder's SHA256SUMS.

    Args:
        folder: The folder.
        sums: SHA-256 in hexadecimal, by file name.
    """
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))


def verify_sums(folder: Path) -> int:
    """Verifies the checksums of all files of a converted folder.

    Returns:
        The number of files.

    Raises:
        CheckpointError: A file is missing or damaged, or there are no checksums.
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
        raise CheckpointError(f"{folder / SUMS} is damaged, it doesn't hold checksums: {again}") from None
    except OSError as error:
        raise CheckpointError(f"{folder} can't be read: {error}") from error
    return len(sums)


def _bytes(array: mx.array) -> memoryview:
    """The bytes of an array, without a copy if possible."""
    return np.ascontiguousarray(np.array(array.view(_PLAIN[array.dtype.size]), copy=None)).reshape(-1).data.cast("B")
