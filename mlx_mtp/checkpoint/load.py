"""Makes models of checkpoints: a description becomes a `Target` or a `Drafter`.

Loads Hugging Face folders as they are published (config.json, model.safetensors or shards with an index) and MLX
conversions of them. Weights are mapped by name, checked against the model's own parameters before any is used, and
read lazily. Only safetensors are read and nothing from a checkpoint is run. Not here: which folder that is (hub.py).
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
from ..models.drafter import POSITIONS, Drafter
from ..models.target import Target
from ..system.fusing import on_gpu
from . import adapters, sizes
from .description import AnyDescription, DrafterDescription, TargetDescription, errors_name
from .quantization import Scheme
from .safetensors_files import check_tied, tensors
from .tensor_names import MERGED_DRAFTER, VISION_AND_AUDIO, Source, of_merged_drafter

log = logging.getLogger(__name__)


def load_target(target: TargetDescription, adapter: Path | None = None) -> Target:
    """Loads a target.

    Args:
        target: What is known of it.
        adapter: Folder of a LoRA adapter to put beside the weights, see adapters.py.

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
    _materialize(model, target.folder)
    return model


def load_drafter(drafter: DrafterDescription, target: TargetConfig, position: str) -> Drafter:
    """Loads a drafter and checks that it belongs to a target.

    Args:
        drafter: What is known of it; its dtype should be what the target runs in.
        target: The target's config.
        position: One of `models.drafter.POSITIONS`.

    Raises:
        CheckpointError: See `errors.CheckpointError`.
        PairingError: The drafter was made for another target.
        MemoryBudgetError: The weights don't fit in this machine's memory.
    """
    model = open_drafter(drafter, target, position)
    _materialize(model, drafter.folder)
    return model


def open_drafter(drafter: DrafterDescription, target: TargetConfig, position: str = POSITIONS[0]) -> Drafter:
    """`load_drafter` up to the point where weights would be read: whether it can be loaded is known then."""
    check_pair(target, drafter.config)
    model = Drafter(drafter.config, position)
    stored = stored_tensors(drafter)
    if drafter.config.num_clusters:
        _sort_by_cluster(stored, drafter)
    assign(model, stored, drafter)
    return model


def empty_model(described: AnyDescription) -> Target | Drafter:
    """A model without weights, to compare with or to count."""
    config = described.config
    return Drafter(config, POSITIONS[0]) if isinstance(config, DrafterConfig) else Target(config.text)


def stored_tensors(described: AnyDescription) -> dict[str, mx.array]:
    """The tensors of a folder, lazily; of a merged drafter its own, under the names they have in one of its own.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    stored = dict(tensors(described.folder))
    return of_merged_drafter(stored) if described.merged else stored


def check_memory(needed: int, folder: Path) -> None:
    """Checks that weights of `needed` bytes fit in this machine's memory.

    Raises:
        MemoryBudgetError: They don't.
    """
    if needed > (have := sizes.memory_for_models()):
        raise MemoryBudgetError(
            f"{folder} needs {sizes.format_bytes(needed)} for its weights, and models can have "
            f"{sizes.format_bytes(have)} here: quantise it (quantize=4, --quantize 4) or take a smaller model"
        )


def check_fits(described: AnyDescription) -> None:
    """`check_memory` for what config.json says, which is worth knowing before weights are downloaded."""
    check_memory(sizes.of(described).weights, described.folder)


def check_ordering(ordering: mx.array, vocab: int, folder: Path) -> None:
    """Checks that a clustered head's token_ordering has every token once.

    Raises:
        CheckpointError: It doesn't.
    """
    everything = mx.arange(vocab, dtype=mx.int32)
    if ordering.shape != (vocab,) or not mx.array_equal(mx.sort(ordering.astype(mx.int32)), everything).item():
        raise CheckpointError(f"{folder}: masked_embedding.token_ordering is no permutation of {vocab} token ids")


def _sort_by_cluster(stored: dict[str, mx.array], drafter: DrafterDescription) -> None:
    """Checks a clustered head's ordering, and brings the rows of its embedding into this order if they aren't yet."""
    vocab, sources = drafter.text.vocab_size, drafter.table.layout(stored).sources
    if "head.token_ordering" not in sources:
        return  # `assign` will say that it is missing
    name = sources["head.token_ordering"].names[0]
    check_ordering(stored[name], vocab, drafter.folder)
    stored[name] = ordering = stored[name].astype(mx.int32)
    for ours, source in sources.items():
        if ours.startswith("head.embedding.") and not drafter.in_cluster_order:
            name = source.names[0]
            if stored[name].shape[0] != vocab:
                raise CheckpointError(f"{drafter.folder}: {name} has {stored[name].shape[0]} rows for {vocab} tokens")
            stored[name] = stored[name][ordering]


def assign(model: nn.Module, stored: dict[str, mx.array], described: AnyDescription) -> None:
    """Gives a model its weights, after checking that names and shapes are exactly the model's. Evaluates nothing.

    Args:
        model: The model, not quantised.
        stored: The tensors under their stored names; emptied.
        described: What they are.

    Raises:
        CheckpointError: See `errors.CheckpointError`.
    """
    folder = described.folder
    with errors_name(folder):
        layout = described.table.layout(stored)
        shapes = {name: tensor.shape for name, tensor in stored.items()}
        found = {ours: source.shape(shapes) for ours, source in layout.sources.items()}
    if layout.skipped:
        reasons = set(layout.skipped.values())
        loss = VISION_AND_AUDIO in reasons or (MERGED_DRAFTER in reasons and not described.holds_drafter)
        log.log(logging.INFO if loss else logging.DEBUG, "%s: left out: %s", folder.name, layout.left_out())
    weights = {ours: _gather(source, stored) for ours, source in layout.sources.items()}
    stored.clear()
    if described.stored:
        nn.quantize(model, class_predicate=described.stored.rule(weights))
    check_complete(model, found, folder)
    _check_types(model, weights, folder)

    own = weights["norm.weight"].dtype
    model.load_weights(list(weights.items()))
    # The model alone holds the weights now, so that what is replaced below is let go at once.
    weights.clear()
    if described.quantize:  # in the stored type, as a conversion does it
        nn.quantize(model, class_predicate=Scheme(described.quantize).rule())
    model.set_dtype(described.dtype_here(own))


def _check_types(model: nn.Module, weights: dict[str, mx.array], folder: Path) -> None:
    """Checks that numbers are numbers, and packed bits and indices are integers."""
    for name, own in _parameters(model):
        dtype = weights[name].dtype
        if mx.issubdtype(dtype, mx.floating) != mx.issubdtype(own.dtype, mx.floating):
            raise CheckpointError(
                f"{folder} doesn't fit its config.json: {name} is stored as {str(dtype).removeprefix('mlx.core.')}"
            )


def _materialize(model: nn.Module, folder: Path) -> None:
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
