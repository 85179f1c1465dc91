"""Runs the real shapes of every Gemma 4 size with random 4-bit weights; prints a Markdown table of time and memory.

    layers   a sliding and a full decoder layer of each size (E2B and E4B: also one of each that shares KV; 26B: all 128
             experts): prefill of 128 tokens, a step, and a verify block of 5, which must agree with 5 steps
    pair     a whole E2B with its vocabulary of 262,144 and its drafter decode through the scheduler; the tokens must be
             the same with and without drafts

Weights are created quantised, tensor by tensor, so that none is ever held in 16 bits. Random weights show nothing about
acceptance or text.

    python scripts/smoke_real_size.py [PART ...]      # e2b e4b 12b 26b 31b pair; all without arguments
"""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from mlx_mtp.checkpoint.description import activation_dtype
from mlx_mtp.checkpoint.sizes import weight_bytes
from mlx_mtp.config import DrafterConfig, TextConfig, drafter_config, target_config
from mlx_mtp.decode.prefill import prefill_block
from mlx_mtp.decode.request import Request, Row
from mlx_mtp.decode.scheduler import Scheduler
from mlx_mtp.kv import KVBuffers
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target
from scripts.random_weights import with_random_weights

BITS, VOCAB = 4, 262_144
PREFILL, VERIFY = 128, 5
PROMPT, TOKENS, DRAFTS = 8, 8, 4

COMMON: dict[str, Any] = {
    "model_type": "gemma4_text", "head_dim": 256, "global_head_dim": 512, "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 30.0, "vocab_size": VOCAB,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    },
}  # fmt: skip
SMALL = {"hidden_size_per_layer_input": 256, "sliding_window": 512, "max_position_embeddings": 131_072}
LARGE = {"attention_k_eq_v": True, "sliding_window": 1024, "max_position_embeddings": 262_144}
SIZES: dict[str, dict[str, Any]] = {
    "e2b": {
        **SMALL, "hidden_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 1, "intermediate_size": 6144,
        "use_double_wide_mlp": True,
    },
    "e4b": {
        **SMALL, "hidden_size": 2560, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 10_240,
    },
    "12b": {
        **LARGE, "hidden_size": 3840, "num_attention_heads": 16, "num_key_value_heads": 8,
        "num_global_key_value_heads": 1, "intermediate_size": 15_360,
    },
    "26b": {
        **LARGE, "hidden_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8,
        "num_global_key_value_heads": 2, "intermediate_size": 2112, "enable_moe_block": True, "num_experts": 128,
        "top_k_experts": 8, "moe_intermediate_size": 704,
    },
    "31b": {
        **LARGE, "hidden_size": 5376, "num_attention_heads": 32, "num_key_value_heads": 16,
        "num_global_key_value_heads": 4, "intermediate_size": 21_504,
    },
}  # fmt: skip


def text_config(size: str, layers: str, shared: int, vocab: int) -> TextConfig:
    """A size's config with other layers ("s" sliding, "f" full; the last `shared` layers share KV)."""
    return target_config(
        {**COMMON, **SIZES[size], **_kinds(layers, shared), "vocab_size": vocab, "vocab_size_per_layer_input": vocab}
    ).text


def e2b_drafter() -> DrafterConfig:
    """The config of E2B's drafter: 2048 clusters, of which 32 are read."""
    text = {
        **COMMON, **_kinds("sssf", 4), "final_logit_softcapping": None, "hidden_size": 256, "intermediate_size": 2048,
        "num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": 512, "max_position_embeddings": 131_072,
    }  # fmt: skip
    return drafter_config(
        {
            "model_type": "gemma4_assistant", "text_config": text, "backbone_hidden_size": 1536,
            "use_ordered_embeddings": True, "num_centroids": 2048, "centroid_intermediate_top_k": 32,
        }
    )  # fmt: skip


def _kinds(layers: str, shared: int) -> dict[str, Any]:
    names = {"s": "sliding_attention", "f": "full_attention"}
    return {
        "layer_types": [names[kind] for kind in layers],
        "num_hidden_layers": len(layers),
        "num_kv_shared_layers": shared,
    }


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Wall-clock seconds of a call, and its result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def run(target: Target, kv: KVBuffers, tokens: list[int], position: int) -> mx.array:
    """Hidden states of a block of one row, evaluated."""
    kv.reserve(position + len(tokens))
    hidden = target(mx.array([tokens], dtype=mx.int32), mx.array([position], dtype=mx.int32), kv)
    mx.eval(hidden, kv.arrays())
    return hidden


