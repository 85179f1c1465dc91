"""A prompt's KV in a safetensors file, so that a long prompt needn't be prefilled again after a restart.

The file holds the token ids and the row's buffers. Decoding needs nothing else: the prompt's last token is run again
anyway, and gives the hidden state from which target and drafter continue. A file works only with the model that wrote
it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..checkpoint.safetensors_files import load, read_header
from ..errors import CheckpointError, PromptError, one_line
from ..files import parse_json, replacing
from ..kv import KVBuffers
from ..kv.blocks import stored
from ..models.target import Target
from .limits import is_int
from .prompt_cache import Entry
from .request import check_prompt

VERSION = "2"
"""Version of the file format."""

_SAMPLE = 256
"""Least number of values of each weight that go into the fingerprint."""


def save_entry(path: Path, entry: Entry, target: Target) -> None:
    """Writes an entry to a file; on failure a file that was there before is unchanged.

    Args:
        path: The file.
        entry: The KV of a prompt.
        target: The model that made it.

    Raises:
        OSError: The file can't be written.
    """
    kv = entry.kv
    arrays = {f"{kind}.{i}": kv.plain(a) for kind in ("keys", "values") for i, a in getattr(kv, kind).items()}
    facts = {
        "mlx_mtp_kv": VERSION,
        "model": fingerprint(target),
        "tokens": json.dumps(entry.tokens),
        "capacity": str(kv.capacity),
        "written": str(kv.written),
    }
    with replacing(path, ".safetensors") as aside:
        try:
            mx.save_safetensors(str(aside), arrays, metadata=facts)
        except RuntimeError:  # MLX's error for a file that can't be written
            raise OSError(errno.EIO, "it can't be written: is the disk full?") from None


def load_entry(path: Path, target: Target) -> Entry:
    """Reads an entry; its arrays are read from the file when they are evaluated.

    Changed numbers in a file that is otherwise intact aren't noticed.

    Args:
        path: A file written by `save_entry`.
        target: The model to use it with.

    Raises:
        CheckpointError: The file doesn't exist, is damaged, isn't a saved prompt, or was written by another model.
    """
    if not os.path.isfile(path):  # False too without the permission to look
        raise CheckpointError(f"there is no such file: {path}")
    try:
        facts, arrays = read_header(path).metadata, load(path)
    except CheckpointError as error:  # replaces its advice, which is for downloaded files
        raise CheckpointError(f"{path} is truncated, damaged, or not a saved prompt: save it again") from error
    if facts.get("mlx_mtp_kv") != VERSION:
        raise CheckpointError(f"{path} wasn't saved by this version of mlx_mtp: save it again")
    if facts.get("model") != fingerprint(target):
        raise CheckpointError(f"{path} was saved by another model: save it again with this one")
    try:
        tokens = _token_ids(facts["tokens"])
        check_prompt(tokens, target.config)
        kv = KVBuffers(target.config, 1, target.dtype, positions=len(tokens))
        if [kv.capacity, len(tokens)] != [int(facts[name]) for name in ("capacity", "written")]:
            raise ValueError("its sizes don't fit together")
        _fill(kv, arrays)
    except (KeyError, TypeError, ValueError, PromptError) as error:
        raise CheckpointError(f"{path} is damaged ({one_line(error)}): save it again") from error
    kv.written = len(tokens)
    return Entry(tokens, kv, (kv.ring_state(len(tokens)),), len(tokens), pinned=True)


def _token_ids(text: str) -> list[int]:
    tokens = parse_json(text)
    if not isinstance(tokens, list) or not all(map(is_int, tokens)):
        raise ValueError("its tokens aren't a list of token ids")
    return tokens


def _fill(kv: KVBuffers, arrays: dict[str, mx.array]) -> None:
    """Replaces the buffers by arrays of a file; KeyError or ValueError if they don't fit."""
    for kind, buffers in (("keys", kv.keys), ("values", kv.values)):
        for layer, empty in buffers.items():
            array, shape = arrays.pop(f"{kind}.{layer}"), kv.plain(empty).shape
            if (array.shape, array.dtype) != (shape, kv.dtype):
                raise ValueError(f"{kind} of layer {layer} are {array.dtype} {array.shape}")
            buffers[layer] = stored(array)
    if arrays:
        raise ValueError(f"unexpected array {min(arrays)}")


def fingerprint(target: Target) -> str:
    """Identifies a model: a SHA-256 of the shapes and dtypes of all weights, and of a sample of their values."""
    digest = hashlib.sha256()
    samples = []
    for name, array in cast("list[tuple[str, mx.array]]", tree_flatten(target.parameters())):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        values = array.reshape(-1)[:: max(1, array.size // _SAMPLE)]
        samples.append(values if values.dtype == mx.uint32 else values.astype(mx.float32))
    mx.eval(samples)
    for sample in samples:
        digest.update(np.array(sample).tobytes())
    return digest.hexdigest()
