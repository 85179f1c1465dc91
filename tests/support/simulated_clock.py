"""Draft length policies on a simulated clock: rounds take what a published cost curve says, not what this machine does.

The curves and texts are in simulated_cases.py. A helper for tests and scripts, which import it by path.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

from mlx_mtp.decode.draft_length import Decision
from mlx_mtp.decode.in_flight import same_cost
from mlx_mtp.decode.limits import MAX_AUTO_LENGTH
from mlx_mtp.decode.request import Request, Row, Stats
from tests.support.simulated_cases import (
    BATCH_COSTS,
    COSTS,
    ENDS,
    HELD_OUT,
    KINDS,
    ROWS,
    TEXTS,
    BatchCost,
    Chance,
    measured_costs,
    mixed_rows,
    texts,
)


class Policy(Protocol):
    """What chooses draft lengths, see `mlx_mtp.decode.draft_length.DraftLengthPolicy`."""

    def next(self, rows: Sequence[Row], waiting: bool = False) -> Decision:
        """What the next round drafts."""

    def observe(self, decision: Decision, accepted: Sequence[int | None], seconds: float | None) -> None:
        """Learns of a finished round."""


class FixedLength:
    """Always the same length."""

    def __init__(self, length: int):
        self._length = length

    def next(self, rows: Sequence[Row], waiting: bool = False) -> Decision:
        """The length, or what is left."""
        return Decision(rows, [max(0, min(self._length, row.remaining - 1)) for row in rows])

    def observe(self, decision: Decision, accepted: Sequence[int | None], seconds: float | None) -> None:
        """Doesn't matter."""


@dataclass(frozen=True)
class Case:
    """Rows to decode.

    Attributes:
        name: For people.
        cost: Seconds of a round.
        chances: By row, in the order in which they are submitted.
        tokens: A row's, or, where rows end anywhere, their mean; a queue's texts have a fourth, more or less.
        ends: "total": it is over once the rows have so many tokens in the mean, and until then others wait. "limits":
            all rows end at their limit. "stops": each comes upon a stop token somewhere. "queue": the same, and more
            rows than places. "lengths": as "queue", but for limits of different lengths in place of stop tokens.
        places: Most rows that decode together.
        held_out: Whether no constant may be tuned on it.
        warm: Runs before those that count, in which the policy learns what rounds take.
        growth: What all rounds gain in price over 1,000 tokens of context, as a share of it.
        noise: Standard deviation of a round's price, as a share of it.
        pauses: Chance that a round takes five times as long.
    """

    name: str
    cost: BatchCost
    chances: Sequence[Chance]
    tokens: int
    ends: str
    places: int
    held_out: bool = False
    warm: int = 0
    growth: float = 0.0
    noise: float = 0.05
    pauses: float = 0.0