def layers(size: str) -> None:
    """Runs a few layers of a size and prints a row."""
    shares = "hidden_size_per_layer_input" in SIZES[size]
    config = text_config(size, "sfsf" if shares else "sf", 2 if shares else 0, vocab=1024)
    target = Target(config)
    with_random_weights(target, BITS, activation_dtype(mx.bfloat16))
    tokens = mx.random.randint(0, config.vocab_size, (PREFILL + VERIFY,)).tolist()
    kv = KVBuffers(config, 1, target.dtype)
    prefill, _ = seconds(lambda: prefill_block(target, kv, [tokens[:PREFILL]], 0, None))
    verify, block = seconds(lambda: run(target, kv, tokens[PREFILL:], PREFILL))
    # The same positions again, one by one; they overwrite the block's KV without seeing it.
    steps = [seconds(lambda n=n: run(target, kv, [tokens[n]], n)) for n in range(PREFILL, PREFILL + VERIFY)]
    apart = mx.abs(block - mx.concatenate([hidden for _, hidden in steps], axis=1)).max().item()
    if not apart < 1e-3 * mx.abs(block).max().item():  # NaN fails too
        raise SystemExit(f"{size}: a verify block and single steps differ by {apart}")
    row(
        f"{size.upper()}, {len(config.layers)} layers", weight_bytes(target), prefill, min(s for s, _ in steps), verify,
        f"verify = steps to {apart:.0e}",
    )  # fmt: skip


def pair() -> None:
    """Decodes with a whole E2B and its drafter, and prints a row for plain decoding and one for drafting."""
    config = text_config("e2b", "ssssf" * 7, 20, vocab=VOCAB)
    target, drafter = Target(config), Drafter(e2b_drafter(), "committed")
    dtype = activation_dtype(mx.bfloat16)
    made, _ = seconds(lambda: [with_random_weights(model, BITS, dtype) for model in (target, drafter)])
    prompt = mx.random.randint(0, VOCAB, (PROMPT,)).tolist()
    texts = []
    for drafts in (0, DRAFTS):
        scheduler = Scheduler(target, drafter)
        done = decode(scheduler, Request(prompt, TOKENS, draft_length=drafts))
        texts.append(done.tokens)
        stats = done.stats
        label = f"E2B and drafter, {drafts} drafts" if drafts else "E2B, plain"
        each = stats.generation_seconds / stats.rounds
        note = f"{stats.generated_tokens} tokens in {stats.rounds} rounds; made in {made:.0f} s"
        step, verify = (None, each) if drafts else (each, None)
        row(label, weight_bytes(target, drafter), stats.prompt_seconds, step, verify, note)
    if texts[0] != texts[1]:
        raise SystemExit(f"drafting changed the tokens: {texts}")


def decode(scheduler: Scheduler, request: Request) -> Row:
    """Runs one request to its end."""
    running = scheduler.submit(request)
    while not running.done:
        scheduler.step()
    return running


def row(what: str, weights: int, prefill: float, step: float | None, verify: float | None, note: str) -> None:
    """Prints a row of the table."""
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    memory = " | ".join(f"{size / 1e9:.2f}" for size in (weights, mx.get_peak_memory(), rss))
    times = " | ".join("" if s is None else f"{s:.3f}" for s in (prefill, step, verify))
    print(f"| {what} | {memory} | {times} | {note} |", flush=True)
    mx.reset_peak_memory()


def main(parts: list[str]) -> None:
    """Runs the given parts, or all."""
    known = [*SIZES, "pair"]
    if unknown := set(parts) - set(known):
        raise SystemExit(f"unknown parts {', '.join(sorted(unknown))}: use {', '.join(known)}")
    mx.random.seed(0)
    print(f"{platform.platform()}, {mx.default_device()}, mlx {version('mlx')}, Python {platform.python_version()}\n")
    print("| | weights, GB | MLX peak, GB | peak RSS so far, GB | prefill, s | step, s | verify, s | |")
    print("|---|---|---|---|---|---|---|---|")
    took, _ = seconds(lambda: [pair() if part == "pair" else layers(part) for part in parts or known])
    print(f"\n{took:.0f} s in all, {time.process_time():.0f} s of them on a CPU")


if __name__ == "__main__":
    main(sys.argv[1:])
