"""A Hugging Face folder becomes an MLX folder, quantised or not, that mlx_mtp and (a target) mlx-lm load.

Tensors are read, converted and let go one by one and written in files of limited size, so that memory holds one output
file and one tensor, however large the model. The result is written aside and renamed when it is complete: a folder of
the wanted name is never half a model.

Not here: going on with an interrupted conversion (it starts again), and comparing the result with its source.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mtp import checkpoint, hub
from mlx_mtp.config import DRAFTER_TYPES, drafter_config, target_config
from mlx_mtp.errors import CheckpointError, MTPError

FILE_BYTES = 2**30
"""Tensors are gathered into files of about this size."""

MODES = {"affine": None, "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
"""Quantisation modes of MLX; for all but affine, bits and group size are given."""

_AFFINE_BITS, _AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
_COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True)
class Format:
    """How large matrices are stored.

    Attributes:
        bits: Bits of a weight.
        group_size: Weights that share a scale.
        mode: One of MODES.
    """

    bits: int = 4
    group_size: int = 64
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise MTPError(f"unknown quantisation mode {self.mode!r}: use one of {', '.join(MODES)}")
        fixed = MODES[self.mode]
        if fixed and (self.bits, self.group_size) != fixed:
            raise MTPError(f"{self.mode} has {fixed[0]} bits in groups of {fixed[1]}, and no others")
        if self.bits not in _AFFINE_BITS or (not fixed and self.group_size not in _AFFINE_GROUPS):
            raise MTPError(
                f"can't quantise to {self.bits} bits in groups of {self.group_size}: use one of {_AFFINE_BITS} bits "
                f"and groups of one of {_AFFINE_GROUPS}"
            )


def convert(
    source: str | Path,
    destination: str | Path,
    how: Format | None = None,
    dtype: str | None = None,
    progress: Callable[[str, int], None] = lambda name, written: None,
) -> Path:
    """Converts a target or a drafter.

    Args:
        source: Folder or hub repository.
        destination: Folder to make; it must not exist yet, or be empty.
        how: How matrices are quantised, the router of a mixture-of-experts model to 8 bits; None leaves all as it is.
        dtype: Type of what isn't quantised, "float32", "bfloat16" or "float16"; None keeps the stored one.
        progress: Called after each tensor with its name and the bytes written so far.

    Returns:
        The new folder.

    Raises:
        CheckpointError: The source can't be used, or the destination can't be written.
    """
    if dtype is not None and dtype not in checkpoint.DTYPES:
        raise CheckpointError(f"dtype {dtype!r} isn't supported: expected one of {', '.join(checkpoint.DTYPES)}")
    folder, destination = hub.find(source), Path(destination).expanduser()
    raw = checkpoint.read_json(folder / "config.json")
    if raw.get("quantization") or raw.get("quantization_config"):
        raise CheckpointError(f"{folder} is quantised already: convert the original")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"{destination} exists already: choose another name")
    tensors, prefix = _tensors(folder, raw)

    aside = destination.with_name(f"{destination.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        writer, overrides = _Writer(aside), {}
        for name, tensor in tensors:
            if dtype and mx.issubdtype(tensor.dtype, mx.floating):
                tensor = tensor.astype(checkpoint.DTYPES[dtype])
            chosen = _format(name, tensor, how)
            if chosen is None:
                writer.add({prefix + name: tensor})
            else:
                module = prefix + name.removesuffix(".weight")
                parts = mx.quantize(tensor, **asdict(chosen))
                writer.add(
                    {f"{module}.{part}": a for part, a in zip(("weight", "scales", "biases"), parts, strict=False)}
                )
                if chosen != how:
                    overrides[module] = asdict(chosen)
            del tensor
            progress(name, writer.written)
        writer.finish()
        if how:
            raw["quantization"] = asdict(how) | overrides
        (aside / "config.json").write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for name in _COPIED:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, aside / name)
        if destination.exists():
            destination.rmdir()
        aside.rename(destination)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{destination} can't be written: {' '.join(str(error).split())}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return destination


def _tensors(folder: Path, raw: dict[str, Any]) -> tuple[Iterator[tuple[str, mx.array]], str]:
    """A checkpoint's tensors, one by one and lazily, and what their names begin with in the new folder."""
    if raw.get("model_type") in DRAFTER_TYPES:
        drafter_config(raw)
        return checkpoint.tensors(folder), ""
    text = target_config(raw).text
    names = ((_mlx_lm_name(name), tensor) for name, tensor in checkpoint.target_tensors(folder, text))
    return names, "language_model.model." if "text_config" in raw else "model."


def _mlx_lm_name(name: str) -> str:
    return name.replace(".experts.", ".experts.switch_glu.")


def _format(name: str, tensor: mx.array, how: Format | None) -> Format | None:
    """How a tensor is quantised: matrices only, as the loader does it on the fly."""
    if how is None or tensor.ndim < 2 or not name.endswith(".weight"):
        return None
    if name.endswith("router.proj.weight"):
        how = Format(8, 64)  # it decides which weights are read at all
    if tensor.shape[-1] % how.group_size:
        return Format(how.bits, 32) if how.mode == "affine" and tensor.shape[-1] % 32 == 0 else None
    return how


class _Writer:
    """Gathers tensors into files, and writes the index."""

    def __init__(self, folder: Path):
        self.written = 0
        self._folder = folder
        self._pending: dict[str, mx.array] = {}
        self._pending_bytes = 0
        self._files: list[list[str]] = []

    def add(self, tensors: dict[str, mx.array]) -> None:
        """Takes a tensor, or the parts of a quantised one, and evaluates it."""
        mx.eval(tensors)
        size = sum(a.nbytes for a in tensors.values())
        if self._pending and self._pending_bytes + size > FILE_BYTES:
            self._flush()
        self._pending |= tensors
        self._pending_bytes += size
        self.written += size

    def finish(self) -> None:
        """Writes what is left; gives the files their final names, and an index if there are several."""
        self._flush()
        count = len(self._files)
        if count == 1:
            self._path(0).rename(self._folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._files):
            final = f"model-{i + 1:05}-of-{count:05}.safetensors"
            self._path(i).rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.written}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        mx.save_safetensors(str(self._path(len(self._files))), self._pending, metadata={"format": "mlx"})
        self._files.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0
        mx.clear_cache()

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number:05}.safetensors"
