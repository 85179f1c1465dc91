"""Checks and loads checkpoints: a folder becomes a `Target` or a `Drafter`.

Loads Hugging Face folders as they are published (config.json, model.safetensors or shards with an index) and MLX
conversions of them. Weights are mapped by name, checked against the model's own parameters before any is used, and
read lazily. Only safetensors are read and nothing from a checkpoint is run. Not here: which folder that is (hub.py).
"""

from __future__ import annotations

import json
import logging
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import sizes
from .config import DrafterConfig, TargetConfig, TextConfig, check_pair, drafter_config, target_config
from .errors import CheckpointError, MemoryBudgetError, one_line
from .models.drafter import Drafter
from .models.elementwise import on_gpu
from .models.target import Target

log = logging.getLogger(__name__)

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}

_TOWERS = re.compile(
    r"^(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio|vision_embedder|multi_modal_projector)\."
)
_PREFIX = re.compile(r"^(model\.language_model\.|language_model\.model\.|language_model\.|model\.)")
_SHARED_KV = re.compile(r"^layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm)\.")


@dataclass(frozen=True)
class GenerationDefaults:
    """Defaults of generation_config.json.

    Attributes:
        stop_tokens: Ids that end an answer (`eos_token_id`).
        suppress_tokens: Ids that are never chosen.
        temperature: 0 unless `do_sample` is set.
        top_k: 0 for off.
        top_p: 1 for off.
        min_p: 0 for off.
    """

    stop_tokens: tuple[int, ...]
    suppress_tokens: tuple[int, ...]
    temperature: float
    top_k: int
    top_p: float
    min_p: float


def read_json(path: Path, required: bool = True) -> dict[str, Any]:
    """Reads a JSON object from a file; {} if the file is optional and missing.

    Raises:
        CheckpointError: Missing, unreadable, or no JSON object.
    """
    if not path.is_file():
        if required:
            raise CheckpointError(f"{path.parent} has no {path.name}: not a model folder, or not completely downloaded")
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def read_generation(folder: Path) -> GenerationDefaults:
    """Reads generation_config.json, whose stop ids override those of config.json.

    Raises:
        CheckpointError: A malformed file.
    """
    config = read_json(folder / "config.json")
    text = config.get("text_config", config)
    given = read_json(folder / "generation_config.json", required=False)
    stop = given.get("eos_token_id", config.get("eos_token_id", text.get("eos_token_id")))
    sample = bool(given.get("do_sample", False))
    try:
        return GenerationDefaults(
            stop_tokens=_token_ids(stop, text["vocab_size"]),
            suppress_tokens=_token_ids(given.get("suppress_tokens"), text["vocab_size"]),
            temperature=float(given.get("temperature", 1.0)) if sample else 0.0,
            top_k=int(given.get("top_k") or 0) if sample else 0,
            top_p=float(given.get("top_p") or 1.0) if sample else 1.0,
            min_p=float(given.get("min_p") or 0.0) if sample else 0.0,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'generation_config.json'} can't be understood: {error}") from error


def _token_ids(value: Any, vocab_size: int) -> tuple[int, ...]:
    ids = [value] if isinstance(value, int) else value or []
    if not isinstance(ids, list) or not all(isinstance(t, int) and 0 <= t < vocab_size for t in ids):
        raise ValueError(f"{value!r} are no token ids of a vocabulary of {vocab_size}")
    return tuple(ids)


def load_target(folder: Path, dtype: str | None = None, quantize: int | None = None) -> tuple[TargetConfig, Target]:
    """Loads a target.

    Args:
        folder: Its folder.
        dtype: "float32", "bfloat16" or "float16" for activations and unquantised weights. None for the checkpoint's
            own type; on the CPU, where 16-bit matmuls are slower than 32-bit ones, float32.
        quantize: Bits to quantise to while loading; None to take the weights as they are.

    Raises:
        CheckpointError: See `errors.CheckpointError`.
        MemoryBudgetError: The weights don't fit in this machine's memory.
    """
    raw = read_json(folder / "config.json")
    config = target_config(raw)
    text = config.text
    model = Target(text)
    weights = dict(target_tensors(folder, text))
    _fill(model, weights, folder, raw, dtype, quantize)
    if not on_gpu() and text.num_experts and model.dtype != mx.float32:
        raise CheckpointError("mixture-of-experts models run on the CPU in float32 only: load with dtype='float32'")
    return config, model


