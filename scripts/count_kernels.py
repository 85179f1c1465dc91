"""Counts the GPU kernels of a round for every published size, from the graph and without a GPU.

For each size: a plain step, a round with 3 drafts, and both with Gemma's default sampling (temperature 1, top-k 64,
top-p 0.95). Batch 1, target in 4 bits, drafter in bfloat16. tests/support/dispatches.py says what is counted.

    python scripts/count_kernels.py [--json]
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from tests.support import dispatches

dispatches.prepare()  # before MLX compiles anything

import pytest

from mlx_mtp.simulate.known_models import KNOWN_MODELS

DRAFTS = 3


def main(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Counts the kernels and prints a table."""
    found = {}
    for name in KNOWN_MODELS:
        with pytest.MonkeyPatch.context() as patch, dispatches.compiling():
            kernels = dispatches.kernels_of(name, patch)
            found[name] = [kernels(how, k) for how in (dispatches.GREEDY, dispatches.GEMMA) for k in (0, DRAFTS)]
    if as_json:
        print(json.dumps(found))
        return
    print(f"{'':10}{'plain':>10}{f'{DRAFTS} drafts':>10}{'sampled':>10}{f'{DRAFTS} drafts':>10}")
    for name, counts in found.items():
        print(f"{name:10}" + "".join(f"{count:10,}" for count in counts))


if __name__ == "__main__":
    typer.run(main)
