"""Draft length policies on a simulated clock: rounds take what a published cost curve says, not what this machine does.

A helper for tests and scripts, which import it by path.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np

from mlx_mtp.decode.batch_length import BatchLength
from mlx_mtp.decode.draft_length import alike
from mlx_mtp.decode.limits import MAX_AUTO_LENGTH
from mlx_mtp.decode.request import Request, Row, Stats

Cost = Callable[[float, float], float]
"""Seconds of a round by steps of the drafter and drafts verified a row, in plain steps."""

BatchCost = Callable[[int, int, int], float]
"""Seconds of a round by number of rows, steps of the drafter and tokens verified in all."""

Chance = Callable[[int, int], float]
"""Chance that draft j is kept if those before it were, at a position of the text."""


class Policy(Protocol):
    """What chooses draft lengths, see `mlx_mtp.decode.draft_length.AutoLength`."""

    def begin(self, rows: Sequence[int]) -> None:
        """Texts begin."""

    def next(self, rows: Sequence[int]) -> dict[int, int]:
        """Tokens to draft in the next round, by row."""

    def observe(self, drafted: Mapping[int, int], kept: Mapping[int, int], seconds: float | None) -> None:
        """Learns of a finished round."""


class FixedLength:
    """Always the same length."""

    def __init__(self, length: int):
        self._length = length

    def begin(self, rows: Sequence[int]) -> None:
        """Doesn't matter."""

    def next(self, rows: Sequence[int]) -> dict[int, int]:
        """The length."""
        return dict.fromkeys(rows, self._length)

    def observe(self, drafted: Mapping[int, int], kept: Mapping[int, int], seconds: float | None) -> None:
        """Doesn't matter."""


def curve(verify: dict[int, float], draft: float) -> Cost:
    """A cost from the seconds of verify passes at some block widths, the rest on lines between, and of a draft."""
    widths = sorted(verify)

    def cost(steps: float, mean: float) -> float:
        width = mean + 1
        below = max((w for w in widths if w <= width), default=widths[0])
        above = min((w for w in widths if w >= width), default=widths[-1])
        if above == below:
            # Past the last width, on with the last slope.
            slope = (verify[widths[-1]] - verify[widths[-2]]) / (widths[-1] - widths[-2])
            return verify[below] + max(0, width - below) * slope + steps * draft
        share = (width - below) / (above - below)
        return verify[below] * (1 - share) + verify[above] * share + steps * draft

    return cost


COSTS: dict[str, Cost] = {
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
}
"""Prices of a round; sources in the comments, the first two made up."""

BATCH_COSTS: dict[str, BatchCost] = {
    # Most of the time goes into reading weights, however many tokens are verified.
    "bandwidth": lambda rows, steps, tokens: 1 + 0.03 * tokens + 0.06 * steps,
    # Most of it into arithmetic.
    "arithmetic": lambda rows, steps, tokens: 1 + 0.22 * tokens + (0.12 + 0.05 * rows) * steps,
    # A product in 4 bits pays by the token, up to about ten.
    "kernel step": lambda rows, steps, tokens: 1 + 0.25 * min(tokens - 1, 9) + 0.01 * tokens + 0.06 * steps,
    # More tokens touch more experts.
    "experts": lambda rows, steps, tokens: 1 + 0.25 * tokens**0.7 + 0.05 * steps,
}
"""Prices of rounds of batches, made up for what they may depend on."""

MEASURED = Path(__file__).resolve().parent.parent / "docs" / "measurements" / "cuda.md"
"""What passes of real sizes cost on a GPU."""


def measured_costs() -> dict[str, BatchCost]:
    """Prices of rounds by model and weights, from the table in `MEASURED`; between its batches on lines."""
    line = r"^\| (\S+, \w+(?: bits)?) \| (\d) \|([\d. |]+)\|$"
    tables: dict[str, dict[int, list[float]]] = {}
    for model, batch, cells in re.findall(line, MEASURED.read_text(), re.MULTILINE):
        tables.setdefault(model, {})[int(batch)] = [float(cell) for cell in cells.split("|")]
    return {model: _cost_of_table(table) for model, table in tables.items()}


def _cost_of_table(table: Mapping[int, Sequence[float]]) -> BatchCost:
    """By batch: milliseconds of passes of 1, 2, ... tokens a row, of a draft, and of the host, which is hidden."""

    @cache
    def cost(rows: int, steps: int, tokens: int) -> float:
        passes = [np.interp(tokens / rows, range(1, len(cells) - 1), cells[:-2]) for cells in table.values()]
        drafts = [cells[-2] for cells in table.values()]
        return float(np.interp(rows, [*table], passes) + steps * np.interp(rows, [*table], drafts)) / 1000

    return cost