def load_drafter(
    folder: Path, target: TargetConfig, position: str, dtype: str | None = None, quantize: int | None = None
) -> tuple[DrafterConfig, Drafter]:
    """Loads a drafter and checks that it belongs to a target.

    Args:
        folder: Its folder.
        target: The target's config.
        position: One of `models.drafter.POSITIONS`.
        dtype: As for `load_target`; should be what the target runs in.
        quantize: As for `load_target`; never inherited from the target's config.

    Raises:
        CheckpointError: See `errors.CheckpointError`.
        PairingError: The drafter was made for another target.
    """
    raw = read_json(folder / "config.json")
    config = drafter_config(raw)
    check_pair(target, config)
    model = Drafter(config, position)
    weights = dict(_drafter_weights(folder, config))
    _fill(model, weights, folder, raw, dtype, quantize)
    return config, model


def target_tensors(folder: Path, config: TextConfig) -> Iterator[tuple[str, mx.array]]:
    """Tensors of a target under our names."""
    skipped = 0
    for name, tensor in tensors(folder):
        if _TOWERS.match(name):
            skipped += 1
            continue
        name = _PREFIX.sub("", name)
        if name.startswith("lm_head.") and config.tied_head:
            continue
        shared = _SHARED_KV.match(name)
        if shared and config.layers[min(int(shared[1]), len(config.layers) - 1)].kv_owner != int(shared[1]):
            continue  # published, but never used: this layer reads another one's KV
        name = name.replace(".experts.switch_glu.", ".experts.")
        if name.endswith(".experts.gate_up_proj"):
            gate, up = mx.split(tensor, 2, axis=-2)
            yield name.replace("gate_up_proj", "gate_proj.weight"), mx.contiguous(gate)
            yield name.replace("gate_up_proj", "up_proj.weight"), mx.contiguous(up)
        elif name.endswith(".experts.down_proj"):
            yield name + ".weight", tensor
        else:
            yield name, tensor
    if skipped:
        log.info("%s: %d vision and audio tensors left out, this is a text decoder", folder.name, skipped)


def _drafter_weights(folder: Path, config: DrafterConfig) -> Iterator[tuple[str, mx.array]]:
    """Tensors of a drafter under our names; a clustered head's embedding in cluster order."""
    ordering, embedding = None, {}
    for name, tensor in tensors(folder):
        name = name.removeprefix("model.")
        if name.startswith("lm_head."):
            continue  # the output head is embed_tokens
        if not config.num_clusters:
            if not name.startswith("masked_embedding."):
                yield name, tensor
        elif name == "masked_embedding.token_ordering":
            ordering = tensor.astype(mx.int32)
        elif name.startswith("embed_tokens."):
            embedding[name.removeprefix("embed_tokens.")] = tensor
        else:
            yield name.replace("masked_embedding.", "head."), tensor
    if config.num_clusters and ordering is not None:
        vocab = config.text.vocab_size
        if ordering.shape != (vocab,) or not mx.array_equal(mx.sort(ordering), mx.arange(vocab, dtype=mx.int32)).item():
            raise CheckpointError(f"{folder}: masked_embedding.token_ordering is no permutation of {vocab} token ids")
        yield "head.token_ordering", ordering
        for part, rows in embedding.items():
            if rows.shape[0] != vocab:
                raise CheckpointError(f"{folder}: embed_tokens.{part} has {rows.shape[0]} rows for {vocab} tokens")
            yield f"head.embedding.{part}", rows[ordering]


def tensors(folder: Path) -> Iterator[tuple[str, mx.array]]:
    """All tensors of a folder's safetensors files, lazily."""
    index = read_json(folder / "model.safetensors.index.json", required=False)
    if index:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{folder / 'model.safetensors.index.json'} has no weight_map: download it again")
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no safetensors files")
    for path in files:
        check_safetensors(path)
        try:
            held = mx.load(str(path))
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} is corrupt: {one_line(error)}; download it again") from error
        assert isinstance(held, dict)
        for name in sorted(held):
            yield name, held.pop(name)  # once evaluated, a tensor that is held here would stay in memory


