"""Prices of rounds and texts for the simulated clock, and which of them are held out from the tuning of any constant.

Constants of the draft length policy are chosen on the development part alone: cells of which nothing, neither price nor
text, is in `HELD_OUT`. The rest says how the policy does where nobody has looked.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

BatchCost = Callable[[int, int, int], float]
"""Seconds of a round by number of rows, steps of the drafter and tokens verified in all."""

Chance = Callable[[int, int], float]
"""Chance that draft j is kept if those before it were, at a position of the text."""

GPU: dict[str, Any] = json.loads(
    (Path(__file__).resolve().parents[2] / "docs" / "measurements" / "cuda.json").read_text()
)
"""What passes of real sizes cost on a GPU."""


def curve(verify: Mapping[int, float], draft: float) -> BatchCost:
    """A cost from the seconds of verify passes at some tokens a row, the rest on lines between, and of a draft."""
    widths = sorted(verify)
    seconds = [verify[width] for width in widths]
    # Past the last width, on with the last slope.
    slope = (seconds[-1] - seconds[-2]) / (widths[-1] - widths[-2])

    def cost(rows: int, steps: int, tokens: int) -> float:
        past = max(0.0, tokens / rows - widths[-1])
        return float(np.interp(tokens / rows, widths, seconds)) + past * slope + steps * draft

    return cache(cost)


def _gpu_curve(model: str) -> BatchCost:
    """One row of a real size on a GPU, in its plain steps."""
    row = GPU["passes_ms"][model]["1"]
    plain = row["verify"][0]
    return curve({i + 1: ms / plain for i, ms in enumerate(row["verify"])}, row["draft"] / plain)


COSTS: dict[str, BatchCost] = {
    "flat": curve({1: 1, 2: 1.15, 8: 1.2}, 0.08),
    "linear": curve({1: 1, 8: 1 + 7 * 0.26}, 0.1),
    # A 4-bit product on an M3 Ultra, mlx #4265.
    "4-bit product": curve({1: 1, 2: 1.83, 4: 3.26, 8: 6.12}, 0.1),
    # The same in 16 bits: flat at about 2 for more than one row.
    "16-bit product": curve({1: 1, 2: 2, 8: 2}, 0.1),
    # 26B-A4B on an M2 Pro, Rapid-MLX.
    "Rapid-MLX 26B": curve({1: 1, 2: 1.74, 4: 3.12, 5: 3.82, 9: 6.13}, 0.1),
    # Rounds of 31B at 4 bits on an M3 Ultra, mlxcel #1217; drafts included.
    "mlxcel 31B": curve({1: 1, 2: 1.17, 4: 1.51, 8: 2.19}, 0.0),
    # A dense stack of 0.93 B weights on 2 x86-64 cores, mlx 0.32.4: float32 with OpenBLAS, and bfloat16 without.
    "OpenBLAS float32": curve({1: 1, 2: 0.96, 4: 0.92, 8: 1.16, 16: 1.63}, 0.11),
    "CPU bfloat16": curve({1: 1, 2: 1.36, 4: 2.18, 8: 3.86, 16: 7.5}, 0.1),
    # A kernel that works on tiles of 4 tokens.
    "tile of 4": curve({1: 1, 2: 1.1, 4: 1.2, 5: 2.2, 8: 2.4}, 0.12),
    # Verifying is cheap, drafting isn't.
    "dear drafter": curve({1: 1, 2: 1.05, 8: 1.2}, 0.35),
    **{f"H200 {model}": _gpu_curve(model) for model in GPU["passes_ms"]},
}
"""Prices of a round; sources in the comments; those without one are made up."""


def _h100_uneven(rows: int, steps: int, tokens: int) -> float:
    """26B-A4B in bfloat16 on an H100, in plain steps, where rows of different lengths were measured as well."""
    facts = GPU["uneven"]
    by_rows = []
    for passes in facts["passes_in_plain_steps"].values():
        even = [it for it in passes if it["drafts"].startswith("even")]
        by_rows.append(np.interp(tokens, [it["tokens"] for it in even], [it["price"] for it in even]))
    # Rows of different lengths took 0.05 to 0.16 plain steps more than even ones with as many tokens.
    packing = 0.08 if tokens < rows * (steps + 1) else 0.0
    return float(np.interp(rows, (4, 8), by_rows)) + packing + steps * facts["draft_ms"] / facts["plain_ms"]


BATCH_COSTS: dict[str, BatchCost] = {
    # Most of the time goes into reading weights, however many tokens are verified.
    "bandwidth": lambda rows, steps, tokens: 1 + 0.03 * tokens + 0.06 * steps,
    # Most of it into arithmetic.
    "arithmetic": lambda rows, steps, tokens: 1 + 0.22 * tokens + (0.12 + 0.05 * rows) * steps,
    # A product in 4 bits pays by the token, up to about ten.
    "kernel step": lambda rows, steps, tokens: 1 + 0.25 * min(tokens - 1, 9) + 0.01 * tokens + 0.06 * steps,
    # More tokens touch more experts.
    "experts": lambda rows, steps, tokens: 1 + 0.25 * tokens**0.7 + 0.05 * steps,
    # Rows of different lengths have their price.
    "packing": lambda rows, steps, tokens: (
        1 + 0.06 * tokens + 0.08 * steps + (0.12 if tokens < rows * (steps + 1) else 0)
    ),
    # Kernels work on tiles of 8 tokens.
    "tile of 8": lambda rows, steps, tokens: 0.8 + 0.25 * -(-tokens // 8) + 0.07 * steps,
    "H100 26B-A4B": cache(_h100_uneven),
}
"""Prices of rounds of batches; all but the last made up for what they may depend on."""


def measured_costs() -> dict[str, BatchCost]:
    """Prices of rounds by model and weights, from what a GPU took; between the batches measured on lines."""
    return {model: _cost_of_table(table) for model, table in GPU["passes_ms"].items()}


def _cost_of_table(table: Mapping[str, Any]) -> BatchCost:
    """From the milliseconds of passes by batch; the host's are hidden."""
    batches = [int(rows) for rows in table]

    @cache
    def cost(rows: int, steps: int, tokens: int) -> float:
        passes = [np.interp(tokens / rows, range(1, len(it["verify"]) + 1), it["verify"]) for it in table.values()]
        drafts = [it["draft"] for it in table.values()]
        return float(np.interp(rows, batches, passes) + steps * np.interp(rows, batches, drafts)) / 1000

    return cost