TEXTS: dict[str, Chance] = {
    "wrong": lambda position, j: 0.0,
    "right": lambda position, j: 1.0,
    "0.31": lambda position, j: 0.31,
    "0.66": lambda position, j: 0.66,
    # Published for chat with thinking off; the last figure is repeated.
    "published": lambda position, j: [0.92, 0.78, 0.67, 0.57][min(j, 3)],
    "switching": lambda position, j: 0.97 if position // 200 % 2 == 0 else 0.05,
}
"""How predictable a text is."""

ROWS: dict[str, list[float]] = {
    "alike": [0.7] * 8,
    "spread": [0.95, 0.9, 0.85, 0.8, 0.6, 0.5, 0.4, 0.2],
    "one hard": [0.9] * 7 + [0.1],
    "one easy": [0.3] * 7 + [0.97],
    "half hard": [0.9] * 4 + [0.2] * 4,
}
"""Chances that a draft is kept, of the rows of a batch."""


def texts(kind: str, rows: int) -> list[Chance]:
    """Rows as bench_never_slower.py has them: mixed, switching, different or, four times as many, queue."""
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
    chances = [kinds[i % 4] for i in range(4 * rows if kind == "queue" else rows)]
    if kind == "queue":
        random.Random(1).shuffle(chances)
    return chances


def speed(
    make: Callable[[], Policy],
    cost: Cost,
    chances: Sequence[Chance],
    seed: int,
    tokens: int = 2000,
    growth: float = 0.0,
    noise: float = 0.05,
) -> float:
    """Tokens per second of rows that decode together, with noise and a pause now and then.

    Args:
        make: Makes the policy.
        cost: What a round takes.
        chances: One for each row; rows keep what they earn, and the run ends when their mean has reached `tokens`.
        seed: Of the noise and of the drafts' luck.
        tokens: A row.
        growth: What all rounds gain in price over 1,000 tokens of context, as a share of it.
        noise: Standard deviation of a round's price, as a share of it; a fifth of it is the chance of a pause.
    """
    rng, policy, rows = random.Random(seed), make(), range(len(chances))
    policy.begin(rows)
    seconds, positions, following = 0.0, [0] * len(chances), policy.next(rows)
    while sum(positions) < tokens * len(chances):
        # As in the engine: the next lengths are chosen before this round's result is known.
        lengths, following = following, policy.next(rows)
        kept = [_kept(chances[row], positions[row], lengths[row], rng) for row in rows]
        dearer = 1 + growth * sum(positions) / len(positions) / 1000
        taken = cost(max(lengths.values()), sum(lengths.values()) / len(rows)) * dearer
        taken *= max(0.5, 1 + noise * rng.gauss(0, 1)) * (5 if rng.random() < noise / 5 else 1)
        seconds += taken
        positions = [position + count + 1 for position, count in zip(positions, kept, strict=True)]
        # As in the engine as well: next to a round of other lengths the time isn't known.
        timed = alike([*lengths.values()], [*following.values()])
        policy.observe(lengths, dict(enumerate(kept)), taken if timed else None)
    return sum(positions) / seconds


def mean_speed(
    make: Callable[[], Policy],
    cost: Cost,
    chances: Sequence[Chance],
    seeds: int = 8,
    tokens: int = 2000,
    growth: float = 0.0,
    noise: float = 0.05,
) -> float:
    """The mean over some seeds."""
    return sum(speed(make, cost, chances, seed, tokens, growth, noise) for seed in range(seeds)) / seeds


def against_fixed(
    make: Callable[[], Policy],
    cost: Cost,
    chances: Sequence[Chance],
    seeds: int = 8,
    tokens: int = 2000,
    growth: float = 0.0,
    noise: float = 0.05,
) -> tuple[float, float, int]:
    """A policy's speed over plain decoding's and over the best fixed length's, and that length."""
    fixed = [
        mean_speed(lambda k=k: FixedLength(k), cost, chances, seeds, tokens, growth, noise)  # type: ignore[misc]
        for k in range(MAX_AUTO_LENGTH + 1)
    ]
    own, best = mean_speed(make, cost, chances, seeds, tokens, growth, noise), max(fixed)
    return own / fixed[0], own / best, fixed.index(best)


