"""safetensors files: which ones a folder has, what is in them, and their tensors.

A file's header is checked against the file before anything of it is used, as strictly as the format demands: known
types, shapes and places that fit each other, no gaps, nothing that overlaps. So what MLX is given to read is sound.
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

TYPES: Mapping[str, mx.Dtype] = {
    "BOOL": mx.bool_, "U8": mx.uint8, "I8": mx.int8, "U16": mx.uint16, "I16": mx.int16, "F16": mx.float16,
    "BF16": mx.bfloat16, "U32": mx.uint32, "I32": mx.int32, "F32": mx.float32, "U64": mx.uint64, "I64": mx.int64,
    "C64": mx.complex64, "F8_E4M3": mx.uint8, "F8_E8M0": mx.uint8,
}  # fmt: skip
"""The format's names of types, and what MLX reads them as."""

_LONGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""

_ROWS_COMPARED = 64
"""Of a head and an embedding that should be the same: fine-tuning changes all rows."""

_MOST_AXES = 64
"""As NumPy has it; tensors of Gemma 4 have up to four."""


@dataclass(frozen=True)
class Stored:
    """A tensor as the header describes it.

    Attributes:
        type: One of TYPES.
        shape: Its shape.
        begin, end: Its bytes, counted from the end of the header.
    """

    type: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says it holds.

    Attributes:
        start: Where the header ends and the tensors begin, in bytes from the file's beginning.
        tensors: By name.
        metadata: Texts by name.
    """

    start: int
    tensors: dict[str, Stored]
    metadata: dict[str, str]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those that its index names and that hold more than vision and audio, or all.

    Raises:
        CheckpointError: There are none, or the index can't be used.
    """
    index = read_json(folder / INDEX, required=False)
    if index:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{folder / INDEX} has no weight_map: download it again")
        if odd := [file for file in weight_map.values() if not is_file_name(file)]:
            raise CheckpointError(f"{folder / INDEX} names {odd[0]!r:.80}, which is no name of a file in its folder")
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
    """Whether this is the name of a file, and leads nowhere else."""
    if not name.isprintable() or set(name) & {"/", "\\"}:
        return False
    return name not in ("", ".", "..") and len(name.encode()) <= 255


def tensors(folder: Path) -> Iterator[tuple[str, mx.array]]:
    """All tensors of a folder's safetensors files, lazily.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    for path in weight_files(folder):
        held = load(path)
        for name in sorted(held):
            yield name, held.pop(name)  # once evaluated, a tensor that is held here would stay in memory


def load(path: Path) -> dict[str, mx.array]:
    """The tensors of a file, lazily: they are read when they are evaluated.

    Raises:
        CheckpointError: See `read_header`.
    """
    read_header(path)
    try:
        return cast("dict[str, mx.array]", mx.load(str(path), format="safetensors"))
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is corrupt: {one_line(error)}; download it again") from error


def read_header(path: Path) -> Header:
    """Checks that a file is whole and sound, without reading its tensors.

    Raises:
        CheckpointError: Missing, truncated, or not a safetensors file that MLX can read.
    """
    if not os.path.isfile(path):  # False too if it mustn't be looked at
        raise CheckpointError(f"{path} is missing: the download is incomplete")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little") if size >= 8 else size
            if length > min(size - 8, _LONGEST_HEADER):
                raise CheckpointError(f"{path} is truncated or no safetensors file: delete it and download it again")
            content = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
    try:
        # Not every JSON that Python reads is one for MLX.
        header = parse_json(content.decode(), object_pairs_hook=_no_name_twice, parse_constant=_refuse)
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata  # MLX writes null where there is none
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is no text")
        stored = {name: _stored(entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is corrupt: its header can't be read; download it again") from error
    end = 0
    for name, tensor in sorted(stored.items(), key=lambda it: (it[1].begin, it[1].end)):
        if tensor.type not in TYPES:
            raise CheckpointError(f"{path} is corrupt, or MLX can't read it: {name} is of the type {tensor.type}")
        if tensor.begin != end or math.prod(tensor.shape) * TYPES[tensor.type].size != tensor.end - tensor.begin:
            raise CheckpointError(
                f"{path} is corrupt: {name} is said to have the bytes {tensor.begin:,} to {tensor.end:,} and the shape "
                f"{list(tensor.shape)}; download it again"
            )
        end = tensor.end
    if (whole := 8 + length + end) != size:
        raise CheckpointError(f"{path} is truncated or damaged: {size:,} bytes instead of {whole:,}; download it again")
    return Header(8 + length, stored, metadata)


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
    """Checks that an output head beside a tied embedding is the embedding: it won't be used.

    Compares some rows, which is enough to tell a head that was trained on its own.

    Raises:
        CheckpointError: It is another one.
    """
    places = {}
    for path in weight_files(folder):
        header = read_header(path)
        for name in header.tensors:
            if (ours := table.bare(name)) in ("lm_head.weight", "embed_tokens.weight"):
                places[ours] = path, header, name
    if len(places) < 2:
        return
    head, embedding = places["lm_head.weight"], places["embed_tokens.weight"]
    shapes = [header.tensors[name].shape for _, header, name in (head, embedding)]
    alike = shapes[0] == shapes[1] and len(shapes[0]) == 2
    if alike:
        some = range(0, shapes[0][0], max(1, shapes[0][0] // _ROWS_COMPARED))
        one, other = (_rows(*place, some) for place in (head, embedding))
        # Numbers may have been rounded differently; packed bits are the same or not.
        close = all(mx.issubdtype(it.dtype, mx.floating) for it in (one, other))
        alike = bool((mx.allclose(one, other, rtol=1e-2, atol=1e-6) if close else mx.array_equal(one, other)).item())
    if not alike:
        raise CheckpointError(
            f"{folder}: {head[2]} isn't the embedding, though config.json ties them: set tie_word_embeddings to false "
            "there to use it, or delete the tensor"
        )


def header_of(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """The beginning of a file that holds some tensors, one after the other.

    Args:
        tensors: Name, type (one of TYPES), shape and number of bytes of each.
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
    # Exactly ints: JSON's true is one too.
    if (
        not isinstance(kind, str)
        or not isinstance(shape, list)
        or not all(type(n) is int for n in (begin, end, *shape))
    ):
        raise TypeError("a tensor that isn't described as the format says")
    # MLX has sizes of 31 bits; and what has no more axes than this is multiplied in no time.
    if not 0 <= begin <= end or len(shape) > _MOST_AXES or not all(0 <= n < 2**31 for n in shape):
        raise ValueError("places or sizes that there can't be")
    return Stored(kind, tuple(shape), begin, end)


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("the same name twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
