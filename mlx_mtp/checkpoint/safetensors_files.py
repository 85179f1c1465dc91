"""safetensors files: which ones a folder has, their headers, and their tensors.

A file's header is checked as strictly as the format demands before MLX reads the file: types are known, shapes fit the
tensors' bytes, and tensors fill the file without gaps or overlaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError, one_line
from ..files import listed, parse_json, read_json
from .tensor_names import RenameTable, of_vision_or_audio

INDEX = "model.safetensors.index.json"
"""Name of the file that lists the shards of a model."""

TYPES: Mapping[str, mx.Dtype] = {
    "BOOL": mx.bool_, "U8": mx.uint8, "I8": mx.int8, "U16": mx.uint16, "I16": mx.int16, "F16": mx.float16,
    "BF16": mx.bfloat16, "U32": mx.uint32, "I32": mx.int32, "F32": mx.float32, "U64": mx.uint64, "I64": mx.int64,
    "C64": mx.complex64, "F8_E4M3": mx.uint8, "F8_E8M0": mx.uint8,
}  # fmt: skip
"""The format's names of types, and the types as which MLX reads them."""

_LONGEST_HEADER = 100_000_000
"""Longest header, in bytes; the format's limit."""

_ROWS_COMPARED = 64
"""Rows to compare of a head and an embedding that should be equal; training would have changed all rows."""

_MOST_AXES = 64
"""Most axes of a tensor that are accepted, as in NumPy; Gemma 4's have up to four."""


@dataclass(frozen=True)
class Stored:
    """A tensor as the header describes it.

    Attributes:
        type: One of TYPES.
        shape: Its shape.
        begin: Offset of its first byte, from the end of the header.
        end: Offset after its last byte.
    """

    type: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of a file.

    Attributes:
        start: Offset of the tensors, in bytes from the file's beginning.
        tensors: The tensors by name.
        metadata: The metadata, texts by name.
    """

    start: int
    tensors: dict[str, Stored]
    metadata: dict[str, str]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, sorted by name.

    With an index these are the files in it, except those with nothing but vision and audio. Without one, they are all
    that match "model*.safetensors", or else all safetensors files.

    Args:
        folder: The model's folder.

    Raises:
        CheckpointError: There are none, or the index can't be used.
    """
    index = read_json(folder / INDEX, required=False)
    if index:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{folder / INDEX} has no weight_map: download it again")
        if odd := [file for file in weight_map.values() if not is_file_name(file)]:
            raise CheckpointError(f"{folder / INDEX} names {odd[0]!r:.80}, which isn't a file name in its folder")
        files = [
            folder / file
            for file in sorted({file for name, file in weight_map.items() if not of_vision_or_audio(name)})
        ]
    else:
        files = listed(folder, "model*.safetensors") or listed(folder, "*.safetensors")
    if not files:
        raise CheckpointError(f"{folder} has no safetensors files")
    return files


def is_file_name(name: str) -> bool:
    """Whether a name is a plain file name, which can't lead to another folder."""
    if not name.isprintable() or set(name) & {"/", "\\"}:
        return False
    return name not in ("", ".", "..") and len(name.encode()) <= 255


def tensors(folder: Path) -> Iterator[tuple[str, mx.array]]:
    """All tensors of a folder's safetensors files, lazily.

    Yields:
        Name and tensor. Nothing else holds the tensor, so it can be freed after it has been evaluated and used.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    for path in weight_files(folder):
        found = load(path)
        for name in sorted(found):
            yield name, found.pop(name)


def load(path: Path) -> dict[str, mx.array]:
    """The tensors of a file by name; they are read when they are evaluated.

    Raises:
        CheckpointError: See `read_header`.
    """
    read_header(path)
    try:
        return cast("dict[str, mx.array]", mx.load(str(path), format="safetensors"))
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is corrupt: {one_line(error)}; download it again") from error


def read_header(path: Path) -> Header:
    """Reads and checks the header of a file, without reading its tensors.

    Raises:
        CheckpointError: The file is missing, truncated, or not a safetensors file that MLX can read.
    """
    if not os.path.isfile(path):  # False too without the permission to look
        raise CheckpointError(f"{path} is missing: the download is incomplete")
    content, size = _header_bytes(path)
    try:
        # Stricter than Python's JSON, as MLX is.
        header = parse_json(content.decode(), object_pairs_hook=_no_name_twice, parse_constant=_refuse)
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata  # MLX writes null if there is none
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that isn't text")
        stored = {name: _stored(entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is corrupt: its header can't be read; download it again") from error
    end = _check_bytes(path, stored)
    if (whole := 8 + len(content) + end) != size:
        raise CheckpointError(f"{path} is truncated or damaged: {size:,} bytes instead of {whole:,}; download it again")
    return Header(8 + len(content), stored, metadata)


def _header_bytes(path: Path) -> tuple[bytes, int]:
    """The header's text, and the size of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little") if size >= 8 else size
            if length > min(size - 8, _LONGEST_HEADER):
                raise CheckpointError(f"{path} is truncated or not a safetensors file: delete it and download it again")
            return file.read(length), size
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error