def batch_seconds(
    length: int | BatchLength,
    cost: BatchCost,
    chances: Sequence[Chance],
    seed: int,
    limits: Sequence[int],
    ends: Sequence[int] | None = None,
    places: int = 8,
) -> float:
    """Seconds until all rows are done, of which some decode together and the others wait for a place.

    Args:
        length: A fixed draft length, or what chooses it.
        cost: What a round takes.
        chances: One for each row.
        seed: Of the noise and of the drafts' luck.
        limits: Tokens that each row may generate.
        ends: Where each row comes upon a stop token; None for rows that have none.
        places: Most rows that decode together.
    """
    rng, stop = random.Random(seed), frozenset({1} if ends else ())
    waiting = [Row(Request([0], limit, stop_tokens=stop), Stats(), limit) for limit in limits]
    chance = {row.number: it for row, it in zip(waiting, chances, strict=True)}
    end = {row.number: it for row, it in zip(waiting, ends or limits, strict=True)}
    running: list[Row] = []
    seconds, in_flight = 0.0, None
    while running or waiting:
        joining = [waiting.pop(0) for _ in range(min(places - len(running), len(waiting)))]
        running += joining
        if isinstance(length, BatchLength):
            chosen, policy = length.next(running, waiting=bool(waiting))
        else:
            chosen, policy = {row.number: length for row in running}, None
        lengths = {row.number: min(chosen[row.number], row.remaining - 1) for row in running}
        # As in the engine: a round's outcome is known once the next length has been chosen.
        if in_flight:
            kept, drafted, taken, told = in_flight
            for row in running:
                if row.number in kept:
                    _receive(row, kept[row.number], drafted[row.number], end[row.number])
                    if row.done and isinstance(length, BatchLength):
                        length.done(row)
            running = [row for row in running if not row.done]
            if told:
                alive = {row.number: kept[row.number] for row in running if row.number in kept}
                timed = alike([*drafted.values()], [*lengths.values()]) and not joining
                told.observe(drafted, alive, taken if timed else None)
            in_flight = None
        if running:
            lengths = {row.number: lengths[row.number] for row in running}
            kept = {row.number: _kept(chance[row.number], len(row.tokens), lengths[row.number], rng) for row in running}
            verified = sum(lengths.values()) + len(running)
            taken = cost(len(running), max(lengths.values()), verified) * max(0.5, 1 + 0.05 * rng.gauss(0, 1))
            seconds += taken
            in_flight = kept, lengths, taken, policy
    return seconds


def batch_against_fixed(
    cost: BatchCost, chances: Sequence[float], kind: str, tokens: int = 300, seeds: int = 4
) -> tuple[float, float, int]:
    """Automatic lengths' speed over plain decoding's and over the best fixed length's, and that length.

    Args:
        cost: What a round takes.
        chances: By row, that a draft is kept.
        kind: "limits": all rows end at their limit. "stops": each comes upon a stop token somewhere. "queue": the same,
            with four times as many rows as places.
        tokens: A row, in the mean if it ends by itself.
        seeds: Runs of which this is the mean; two more before them, in which automatic lengths learn what rounds cost.
    """
    rows = [lambda position, j, it=it: it for it in chances] * (4 if kind == "queue" else 1)

    def seconds(length: int | BatchLength, seeds: Sequence[int]) -> float:
        total = 0.0
        for seed in seeds:
            rng = random.Random(f"ends {seed}")
            ends = None if kind == "limits" else [max(2, int(rng.expovariate(1 / tokens))) for _ in rows]
            limits = [tokens if kind == "limits" else 2 * tokens] * len(rows)
            total += batch_seconds(length, cost, rows, seed, limits, ends, len(chances))
        return total

    fixed = [seconds(k, range(seeds)) for k in range(MAX_AUTO_LENGTH + 1)]
    auto = BatchLength()
    seconds(auto, range(seeds, seeds + 2))
    own, best = seconds(auto, range(seeds)), min(fixed)
    return fixed[0] / own, best / own, fixed.index(best)


def texts_against_fixed(
    cost: BatchCost, kind: str, rows: int, tokens: int = 2000, seeds: int = 4
) -> tuple[float, float, int]:
    """The same for rows whose texts are of a kind of `texts`, each with automatic lengths that know nothing of costs.

    Args:
        cost: What a round takes.
        kind: See `texts`.
        rows: Of the batch.
        tokens: A row; in a queue a fourth of it, more or less.
        seeds: Runs of which this is the mean.
    """
    chances = texts(kind, rows)

    def seconds(make: Callable[[], int | BatchLength]) -> float:
        total = 0.0
        for seed in range(seeds):
            rng = random.Random(seed)
            limits = [rng.randint(tokens // 8, 3 * tokens // 8) if kind == "queue" else tokens for _ in chances]
            total += batch_seconds(make(), cost, chances, seed, limits, places=rows)
        return total

    fixed = [seconds(lambda k=k: k) for k in range(MAX_AUTO_LENGTH + 1)]  # type: ignore[misc]
    own, best = seconds(BatchLength), min(fixed)
    return fixed[0] / own, best / own, fixed.index(best)


def _kept(chance: Chance, position: int, drafted: int, rng: random.Random) -> int:
    return next((j for j in range(drafted) if rng.random() >= chance(position, j)), drafted)


def _receive(row: Row, kept: int, drafted: int, end: int) -> None:
    """A row's share of a round, with a stop token where its text ends."""
    row.receive([int(len(row.tokens) + i + 1 == end) for i in range(kept + 1)], kept, drafted)
