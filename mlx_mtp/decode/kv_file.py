"""A prompt's KV in a safetensors file, so that a long prompt need not be prefilled after a restart.

Holds the token ids and the buffers of their row. Target and drafter need nothing else to start at once: the last token
runs again in any case, and gives the hidden state that both go on from. A file is tied to the model that wrote it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..errors import CheckpointError
from ..kv import KVBuffers, longest_block
from ..models.target import Target
from .prompt_cache import Entry

VERSION = "1"


def save_entry(path: Path, entry: Entry, target: Target) -> None:
    """Writes an entry, aside first.

    Raises:
        OSError: It can't be written.
    """
    arrays = {f"keys.{i}": a for i, a in entry.kv.keys.items()} | {f"values.{i}": a for i, a in entry.kv.values.items()}
    facts = {
        "mlx_mtp_kv": VERSION,
        "model": fingerprint(target),
        "tokens": json.dumps(entry.tokens),
        "capacity": str(entry.kv.capacity),
        "written": str(entry.kv.written),
    }
    aside = path.with_name(f"{path.name}.partial.safetensors")
    try:
        aside.touch()  # MLX doesn't say why a file can't be opened
        mx.save_safetensors(str(aside), arrays, metadata=facts)
        os.replace(aside, path)
    except RuntimeError:  # how MLX says that it can't be written
        raise OSError(errno.EIO, "it can't be written: is the disk full?", str(path)) from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            aside.unlink()


def load_entry(path: Path, target: Target) -> Entry:
    """Reads an entry.

    Raises:
        CheckpointError: No such file, not one of ours, damaged, or written by another model.
    """
    from ..checkpoint import check_safetensors

    if not path.is_file():
        raise CheckpointError(f"there is no such file: {path}")
    check_safetensors(path)
    arrays, facts = cast("tuple[dict[str, mx.array], dict[str, str]]", mx.load(str(path), return_metadata=True))
    if facts.get("mlx_mtp_kv") != VERSION:
        raise CheckpointError(f"{path} is no prompt that this version of mlx_mtp has saved: save it again")
    if facts["model"] != fingerprint(target):
        raise CheckpointError(f"{path} was saved by another model: save it again with this one")
    kv = KVBuffers(target.config, 1, target.dtype, longest_block(target.config))
    kv.capacity, kv.written = int(facts["capacity"]), int(facts["written"])
    for name, array in arrays.items():
        kind, layer = name.split(".")
        getattr(kv, kind)[int(layer)] = array
    mx.eval(kv.arrays())
    tokens = json.loads(facts["tokens"])
    return Entry(tokens, kv, (kv.checkpoint(len(tokens)),), len(tokens))


def fingerprint(target: Target) -> str:
    """Tells models apart: shapes and types of all weights, and the values of the norms."""
    digest = hashlib.sha256()
    for name, array in cast("list[tuple[str, mx.array]]", tree_flatten(target.parameters())):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        if array.ndim == 1:
            digest.update(np.array(array.astype(mx.float32)).tobytes())
    return digest.hexdigest()
