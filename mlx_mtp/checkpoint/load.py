"""Checks and loads checkpoints: a folder becomes a `Target` or a `Drafter`.

Loads Hugging Face folders as they are published (config.json, model.safetensors or shards with an index) and MLX
conversions of them. Weights are mapped by name, checked against the model's own parameters before any is used, and
read lazily. Only safetensors are read and nothing from a checkpoint is run. Not here: which folder that is (hub.py).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..config import (
    DRAFTER_TYPES,
    DrafterConfig,
    TargetConfig,
    check_pair,
    drafter_config,
    merged_drafter,
    target_config,
)
from ..errors import CheckpointError, MemoryBudgetError
from ..files import read_json
from ..models.drafter import Drafter
from ..models.elementwise import on_gpu
from ..models.target import Target
from . import adapters, quantization, sizes
from .quantization import Format, Rule, Scheme, Stored
from .safetensors_files import check_tied, tensors
from .tensor_names import (
    MERGED_DRAFTER,
    VISION_AND_AUDIO,
    Source,
    Table,
    drafter_table,
    of_merged_drafter,
    target_table,
)

log = logging.getLogger(__name__)

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}

CLUSTER_ORDER = "cluster_order"
"""Key of config.json's section "mlx_mtp": a clustered head's embedding is stored cluster by cluster already."""


@contextmanager
def about(folder: Path) -> Iterator[None]:
    """Names the folder in errors of what reads a config.json or names without knowing where they come from."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def read_target(folder: Path) -> tuple[dict[str, Any], TargetConfig]:
    """A target's config.json, as it is and as it is understood.

    Raises:
        CheckpointError: It is missing, or none of a target.
    """
    raw = read_json(folder / "config.json")
    with about(folder):
        return raw, target_config(raw)


def read_drafter(folder: Path) -> tuple[dict[str, Any], DrafterConfig]:
    """The same for a drafter: in a folder of its own, or merged into a target's."""
    raw = read_json(folder / "config.json")
    merged = merged_drafter(raw)
    with about(folder):
        if merged is not None and not isinstance(merged, dict):
            raise CheckpointError(f"config.json: the merged drafter's config is {merged!r}, expected an object")
        raw = raw if merged is None else merged
        return raw, drafter_config(raw)


def holds_drafter(folder: Path) -> bool:
    """Whether a folder is a target's and, by its config.json, has a drafter merged into its files."""
    return merged_drafter(read_json(folder / "config.json")) is not None


def drafter_tensors(folder: Path) -> dict[str, mx.array]:
    """`tensors` of a drafter; if it is merged into a target, under the names they have in a folder of its own."""
    stored = dict(tensors(folder))
    return of_merged_drafter(stored) if holds_drafter(folder) else stored


def read_quantization(
    config: dict[str, Any], table: Table, folder: Path, quantize: int | Format | None = None
) -> Stored | None:
    """How a folder's weights are quantised; None if they aren't. Arguments as for `assign`.

    Raises:
        CheckpointError: In a way that can't be used, or they are and `quantize` is given.
    """
    with about(folder):
        found = quantization.stored(config, table)
    if found and quantize:
        raise CheckpointError(f"{folder} is quantised already: load it without quantize (--quantize)")
    return found


