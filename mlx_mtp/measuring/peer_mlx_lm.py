"""mlx-lm's batch generator, on the target alone: it knows no MTP drafters. `python -m` serves it, see peer_protocol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .peer_protocol import Decode, Job, Tick, serve

if TYPE_CHECKING:
    import mlx.core as mx


def load_target(folder: Path, dtype: mx.Dtype) -> Any:
    """mlx-lm's model of a target, with activations and unquantised weights of this type."""
    from mlx_lm.utils import load_model

    # mlx-lm takes the vocabulary's size from the top level of config.json, where no Gemma 4 checkpoint has it.
    config = json.loads((folder / "config.json").read_text("utf-8"))
    model, _ = load_model(folder, model_config={"vocab_size": config.get("text_config", config)["vocab_size"]})
    model.set_dtype(dtype)
    return model


def decode(model: Any, prompts: list[list[int]], tokens: int, tick: Tick = lambda _: None) -> None:
    """Decodes a batch plainly, see `peer_protocol.Decode`."""
    from mlx_lm.generate import BatchGenerator

    batch = BatchGenerator(model, max_tokens=tokens, completion_batch_size=len(prompts))
    batch.insert([list(prompt) for prompt in prompts])
    while responses := batch.next_generated():
        for response in responses:
            tick(response.uid)
    batch.close()


def _load(job: Job) -> Decode:
    import mlx.core as mx

    model = load_target(Path(job["target"]), getattr(mx, job["dtype"]))
    return lambda prompts, tokens, _, tick: decode(model, prompts, tokens, tick)


if __name__ == "__main__":
    serve("mlx-lm", _load)
