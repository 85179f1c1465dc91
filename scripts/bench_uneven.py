"""Measures verify passes over rows with different draft lengths, compared with passes over equal ones.

    even K   K drafts in every row
    half K   K drafts in every other row, none in the rest
    one K    K drafts in one row, none in the others
    spread   7, 6, 5, 4, 2, 1, 1 and 0 drafts in eight rows; every other of these in four

With `--model`, uses a published size: real shapes, random weights, in `--bits` 4 or 8, by default bfloat16. Without it,
uses the pairs of medium size of bench_batch.py (float32): dense and MoE.

    python scripts/bench_uneven.py [--model 26B-A4B --bits 4] [--rows 8] [--json]
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from mlx_mtp.system.blas import use_openblas

BLAS = use_openblas()  # before MLX is imported

import mlx.core as mx
import typer

from mlx_mtp.decode.prefill import prefill
from mlx_mtp.decode.round import RoundState, draft, verify
from mlx_mtp.decode.sampling import Sampler, SamplingOptions
from mlx_mtp.errors import MTPError
from mlx_mtp.kv import BatchKV
from mlx_mtp.measuring.machine import machine_line
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target
from scripts.medium_pair import make_medium_pair
from scripts.random_weights import random_pair
from tests.support.tiny_checkpoints import load_pair

CONTEXT, WIDEST = 256, 8
SPREAD = [7, 6, 5, 4, 2, 1, 1, 0]


def patterns(rows: int) -> dict[str, list[int]]:
    """Draft lengths by row."""
    found = {f"even {k}": [k] * rows for k in (0, 1, 2, 3, 4, 5, 7)}
    for k in (4, 7):
        found |= {f"half {k}": [k if row % 2 == 0 else 0 for row in range(rows)], f"one {k}": [k] + [0] * (rows - 1)}
    return found | {"spread": SPREAD[:: len(SPREAD) // rows][:rows]}


def measure(target: Target, drafter: Drafter, rows: int, repeats: int) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of verify passes by pattern, and of a step of the drafter, measured in random order."""
    texts = mx.random.randint(0, target.config.vocab_size, (rows, CONTEXT + WIDEST), key=mx.random.key(0))
    prefilled = [prefill(target, text[:CONTEXT]) for text in texts.tolist()]
    kv = BatchKV.of([own for own, _ in prefilled], CONTEXT + WIDEST)
    sampler = Sampler([SamplingOptions()] * rows, target.config.logit_softcap)
    lengths, block = mx.full((rows,), CONTEXT, dtype=mx.int32), texts[:, CONTEXT:].astype(mx.int32)
    state = RoundState(lengths, block[:, 0], mx.concatenate([hidden for _, hidden in prefilled]))

    def verified(each: Sequence[int]) -> mx.array:
        counts = [length + 1 for length in each] if min(each) < max(each) else None
        return verify(target, kv, sampler, lengths, block[:, : max(each) + 1], counts=counts)[0]

    work = {name: lambda each=each: verified(each) for name, each in patterns(rows).items()}
    work["drafts"] = lambda: draft(target, drafter, kv, sampler, state, 7)
    took: dict[str, list[float]] = {name: [] for name in work}
    rng, order = random.Random(0), [*work]
    for repeat in range(repeats + 2):
        rng.shuffle(order)
        for name in order:
            begun = time.perf_counter()
            mx.eval(work[name]())
            if repeat >= 2:  # the first ones warm up
                took[name].append(time.perf_counter() - begun)
    return took, [seconds / 7 for seconds in took.pop("drafts")]


def models(model: str | None, bits: int | None) -> dict[str, tuple[Target, Drafter]]:
    """The pairs to measure, by name."""
    if model:
        try:
            return {f"{model}, {f'{bits} bits' if bits else 'bfloat16'}": random_pair(model, bits)}
        except MTPError as error:
            raise typer.BadParameter(str(error)) from None
    pairs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in (("dense", "31b"), ("MoE", "26b")):
            target_folder, drafter_folder = make_medium_pair(kind, Path(folder) / kind)
            pairs[name] = load_pair(target_folder, drafter_folder, "float32")
            mx.eval(*(model.parameters() for model in pairs[name]))
    return pairs


def main(
    model: Annotated[str | None, typer.Option(help="E2B, E4B, 12B, 26B-A4B or 31B.")] = None,
    bits: Annotated[int | None, typer.Option(help="Bits of the weights of --model. Default: bfloat16.")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Rows of a batch: 2, 4 or 8. Default: 4 and 8.")] = None,
    repeats: Annotated[int, typer.Option(help="Repetitions.", min=3)] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measures, and prints a table for each pair and batch."""
    if not set(rows or ()) <= {2, 4, 8}:
        raise typer.BadParameter("expected 2, 4 or 8", param_hint="--rows")
    found = {}
    print(
        f"{machine_line()}, BLAS {BLAS}",
        file=sys.stderr if as_json else sys.stdout,
    )
    for name, (target, drafter) in models(model, bits).items():
        for size in rows or (4, 8):
            took, drafts = measure(target, drafter, size, repeats)
            seconds = {label: statistics.median(laps) for label, laps in took.items()}
            found[f"{name}, {size} rows"] = seconds | {"draft": statistics.median(drafts)}
            if as_json:
                continue
            plain, counts = seconds["even 0"], patterns(size)
            print(
                f"{name}, {size} rows: a plain step {1e3 * plain:.1f} ms, a draft {1e3 * statistics.median(drafts):.2f}"
                f" ms; {repeats} repetitions, medians\n"
                f"  {'drafts':10}{'tokens':>7}{'/ plain step':>14}{'/ even, as long':>17}"
            )
            for label, each in counts.items():
                longest = seconds[f"even {max(each)}"]
                print(
                    f"  {label:10}{sum(each) + size:7}{seconds[label] / plain:14.2f}"
                    + (f"{seconds[label] / longest:17.2f}" if min(each) < max(each) else "")
                )
    if as_json:
        print(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