def load_target(
    folder: Path, dtype: str | None = None, quantize: int | None = None, adapter: Path | None = None
) -> tuple[TargetConfig, Target]:
    """Loads a target.

    Args:
        folder: Its folder.
        dtype: "float32", "bfloat16" or "float16" for activations and unquantised weights. None for the checkpoint's
            own type; on the CPU, where 16-bit matmuls are slower than 32-bit ones, float32.
        quantize: Bits to quantise to while loading, by the rule of `quantization.Scheme`; None to take the weights as
            they are.
        adapter: Folder of a LoRA adapter to put beside the weights, see adapters.py.

    Raises:
        CheckpointError: See `errors.CheckpointError`.
        MemoryBudgetError: The weights don't fit in this machine's memory.
    """
    raw, config = read_target(folder)
    model, table = Target(config.text), target_table(config.text)
    if config.text.tied_head:
        check_tied(folder, table)
    assign(model, dict(tensors(folder)), table, folder, raw, dtype, _format(quantize))
    if adapter:
        adapters.apply(adapters.read_adapter(adapter), model, table)
    if not on_gpu() and config.text.num_experts and model.dtype != mx.float32:
        raise CheckpointError("mixture-of-experts models run on the CPU in float32 only: load with dtype='float32'")
    _read(model, folder)
    return config, model


def load_drafter(
    folder: Path, target: TargetConfig, position: str, dtype: str | None = None, quantize: Format | None = None
) -> tuple[DrafterConfig, Drafter]:
    """Loads a drafter and checks that it belongs to a target.

    Args:
        folder: Its folder, or that of a target that it is merged into.
        target: The target's config.
        position: One of `models.drafter.POSITIONS`.
        dtype: As for `load_target`; should be what the target runs in.
        quantize: What to quantise to while loading, see `drafter_precision.drafter_format`; None to take the weights
            as they are.

    Raises:
        CheckpointError: See `errors.CheckpointError`.
        PairingError: The drafter was made for another target.
        MemoryBudgetError: The weights don't fit in this machine's memory.
    """
    config, model = open_drafter(folder, target, position, dtype, quantize)
    _read(model, folder)
    return config, model


def open_drafter(
    folder: Path, target: TargetConfig, position: str, dtype: str | None = None, quantize: Format | None = None
) -> tuple[DrafterConfig, Drafter]:
    """`load_drafter` up to the point where weights would be read: whether it can be loaded is known then."""
    raw, config = read_drafter(folder)
    check_pair(target, config)
    model = Drafter(config, position)
    stored = drafter_tensors(folder)
    if config.num_clusters:
        _sort_by_cluster(stored, config, folder, already=in_cluster_order(raw))
    assign(model, stored, drafter_table(config), folder, raw, dtype, quantize)
    return config, model


def check_config(
    folder: Path, dtype: str | None = None, quantize: int | None = None, drafter_bits: int | None = None
) -> None:
    """Checks what config.json alone can tell, which is worth knowing before weights are downloaded.

    Args:
        folder: A target's or a drafter's folder; it needs no weights.
        dtype, quantize: As for `load_target`.
        drafter_bits: Bits that a drafter is quantised to unless it is already; None for none.

    Raises:
        CheckpointError, MemoryBudgetError: The model couldn't be loaded.
    """
    check_dtype(dtype)
    raw = read_json(folder / "config.json")
    if raw.get("model_type") in DRAFTER_TYPES:
        _, config = read_drafter(folder)
        stored = read_quantization(raw, drafter_table(config), folder, None)
        check_memory(sizes.drafter_sizes(config, *in_memory(raw, stored, _format(drafter_bits), dtype)).weights, folder)
    else:
        text = read_target(folder)[1].text
        stored = read_quantization(raw, target_table(text), folder, quantize)
        check_memory(sizes.target_sizes(text, *in_memory(raw, stored, _format(quantize), dtype)).weights, folder)


def check_dtype(dtype: str | None) -> None:
    """Checks an argument `dtype`.

    Raises:
        CheckpointError: There is no such type.
    """
    if dtype not in (None, *DTYPES):
        raise CheckpointError(f"dtype {dtype!r} isn't supported: expected one of {', '.join(DTYPES)}")


def check_options(dtype: str | None, quantize: int | None) -> None:
    """Checks the arguments of `load_target` that aren't the folder.

    Raises:
        CheckpointError: There is no such type, or no such number of bits.
    """
    check_dtype(dtype)
    if quantize:
        Format(quantize)


