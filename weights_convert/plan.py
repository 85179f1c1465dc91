"""Plans a conversion: the tensors, files and config.json of the new checkpoint.

For each new tensor: the rows of the source that it consists of, its type and format, and its file. Reads only headers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from mlx_mtp.checkpoint.description import CLUSTER_ORDER, DTYPES, AnyDescription, check_dtype
from mlx_mtp.checkpoint.load import check_complete, check_ordering, empty_model
from mlx_mtp.checkpoint.quantization import Format, Scheme
from mlx_mtp.checkpoint.safetensors_files import check_tied, read_header, weight_files
from mlx_mtp.checkpoint.tensor_names import Source, mlx_lm_name, of_merged_drafter
from mlx_mtp.config import DRAFTER_TYPES, MERGED_FIELDS, DrafterConfig, TargetConfig, in_published_fields
from mlx_mtp.errors import CheckpointError
from mlx_mtp.files import sample

from .source import Tensor, find_tensors

FILE_BYTES = 2**30
"""Approximate size of a weight file, and so the most that an interruption loses."""

CHUNK_BYTES = 2**26
"""Approximate size of a chunk, the part of a tensor that is in memory at a time."""

FINGERPRINT = "conversion"
"""Key of the plan's fingerprint, in the section "mlx_mtp" of the new config.json."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a new file."""

    name: str
    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.size


