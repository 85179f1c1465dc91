"""What a folder says of the model that it holds, and how that is to be loaded: read once, handed on whole.

A `Description` is all that sizes, pairing, loading, conversions and profiles need to know before weights are read. It
comes from config.json alone; the weights needn't be there.
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

CLUSTER_ORDER = "cluster_order"
"""Key of config.json's section "mlx_mtp": a clustered head's embedding is stored cluster by cluster already."""

Config = TypeVar("Config", bound=TargetConfig | DrafterConfig, covariant=True)


@dataclass(frozen=True, kw_only=True)
class Description(Generic[Config]):
    """A checkpoint of one model.

    Attributes:
        folder: Where it lies.
        raw: Its config.json; of a merged drafter the part that would be its own.
        config: The same, understood.
        table: What the names of its tensors mean.
        stored: How its weights are quantised; None if they aren't.
        quantize: What they are quantised to while loading; None to take them as they are. Never with `stored`.
        dtype: A name of DTYPES for activations and unquantised weights. None for the checkpoint's own type; on the
            CPU, where 16-bit matmuls are slower than 32-bit ones, float32.
        merged: Whether this is a drafter whose tensors lie among its target's, in the target's folder.
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
        """How most of its matrices are quantised once it is loaded; None if they aren't."""
        return self.stored.common if self.stored else self.quantize

    @property
    def rule(self) -> Rule | None:
        """How each of them is, as `mlx.nn.quantize` and `sizes` take it; None if none is."""
        if self.stored:
            return self.stored.rule()
        return Scheme(self.quantize).rule() if self.quantize else None

    @property
    def stated_dtype(self) -> str | None:
        """The type that config.json names for what isn't quantised."""
        text = self.raw.get("text_config", {})
        named = self.raw.get("dtype") or self.raw.get("torch_dtype") or text.get("dtype")
        return named if isinstance(named, str) else None

    @property
    def dtype_bytes(self) -> int:
        """Bytes of an unquantised parameter once it is loaded here, by what config.json says."""
        return self.dtype_here(DTYPES.get(self.stated_dtype or "", mx.bfloat16)).size

    def dtype_here(self, stored: mx.Dtype) -> mx.Dtype:
        """In which type it runs here, if its weights are stored in `stored`."""
        return DTYPES[self.dtype] if self.dtype else activation_dtype(stored)

    @property
    def holds_drafter(self) -> bool:
        """Whether this is a target that, by its config.json, has a drafter merged into its files."""
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
    """Reads what describes a target.

    Args:
        folder: Its folder.
        quantize, dtype: See `Description`.

    Raises:
        CheckpointError: config.json is missing, or none of a target; the weights are quantised in a way that can't be
            used, or are and `quantize` is given; there is no such dtype.
    """
    return _target(folder, _config(folder), quantize, dtype)


def read_drafter(folder: Path, quantize: Format | None = None, dtype: str | None = None) -> DrafterDescription:
    """The same for a drafter: in a folder of its own, or merged into a target's."""
    return _drafter(folder, _config(folder), quantize, dtype)


def read(folder: Path) -> AnyDescription:
    """The same for what a folder is by itself: a target, or a drafter that isn't merged into one."""
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
        CheckpointError: There is no such type.
    """
    if dtype not in (None, *DTYPES):
        raise CheckpointError(f"dtype {dtype!r} isn't supported: expected one of {', '.join(DTYPES)}")


def activation_dtype(stored: mx.Dtype) -> mx.Dtype:
    """The type in which a checkpoint of some type runs here, unless told otherwise."""
    return stored if on_gpu() else mx.float32


@contextmanager
def errors_name(folder: Path) -> Iterator[None]:
    """Names the folder in errors of what reads a config.json or names without knowing where they come from."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
