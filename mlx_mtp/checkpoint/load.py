"""Loads models: turns a description and its weights into a `Target` or a `Drafter`.

Loads Hugging Face folders as published (config.json, model.safetensors or shards with an index) and MLX conversions.
Weights are mapped by name, checked against the model's parameters before any is used, and read lazily. Only safetensors
files are read, and no code from a checkpoint is run. Not here: finding the folder (hub.py).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..config import DrafterConfig, TargetConfig, check_pair
from ..errors import CheckpointError, MemoryBudgetError
from ..files import published_name
from ..models.drafter import POSITIONS, Drafter
from ..models.target import Target
from ..system.fusing import on_gpu
from . import adapters, sizes
from .description import AnyDescription, DrafterDescription, TargetDescription, errors_name
from .progress import Progress, ProgressCallback
from .quantization import Scheme
from .safetensors_files import check_tied, tensors
from .tensor_names import MERGED_DRAFTER, VISION_AND_AUDIO, Source, of_merged_drafter

log = logging.getLogger(__name__)


def load_target(
    target: TargetDescription, adapter: Path | None = None, progress: ProgressCallback | None = None
) -> Target:
    """Loads a target.

    Args:
        target: Its description.
        adapter: Folder of a LoRA adapter to add, see adapters.py.
        progress: Receives reports.

    Returns:
        The target, with its weights in memory.

    Raises:
        CheckpointError: See `errors.CheckpointError`.
        MemoryBudgetError: The weights don't fit in this machine's memory.
    """
    model = Target(target.text)
    if target.text.tied_head:
        check_tied(target.folder, target.table)
    assign(model, stored_tensors(target), target)
    if adapter:
        adapters.apply(adapters.read_adapter(adapter), model, target.table)
    if not on_gpu() and target.text.num_experts and model.dtype != mx.float32:
        raise CheckpointError("mixture-of-experts models run on the CPU in float32 only: load with dtype='float32'")
    _materialize(model, target.folder, progress)
    return model


def load_drafter(
    drafter: DrafterDescription, target: TargetConfig, position: str, progress: ProgressCallback | None = None
) -> Drafter:
    """Loads a drafter and checks that it fits a target.

    Args:
        drafter: Its description; the dtype should be the target's.
        target: The target's config.
        position: One of `models.drafter.POSITIONS`.
        progress: Receives reports.

    Returns:
        The drafter, with its weights in memory.

    Raises:
        CheckpointError: See `errors.CheckpointError`.
        PairingError: The drafter was made for another target.
        MemoryBudgetError: The weights don't fit in this machine's memory.
    """
    model = open_drafter(drafter, target, position)
    _materialize(model, drafter.folder, progress)
    return model


def open_drafter(drafter: DrafterDescription, target: TargetConfig, position: str = POSITIONS[0]) -> Drafter:
    """As `load_drafter`, but reads no weights yet: it only shows whether the drafter can be loaded."""
    check_pair(target, drafter.config)
    model = Drafter(drafter.config, position)
    stored = stored_tensors(drafter)
    if drafter.config.num_clusters:
        _sort_by_cluster(stored, drafter)
    assign(model, stored, drafter)
    return model


def empty_model(described: AnyDescription) -> Target | Drafter:
    """A model with empty weights, for its parameters' names and shapes."""
    config = described.config
    return Drafter(config, POSITIONS[0]) if isinstance(config, DrafterConfig) else Target(config.text)


def stored_tensors(described: AnyDescription) -> dict[str, mx.array]:
    """The tensors of a checkpoint by stored name, lazily.

    A merged drafter's tensors have the names that they would have in its own folder.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    stored = dict(tensors(described.folder))
    return of_merged_drafter(stored) if described.merged else stored


def check_memory(needed: int, folder: Path) -> None:
    """Checks that weights fit in this machine's memory.

    Args:
        needed: Bytes of the weights.
        folder: The model's folder, for the message.

    Raises:
        MemoryBudgetError: They don't fit.
    """
    if needed > (have := sizes.memory_for_models()):
        raise MemoryBudgetError(
            f"{folder} needs {sizes.format_bytes(needed)} for its weights, and models can have "
            f"{sizes.format_bytes(have)} here: quantise it (quantize=4, --quantize 4) or take a smaller model"
        )


def check_fits(described: AnyDescription) -> None:
    """As `check_memory`, with the size that follows from config.json, so that it can be checked before a download."""
    check_memory(sizes.of(described).weights, described.folder)


def check_ordering(ordering: mx.array, vocab: int, folder: Path) -> None:
    """Checks that a clustered head's token_ordering contains every token id once.

    Args:
        ordering: The tensor.
        vocab: Number of token ids.
        folder: The model's folder, for the message.

    Raises:
        CheckpointError: It doesn't.
    """
    everything = mx.arange(vocab, dtype=mx.int32)
    if ordering.shape != (vocab,) or not mx.array_equal(mx.sort(ordering.astype(mx.int32)), everything).item():
        raise CheckpointError(f"{folder}: masked_embedding.token_ordering isn't a permutation of {vocab} token ids")


def _sort_by_cluster(stored: dict[str, mx.array], drafter: DrafterDescription) -> None:
    """Checks a clustered head's ordering, and sorts the rows of its embedding by cluster unless they are stored so."""
    vocab, sources = drafter.text.vocab_size, drafter.table.layout(stored).sources
    if "head.token_ordering" not in sources:
        return  # `assign` will raise an error
    name = sources["head.token_ordering"].names[0]
    check_ordering(stored[name], vocab, drafter.folder)
    stored[name] = ordering = stored[name].astype(mx.int32)
    for parameter, source in sources.items():
        if parameter.startswith("head.embedding.") and not drafter.in_cluster_order:
            name = source.names[0]
            if stored[name].shape[0] != vocab:
                raise CheckpointError(f"{drafter.folder}: {name} has {stored[name].shape[0]} rows for {vocab} tokens")
            stored[name] = stored[name][ordering]


