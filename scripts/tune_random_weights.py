"""Runs the tuner for a published Gemma 4 size with random weights instead of its own.

Verify passes, drafts and prefill are timed as by `mlx-mtp tune`. With random weights no draft would be accepted, so
acceptance is assumed: that published for 26B-A4B (`mlx_mtp.simulate.cost_model.PUBLISHED_ACCEPTANCE`, its last value
repeated). A random router spreads tokens evenly, as if they chose experts independently. No profile is saved: a real
model must be tuned with its own weights.

    python scripts/tune_random_weights.py 26B-A4B --bits 4 [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import typer

from mlx_mtp import profile
from mlx_mtp.checkpoint.sizes import format_bytes, kv_budget, weight_bytes
from mlx_mtp.cli import render
from mlx_mtp.cli.tune import facts
from mlx_mtp.cli.tune_tables import tables
from mlx_mtp.decode.limits import MAX_AUTO_LENGTH
from mlx_mtp.decode.objective import OBJECTIVES
from mlx_mtp.decode.sampling import SamplingOptions
from mlx_mtp.errors import MTPError
from mlx_mtp.simulate.cost_model import acceptance_for
from mlx_mtp.tuning import choose, costs
from mlx_mtp.tuning.plot import check_plot, write_plot
from scripts.random_weights import random_pair

SAMPLING = SamplingOptions(temperature=1.0, top_k=64, top_p=0.95)
"""Sampling options of the published models' generation_config.json."""

TEXTS, TOKENS = 12, 4096


def main(
    model: Annotated[str, typer.Argument(help="E2B, E4B, 12B, 26B-A4B or 31B.")],
    bits: Annotated[int | None, typer.Option(help="Bits of the weights. Default: bfloat16.")] = None,
    batch_sizes: Annotated[str, typer.Option(help="Batches to costs.")] = ",".join(map(str, costs.BATCHES)),
    contexts: Annotated[str, typer.Option(help="Context lengths to costs.")] = ",".join(map(str, costs.CONTEXTS)),
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write what was measured.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to draw tokens per second against batch.")] = None,
) -> None:
    """Measures, chooses, and prints the tuner's tables."""
    if plot:
        check_plot(plot)
    try:
        batches, lengths = ([int(number) for number in text.split(",")] for text in (batch_sizes, contexts))
        begun = time.perf_counter()
        target, drafter = random_pair(model, bits)
    except (MTPError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    held, name = weight_bytes(target, drafter), f"{model}, {f'{bits} bits' if bits else 'bfloat16'}"
    print(
        f"{name}, random weights of {format_bytes(held)}, made in {time.perf_counter() - begun:.0f} s; mlx "
        f"{version('mlx')} on {profile.device()}\n",
        flush=True,
    )
    texts = mx.random.randint(0, target.config.vocab_size, (TEXTS, TOKENS)).tolist()
    assumed = list(acceptance_for(MAX_AUTO_LENGTH))
    found = costs.Measurement(acceptance={"assumed": assumed}, drafter_position="committed")
    begun = time.perf_counter()
    costs.measure_costs(
        target, drafter, texts, SAMPLING, kv_budget(held)[0], found, batches, contexts=lengths,
        progress=lambda what: print(f"{time.perf_counter() - begun:6.1f} s  {what}", file=sys.stderr, flush=True),
    )  # fmt: skip
    found.complete = True
    options = choose.options(found)
    choices = [choose.choose(options, objective) for objective in OBJECTIVES]
    render.show(tables(found, options, choices, target.config))
    print(f"\nmeasured in {time.perf_counter() - begun:.0f} s; peak {format_bytes(mx.get_peak_memory())}")
    if json_file:
        json_file.write_text(json.dumps(facts(found, options, choices, None, target.config)))
    if plot:
        write_plot(options, plot, f"{name} (random weights) on {profile.device()}")


if __name__ == "__main__":
    typer.run(main)
