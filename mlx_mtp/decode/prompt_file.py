"""A prompt's KV in a safetensors file, so that a long prompt need not be prefilled after a restart.

Holds the token ids and the buffers of their row. Target and drafter need nothing else to start at once: the last token
runs again in any case, and gives the hidden state that both go on from. A file is tied to the model that wrote it.
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
from .prompt_cache import Entry
from .request import check_prompt
from .sampling import is_int

VERSION = "2"

_SAMPLE = 256
"""Values of each weight, at least, that tell one model from another."""


def save_entry(path: Path, entry: Entry, target: Target) -> None:
    """Writes an entry, aside first.

    Raises:
        OSError: It can't be written.
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
        except RuntimeError:  # how MLX says that it can't be written
            raise OSError(errno.EIO, "it can't be written: is the disk full?") from None


def load_entry(path: Path, target: Target) -> Entry:
    """Reads an entry; its arrays are read when they are evaluated.

    Raises:
        CheckpointError: No such file, not one of ours, damaged, or written by another model. Numbers that have changed
            in an otherwise whole file aren't noticed.
    """
    if not os.path.isfile(path):  # False too if it mustn't be looked at
        raise CheckpointError(f"there is no such file: {path}")
    try:
        facts, arrays = read_header(path).metadata, load(path)
    except CheckpointError as error:  # what it advises is for files that were downloaded
        raise CheckpointError(f"{path} is truncated or damaged, or no saved prompt: save it again") from error
    if facts.get("mlx_mtp_kv") != VERSION:
        raise CheckpointError(f"{path} is no prompt that this version of mlx_mtp has saved: save it again")
    if facts.get("model") != fingerprint(target):
        raise CheckpointError(f"{path} was saved by another model: save it again with this one")
    try:
        tokens = parse_json(facts["tokens"])
        if not isinstance(tokens, list) or not all(map(is_int, tokens)):
            raise ValueError("its tokens are no list of token ids")
        check_prompt(tokens, target.config)
        kv = KVBuffers(target.config, 1, target.dtype, positions=len(tokens))
        if [kv.capacity, len(tokens)] != [int(facts[name]) for name in ("capacity", "written")]:
            raise ValueError("its sizes don't fit together")
        kv.written = len(tokens)
        for kind, buffers in (("keys", kv.keys), ("values", kv.values)):
            for layer, expected in buffers.items():
                array = arrays.pop(f"{kind}.{layer}")
                shape = kv.plain(expected).shape
                if (array.shape, array.dtype) != (shape, kv.dtype):
                    raise ValueError(f"{kind} of layer {layer} are {array.dtype} {array.shape}")
                buffers[layer] = stored(array)
        if arrays:
            raise ValueError(f"nothing is known of {min(arrays)}")
    except (KeyError, TypeError, ValueError, PromptError) as error:
        raise CheckpointError(f"{path} is damaged ({one_line(error)}): save it again") from error
    return Entry(tokens, kv, (kv.ring_state(len(tokens)),), len(tokens), pinned=True)


def fingerprint(target: Target) -> str:
    """Tells models apart: shapes and types of all weights, and a sample of each one's values."""
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