def assign(model: nn.Module, stored: dict[str, mx.array], described: AnyDescription) -> None:
    """Gives a model its weights, after checking that names and shapes are exactly the model's. Evaluates nothing.

    Args:
        model: The model with empty weights, not quantised.
        stored: The tensors by stored name. Is emptied, so that the model alone holds them.
        described: The checkpoint's description.

    Raises:
        CheckpointError: See `errors.CheckpointError`.
    """
    folder = described.folder
    with errors_name(folder):
        layout = described.table.layout(stored)
        shapes = {name: tensor.shape for name, tensor in stored.items()}
        found = {parameter: source.shape(shapes) for parameter, source in layout.sources.items()}
    if layout.skipped:
        reasons = set(layout.skipped.values())
        loss = VISION_AND_AUDIO in reasons or (MERGED_DRAFTER in reasons and not described.holds_drafter)
        log.log(logging.INFO if loss else logging.DEBUG, "%s: left out: %s", folder.name, layout.left_out())
    weights = {parameter: _gather(source, stored) for parameter, source in layout.sources.items()}
    stored.clear()
    if described.stored:
        nn.quantize(model, class_predicate=described.stored.rule(weights))
    check_complete(model, found, folder)
    _check_types(model, weights, folder)

    own = weights["norm.weight"].dtype
    model.load_weights(list(weights.items()))
    # From here on only the model holds the weights, so that those replaced below are freed at once.
    weights.clear()
    if described.quantize:  # before the change of dtype, as in a conversion
        nn.quantize(model, class_predicate=Scheme(described.quantize).rule())
    model.set_dtype(described.dtype_here(own))


def _check_types(model: nn.Module, weights: dict[str, mx.array], folder: Path) -> None:
    """Checks that tensors are floating-point or integer as the model's are."""
    for name, own in _parameters(model):
        dtype = weights[name].dtype
        if mx.issubdtype(dtype, mx.floating) != mx.issubdtype(own.dtype, mx.floating):
            raise CheckpointError(
                f"{folder} doesn't fit its config.json: {name} is stored as {str(dtype).removeprefix('mlx.core.')}"
            )


def _materialize(model: nn.Module, folder: Path, progress: ProgressCallback | None) -> None:
    """Reads the assigned weights into memory, and prepares the model's layers for running."""
    # So far nothing has been read, but sizes are known.
    total, done, name = sizes.weight_bytes(model), 0, published_name(folder.absolute())
    check_memory(total, folder)

    def report() -> None:
        if progress:
            progress(Progress("load", name, done, total))

    report()
    for part in model.modules():
        if hasattr(part, "prepare"):
            part.prepare()
            mx.eval(part.parameters())
    # One by one, because a layer that is quantised while loading is in memory unquantised for a moment.
    for part in model.modules():
        if not part.children():
            mx.eval(part.parameters())
            mx.clear_cache()
            done = min(done + sizes.weight_bytes(part), total)
            report()
    mx.eval(model.parameters())
    # The layers have drawn weights that nothing has read. Unless the generator's state is known, MLX keeps that graph.
    mx.eval(mx.random.state)
    done = total
    report()


def _gather(source: Source, stored: dict[str, mx.array]) -> mx.array:
    parts = [stored[name] for name in source.names]
    if source.half is not None:
        parts = [mx.contiguous(mx.split(part, 2, axis=-2)[source.half]) for part in parts]
    return mx.stack(parts) if source.stacked else parts[0]


def _parameters(model: nn.Module) -> list[tuple[str, mx.array]]:
    return cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))


def check_complete(model: nn.Module, found: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Checks that a model's parameters have been found, with the right shapes, and no others.

    Args:
        model: The model.
        found: Shapes by parameter name.
        folder: The checkpoint's folder, for the message.

    Raises:
        CheckpointError: Parameters are missing, unknown, or of the wrong shape; the message names the first ones.
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
