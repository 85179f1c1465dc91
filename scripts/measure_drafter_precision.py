"""Measures accepted drafts per round with the drafter in several precisions and the target in 4 bits.

    python scripts/measure_drafter_precision.py [--tokens 200] [--draft-length 4]

Pairs: the embedded one on chat prompts, and two of medium size (medium_pair.py), dense and mixture of experts, on
random prompts. Decoding is greedy, so the text must not depend on the drafter's precision; this is checked. The
target's weights are quantised to 4 bits and expanded to float32: quantised products take a CPU many times as long, and
differ only by rounding.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Annotated, Any

from mlx_mtp.system.blas import use_openblas

use_openblas()  # before MLX is imported

import mlx.core as mx
import mlx.nn as nn
import typer
from mlx.utils import tree_unflatten

import mlx_mtp
from mlx_mtp.checkpoint.pair import DEMO
from mlx_mtp.models.moe import ExpertLinear, QuantizedExpertLinear
from scripts.bench_batch import PROMPTS
from scripts.medium_pair import VOCAB, make_medium_pair

TARGET_BITS = 4
CHOICES: tuple[Any, ...] = ("none", 8, 6, 5, 4, 3, 2)


def measure(folders: tuple[Path, Path], prompts: Sequence[Any], tokens: int, draft_length: int) -> list[float]:
    """Accepted drafts per round (bonus token not counted), for each of `CHOICES`.

    Raises:
        AssertionError: A text depends on the drafter's precision.
    """
    found, texts = [], []
    for choice in CHOICES:
        with mlx_mtp.load(*folders, quantize=TARGET_BITS, quantize_drafter=choice, profile=None) as lm:
            with lm.models() as (target, _):
                in_floats(target)
            answers = lm.generate_batch(
                prompts, max_tokens=tokens, temperature=0, draft_length=draft_length, ignore_eos=True
            )
        texts.append([answer.tokens for answer in answers])
        assert texts[-1] == texts[0], f"the text changes with the drafter's precision {choice}"
        stats = [answer.stats for answer in answers]
        found.append(sum(it.accepted for it in stats) / sum(it.rounds for it in stats))
    return found


def in_floats(model: nn.Module) -> None:
    """Replaces quantised layers by unquantised ones with the same values."""
    plain = {nn.QuantizedLinear: nn.Linear, nn.QuantizedEmbedding: nn.Embedding, QuantizedExpertLinear: ExpertLinear}
    new = []
    for path, module in model.named_modules():
        if kind := plain.get(type(module)):
            weight = mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)
            layer = kind(1, 1, bias=False) if kind is nn.Linear else kind(*[1] * (weight.ndim))
            layer.weight = weight
            new.append((path, layer))
    model.update_modules(tree_unflatten(new))
    mx.eval(model.parameters())


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 200,
    draft_length: Annotated[int, typer.Option(help="Drafts a round.")] = 4,
) -> None:
    """Prints a table in Markdown."""
    with tempfile.TemporaryDirectory() as place:
        random = Random(0)
        numbers = [[random.randrange(VOCAB) for _ in range(64)] for _ in PROMPTS]
        pairs = {
            "embedded": ((DEMO / "target", DEMO / "drafter"), PROMPTS),
            "dense": (make_medium_pair("31b", Path(place) / "dense"), numbers),
            "MoE": (make_medium_pair("26b", Path(place) / "MoE"), numbers),
        }
        columns = []
        for name, (folders, prompts) in pairs.items():
            print(name, file=sys.stderr)
            columns.append(measure(folders, prompts, tokens, draft_length))
    print(f"| drafter | {' | '.join(pairs)} |\n|---|{'---|' * len(pairs)}")
    for choice, *means in zip(CHOICES, *columns, strict=True):
        name = "as stored" if choice == "none" else f"{choice} bits"
        print(f"| {name} | {' | '.join(f'{mean:.2f}' for mean in means)} |")


if __name__ == "__main__":
    typer.run(main)