def _check_bytes(path: Path, stored: Mapping[str, Stored]) -> int:
    """Checks that tensors have known types and lie next to each other; returns the offset after the last one."""
    end = 0
    for name, tensor in sorted(stored.items(), key=lambda it: (it[1].begin, it[1].end)):
        if tensor.type not in TYPES:
            raise CheckpointError(f"{path} is corrupt, or MLX can't read it: {name} has the type {tensor.type}")
        if tensor.begin != end or math.prod(tensor.shape) * TYPES[tensor.type].size != tensor.end - tensor.begin:
            raise CheckpointError(
                f"{path} is corrupt: {name} is said to have the bytes {tensor.begin:,} to {tensor.end:,} and the shape "
                f"{list(tensor.shape)}; download it again"
            )
        end = tensor.end
    return end


def _rows(path: Path, header: Header, name: str, indices: Iterable[int]) -> mx.array:
    """Some rows of a matrix, [rows, width], without reading the rest."""
    tensor = header.tensors[name]
    width = tensor.shape[-1]
    size = width * TYPES[tensor.type].size
    found = []
    with path.open("rb") as file:
        for index in indices:
            file.seek(header.start + tensor.begin + index * size)
            found.append(np.frombuffer(file.read(size), np.uint8))
    return mx.array(np.stack(found)).view(TYPES[tensor.type])


def check_tied(folder: Path, table: RenameTable) -> None:
    """Checks that a stored output head equals the embedding, if config.json ties them: then the head isn't used.

    Compares some rows, which is enough to notice a head that was trained separately.

    Args:
        folder: The model's folder.
        table: The names of the model's tensors.

    Raises:
        CheckpointError: They differ.
    """
    places = {}
    for path in weight_files(folder):
        header = read_header(path)
        for name in header.tensors:
            if (bare := table.bare(name)) in ("lm_head.weight", "embed_tokens.weight"):
                places[bare] = path, header, name
    if len(places) < 2:
        return
    head, embedding = places["lm_head.weight"], places["embed_tokens.weight"]
    shapes = [header.tensors[name].shape for _, header, name in (head, embedding)]
    equal = shapes[0] == shapes[1] and len(shapes[0]) == 2
    if equal:
        some = range(0, shapes[0][0], max(1, shapes[0][0] // _ROWS_COMPARED))
        one, other = (_rows(*place, some) for place in (head, embedding))
        # Floats may have been rounded differently; quantised weights must be identical.
        close = all(mx.issubdtype(it.dtype, mx.floating) for it in (one, other))
        equal = bool((mx.allclose(one, other, rtol=1e-2, atol=1e-6) if close else mx.array_equal(one, other)).item())
    if not equal:
        raise CheckpointError(
            f"{folder}: {head[2]} isn't the embedding, though config.json ties them: set tie_word_embeddings to false "
            "there to use it, or delete the tensor"
        )


def header_of(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Makes the header of a file.

    Args:
        tensors: Name, type (one of TYPES), shape and number of bytes of each tensor, in the order of the file.

    Returns:
        The header's length in 8 bytes, and the header; the tensors' bytes follow.
    """
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for name, kind, shape, nbytes in tensors:
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def _stored(entry: Mapping[str, Any]) -> Stored:
    kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    # `type` instead of isinstance, because JSON's true is an int, too.
    if (
        not isinstance(kind, str)
        or not isinstance(shape, list)
        or not all(type(n) is int for n in (begin, end, *shape))
    ):
        raise TypeError("a tensor's description doesn't follow the format")
    # MLX's sizes have 31 bits. The number of axes is limited so that their product is computed quickly.
    if not 0 <= begin <= end or len(shape) > _MOST_AXES or not all(0 <= n < 2**31 for n in shape):
        raise ValueError("a tensor has impossible offsets or sizes")
    return Stored(kind, tuple(shape), begin, end)


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} isn't JSON")