def check_memory(needed: int, folder: Path) -> None:
    """Checks that weights of `needed` bytes fit in this machine's memory.

    Raises:
        MemoryBudgetError: They don't.
    """
    if needed > (have := sizes.memory_for_models()):
        raise MemoryBudgetError(
            f"{folder} needs {sizes.in_words(needed)} for its weights, and models can have {sizes.in_words(have)} "
            "here: quantise it (quantize=4, --quantize 4) or take a smaller model"
        )


def named_dtype(raw: dict[str, Any]) -> str | None:
    """The type that a config.json names for what isn't quantised."""
    named = raw.get("dtype") or raw.get("torch_dtype") or raw.get("text_config", {}).get("dtype")
    return named if isinstance(named, str) else None


def in_memory(
    raw: dict[str, Any], stored: Stored | None, quantize: Format | None, dtype: str | None = None
) -> tuple[int, Rule | None]:
    """Bytes of an unquantised parameter once loaded here, and how the others are quantised: as `sizes` takes them.

    Args:
        raw: A config.json.
        stored: How it says that weights are quantised.
        quantize: What the others are quantised to while loading, if anything.
        dtype: As for `load_target`.
    """
    rule = stored.rule() if stored else Scheme(quantize).rule() if quantize else None
    own = DTYPES.get(named_dtype(raw) or "", mx.bfloat16)
    return (DTYPES[dtype] if dtype else activation_dtype(own)).size, rule


def _format(bits: int | None) -> Format | None:
    return Format(bits) if bits else None


def in_cluster_order(config: dict[str, Any]) -> bool:
    """Whether the embedding of a drafter with this config.json is stored in cluster order."""
    ours = config.get("mlx_mtp")
    return isinstance(ours, dict) and ours.get(CLUSTER_ORDER) is True


def check_ordering(ordering: mx.array, vocab: int, folder: Path) -> None:
    """Checks that a clustered head's token_ordering has every token once.

    Raises:
        CheckpointError: It doesn't.
    """
    everything = mx.arange(vocab, dtype=mx.int32)
    if ordering.shape != (vocab,) or not mx.array_equal(mx.sort(ordering.astype(mx.int32)), everything).item():
        raise CheckpointError(f"{folder}: masked_embedding.token_ordering is no permutation of {vocab} token ids")


def _sort_by_cluster(stored: dict[str, mx.array], config: DrafterConfig, folder: Path, already: bool) -> None:
    """Checks a clustered head's ordering, and brings the rows of its embedding into this order if they aren't yet."""
    vocab, sources = config.text.vocab_size, drafter_table(config).layout(stored).sources
    if "head.token_ordering" not in sources:
        return  # `assign` will say that it is missing
    name = sources["head.token_ordering"].names[0]
    check_ordering(stored[name], vocab, folder)
    stored[name] = ordering = stored[name].astype(mx.int32)
    for ours, source in sources.items():
        if ours.startswith("head.embedding.") and not already:
            name = source.names[0]
            if stored[name].shape[0] != vocab:
                raise CheckpointError(f"{folder}: {name} has {stored[name].shape[0]} rows for {vocab} tokens")
            stored[name] = stored[name][ordering]


