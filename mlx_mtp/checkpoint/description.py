"""Descriptions: everything known about a checkpoint before its weights are read, and how it is to be loaded.

Sizes, pairing, loading, conversions and profiles take a `Description`. It is read once, from config.json alone; the
weights needn't be there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import mlx.core as mx

from .. import config as configs
from ..config import DrafterConfig, TargetConfig, TextConfig
from ..errors import CheckpointError
from ..files import read_json
from ..system.fusing import on_gpu
from . import quantization
from .quantization import Format, Rule, Scheme, Stored
from .tensor_names import RenameTable, drafter_table, target_table

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
"""The types that models can run in, by name."""

CLUSTER_ORDER = "cluster_order"
"""Key in config.json's section "mlx_mtp": whether a clustered head's embedding is stored cluster by cluster."""

Config = TypeVar("Config", bound=TargetConfig | DrafterConfig, covariant=True)


@dataclass(frozen=True, kw_only=True)
class Description(Generic[Config]):
    """The description of one model's checkpoint.

    Attributes:
        folder: Its folder.
        raw: Its config.json as read; for a merged drafter the part that would be its own config.json.
        config: The parsed config.
        table: Maps the names of stored tensors to parameters.
        stored: How its weights are quantised in the files; None if they aren't.
        quantize: The format to which they are quantised while loading; None to leave them as stored. Never together
            with `stored`.
        dtype: A name of DTYPES for activations and unquantised weights. None for the checkpoint's own type, or float32
            on a CPU, where 16-bit matrix products are slower.
        merged: Whether this is a drafter whose tensors are in its target's files.

    Raises:
        CheckpointError: The dtype is unknown, or both `stored` and `quantize` are given.
    """

    folder: Path
    raw: dict[str, Any]
    config: Config
    table: RenameTable
    stored: Stored | None = None
    quantize: Format | None = None
    dtype: str | None = None
    merged: bool = False

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if self.stored and self.quantize:
            raise CheckpointError(f"{self.folder} is quantised already: load it without quantize (--quantize)")

    @property
    def text(self) -> TextConfig:
        """Its decoder stack."""
        return self.config.text

    @property
    def format(self) -> Format | None:
        """The format of most of its matrices once it is loaded; None if they aren't quantised."""
        return self.stored.common if self.stored else self.quantize

    @property
    def rule(self) -> Rule | None:
        """The format of each matrix once it is loaded, for `mlx.nn.quantize` and `sizes`; None if none is quantised."""
        if self.stored:
            return self.stored.rule()
        return Scheme(self.quantize).rule() if self.quantize else None

    @property
    def stated_dtype(self) -> str | None:
        """The type of unquantised weights according to config.json; None if it doesn't say."""
        text = self.raw.get("text_config", {})
        named = self.raw.get("dtype") or self.raw.get("torch_dtype") or text.get("dtype")
        return named if isinstance(named, str) else None

    @property
    def dtype_bytes(self) -> int:
        """Bytes of an unquantised parameter once it is loaded, according to config.json."""
        return self.dtype_here(DTYPES.get(self.stated_dtype or "", mx.bfloat16)).size

    def dtype_here(self, stored: mx.Dtype) -> mx.Dtype:
        """The type of activations on this machine, if the weights are stored as `stored`."""
        return DTYPES[self.dtype] if self.dtype else activation_dtype(stored)

    @property
    def holds_drafter(self) -> bool:
        """Whether this is a target that has a drafter merged into its files, according to config.json."""
        return configs.merged_drafter(self.raw) is not None

    @property
    def in_cluster_order(self) -> bool:
        """Whether the embedding of a drafter with a clustered head is stored in cluster order."""
        ours = self.raw.get("mlx_mtp")
        return isinstance(ours, dict) and ours.get(CLUSTER_ORDER) is True


TargetDescription = Description[TargetConfig]
DrafterDescription = Description[DrafterConfig]
AnyDescription = Description[TargetConfig | DrafterConfig]


def read_target(folder: Path, quantize: Format | None = None, dtype: str | None = None) -> TargetDescription:
    """Reads the description of a target.

    Args:
        folder: Its folder.
        quantize: See `Description`.
        dtype: See `Description`.

    Raises:
        CheckpointError: config.json is missing or isn't a target's; the weights are quantised in an unknown way, or are
            quantised although `quantize` is given; or the dtype is unknown.
    """
    return _target(folder, _config(folder), quantize, dtype)


def read_drafter(folder: Path, quantize: Format | None = None, dtype: str | None = None) -> DrafterDescription:
    """Reads the description of a drafter, in its own folder or merged into a target; see `read_target`."""
    return _drafter(folder, _config(folder), quantize, dtype)


def read(folder: Path) -> AnyDescription:
    """Reads the description of a folder's model, a target or a drafter that isn't merged; errors as `read_target`."""
    raw = _config(folder)
    return (_drafter if raw.get("model_type") in configs.DRAFTER_TYPES else _target)(folder, raw)


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json")


def _target(
    folder: Path, raw: dict[str, Any], quantize: Format | None = None, dtype: str | None = None
) -> TargetDescription:
    with errors_name(folder):
        config = configs.target_config(raw)
        table = target_table(config.text)
        stored = quantization.stored(raw, table)
    return Description(
        folder=folder, raw=raw, config=config, table=table, stored=stored, quantize=quantize, dtype=dtype
    )


def _drafter(
    folder: Path, raw: dict[str, Any], quantize: Format | None = None, dtype: str | None = None
) -> DrafterDescription:
    merged = configs.merged_drafter(raw)
    with errors_name(folder):
        if merged is not None and not isinstance(merged, dict):
            raise CheckpointError(f"config.json: the merged drafter's config is {merged!r}, expected an object")
        raw = raw if merged is None else merged
        config = configs.drafter_config(raw)
        table = drafter_table(config)
        stored = quantization.stored(raw, table)
    return Description(
        folder=folder, raw=raw, config=config, table=table, stored=stored, quantize=quantize, dtype=dtype,
        merged=merged is not None,
    )  # fmt: skip


def check_dtype(dtype: str | None) -> None:
    """Checks an argument `dtype`.

    Raises:
        CheckpointError: It is neither None nor a name of DTYPES.
    """
    if dtype not in (None, *DTYPES):
        raise CheckpointError(f"dtype {dtype!r} isn't supported: expected one of {', '.join(DTYPES)}")


def activation_dtype(stored: mx.Dtype) -> mx.Dtype:
    """The default type of activations on this machine, for weights stored as `stored`."""
    return stored if on_gpu() else mx.float32


@contextmanager
def errors_name(folder: Path) -> Iterator[None]:
    """Adds the folder's name to every CheckpointError of the block, whose code doesn't know it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