@dataclass(frozen=True)
class Parameter:
    """A parameter of the new checkpoint: one tensor, or two or three if it is quantised.

    Attributes:
        name: Its new name.
        shape: Its shape before quantisation.
        dtype: The type to convert it to.
        format: Its quantisation, or None.
        sources: Tensors of the source whose rows it consists of, concatenated.
        half: See `tensor_names.Source`.
        order: A tensor with the order of the rows, or None for the stored order.
        values: Learnt values, one array for each of `entries` (learned.py); None to compute them from the sources.
    """

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype
    format: Format | None
    sources: tuple[Tensor, ...]
    half: int | None
    order: Tensor | None
    values: tuple[mx.array, ...] | None = None

    def entries(self) -> list[Entry]:
        """The tensors that are stored for it: the weight, and its scales and biases if it is quantised."""
        if self.format is None:
            return [Entry(self.name, self.dtype, self.shape)]
        *outer, width = self.shape
        module, how = self.name.removesuffix(".weight"), self.format
        groups = (*outer, width // how.group_size)
        weight = Entry(f"{module}.weight", mx.uint32, (*outer, width * how.bits // 32))
        if how.mode != "affine":
            return [weight, Entry(f"{module}.scales", mx.uint8, groups)]
        return [weight, *(Entry(f"{module}.{part}", self.dtype, groups) for part in ("scales", "biases"))]

    def chunks(self) -> Iterator[tuple[mx.array, ...]]:
        """Yields its values in chunks of rows: tuples of matrices, one for each of `entries`."""
        if self.values is not None:
            yield self.values
            return
        for rows in self._rows():
            if mx.issubdtype(rows.dtype, mx.floating):
                rows = rows.astype(self.dtype)
            yield tuple(mx.quantize(rows, **asdict(self.format))) if self.format else (rows,)

    def _rows(self) -> Iterator[mx.array]:
        if self.order is not None:  # only heads of drafters, which are small
            (tensor,) = self.sources
            yield tensor.read(0, tensor.rows)[self.order.read(0, 1)[0]]
            return
        for tensor in self.sources:
            step = max(1, CHUNK_BYTES // max(1, tensor.width * tensor.dtype.size))
            for start, stop in _ranges(tensor, self.half):
                for i in range(start, stop, step):
                    yield tensor.read(i, min(i + step, stop))


def _ranges(tensor: Tensor, half: int | None) -> list[tuple[int, int]]:
    """Ranges of a tensor's rows: all of them, or the first (0) or second (1) half of each block."""
    if half is None:
        return [(0, tensor.rows)]
    block = tensor.shape[-2]
    first = half * (block // 2)
    return [(i + first, i + first + block // 2) for i in range(0, tensor.rows, block)]


@dataclass(frozen=True)
class Plan:
    """The contents of a new checkpoint.

    Attributes:
        files: Parameters by file name, in the order in which they are written.
        modules: This package's names of the matrices, which a `Scheme` may quantise.
        config: The new config.json.
        fingerprint: A hash of the source and the options.
    """

    files: dict[str, list[Parameter]]
    modules: tuple[str, ...]
    config: dict[str, Any]
    fingerprint: str

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return sum(map(file_bytes, self.files.values()))


def file_bytes(parameters: list[Parameter]) -> int:
    """Bytes of all tensors of some parameters."""
    return sum(entry.nbytes for parameter in parameters for entry in parameter.entries())


def make_plan(source: AnyDescription, scheme: Scheme | None, dtype: str | None) -> Plan:
    """Plans the conversion of a target or a drafter; see `converter.prepare`.

    Args:
        source: The original.
        scheme: Quantisation of the matrices; None quantises nothing.
        dtype: Type of unquantised weights; None keeps the stored type.

    Raises:
        CheckpointError: The source can't be used.
    """
    check_dtype(dtype)
    if isinstance(source.config, TargetConfig) and source.text.tied_head:
        check_tied(source.folder, source.table)
    parameters = _parameters(source, scheme, dtype)
    if order := next((p.sources[0] for p in parameters.values() if p.name.endswith("token_ordering")), None):
        check_ordering(order.read(0, 1)[0], source.text.vocab_size, source.folder)
    files = {name: sorted(group, key=_alignment) for name, group in _in_files(list(parameters.values())).items()}
    new_config = _new_config(source.raw, parameters, scheme, dtype, clustered=order is not None)
    digest = hashlib.sha256(json.dumps(new_config).encode())
    for name, group in files.items():
        digest.update(f"{name} {[str(entry) for parameter in group for entry in parameter.entries()]}".encode())
    for file in weight_files(source.folder):
        # The sample may not include all of the header, which alone assigns bytes to tensors.
        digest.update(f"{read_header(file)}".encode() + sample(file))
    fingerprint = digest.hexdigest()
    ours = new_config.get("mlx_mtp")
    new_config["mlx_mtp"] = (ours if isinstance(ours, dict) else {}) | {FINGERPRINT: fingerprint}
    modules = tuple(
        ours.removesuffix(".weight") for ours, p in parameters.items() if _is_matrix(ours, p.shape, p.dtype)
    )
    return Plan(files, modules, new_config, fingerprint)


def check_original(source: AnyDescription) -> None:
    """Checks that a checkpoint isn't a conversion itself.

    Raises:
        CheckpointError: It is quantised; its original is the better source.
    """
    if source.stored:
        raise CheckpointError(f"{source.folder} is quantised already: convert the original")


def _parameters(source: AnyDescription, scheme: Scheme | None, dtype: str | None) -> dict[str, Parameter]:
    """The new parameters by this package's names.

    Raises:
        CheckpointError: A tensor is missing, unknown, or of the wrong shape.
    """
    found = find_tensors(source.folder)
    stored = of_merged_drafter(found) if source.merged else found
    layout = source.table.layout(stored)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    expected = {ours: part.shape(shapes) for ours, part in layout.sources.items()}
    check_complete(empty_model(source), expected, source.folder)
    drafter = isinstance(source.config, DrafterConfig)
    order = None if source.in_cluster_order else layout.sources.get("head.token_ordering")

    def parameter(ours: str, part: Source) -> Parameter:
        parts, shape = tuple(stored[name] for name in part.names), expected[ours]
        stored_dtype = parts[0].dtype
        matrix = _is_matrix(ours, shape, stored_dtype)
        return Parameter(
            # Only this package loads converted drafters, so they keep Google's names.
            name=part.names[0] if drafter else mlx_lm_name(ours, "text_config" in source.raw),
            shape=shape,
            dtype=DTYPES[dtype] if dtype and mx.issubdtype(stored_dtype, mx.floating) else stored_dtype,
            format=scheme.format(ours.removesuffix(".weight"), shape[-1]) if scheme and matrix else None,
            sources=parts,
            half=part.half,
            order=stored[order.names[0]] if order and ours == "head.embedding.weight" else None,
        )

    return {ours: parameter(ours, part) for ours, part in layout.sources.items()}


def _is_matrix(ours: str, shape: tuple[int, ...], dtype: mx.Dtype) -> bool:
    return mx.issubdtype(dtype, mx.floating) and len(shape) > 1 and ours.endswith(".weight")


def _in_files(parameters: list[Parameter]) -> dict[str, list[Parameter]]:
    groups: list[list[Parameter]] = []
    size = FILE_BYTES
    for parameter in parameters:
        added = file_bytes([parameter])
        if size + added > FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(parameter)
        size += added
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _alignment(parameter: Parameter) -> int:
    """Sort key that puts wide types first in a file, so that all tensors are aligned."""
    return -max(entry.dtype.size for entry in parameter.entries())


def _new_config(
    config: dict[str, Any],
    parameters: dict[str, Parameter],
    scheme: Scheme | None,
    dtype: str | None,
    clustered: bool,
) -> dict[str, Any]:
    new = deepcopy(config)
    if "text_config" in new:
        new["text_config"] = in_published_fields(new["text_config"])
    else:
        new = in_published_fields(new)
    for field in MERGED_FIELDS:  # a converted drafter isn't merged any more
        new.get("text_config", new).pop(field, None)
    if scheme:
        # Entries for matrices that differ from the common format, in the form that mlx-lm reads.
        special = {
            p.name.removesuffix(".weight"): asdict(p.format) if p.format else False
            for ours, p in parameters.items()
            if p.format != scheme.common and _is_matrix(ours, p.shape, p.dtype)
        }
        new["quantization"] = asdict(scheme.common) | special
    if new.get("model_type") not in DRAFTER_TYPES:
        _for_mlx_lm(new)
    if dtype:
        for part in (new, new.get("text_config", {})):
            for key in ("dtype", "torch_dtype"):
                if key in part:
                    part[key] = dtype
    if clustered:
        new["mlx_mtp"] = {CLUSTER_ORDER: True}
    return new


def _for_mlx_lm(config: dict[str, Any]) -> None:
    """Adds to a target's config.json what mlx-lm needs to load it."""
    text = config.get("text_config", config)
    # mlx-lm's defaults are E2B's values; here, as in transformers, a missing field means that there is no such feature.
    for field, value in (
        ("num_kv_shared_layers", 0), ("use_double_wide_mlp", False), ("hidden_size_per_layer_input", 0),
        ("final_logit_softcapping", None),
    ):  # fmt: skip
        text.setdefault(field, value)
    if text is not config:
        config["vocab_size"] = text["vocab_size"]  # otherwise mlx-lm assumes 262,144 tokens
    elif config["model_type"] == "gemma4_unified_text":
        config["model_type"] = "gemma4_text"  # the same decoder under the name that mlx-lm knows