def _burst(position: int) -> float:
    """Stretches of 40 tokens, each easy or hard, in no order."""
    return 0.95 if random.Random(position // 40).random() < 0.5 else 0.3


TEXTS: dict[str, Chance] = {
    "wrong": lambda position, j: 0.0,
    "right": lambda position, j: 1.0,
    "0.31": lambda position, j: 0.31,
    "0.66": lambda position, j: 0.66,
    # Published for chat with thinking off; the last figure is repeated.
    "published": lambda position, j: [0.92, 0.78, 0.67, 0.57][min(j, 3)],
    "switching": lambda position, j: 0.97 if position // 200 % 2 == 0 else 0.05,
    # Nearly all can be foreseen, but for a few tokens in a row now and then.
    "template": lambda position, j: 0.97 if (position + j) % 30 >= 4 else 0.05,
    # As low as was published for JSON.
    "0.08": lambda position, j: 0.08,
    "bursts": lambda position, j: _burst(position + j),
    "drifting": lambda position, j: max(0.1, 0.95 - 0.85 * position / 2000),
    # First drafts are good, later ones not.
    "steep": lambda position, j: 0.9 * 0.6**j,
}
"""How predictable a text is."""

ROWS: dict[str, list[float]] = {
    "alike": [0.7] * 8,
    "spread": [0.95, 0.9, 0.85, 0.8, 0.6, 0.5, 0.4, 0.2],
    "one hard": [0.9] * 7 + [0.1],
    "one easy": [0.3] * 7 + [0.97],
    "half hard": [0.9] * 4 + [0.2] * 4,
    "pairs": [0.95, 0.95, 0.75, 0.75, 0.55, 0.55, 0.3, 0.3],
    "all hard": [0.2] * 8,
}
"""Chances that a draft is kept, of the rows of a batch."""

ENDS = ("limits", "stops", "queue")
"""How the rows of a batch end, see `simulated_clock.batch_against_fixed`."""

KINDS = ("switching", "mixed", "different", "queue", "bursts")
"""Texts of the rows of a batch, see `texts`."""

HELD_OUT: dict[str, tuple[str, ...]] = {
    "costs": (
        "4-bit product", "OpenBLAS float32", "tile of 4", "dear drafter", "H200 26B-A4B, bfloat16",
        "H200 E4B, 4 bits",
    ),
    "texts": ("0.66", "0.08", "bursts", "drifting"),
    "batch_costs": ("experts", "tile of 8", "H100 26B-A4B"),
    "rows": ("half hard", "pairs", "all hard"),
    "models": ("26B-A4B, bfloat16", "E4B, 4 bits"),
    "kinds": ("different", "bursts"),
}  # fmt: skip
"""By what they are keys of: seen by no constant's tuning. Fixed before the policy was written."""


def texts(kind: str, rows: int) -> list[Chance]:
    """Rows as bench_never_slower.py has them: mixed, switching, different or, four times as many, queue; and bursts."""
    kinds: list[Chance] = [
        TEXTS["right"],
        TEXTS["wrong"],
        lambda position, j: 0.7,
        lambda position, j: (position + j) // 200 % 2 == 0,
    ]
    if kind == "mixed":
        return [kinds[2]] * rows
    if kind == "switching":
        return [lambda position, j, row=row: kinds[3](position + 400 * row // rows, j) for row in range(rows)]
    if kind == "bursts":
        return [lambda position, j, row=row: _burst(position + j + 4000 * row) for row in range(rows)]
    chances = [kinds[i % 4] for i in range(4 * rows if kind == "queue" else rows)]
    if kind == "queue":
        random.Random(1).shuffle(chances)
    return chances


def mixed_rows(names: Sequence[str], rows: int) -> list[Chance]:
    """A batch whose rows have these texts, one after the other."""
    return [TEXTS[names[i % len(names)]] for i in range(rows)]