def run(policy: Policy, case: Case, seed: int) -> tuple[int, float]:
    """Tokens, and the seconds they took; one seed gives every policy the same texts, limits and noise of rounds."""
    rng, lengths_rng = random.Random(seed), random.Random(f"ends {seed}")
    stops = case.ends in ("stops", "queue")
    waiting, chance, end = list[Row](), dict[int, Chance](), dict[int, int]()
    for it in case.chances:
        limit = {"stops": 2 * case.tokens, "queue": 2 * case.tokens, "total": 10**6}.get(case.ends, case.tokens)
        if case.ends == "lengths":
            limit = lengths_rng.randint(case.tokens // 8, 3 * case.tokens // 8)
        row = Row(Request([0], limit, stop_tokens=frozenset({1} if stops else ())), Stats(), limit)
        chance[row.number] = it
        end[row.number] = max(2, int(lengths_rng.expovariate(1 / case.tokens))) if stops else limit
        waiting.append(row)
    running, tokens, seconds = list[Row](), 0, 0.0
    flight: tuple[Decision, list[int], float] | None = None
    total = case.tokens * len(case.chances) if case.ends == "total" else None
    while (running or waiting) and (total is None or tokens < total):
        joining = [waiting.pop(0) for _ in range(min(case.places - len(running), len(waiting)))]
        running = running + joining
        decision = policy.next(running, bool(waiting) or total is not None)
        # As in the engine: a round's outcome is known once the next one has been built.
        if flight:
            before, kept, taken = flight
            counts = list[int | None]()
            for row, count in zip(before.rows, kept, strict=True):
                counts.append(None if row.done else count)
                if not row.done:
                    new = min(count + 1, row.remaining, end[row.number] - len(row.tokens))
                    tokens += new
                    row.tokens += [0] * new
                    row.done = len(row.tokens) == end[row.number] or not row.remaining
                    if row.done and stops and len(row.tokens) == end[row.number]:
                        row.tokens[-1] = 1
            # As in the engine as well: next to a round of other lengths the time isn't known.
            timed = same_cost(before.lengths, decision.lengths) and not joining
            policy.observe(before, counts, taken if timed else None)
        flight = None
        if any(row.done for row in running):
            # The round built ahead has rows that have ended: these are dropped, and the rest of it counts.
            running = [row for row in running if not row.done]
            if not running:
                continue
        alive = [row for row in decision.rows if not row.done]
        kept = [0 if row.done else _kept(chance[row.number], len(row.tokens), n, rng) for row, n in _pairs(decision)]
        drafts = [n for row, n in _pairs(decision) if not row.done]
        taken = case.cost(len(alive), max(drafts), sum(drafts) + len(alive))
        taken *= max(0.5, 1 + case.noise * rng.gauss(0, 1)) * (5 if rng.random() < case.pauses else 1)
        taken *= 1 + case.growth * sum(len(row.tokens) for row in alive) / len(alive) / 1000
        seconds += taken
        flight = decision, kept, taken
    return tokens, seconds


def _pairs(decision: Decision) -> Iterator[tuple[Row, int]]:
    return zip(decision.rows, decision.lengths, strict=True)


def _kept(chance: Chance, position: int, drafted: int, rng: random.Random) -> int:
    return next((j for j in range(drafted) if rng.random() >= chance(position, j)), drafted)


def speed(make: Callable[[], Policy], case: Case, seeds: int) -> float:
    """Tokens per second over some runs: one policy for all of them if it warms up, else each has its own."""
    policy, tokens, seconds = make(), 0, 0.0
    for seed in range(seeds, seeds + case.warm):
        run(policy, case, seed)
    for seed in range(seeds):
        some, taken = run(policy if case.warm else make(), case, seed)
        tokens, seconds = tokens + some, seconds + taken
    return tokens / seconds


def fixed_speeds(case: Case, seeds: int = 4) -> list[float]:
    """Tokens per second by fixed draft length."""
    return [speed(lambda k=k: FixedLength(k), case, seeds) for k in range(MAX_AUTO_LENGTH + 1)]  # type: ignore[misc]


def against_fixed(make: Callable[[], Policy], case: Case, seeds: int = 4) -> tuple[float, float, int]:
    """A policy's speed over plain decoding's and over the best fixed length's, and that length."""
    own, fixed = speed(make, case, seeds), fixed_speeds(case, seeds)
    return own / fixed[0], own / max(fixed), fixed.index(max(fixed))


def one_row(cost: str, text: str, **options: float) -> Case:
    """A text of 2,000 tokens alone."""
    held = cost in HELD_OUT["costs"] or text in HELD_OUT["texts"]
    pauses = options.get("noise", 0.05) / 5
    return Case(f"{cost}: {text}", COSTS[cost], [TEXTS[text]], 2000, "total", 1, held, pauses=pauses, **options)


def cases() -> Iterator[Case]:
    """All cells of the benchmark."""
    for cost, text in product(COSTS, TEXTS):
        yield one_row(cost, text)
    seen = [text for text in TEXTS if text not in HELD_OUT["texts"]]
    for cost, rows in product(COSTS, (2, 4, 8)):
        held = cost in HELD_OUT["costs"]
        chances = mixed_rows([*TEXTS] if held else seen, rows)
        yield Case(f"{cost}: mixed, {rows} rows", COSTS[cost], chances, 1000, "total", rows, held, pauses=0.01)
    for cost, rows_name, ends in product(BATCH_COSTS, ROWS, ENDS):
        held = cost in HELD_OUT["batch_costs"] or rows_name in HELD_OUT["rows"]
        chances = [lambda position, j, it=it: it for it in ROWS[rows_name]] * (4 if ends == "queue" else 1)
        yield Case(f"{cost}: {rows_name}, {ends}", BATCH_COSTS[cost], chances, 300, ends, 8, held, warm=2)
    prices = measured_costs()
    for model, kind, rows in product(prices, KINDS, (2, 4, 8)):
        held = model in HELD_OUT["models"] or kind in HELD_OUT["kinds"]
        ends = "lengths" if kind == "queue" else "limits"
        yield Case(f"{model}: {kind}, {rows} rows", prices[model], texts(kind, rows), 2000, ends, rows, held)


def by_hand(
    policy: Policy, rows: Sequence[Row], kept: Callable[[int, int], int], cost: BatchCost, waiting: bool = True
) -> Decision:
    """A round without noise, whose outcome is known at once.

    Args:
        policy: Chooses the lengths.
        rows: The batch.
        kept: Drafts kept, by place of the row and draft length.
        cost: What it takes.
        waiting: As for `Policy.next`.
    """
    decision = policy.next(rows, waiting)
    lengths = decision.lengths
    counts = [kept(i, length) for i, length in enumerate(lengths)]
    policy.observe(decision, counts, cost(len(rows), max(lengths), len(rows) + sum(lengths)))
    return decision