def check_safetensors(path: Path) -> dict[str, Any]:
    """Checks that a safetensors file is whole, without reading its data.

    Returns:
        Its header: tensor name -> {dtype, shape, data_offsets}.

    Raises:
        CheckpointError: Missing, truncated, or not a safetensors file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the download is incomplete")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise CheckpointError(f"{path} is truncated or no safetensors file: delete it and download it again")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((t["data_offsets"][1] for t in header.values()), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{path} is corrupt: its header can't be read") from error
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path} is truncated or damaged: {size:,} bytes instead of {8 + length + end:,}; download it again"
        )
    return header


def _fill(
    model: nn.Module,
    weights: dict[str, mx.array],
    folder: Path,
    config: dict[str, Any],
    dtype: str | None,
    quantize: int | None,
) -> None:
    """Puts weights into a model, after checking that names and shapes are exactly the model's."""
    stored = config.get("quantization") or config.get("quantization_config")
    if stored:
        if quantize:
            raise CheckpointError(f"{folder} is quantised already: load it without quantize")
        try:
            nn.quantize(model, class_predicate=_stored_bits(weights, stored))
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder}: the quantization in config.json can't be used: {one_line(error)}"
            ) from error
    parameters = cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))
    expected = {name: value.shape for name, value in parameters}
    _compare(folder, expected, {name: value.shape for name, value in weights.items()})

    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} isn't supported: expected one of {', '.join(DTYPES)}")
    own = next(value.dtype for name, value in weights.items() if name == "norm.weight")
    wanted = DTYPES[dtype] if dtype else activation_dtype(own)
    for name, weight in weights.items():
        weights[name] = weight.astype(wanted) if mx.issubdtype(weight.dtype, mx.floating) else weight
    model.load_weights(list(weights.items()))
    # The model alone holds the weights now, so that what is replaced below is let go at once.
    weights.clear()
    if quantize:
        nn.quantize(model, class_predicate=quantization(quantize))
    # Nothing has been read so far: sizes are known, weights aren't in memory.
    needed = sum(array.nbytes for _, array in cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters())))
    if needed > (have := sizes.memory_for_models()):
        raise MemoryBudgetError(
            f"{folder} needs {needed / 1e9:.1f} GB for its weights, and models can have {have / 1e9:.1f} GB here: "
            "quantise it (quantize=4, --quantize 4) or take a smaller model"
        )
    for part in model.modules():
        if hasattr(part, "prepare"):
            part.prepare()
            mx.eval(part.parameters())
    mx.eval(model.parameters())


def activation_dtype(stored: mx.Dtype) -> mx.Dtype:
    """The type in which a checkpoint of some type runs here, unless told otherwise."""
    return stored if on_gpu() else mx.float32


def quantization(bits: int) -> Callable[[str, nn.Module], bool | dict[str, Any]]:
    """Quantisation while loading: everything big, the router at 8 bits since it decides which weights are read."""
    if bits not in (2, 3, 4, 5, 6, 8):
        raise CheckpointError(f"can't quantise to {bits!r} bits: use 2, 3, 4, 5, 6 or 8")

    def rule(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized"):
            return False
        group = next((g for g in (64, 32) if module.weight.shape[-1] % g == 0), None)
        return {"group_size": group, "bits": 8 if path.endswith("router.proj") else bits} if group else False

    return rule


def _stored_bits(weights: dict[str, mx.array], stored: dict[str, Any]) -> Callable[[str, nn.Module], Any]:
    """Which modules a checkpoint holds quantised, and how: those with scales, as config.json says."""
    common = {k: stored[k] for k in ("group_size", "bits", "mode") if k in stored}
    special = {_PREFIX.sub("", k).replace(".switch_glu.", "."): v for k, v in stored.items() if isinstance(v, dict)}

    def rule(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in weights:
            return False
        return {**common, **special.get(path, {})}

    return rule


def _compare(folder: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
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
