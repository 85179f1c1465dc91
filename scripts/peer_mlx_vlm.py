"""Runs mlx-vlm's batch generator with its MTP drafter for bench_batch.py, in mlx-vlm's own environment.

    python -m venv /tmp/mlx-vlm
    /tmp/mlx-vlm/bin/pip install "mlx[cpu]" mlx-vlm==0.7.10 scipy-openblas32==0.3.23.293.2
    python scripts/bench_batch.py --mlx-vlm /tmp/mlx-vlm/bin/python

Reads a line of JSON with folders and prompts, and answers {"blas": ...}, its BLAS. Then reads a line for each run,
{"rows": 4, "draft_length": 4} with 0 for plain decoding, and answers {"tps": ...}. mlx-vlm can't load a checkpoint
without a vision tower, so this script builds its language model and loads the weights; generation is mlx-vlm's code.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlx_mtp.system.blas import use_openblas

BLAS = use_openblas()  # before MLX is imported

import mlx.core as mx
from mlx_vlm.generate.ar import BatchGenerator
from mlx_vlm.models.gemma4.config import TextConfig
from mlx_vlm.models.gemma4.language import LanguageModel
from mlx_vlm.speculative.drafters import load_drafter


class NeverStops:
    """Stands in for a processor, its tokenizer, and the stopping criteria: every row runs to its limit."""

    def __init__(self) -> None:
        self.tokenizer = self.stopping_criteria = self

    def add_eos_token_ids(self, _: object) -> None:
        """Ignores them."""

    def __call__(self, _: object) -> bool:
        """Never stops a row."""
        return False


def load_target(folder: Path) -> LanguageModel:
    """The language model of a published checkpoint, in float32."""
    config = json.loads((folder / "config.json").read_text())["text_config"]
    model = LanguageModel(TextConfig.from_dict(config))
    weights = mx.load(str(folder / "model.safetensors"))
    names = {name.replace("language_model.", "").replace("model.model.", "model."): it for name, it in weights.items()}
    model.load_weights([(name, value.astype(mx.float32)) for name, value in names.items()])
    model.eval()
    return model


def embed(model: LanguageModel, ids: mx.array) -> dict[str, mx.array]:
    """The embeddings that a vision-language model would pass to its language model."""
    inputs = {"inputs_embeds": model.model.embed_tokens(ids) * model.model.embed_scale}
    if model.config.hidden_size_per_layer_input:
        inputs["per_layer_inputs"] = model.model.get_per_layer_inputs(ids)
    return inputs


def run(model: LanguageModel, drafter: Any, prompts: list[list[int]], tokens: int, k: int) -> float:
    """Tokens per second of a greedy batch, prefill included."""
    started = time.perf_counter()
    drafting = {"draft_model": drafter, "draft_kind": "mtp", "draft_block_size": k + 1} if k else {}
    rows = len(prompts)
    batch = BatchGenerator(
        model, NeverStops(), max_tokens=tokens, completion_batch_size=rows, prefill_batch_size=rows,
        greedy_sampling=True, **drafting,
    )  # fmt: skip
    embedded = [embed(model, mx.array([prompt])) for prompt in prompts]
    left = dict.fromkeys(batch.insert(prompts, tokens, prompt_kwargs=embedded), tokens)
    while any(left.values()):
        for response in batch.next()[1]:
            left[response.uid] -= 1
    batch.close()
    return rows * tokens / (time.perf_counter() - started)


def main() -> None:
    """Serves runs until stdin ends."""
    job = json.loads(sys.stdin.readline())
    model = load_target(Path(job["target"]))
    drafter, _ = load_drafter(job["drafter"])
    drafter.set_dtype(mx.float32)
    print(json.dumps({"blas": BLAS}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        tps = run(model, drafter, job["prompts"][: asked["rows"]], job["tokens"], asked["draft_length"])
        print(json.dumps({"tps": tps}), flush=True)


if __name__ == "__main__":
    main()