def assign(
    model: nn.Module,
    stored: dict[str, mx.array],
    table: Table,
    folder: Path,
    config: dict[str, Any],
    dtype: str | None,
    quantize: Format | None,
) -> None:
    """Gives a model its weights, after checking that names and shapes are exactly the model's. Evaluates nothing.

    Args:
        model: The model, not quantised.
        stored: The tensors under their stored names; emptied.
        table: What these names mean.
        folder: Where they come from, for messages.
        config: The folder's config.json.
        dtype: As for `load_target`.
        quantize: What to quantise to; None to take the weights as they are.

    Raises:
        CheckpointError: See `errors.CheckpointError`.
    """
    check_dtype(dtype)
    section = read_quantization(config, table, folder, quantize)
    with about(folder):
        layout = table.layout(stored)
        shapes = {name: tensor.shape for name, tensor in stored.items()}
        found = {ours: source.shape(shapes) for ours, source in layout.sources.items()}
    if layout.skipped:
        reasons = set(layout.skipped.values())
        loss = VISION_AND_AUDIO in reasons or (MERGED_DRAFTER in reasons and merged_drafter(config) is None)
        log.log(logging.INFO if loss else logging.DEBUG, "%s: left out: %s", folder.name, layout.left_out())
    weights = {ours: _gather(source, stored) for ours, source in layout.sources.items()}
    stored.clear()
    if section:
        nn.quantize(model, class_predicate=section.rule(weights))
    check_complete(model, found, folder)
    _check_types(model, weights, folder)

    own = weights["norm.weight"].dtype
    model.load_weights(list(weights.items()))
    # The model alone holds the weights now, so that what is replaced below is let go at once.
    weights.clear()
    if quantize:
        nn.quantize(model, class_predicate=Scheme(quantize).rule())  # in the stored type, as a conversion does it
    model.set_dtype(DTYPES[dtype] if dtype else activation_dtype(own))


def _check_types(model: nn.Module, weights: dict[str, mx.array], folder: Path) -> None:
    """Checks that numbers are numbers, and packed bits and indices are integers."""
    for name, own in _parameters(model):
        dtype = weights[name].dtype
        if mx.issubdtype(dtype, mx.floating) != mx.issubdtype(own.dtype, mx.floating):
            raise CheckpointError(
                f"{folder} doesn't fit its config.json: {name} is stored as {str(dtype).removeprefix('mlx.core.')}"
            )


def _read(model: nn.Module, folder: Path) -> None:
    """Reads the weights that a model was assigned, and brings them into the form they run in."""
    # Nothing has been read so far: sizes are known, weights aren't in memory.
    check_memory(sum(array.nbytes for _, array in _parameters(model)), folder)
    for part in model.modules():
        if hasattr(part, "prepare"):
            part.prepare()
            mx.eval(part.parameters())
    # One by one: what is quantised while loading is in memory unquantised for a moment.
    for part in model.modules():
        if not part.children():
            mx.eval(part.parameters())
            mx.clear_cache()
    mx.eval(model.parameters())


def _gather(source: Source, stored: dict[str, mx.array]) -> mx.array:
    parts = [stored[name] for name in source.names]
    if source.half is not None:
        parts = [mx.contiguous(mx.split(part, 2, axis=-2)[source.half]) for part in parts]
    return mx.stack(parts) if source.stacked else parts[0]


def _parameters(model: nn.Module) -> list[tuple[str, mx.array]]:
    return cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))


def activation_dtype(stored: mx.Dtype) -> mx.Dtype:
    """The type in which a checkpoint of some type runs here, unless told otherwise."""
    return stored if on_gpu() else mx.float32


def check_complete(model: nn.Module, found: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Checks that tensors of these names and shapes are exactly a model's.

    Raises:
        CheckpointError: With the first that are missing, unknown, or of the wrong shape.
    """
    expected = {name: value.shape for name, value in _parameters(model)}
    problems = []
    for label, names in (
        ("missing", sorted(expected.keys() - found.keys())),
        ("unknown", sorted(found.keys() - expected.keys())),
    ):
        if names:
            problems.append(f"{len(names)} tensors {label} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")
    wrong = [n for n in sorted(expected.keys() & found.keys()) if expected[n] != found[n]]
    if wrong:
        shown = ", ".join(f"{n} is {list(found[n])} instead of {list(expected[n])}" for n in wrong[:3])
        problems.append(f"{len(wrong)} tensors of the wrong shape ({shown}{', ...' if len(wrong) > 3 else ''})")
    if problems:
        raise CheckpointError(f"{folder} doesn't fit its config.json: {'; '.join(problems)}")
