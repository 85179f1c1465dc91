"""Compares automatic draft length with plain decoding and with the best fixed length, as ratios within one run.

    wrong      the drafter is always wrong
    right      the drafter is always right
    switching  right for 200 tokens, wrong for the next 200; the rows of a batch switch at different times
    mixed      right for 7 tokens of 10 at random, different ones in each row, so that rows advance at different speeds
    different  rows of the kinds above, so that some finish long before others
    queue      texts of these kinds, four per place and about a quarter as long; a finished one makes room for the next

Runs on this machine with the embedded pair, one of medium size (`--pair MoE`, see medium_pair.py), or a published
size with random weights (`--pair 26B-A4B`, in `--bits` 4 or 8, by default bfloat16). The drafter does all its work, but
its proposals are replaced by right or wrong tokens: so its cost is real and its acceptance is scripted. Every variant
has a scheduler of its own, which knows no costs at the start.

simulate_draft_length.py does the same on a simulated clock, for many costs of rounds.

    python scripts/bench_never_slower.py [--tokens 2000] [--repeats 1] [--text wrong] [--pair 26B-A4B --bits 4] [--json]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from mlx_mtp.system.blas import use_openblas

BLAS = use_openblas()  # before MLX is imported

import mlx.core as mx
import typer

import mlx_mtp
from mlx_mtp.decode.request import Request, Row
from mlx_mtp.decode.scheduler import Scheduler
from mlx_mtp.kv import KVBuffers
from mlx_mtp.measuring.machine import machine_line
from mlx_mtp.measuring.spread import Spread
from mlx_mtp.models.drafter import Drafter, SharedKV
from mlx_mtp.models.ragged import RaggedBlock
from mlx_mtp.models.target import Target
from mlx_mtp.simulate.known_models import KNOWN_MODELS
from scripts.medium_pair import make_medium_pair
from scripts.random_weights import random_pair

FIXED = (2, 4, 7)
BATCHES = (1, 2, 4, 8)
KINDS = ("wrong", "right", "switching", "mixed", "different", "queue")
QUEUED = 4
"""Texts per place of the queue."""
PAIRS = {"dense": "31b", "MoE": "26b"}
"""Architectures of the pairs of medium size, by name."""
AHEAD = 9
"""Difference in tokens between the prompts of neighbouring rows. Prompts of real use differ in length; rows in step, as
equal prompts give without a drafter, would be faster."""
SLICE = 50
"""Tokens of a row in one turn of a variant."""


class Oracle:
    """A drafter that does the work of a real one, and then proposes the tokens of a script.

    Attributes:
        rows: The rows that it drafts for and those that wait, in the order of their scripts.
    """

    def __init__(self, drafter: Drafter, scripts: Sequence[Sequence[int]]) -> None:
        """Takes a script for each row: token ids by absolute position, including the prompt."""
        self.rows: list[Row] = []
        self._drafter, self._scripts = drafter, mx.array([list(script) for script in scripts], dtype=mx.int32)
        self._step, self._lengths, self._running = 0, self._scripts, self._scripts

    def shared_kv(self, kv: KVBuffers, lengths: mx.array) -> SharedKV:
        """Starts a round."""
        self._step, self._lengths = 0, lengths
        running = [i for i, row in enumerate(self.rows) if not row.done][: lengths.size]
        self._running = self._scripts[mx.array(running)]
        return self._drafter.shared_kv(kv, lengths)

    def __call__(self, embedded: mx.array, hidden: mx.array, lent: SharedKV) -> tuple[mx.array, mx.array, mx.array]:
        """Proposes the script's token as the only candidate, after computing the drafter's scores."""
        self._step += 1
        logits, _, hidden = self._drafter(embedded, hidden, lent)
        at = (self._lengths + self._step)[:, None] % self._scripts.shape[1]
        token = mx.take_along_axis(self._running, at, axis=1)
        (token,) = mx.depends([token], [logits.max()])
        return mx.zeros(token.shape), token, hidden


class Told(Target):
    """A target that does all its work, and then chooses a token that depends only on the token before, see `after`.

    The choice of a random target would depend on the last bits of its scores. The token is passed to the head in the
    first entries of the hidden state, in digits that every dtype represents exactly.
    """

    _BASE, _DIGITS = 64, 3

    def __call__(
        self, tokens: mx.array, lengths: mx.array, kv: KVBuffers, packing: RaggedBlock | None = None
    ) -> mx.array:
        """As `Target.__call__`, with the digits of the tokens in the hidden states."""
        hidden = super().__call__(tokens, lengths, kv, packing)
        digits = mx.stack([tokens // self._BASE**i % self._BASE for i in range(self._DIGITS)], axis=-1)
        return mx.concatenate([digits.astype(hidden.dtype), hidden[..., self._DIGITS :]], axis=-1)

    def raw_logits(self, hidden: mx.array) -> mx.array:
        """As `Target.raw_logits`, except that the chosen token is the best."""
        digits = hidden[..., : self._DIGITS].astype(mx.int32)
        token = (digits * mx.array([self._BASE**i for i in range(self._DIGITS)])).sum(axis=-1, keepdims=True)
        logits = super().raw_logits(hidden)
        return mx.put_along_axis(logits, self.after(token), mx.array(1e4, logits.dtype), axis=-1)

    def after(self, token: Any) -> Any:
        """The token that follows each of the given tokens."""
        return (5 * token + 1) % self.config.vocab_size


def scripts(kind: str, text: Sequence[int], start: int, vocab: int, rows: int) -> list[list[int]]:
    """The drafter's proposals by row, made from the target's text; positions before `start` belong to the prompt."""
    rng = Random(0)
    good = {
        "right": lambda row, i: True,
        "wrong": lambda row, i: False,
        "mixed": lambda row, i: rng.random() < 0.7,
        "switching": lambda row, i: (i - start + (400 * row // rows if kind == "switching" else 0)) // 200 % 2 == 0,
    }
    kinds = [kind]
    if kind in ("different", "queue"):
        kinds = [*good]
    if kind == "queue":
        rows *= QUEUED
        kinds = kinds * (rows // len(kinds))
        Random(1).shuffle(kinds)
    return [
        [token if good[kinds[row % len(kinds)]](row, i) else (token + 1) % vocab for i, token in enumerate(text)]
        for row in range(rows)
    ]


def race(
    target: Target,
    drafter: Drafter,
    scripts: Sequence[Sequence[int]],
    prompts: Sequence[list[int]],
    tokens: Sequence[int],
    places: int,
) -> dict[int | str, float]:
    """Tokens per second after the first token, by draft length, for one row per script.

    Each row has its prompt and number of tokens. Some rows decode together, and the others wait for a place.

    The variants take turns, a slice of the text each, so that a disturbance of the machine affects all of them.
    """
    total, runs = sum(tokens), dict[int | str, tuple[Scheduler, list[Row]]]()
    for length in (0, *FIXED, "auto"):
        oracle = Oracle(drafter, scripts)
        scheduler: Scheduler = Scheduler(target, oracle, max_rows=places)  # type: ignore[arg-type]
        requests = [Request(*each, draft_length=length) for each in zip(prompts, tokens, strict=True)]
        oracle.rows = rows = [scheduler.submit(request) for request in requests]
        while not all(row.tokens for row in rows[:places]):
            scheduler.step()
        runs[length] = scheduler, rows
    mx.synchronize()
    had = {length: sum(len(row.tokens) for row in rows) for length, (_, rows) in runs.items()}
    seconds: dict[int | str, float] = dict.fromkeys(runs, 0.0)
    rng, order = Random(0), [*runs]
    for end in range(SLICE * places, total + SLICE * places, SLICE * places):
        rng.shuffle(order)  # no variant always follows the same other one
        for length in order:
            scheduler, rows = runs[length]
            begun = time.perf_counter()
            while sum(len(row.tokens) for row in rows) < min(end, total):
                scheduler.step()
            mx.synchronize()
            seconds[length] += time.perf_counter() - begun
    return {length: (total - had[length]) / seconds[length] for length in runs}


def pair_and_text(
    stack: ExitStack, pair: str, bits: int | None, tokens: int
) -> tuple[Target, Drafter, list[int], list[int]]:
    """Target, drafter, a prompt, and the target's text: the prompt and the given number of tokens after it."""
    if pair in KNOWN_MODELS:
        target, drafter = random_pair(pair, bits, Told)
        text = [*accumulate(range(1, 40 + tokens), lambda token, _: target.after(token), initial=7)]
        return target, drafter, text[:40], text
    folders = []
    if pair in PAIRS:
        folders = [*make_medium_pair(PAIRS[pair], Path(stack.enter_context(TemporaryDirectory())))]
    lm = stack.enter_context(mlx_mtp.load(*folders, dtype="float32", profile=None))
    target, drafter = stack.enter_context(lm.models())
    prompt = [*range(40)] if folders else lm.encode("Tell me a short story about a fox.")
    plain = Scheduler(target, None).stream(Request(prompt, tokens, draft_length=0))
    return target, drafter, prompt, prompt + [token for new in plain for token in new]


