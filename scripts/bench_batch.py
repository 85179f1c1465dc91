"""Total tokens per second of batches, as ratios measured in one run.

    plain    our plain decoding / mlx-lm's BatchGenerator on the same target
    MTP      our decoding with the drafter / our plain decoding, at the same batch size (embedded pair)
    mlx-vlm  our decoding with the drafter / mlx-vlm's, same pair and draft length (with --mlx-vlm, see peer_mlx_vlm.py)
    rounds   tokens a row gets out of a round; it should not depend on the batch size

Pairs: the embedded one on chat prompts, and two random targets of medium size, dense and mixture of experts, on random
prompts (their drafters would never be right, so they are measured without). Every ratio is the median over repetitions
in which all variants take turns. Needs the `bench` extra (mlx-lm).

    python scripts/bench_batch.py [--repeats 5] [--draft-length 4] [--mlx-vlm PYTHON] [--json]
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from mlx_mtp.blas import use_openblas

BLAS = use_openblas()  # before MLX is imported

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import typer  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.generate import BatchGenerator  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from tiny_checkpoints import make_pair  # noqa: E402

import mlx_mtp  # noqa: E402
from mlx_mtp.api import DEMO  # noqa: E402
from mlx_mtp.config import target_config  # noqa: E402
from mlx_mtp.models.target import Target  # noqa: E402

SIZES = (1, 2, 4, 8)
TOKENS = 120
PROMPTS = (
    "What is a drafter?",
    "Tell me a short story about a fox and a lantern.",
    "Write a Python function that adds two numbers.",
    "How does speculative decoding work?",
    "Tell me a story about an owl.",
    "What can you do?",
    "Give me a JSON record for a book.",
    "List the months of the year.",
)


class MlxVlm:
    """mlx-vlm in a process of its own, which runs a batch when asked and waits otherwise."""

    def __init__(self, python: Path, prompts: list[list[int]]):
        script = Path(__file__).with_name("peer_mlx_vlm.py")
        self._process = subprocess.Popen([python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        job = {"target": str(DEMO / "target"), "drafter": str(DEMO / "drafter"), "prompts": prompts, "tokens": TOKENS}
        self._send(job)

    def run(self, rows: int, draft_length: int) -> tuple[float, list[list[int]]]:
        """Tokens per second, and the texts."""
        self._send({"rows": rows, "draft_length": draft_length})
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise typer.BadParameter("mlx-vlm has failed, see above", param_hint="--mlx-vlm")
        result = json.loads(line)
        return result["tps"], result["tokens"]

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()


def ours(lm: mlx_mtp.MTPModel, prompts: Sequence[list[int]], draft_length: int | str) -> tuple[float, float]:
    """Tokens per second of a batch, prefill included, and tokens a row got out of a round."""
    started = time.perf_counter()
    results = lm.generate_batch(
        prompts, len(prompts), max_tokens=TOKENS, temperature=0, draft_length=draft_length, ignore_eos=True
    )
    seconds = time.perf_counter() - started
    generated = sum(len(result.tokens) for result in results)
    return generated / seconds, (generated - len(results)) / sum(result.stats.rounds for result in results)


def mlx_lm(model: nn.Module, prompts: Sequence[list[int]]) -> float:
    """Tokens per second of mlx-lm's batch, prefill included."""
    started = time.perf_counter()
    batch = BatchGenerator(model, max_tokens=TOKENS, completion_batch_size=len(prompts))
    batch.insert([list(prompt) for prompt in prompts])
    generated = 0
    while responses := batch.next_generated():
        generated += len(responses)
    batch.close()
    return generated / (time.perf_counter() - started)


