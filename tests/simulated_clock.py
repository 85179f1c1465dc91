"""Draft length policies on a simulated clock: rounds take what a published cost curve says, not what this machine does.

The curves and texts are in simulated_cases.py.

A helper for tests and scripts, which import it by path.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from simulated_cases import BatchCost, Chance, Cost, texts

from mlx_mtp.decode.batch_length import BatchLength
from mlx_mtp.decode.draft_length import alike
from mlx_mtp.decode.limits import MAX_AUTO_LENGTH
from mlx_mtp.decode.request import Request, Row, Stats


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