def measured(
    pair: str, bits: int | None, tokens: int, repeats: int, kinds: Sequence[str], batches: Sequence[int]
) -> dict[str, dict[str, list[float]]]:
    """Ratios by text and batch: automatic over plain, and over the best fixed length."""
    results: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        longest = tokens + AHEAD * QUEUED * max(BATCHES)
        target, own, prompt, text = pair_and_text(stack, pair, bits, longest)
        cases = [(name, rows) for name in KINDS[:3] for rows in batches if rows == 1]
        cases += [(name, rows) for name in KINDS if name != "right" for rows in batches if rows > 1]
        for name, rows in [case for case in cases if case[0] in kinds]:
            told = scripts(name, text, len(prompt), target.config.vocab_size, rows)
            label = f"{name}, {rows} rows" if rows > 1 else name
            found = results.setdefault(label, {"auto / plain": [], "auto / best fixed": []})
            prompts = [text[: len(prompt) + AHEAD * row] for row in range(len(told))]
            for _ in range(repeats):
                # In a queue all lengths differ, so that rows don't begin and end together.
                few, rng = tokens // QUEUED, Random(0)
                each = [rng.randint(few // 2, 3 * few // 2) if name == "queue" else tokens for _ in told]
                speeds = race(target, own, told, prompts, each, rows)
                found["auto / plain"].append(speeds["auto"] / speeds[0])
                found["auto / best fixed"].append(speeds["auto"] / max(speeds[k] for k in (0, *FIXED)))
                # Progress: all cases together take more than an hour.
                so_far = ", ".join(f"{facts} {ratios[-1]:.3f}" for facts, ratios in found.items())
                print(f"{label}: {so_far}", file=sys.stderr)
    return results


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of a text.", min=400)] = 2000,
    repeats: Annotated[int, typer.Option(help="Repetitions of every variant.", min=1)] = 1,
    text: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(KINDS)}. Default: all.")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Some of 1, 2, 4, 8. Default: all.")] = None,
    pair: Annotated[str, typer.Option(help=f"embedded, {', '.join(PAIRS)}, {' or '.join(KNOWN_MODELS)}.")] = "embedded",
    bits: Annotated[int | None, typer.Option(help="Bits of a published size. Default: bfloat16.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Runs the benchmark and prints its table."""
    if unknown := set(text or ()) - set(KINDS):
        raise typer.BadParameter(f"unknown text {', '.join(unknown)}: expected some of {', '.join(KINDS)}")
    if not set(rows or ()) <= set(BATCHES):
        raise typer.BadParameter("expected some of 1, 2, 4, 8", param_hint="--rows")
    if pair not in (known := ("embedded", *PAIRS, *KNOWN_MODELS)):
        raise typer.BadParameter(f"expected one of {', '.join(known)}", param_hint="--pair")
    if bits and pair not in KNOWN_MODELS:
        raise typer.BadParameter("only a published size has weights in bits", param_hint="--bits")
    machine = measured(pair, bits, tokens, repeats, text or KINDS, rows or BATCHES)
    if as_json:
        print(json.dumps({"mlx": mx.__version__, "blas": BLAS, "measured": machine}))
        return
    kind = ("bfloat16" if bits is None else f"{bits} bits") if pair in KNOWN_MODELS else "float32"
    print(
        f"{machine_line()}, BLAS {BLAS}\n"
        f"{pair} pair, {kind}, {tokens} tokens, greedy, {repeats} repetitions; median (lowest to highest)"
    )
    print(f"  {'':20}{'auto / plain':24}auto / best of 0, {', '.join(map(str, FIXED))}")
    for label, found in machine.items():
        cells = (Spread.of(ratios).text() for ratios in found.values())
        print(f"  {label:20}" + "    ".join(f"{cell:20}" for cell in cells))


if __name__ == "__main__":
    typer.run(main)
