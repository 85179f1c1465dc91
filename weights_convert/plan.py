"""What a converted checkpoint will hold, known before anything of it is written.

Which of the source's rows make up each new tensor, its type and format, and the file it goes to. Reads headers only.
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
"""Tensors are gathered into files of about this size: what an interruption can cost."""

CHUNK_BYTES = 2**26
"""About how much of a tensor is in memory at a time."""


FINGERPRINT = "conversion"
"""Key of the new config.json's section "mlx_mtp" that has the plan's fingerprint."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a new file: its name, type, shape, and so its size."""

    name: str
    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.size


@dataclass(frozen=True)
class Parameter:
    """A parameter of the new checkpoint; one tensor, or the two or three of a quantised one.

    Attributes:
        name: Its new name.
        shape: Its shape before it is quantised.
        dtype: The type it is converted to.
        format: How it is quantised, or None.
        sources: Stored tensors whose rows make it up, one after the other.
        half: See `tensor_names.Source`.
        order: A tensor that says in which order the rows go, or None for the stored one.
        values: What is stored for it, one array for each of `entries`, if that was learnt (learned.py) and isn't made
            of the sources.
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
        """The tensors that are stored for it."""
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
        """What is stored for it, some rows at a time: matrices, one for each of `entries`."""
        if self.values is not None:
            yield self.values
            return
        for rows in self._rows():
            if mx.issubdtype(rows.dtype, mx.floating):
                rows = rows.astype(self.dtype)
            yield tuple(mx.quantize(rows, **asdict(self.format))) if self.format else (rows,)

    def _rows(self) -> Iterator[mx.array]:
        if self.order is not None:  # only drafters' heads, which are small
            (tensor,) = self.sources
            yield tensor.read(0, tensor.rows)[self.order.read(0, 1)[0]]
            return
        for tensor in self.sources:
            step = max(1, CHUNK_BYTES // max(1, tensor.width * tensor.dtype.size))
            for start, stop in _ranges(tensor, self.half):
                for i in range(start, stop, step):
                    yield tensor.read(i, min(i + step, stop))


def _ranges(tensor: Tensor, half: int | None) -> list[tuple[int, int]]:
    """The rows of a tensor that are wanted."""
    if half is None:
        return [(0, tensor.rows)]
    block = tensor.shape[-2]
    first = half * (block // 2)
    return [(i + first, i + first + block // 2) for i in range(0, tensor.rows, block)]


@dataclass(frozen=True)
class Plan:
    """A conversion.

    Attributes:
        files: File name -> the parameters it will hold, in the order in which they are written.
        modules: Our names of the matrices, which a `Scheme` may quantise.
        config: The new config.json.
        fingerprint: Differs for other sources and other options.
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
    """Bytes of the tensors that are stored for some parameters."""
    return sum(entry.nbytes for parameter in parameters for entry in parameter.entries())


def make_plan(source: AnyDescription, scheme: Scheme | None, dtype: str | None) -> Plan:
    """Plans the conversion of a target or a drafter; see `converter.prepare`.

    Args:
        source: The original.
        scheme, dtype: As for `converter.prepare`.

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
        # Which bytes are which tensor is said in the header alone, of which a sample may miss a part.
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
        CheckpointError: It is quantised, so that what it was made of is the better source.
    """
    if source.stored:
        raise CheckpointError(f"{source.folder} is quantised already: convert the original")


def _parameters(source: AnyDescription, scheme: Scheme | None, dtype: str | None) -> dict[str, Parameter]:
    """What will be stored, by our names."""
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
            # Nobody but us loads converted drafters: they keep Google's names.
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
    """Sorts tensors of wide types first in a file, so that all are aligned."""
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
    for field in MERGED_FIELDS:  # a merged drafter is a folder of its own from here on
        new.get("text_config", new).pop(field, None)
    if scheme:
        # Entries name what isn't as all others; mlx-lm takes them as they are.
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
    """Says in a target's config.json what mlx-lm reads there, or would take for granted."""
    text = config.get("text_config", config)
    # Its defaults are E2B's; ours, as transformers', are that a model hasn't what its config doesn't name.
    for field, value in (
        ("num_kv_shared_layers", 0), ("use_double_wide_mlp", False), ("hidden_size_per_layer_input", 0),
        ("final_logit_softcapping", None),
    ):  # fmt: skip
        text.setdefault(field, value)
    if text is not config:
        config["vocab_size"] = text["vocab_size"]  # it has 262,144 tokens otherwise, whatever text_config says
    elif config["model_type"] == "gemma4_unified_text":
        config["model_type"] = "gemma4_text"  # the same decoder, under the one name that it knows
