"""mlx-vlm's batch generator with its MTP drafter. `python -m` serves it, see peer_protocol.

mlx-vlm loads a published checkpoint with its vision tower. It can't load one without, such as those that `mlx-mtp
convert` writes: here its language model is built, and given the weights. What generates is mlx-vlm's code either way.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .peer_protocol import Decode, Job, Tick, serve

if TYPE_CHECKING:
    import mlx.core as mx


class NeverStops:
    """Stands in for a processor, its tokenizer, and the stopping criteria: every row runs to its limit."""

    def __init__(self) -> None:
        self.tokenizer = self.stopping_criteria = self

    def add_eos_token_ids(self, _: object) -> None:
        """Ignores them."""

    def __call__(self, _: object) -> bool:
        """Never stops a row."""
        return False


def load_target(folder: Path) -> Any:
    """The language model of a checkpoint."""
    import mlx.core as mx

    weights: dict[str, mx.array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= cast("dict[str, mx.array]", mx.load(str(path)))
    if any("vision_tower." in name for name in weights):
        return import_module("mlx_vlm.utils").load_model(folder).language_model
    return _language_model(json.loads((folder / "config.json").read_text("utf-8")), weights)


def _language_model(raw: dict[str, Any], weights: dict[str, mx.array]) -> Any:
    import mlx.nn as nn

    text_config = import_module("mlx_vlm.models.gemma4.config").TextConfig.from_dict(raw["text_config"])
    model = import_module("mlx_vlm.models.gemma4.language").LanguageModel(text_config)
    named = {name.replace("language_model.", "").replace("model.model.", "model."): it for name, it in weights.items()}
    if how := raw.get("quantization"):
        # A module may have a format of its own, under its name in the file.
        own = {
            name.replace("language_model.", "").replace("model.model.", "model."): it
            for name, it in how.items()
            if isinstance(it, dict)
        }

        def predicate(path: str, _: nn.Module) -> Any:
            return f"{path}.scales" in named and own.get(path, True)

        nn.quantize(model, how["group_size"], how["bits"], mode=how.get("mode", "affine"), class_predicate=predicate)
    model.load_weights([*named.items()])
    model.eval()
    return model


def _embed(model: Any, ids: mx.array) -> dict[str, mx.array]:
    """The embeddings that a vision-language model would pass to its language model."""
    inputs = {"inputs_embeds": model.model.embed_tokens(ids) * model.model.embed_scale}
    if model.config.hidden_size_per_layer_input:
        inputs["per_layer_inputs"] = model.model.get_per_layer_inputs(ids)
    return inputs


def decode(model: Any, drafter: Any, prompts: list[list[int]], tokens: int, draft_length: int, tick: Tick) -> None:
    """Decodes a batch, see `peer_protocol.Decode`."""
    import mlx.core as mx

    k, rows = draft_length, len(prompts)
    drafting = {"draft_model": drafter, "draft_kind": "mtp", "draft_block_size": k + 1} if k else {}
    batch = import_module("mlx_vlm.generate.ar").BatchGenerator(
        model, NeverStops(), max_tokens=tokens, completion_batch_size=rows, prefill_batch_size=rows,
        greedy_sampling=True, **drafting,
    )  # fmt: skip
    embedded = [_embed(model, mx.array([prompt])) for prompt in prompts]
    left = dict.fromkeys(batch.insert(prompts, tokens, prompt_kwargs=embedded), tokens)
    while any(left.values()):
        for response in batch.next()[1]:
            left[response.uid] -= 1
            tick(response.uid)
    batch.close()


def _load(job: Job) -> Decode:
    import mlx.core as mx

    dtype = getattr(mx, job["dtype"])
    model, drafter = load_target(Path(job["target"])), None
    model.set_dtype(dtype)
    if job["drafter"]:
        drafter, _ = import_module("mlx_vlm.speculative.drafters").load_drafter(job["drafter"])
        drafter.set_dtype(dtype)
    return lambda prompts, tokens, k, tick: decode(model, drafter, prompts, tokens, k, tick)


if __name__ == "__main__":
    serve("mlx-vlm", _load)