def medium(kind: str, folder: Path) -> Path:
    """A random target of 20 to 50 million parameters, of a size's architecture."""
    source, _ = make_pair(kind, folder)
    raw = json.loads((source / "config.json").read_text())
    text = raw["text_config"]
    text |= {"hidden_size": 512, "intermediate_size": 1536, "vocab_size": 8192, "vocab_size_per_layer_input": 8192}
    text |= {"layer_types": text["layer_types"] * 2, "num_hidden_layers": 2 * text["num_hidden_layers"]}
    text |= {"sliding_window": 256, "moe_intermediate_size": 128} if kind == "26b" else {"sliding_window": 256}
    if text.get("num_experts"):
        text["num_experts"] = 32
    model = Target(target_config(raw).text)
    key = mx.random.key(3)
    weights: dict[str, mx.array] = {}
    for i, (name, value) in enumerate(tree_flatten(model.parameters())):
        name = name.replace(".experts.", ".experts.switch_glu.")
        if value.ndim > 1:
            value = mx.random.normal(value.shape, key=mx.random.split(key, i + 2)[-1]) * value.shape[-1] ** -0.5
        weights["language_model.model." + name] = value
    (source / "config.json").write_text(json.dumps(raw))
    (source / "model.safetensors").unlink()
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    return source


def measure(
    name: str, folder: Path, prompts: list[list[int]], k: int, repeats: int, peer: MlxVlm | None = None
) -> dict[str, list[float]]:
    """Ratios for one pair, by batch size."""
    drafter = None if name == "embedded" else False
    rows: dict[str, list[float]] = {}
    with mlx_mtp.load(folder if drafter is False else None, drafter=drafter, dtype="float32", cache_bytes=0) as lm:
        # mlx-lm takes the vocabulary's size from the top level of config.json, where no Gemma 4 checkpoint has it.
        theirs, _ = load_model(folder, model_config={"vocab_size": lm.config.text.vocab_size})
        theirs.set_dtype(mx.float32)
        for repeat in range(repeats + 1):
            for size in SIZES:
                batch = prompts[:size]
                plain, _ = ours(lm, batch, 0)
                figures = {"plain / mlx-lm": plain / mlx_lm(theirs, batch)}
                if drafter is None:
                    mtp, tokens = ours(lm, batch, k)
                    auto, _ = ours(lm, batch, "auto")
                    figures |= {f"MTP ({k}) / plain": mtp / plain, "MTP (auto) / plain": auto / plain,
                                "tokens a round": tokens}  # fmt: skip
                    if peer:
                        vlm, _ = peer.run(size, k)
                        figures |= {f"MTP ({k}) / mlx-vlm's MTP ({k})": mtp / vlm}
                if repeat:  # the first time warms up
                    for label, value in figures.items():
                        rows.setdefault(f"{name}, {size} rows: {label}", []).append(value)
    return rows


def main(
    repeats: Annotated[int, typer.Option(help="Repetitions of every variant.")] = 5,
    draft_length: Annotated[int, typer.Option(help="Tokens to draft a round.")] = 4,
    mlx_vlm: Annotated[Path | None, typer.Option(help="Python of an environment with mlx-vlm.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Runs the benchmark and prints its table."""
    rows: dict[str, Any] = {}
    with mlx_mtp.load() as lm:
        chat = [lm.encode(text) for text in PROMPTS]
    random = [mx.random.randint(3, 8000, (10 + 7 * i,), key=mx.random.key(i)).tolist() for i in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        peer = MlxVlm(mlx_vlm, chat) if mlx_vlm else None
        rows |= measure("embedded", DEMO / "target", chat, draft_length, repeats, peer)
        for name, kind in (("dense", "31b"), ("MoE", "26b")):
            rows |= measure(name, medium(kind, Path(folder) / kind), random, draft_length, repeats)
    if as_json:
        print(json.dumps({name: statistics.median(values) for name, values in rows.items()} | {"blas": BLAS}))
        return
    print(
        f"{platform.machine()} {platform.system()}, mlx {mx.__version__} on {mx.default_device()}, BLAS {BLAS}, float32"
    )
    print(f"{TOKENS} tokens a row, greedy, {repeats} repetitions; median (lowest to highest)")
    for name, values in rows.items():
        print(f"  {name:44} {statistics.median(values):5.2f}   ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    typer.run(main)
